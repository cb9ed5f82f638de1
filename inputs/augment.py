"""What makes a training picture differ each time it is seen. Every draw is a function of a seed that is passed in.

Crops and flips are drawn for each picture with TensorFlow's stateless operations. What works on a whole batch are
Keras' own layers, which draw from a `SeedGenerator`; ours hands them seeds derived from the one passed in.
"""
import keras
import tensorflow as tf


def random_crop(encoded, seed, area):
    """The window of a random resized crop (Szegedy et al. 2015): a share of the picture in `area`, aspect 3/4 to 4/3.

    Args:
        encoded: a JPEG, PNG, GIF or BMP file, string []. Of a JPEG only the window is decoded.
        seed: int64 [2].
        area: (low, high) shares of the picture.

    Returns: uint8 [height, width, 3] of any size.
    """
    def window(shape):
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            shape, tf.constant([[[0.0, 0.0, 1.0, 1.0]]]), seed=seed, min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3), area_range=area, max_attempts=10)
        return begin[:2], extent[:2]

    def crop_jpeg():
        return tf.image.decode_and_crop_jpeg(encoded, tf.concat(window(tf.io.extract_jpeg_shape(encoded)), axis=0), channels=3)

    def crop_decoded():
        image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
        (top, left), (height, width) = map(tf.unstack, window(tf.shape(image)))
        return image[top:top + height, left:left + width]

    return tf.ensure_shape(tf.cond(tf.io.is_jpeg(encoded), crop_jpeg, crop_decoded), [None, None, 3])


def random_flip(image, seed):
    """Mirrors a picture [height, width, 3] left-right with probability 1/2."""
    return tf.image.stateless_random_flip_left_right(image, seed)


def rand_augment(settings):
    """Keras' RandAugment (Cubuk et al. 2019) for one picture, applied with probability `settings.rate`.

    Returns: a function of an image float32 [size, size, 3] in 0..255 and a seed int64 [2]; None when it is off.
    """
    if not settings.num_ops:
        return None
    layer = keras.layers.RandAugment((0, 255), num_ops=settings.num_ops, factor=settings.factor, dtype='float32')
    seeds = _derive_seeds([layer])

    def apply(image, seed):
        seeds.start(seed)
        chosen = tf.random.stateless_uniform([], tf.random.experimental.stateless_fold_in(seed, 0)) < settings.rate
        return tf.cond(chosen, lambda: layer(image[None], training=True)[0], lambda: image)

    return apply


def batch_augmentation(augment, num_classes):
    """The Keras layers that `config.augment` asks for, as one function.

    Returns: a function of images float32 [batch, size, size, 3] in 0..255, labels int64 [batch] and a seed int64 [2],
        that returns images of the same kind and labels, float32 [batch, num_classes] where mixing made them soft; or
        None when nothing is asked for.
    """
    layers, mixers = _image_layers(augment), _mixers(augment)
    if not layers and not mixers:
        return None
    seeds = _derive_seeds(layers + mixers)

    def apply(images, labels, seed):
        seeds.start(seed)
        for layer in layers:
            images = layer(images, training=True)
        if mixers:
            labels = tf.one_hot(labels, num_classes)
            choice = tf.random.stateless_uniform([], tf.random.experimental.stateless_fold_in(seed, 0), maxval=len(mixers), dtype=tf.int32)
            mixed = [mixer({'images': images, 'labels': labels}, training=True) for mixer in mixers]
            images = tf.switch_case(choice, [lambda m=m: m['images'] for m in mixed])
            labels = tf.switch_case(choice, [lambda m=m: m['labels'] for m in mixed])
        return images, labels

    return apply


def _image_layers(augment):
    black = dict(fill_mode='constant', fill_value=0.0, dtype='float32')  # whatever type the model computes in
    layers = []
    if augment.translate:
        layers.append(keras.layers.RandomTranslation(augment.translate, augment.translate, **black))
    if augment.rotate:
        layers.append(keras.layers.RandomRotation(augment.rotate, **black))
    if augment.zoom:
        layers.append(keras.layers.RandomZoom((-augment.zoom, augment.zoom), (-augment.zoom, augment.zoom), **black))
    if augment.random_erasing:
        probability = (augment.random_erasing, augment.random_erasing)  # one number would mean: drawn from 0 to it
        layers.append(keras.layers.RandomErasing(factor=probability, value_range=(0, 255), dtype='float32'))
    return layers


def _mixers(augment):
    mixup = [keras.layers.MixUp(augment.mixup, dtype='float32')] if augment.mixup else []
    cutmix = [keras.layers.CutMix((augment.cutmix, augment.cutmix), dtype='float32')] if augment.cutmix else []  # as above
    return mixup + cutmix


def _derive_seeds(layers):
    seeds = _DerivedSeeds()
    for layer in layers:
        for part in layer._flatten_layers():
            if hasattr(part, 'generator'):
                part.generator = seeds
    return seeds


class _DerivedSeeds(keras.random.SeedGenerator):
    """Gives Keras layers the seeds fold_in(seed, 1), fold_in(seed, 2), ... of one seed, and keeps no state."""

    def start(self, seed):
        self._seed, self._drawn = seed, 0

    def next(self, ordered=True):
        self._drawn += 1
        return tf.random.experimental.stateless_fold_in(self._seed, self._drawn)
