"""From encoded examples to batches on the devices, for training and for evaluation.

Training examples form one endless stream: epoch 0 shuffled, epoch 1 shuffled otherwise, and so on, cut into batches
without regard to the ends of epochs, so every example is seen exactly once per epoch. The position in the stream is
`step * batch_size`, which is all that a resumed run needs, and what every random draw is derived from.
"""
import tensorflow as tf

from inputs import augment

AUTOTUNE = tf.data.AUTOTUNE


def training_batches(source, config, plan, start_step, strategy):
    """The batches from update `start_step` to the last.

    Returns: a distributed dataset of (images, labels) per replica: uint8 [batch, size, size, 3], and int64 [batch] or,
        where mixup or cutmix is on, float32 [batch, num_classes].
    """
    crop_or_resize = _training_picture(config)
    augment_batch = augment.batch_augmentation(config.augment, plan.num_classes)

    def picture(position, encoded, label):
        return position, crop_or_resize(encoded, _seed(config.seed, position)), label

    def finish(positions, images, labels):
        if augment_batch:
            images, labels = augment_batch(tf.cast(images, tf.float32), labels, _seed(config.seed, positions[0]))
            images = _to_uint8(images)
        return images, labels

    def on_host(context):
        stream = _stream(source, config, plan, start_step)
        stream = _share_of_host(stream, plan.batch_size, context)
        stream = stream.map(picture, AUTOTUNE)
        batches = stream.batch(plan.batch_size // plan.num_replicas, drop_remainder=True, num_parallel_calls=AUTOTUNE)
        return batches.map(finish, AUTOTUNE).prefetch(AUTOTUNE).with_options(_options())

    return strategy.distribute_datasets_from_function(on_host)


def evaluation_batches(source, config, plan, strategy):
    """Every example of the evaluation split exactly once, then padding to whole batches.

    Returns: a distributed dataset of (images, labels, mask) per replica: uint8 [batch, size, size, 3], int64 [batch],
        float32 [batch] with 1 for an example and 0 for padding; and the number of steps.
    """
    steps = -(-plan.eval_examples // plan.eval_batch_size)
    size = config.image_size

    def picture(position, encoded, label):
        return resize_picture(decode(encoded), size, config.eval_crop), label, tf.constant(1.0)

    def on_host(context):
        stream = source.examples(source.eval_split).enumerate().map(lambda position, example: (position, *example))
        padding = tf.data.Dataset.from_tensors((tf.zeros([size, size, 3], tf.uint8), tf.zeros([], tf.int64), tf.zeros([])))
        stream = stream.map(picture, AUTOTUNE).concatenate(padding.repeat(steps * plan.eval_batch_size - plan.eval_examples))
        stream = stream.enumerate().map(lambda position, example: (position, *example))
        stream = _share_of_host(stream, plan.eval_batch_size, context).map(lambda position, *example: example)
        batches = stream.batch(plan.eval_batch_size // plan.num_replicas, drop_remainder=True)
        return batches.prefetch(AUTOTUNE).with_options(_options())

    return strategy.distribute_datasets_from_function(on_host), steps


def decode(encoded):
    """A JPEG, PNG, GIF (first frame) or BMP file, string [], to uint8 [height, width, 3]."""
    return tf.ensure_shape(tf.io.decode_image(encoded, channels=3, expand_animations=False), [None, None, 3])


def resize_picture(images, size, central_share=1.0):
    """The central square of pictures, resized: what evaluation and the exported model see.

    Args:
        images: uint8 or float in 0..255, [..., height, width, 3].
        size: pixels of the result.
        central_share: side of the square as share of the shorter side.

    Returns: uint8 [..., size, size, 3].
    """
    height, width = tf.unstack(tf.shape(images)[-3:-1])
    side = tf.maximum(1, tf.cast(tf.round(central_share * tf.cast(tf.minimum(height, width), tf.float32)), tf.int32))
    top, left = (height - side) // 2, (width - side) // 2
    square = images[..., top:top + side, left:left + side, :]
    return _to_uint8(tf.image.resize(square, (size, size), antialias=True))


def _training_picture(config):
    """A function from an encoded picture and a seed to uint8 [size, size, 3]."""
    size, rand_augment = config.image_size, augment.rand_augment(config.augment.rand_augment)

    def picture(encoded, seed):
        crop_seed, flip_seed, rand_augment_seed = tf.unstack(tf.random.split(seed, 3))
        if config.augment.crop == 'random':
            window = augment.random_crop(encoded, crop_seed, config.augment.crop_area)
            image = _to_uint8(tf.image.resize(window, (size, size), antialias=True))
        else:
            image = resize_picture(decode(encoded), size, config.eval_crop)
        if config.augment.flip:
            image = augment.random_flip(image, flip_seed)
        if rand_augment:
            image = _to_uint8(rand_augment(tf.cast(image, tf.float32), rand_augment_seed))
        return tf.ensure_shape(image, [size, size, 3])

    return picture


def _stream(source, config, plan, start_step):
    """(position, encoded, label) from position `start_step * batch_size` to the end of the run."""
    examples = source.examples(source.train_split)
    first_epoch, consumed = divmod(start_step * plan.batch_size, plan.train_examples)
    num_epochs = -(-plan.total_steps * plan.batch_size // plan.train_examples)

    def epoch(index):
        shuffled = examples.shuffle(config.dataset.shuffle_buffer, seed=_seed(config.seed, index)[1], reshuffle_each_iteration=False)
        skipped = tf.where(index == first_epoch, tf.constant(consumed, tf.int64), tf.constant(0, tf.int64))
        return shuffled.skip(skipped)

    stream = tf.data.Dataset.range(first_epoch, num_epochs).flat_map(epoch)
    stream = stream.take((plan.total_steps - start_step) * plan.batch_size)
    return stream.enumerate(start_step * plan.batch_size).map(lambda position, example: (position, *example))


def _share_of_host(stream, batch_size, context):
    """Of every global batch the rows that this host feeds to its replicas; `position` comes first in an element."""
    rows = batch_size // context.num_input_pipelines
    if context.num_input_pipelines == 1:
        return stream
    return stream.filter(lambda position, *_: position % batch_size // rows == context.input_pipeline_id)


def _seed(seed, number):
    """int64 [2], a mix of both arguments, so that neighbouring seeds and positions have nothing in common."""
    pair = tf.stack([tf.cast(seed, tf.int64), tf.cast(number, tf.int64)])
    return tf.random.stateless_uniform([2], pair, minval=None, maxval=None, dtype=tf.int64)


def _to_uint8(images):
    return images if images.dtype == tf.uint8 else tf.cast(tf.round(tf.clip_by_value(images, 0, 255)), tf.uint8)


def _options():
    options = tf.data.Options()
    options.deterministic = True  # the same batches whatever the parallelism
    options.autotune.ram_budget = 2 * 1024**3  # bytes for prefetched batches; the shuffle buffer comes on top
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF  # done here
    return options
