"""Augments training images at random.

Operations on single images run on the host, in uint8: the crop (of a JPEG, only the crop is
decoded), rotations and the like, RandAugment and TrivialAugment. Arithmetic on whole batches runs
on the device, inside the compiled step: flips, colours, erasing, mixing. The device draws no random
numbers: they come with the batch, each a function of (seed, epoch, example), so it does not matter
how many replicas share a batch.

Keras' layers are not used: they draw from a state that is the same on every replica and saved in no
checkpoint, so neither the order of the examples nor a resumed run could be reproduced exactly. That
rules out even MixUp, CutMix and RandomFlip, which are as fast as the functions here. Keras'
RandAugment also computes all operations for each image and keeps one (benchmarks/augmentation.py
compares them).
"""

import math
from collections.abc import Callable

import tensorflow as tf
from ml_collections import ConfigDict

from inputs.image_ops import WHITE_LEVEL, center_crop_and_resize, decode, resize, to_uint8

LUMA = (0.299, 0.587, 0.114)  # grey from red, green and blue: ITU-R BT.601
SEEDS_PER_EXAMPLE = 8  # reserved for each example: seed + (0, n) for n < 8
GEOMETRY = ('rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y')
# Amount of each operation at full strength: (RandAugment at magnitude 10, Cubuk et al. 2019;
# TrivialAugment's wide space, Müller and Hutter 2021). Units: degrees, slope, share of the image,
# change of a factor, bits removed, share of the range.
FULL_STRENGTH = {
    'identity': (0.0, 0.0),
    'autocontrast': (0.0, 0.0),
    'equalize': (0.0, 0.0),
    'rotate': (30.0, 135.0),
    'shear_x': (0.3, 0.99),
    'shear_y': (0.3, 0.99),
    'translate_x': (100 / 331, 32 / 224),
    'translate_y': (100 / 331, 32 / 224),
    'color': (0.9, 0.99),
    'contrast': (0.9, 0.99),
    'brightness': (0.9, 0.99),
    'sharpness': (0.9, 0.99),
    'posterize': (4.0, 6.0),
    'solarize': (1.0, 1.0),
}


def make_host_augment(
    settings: ConfigDict, size: int, white_level: int = WHITE_LEVEL
) -> Callable[[tf.Tensor, tf.Tensor, float], tf.Tensor]:
    """Returns the function that does the host's part of `config.augment`.

    It takes an encoded image, string [], a seed, int64 [2], and `central_share`, the side of the
    square that evaluation crops (see `center_crop_and_resize`), and returns the cropped, resized
    and augmented image, uint8 [size, size, 3].
    """
    uses_affine = settings.translate or settings.rotate or settings.zoom

    def prepare(encoded: tf.Tensor, seed: tf.Tensor, central_share: float) -> tf.Tensor:
        if settings.crop == 'random':
            crop = random_crop(encoded, seed, settings.crop_area, size, white_level)
            image = to_uint8(resize(crop, (size, size)))
        else:
            image = center_crop_and_resize(decode(encoded, white_level), size, central_share)
        if uses_affine:
            image = random_affine(image, seed + (0, 1), settings)
        if settings.policy.name:
            image = apply_policy(image, seed + (0, 2), settings.policy)
        return tf.ensure_shape(image, [size, size, 3])

    return prepare


def random_crop(
    encoded: tf.Tensor,
    seed: tf.Tensor,
    area: tuple[float, float],
    size: int,
    white_level: int = WHITE_LEVEL,
) -> tf.Tensor:
    """Cuts out the window of a random resized crop (Szegedy et al. 2015), aspect ratio 3/4 to 4/3.

    Args:
        encoded: a JPEG, PNG, GIF or BMP file, string []. Only the window of a JPEG is decoded.
        seed: int64 [2].
        area: (low, high) shares of the image.
        size: pixels, height and width, to which the crop will be resized.
        white_level: see `image_ops.decode`.

    Returns: uint8 [height, width, 3]: the window at its own size; that of a JPEG is shrunk to 1/2,
        1/4 or 1/8 where both sides stay at least `size`.
    """

    def window(shape: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            shape,
            tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            seed=seed,
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=area,
            max_attempts=10,
        )
        return begin[:2], extent[:2]

    def crop_jpeg() -> tf.Tensor:
        return decode_jpeg_window(encoded, *window(tf.io.extract_jpeg_shape(encoded)), size)

    def crop_decoded() -> tf.Tensor:
        image = decode(encoded, white_level)
        (top, left), (height, width) = map(tf.unstack, window(tf.shape(image)))
        return image[top : top + height, left : left + width]

    # Faster in a tf.data map than the equivalent tf.cond.
    kind = tf.cast(tf.io.is_jpeg(encoded), tf.int32)
    return tf.ensure_shape(tf.switch_case(kind, [crop_decoded, crop_jpeg]), [None, None, 3])


def decode_jpeg_window(
    encoded: tf.Tensor, begin: tf.Tensor, extent: tf.Tensor, size: int
) -> tf.Tensor:
    """Decodes a window of a JPEG, shrunk by the largest ratio that leaves no side below `size`.

    At a ratio above 1 the decoder computes the means of blocks of ratio x ratio pixels directly
    from the frequencies, which costs less. The window is rounded to whole blocks, which moves it by
    at most half a pixel of the result; sides of at least `ratio * size` still have at least `size`
    pixels.

    Args:
        encoded: string [].
        begin: (top, left), int32 [2].
        extent: (height, width), int32 [2].
        size: pixels.

    Returns: uint8 [height / ratio, width / ratio, 3].
    """
    ratios = (1, 2, 4, 8)  # what libjpeg offers
    is_large_enough = tf.reduce_min(extent) >= [size * ratio for ratio in ratios[1:]]
    chosen = tf.reduce_sum(tf.cast(is_large_enough, tf.int32))
    ratio = tf.gather(ratios, chosen)
    first = (begin + ratio // 2) // ratio
    last = (begin + extent + ratio // 2) // ratio
    window = tf.concat([first, last - first], axis=0)

    def decode_by(ratio: int) -> Callable[[], tf.Tensor]:
        return lambda: tf.image.decode_and_crop_jpeg(encoded, window, channels=3, ratio=ratio)

    return tf.switch_case(chosen, [decode_by(ratio) for ratio in ratios])


def apply_policy(image: tf.Tensor, seed: tf.Tensor, policy: ConfigDict) -> tf.Tensor:
    """Applies RandAugment or TrivialAugment to an image, uint8 [size, size, 3].

    An image is changed with probability `policy.rate`. `rand_augment` applies `num_ops` operations
    of strength `magnitude` (10 is full strength), `trivial_augment` one of random strength.
    """
    wide = policy.name == 'trivial_augment'
    column = 1 if wide else 0
    num_ops = 1 if wide else policy.num_ops
    names = list(FULL_STRENGTH)
    drawn = tf.random.stateless_uniform([1 + 3 * num_ops], seed)
    chosen = drawn[0] < policy.rate

    def branch(
        name: str, image: tf.Tensor, strength: tf.Tensor | float, sign: tf.Tensor
    ) -> Callable[[], tf.Tensor]:
        return lambda: apply_operation(name, image, FULL_STRENGTH[name][column] * strength, sign)

    for index in range(num_ops):
        kind = tf.cast(drawn[3 * index + 1] * len(names), tf.int32)
        sign = tf.where(drawn[3 * index + 2] < 0.5, 1.0, -1.0)
        strength = drawn[3 * index + 3] if wide else policy.magnitude / 10
        branches = [branch(name, image, strength, sign) for name in names]
        image = tf.switch_case(tf.where(chosen, kind, 0), branches)  # operation 0 is the identity
    return image


def apply_operation(
    name: str, image: tf.Tensor, amount: tf.Tensor | float, sign: tf.Tensor | float
) -> tf.Tensor:
    """Applies one operation of FULL_STRENGTH to an image, uint8 [size, size, 3].

    `sign` is 1.0 or -1.0 where the operation has a direction.
    """
    size = tf.cast(tf.shape(image)[0], tf.float32)
    values = tf.cast(image, tf.float32)
    if name == 'identity':
        return image
    if name in GEOMETRY:
        signed_amount = sign * amount
        turn = signed_amount * math.pi / 180 if name == 'rotate' else 0.0
        return affine(
            image,
            turn=turn,
            shear_x=signed_amount if name == 'shear_x' else 0.0,
            shear_y=signed_amount if name == 'shear_y' else 0.0,
            left=signed_amount * size if name == 'translate_x' else 0.0,
            up=signed_amount * size if name == 'translate_y' else 0.0,
        )
    if name == 'autocontrast':
        low, high = tf.reduce_min(values, (0, 1)), tf.reduce_max(values, (0, 1))  # [3]
        stretched = tf.where(high > low, (values - low) * 255 / tf.maximum(high - low, 1), values)
        return to_uint8(stretched)
    if name == 'equalize':
        return tf.stack([_equalized(channel) for channel in tf.unstack(image, axis=-1)], axis=-1)
    if name == 'posterize':
        step = 2.0 ** tf.floor(tf.convert_to_tensor(amount))
        return to_uint8(tf.floor(values / step) * step)
    if name == 'solarize':
        return tf.where(values >= 256 * (1 - amount), 255 - image, image)
    degenerate = {
        'color': lambda: tf.tensordot(values, LUMA, 1)[..., None],
        'contrast': lambda: tf.reduce_mean(tf.tensordot(values, LUMA, 1)),
        'brightness': lambda: 0.0,
        'sharpness': lambda: _smoothed(values),
    }[name]()
    return to_uint8(degenerate + (1 + sign * amount) * (values - degenerate))


def affine(
    image: tf.Tensor,
    turn: tf.Tensor | float = 0.0,
    shear_x: tf.Tensor | float = 0.0,
    shear_y: tf.Tensor | float = 0.0,
    left: tf.Tensor | float = 0.0,
    up: tf.Tensor | float = 0.0,
    zoom_x: tf.Tensor | float = 1.0,
    zoom_y: tf.Tensor | float = 1.0,
) -> tf.Tensor:
    """Turns, shears, moves and zooms an image about its centre in one bilinear step.

    Args:
        image: uint8 [height, width, 3]; pixels from outside it are black.
        turn: radians.
        shear_x, shear_y: slopes.
        left, up: pixels.
        zoom_x, zoom_y: factors.
    """
    height, width = tf.unstack(tf.cast(tf.shape(image)[:2], tf.float32))
    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    # Where a pixel of the result comes from, relative to the centre: turned and sheared, then
    # zoomed.
    xx, xy = tf.cos(turn) / zoom_x, (shear_x - tf.sin(turn)) / zoom_x
    yx, yy = (shear_y + tf.sin(turn)) / zoom_y, tf.cos(turn) / zoom_y
    offset_x = centre_x - xx * centre_x - xy * centre_y + left
    offset_y = centre_y - yx * centre_x - yy * centre_y + up
    transform = tf.stack([xx, xy, offset_x, yx, yy, offset_y, 0.0, 0.0])
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=image[None],
        transforms=transform[None],
        output_shape=tf.shape(image)[:2],
        fill_value=0.0,
        interpolation='BILINEAR',
        fill_mode='CONSTANT',
    )
    return tf.ensure_shape(moved[0], image.shape)


def draw_numbers(settings: ConfigDict, seed: tf.Tensor) -> dict[str, tf.Tensor]:
    """Draws the random numbers that `make_device_augment` needs for one example.

    Returns: a dict of float32 tensors, uniform in [0, 1) or Beta-distributed.
    """
    uniform = tf.random.stateless_uniform([15], seed + (0, 3))
    flip, jitter, erase, mix = tf.split(uniform, [1, 3, 8, 3])
    drawn = {}
    if settings.flip:
        drawn['flip'] = flip
    if settings.color_jitter:
        drawn['jitter'] = jitter
    if settings.random_erasing:
        drawn['erase'] = erase
    if settings.mixup or settings.cutmix:
        mixup_share = _beta(seed + (0, 4), settings.mixup)
        cutmix_share = _beta(seed + (0, 6), settings.cutmix)
        drawn['mix'] = tf.concat([mix, mixup_share, cutmix_share], 0)
    return drawn


def make_device_augment(
    settings: ConfigDict, num_classes: int
) -> Callable[[tf.Tensor, tf.Tensor, dict[str, tf.Tensor]], tuple[tf.Tensor, tf.Tensor]]:
    """Returns the function that does the device's part of `config.augment`, in the compiled step.

    It takes images uint8 [batch, size, size, 3], labels int64 [batch] and the numbers of
    `draw_numbers`, each float32 [batch, n], and returns images float32 in 0..255 and labels float32
    [batch, num_classes]. Mixing pairs neighbours (images 0 and 1, 2 and 3, and so on), so a
    replica's batch size must be even.
    """

    def change(
        images: tf.Tensor, labels: tf.Tensor, drawn: dict[str, tf.Tensor]
    ) -> tuple[tf.Tensor, tf.Tensor]:
        labels = tf.one_hot(labels, num_classes)
        if settings.flip:  # before the cast, while a value is still one byte
            stays = drawn['flip'][:, :, None, None] < 0.5
            images = tf.where(stays, images, tf.reverse(images, [2]))
        images = tf.cast(images, tf.float32)
        if settings.color_jitter:
            images = jitter(images, 1 + settings.color_jitter * (2 * drawn['jitter'] - 1))
        if settings.random_erasing:
            images = erase(images, drawn['erase'], settings.random_erasing)
        if settings.mixup or settings.cutmix:
            images, labels = mix(images, labels, drawn['mix'], settings.mixup, settings.cutmix)
        return images, labels

    return change


def jitter(images: tf.Tensor, factors: tf.Tensor) -> tf.Tensor:
    """Multiplies brightness, contrast and saturation by `factors`, float32 [batch, 3]."""
    brightness, contrast, saturation = (
        factor[:, None, None, None] for factor in tf.unstack(factors, axis=1)
    )
    images = tf.clip_by_value(images * brightness, 0, 255)
    grey = tf.tensordot(images, LUMA, 1)[..., None]  # [batch, height, width, 1]
    mean = tf.reduce_mean(grey, (1, 2), keepdims=True)
    images = tf.clip_by_value(mean + contrast * (images - mean), 0, 255)
    grey = tf.tensordot(images, LUMA, 1)[..., None]
    return tf.clip_by_value(grey + saturation * (images - grey), 0, 255)


def erase(images: tf.Tensor, drawn: tf.Tensor, probability: float) -> tf.Tensor:
    """Fills a rectangle with one random colour (Zhong et al. 2020).

    It covers 2 to 33 % of the image, with an aspect ratio of 0.3 to 1 / 0.3.
    """
    area, aspect = 0.02 + 0.31 * drawn[:, 1], tf.exp(math.log(0.3) * (1 - 2 * drawn[:, 2]))
    height = tf.minimum(1.0, tf.sqrt(area * aspect))
    width = tf.minimum(1.0, tf.sqrt(area / aspect))
    inside = _rectangle(tf.shape(images), height, width, drawn[:, 3], drawn[:, 4])
    is_erased = inside & (drawn[:, 0] < probability)[:, None, None, None]
    return tf.where(is_erased, 255 * drawn[:, None, None, 5:8], images)


def mix(
    images: tf.Tensor, labels: tf.Tensor, drawn: tf.Tensor, mixup: float, cutmix: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mixes neighbours by Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019).

    With both, a coin flip chooses for each pair.
    """
    drawn = tf.repeat(drawn[::2], 2, axis=0)  # a pair shares its numbers
    coin, down, across, mixup_share, cutmix_share = tf.unstack(drawn, axis=1)  # [batch]
    shape = tf.shape(images)
    pairs = tf.reshape(images, [-1, 2, shape[1], shape[2], 3])
    other_images = tf.reshape(tf.reverse(pairs, [1]), shape)
    pairs = tf.reshape(labels, [-1, 2, labels.shape[1]])
    other_labels = tf.reshape(tf.reverse(pairs, [1]), tf.shape(labels))
    takes_mixup = coin < 0.5
    if mixup:
        blended = other_images + mixup_share[:, None, None, None] * (images - other_images)
        mixed, share = blended, mixup_share
    if cutmix:
        side = tf.sqrt(1 - cutmix_share)
        inside = _rectangle(shape, side, side, down, across)
        cut = tf.where(inside, other_images, images)
        kept = 1 - tf.reduce_mean(tf.cast(inside, tf.float32), (1, 2, 3))  # counted in whole pixels
        mixed, share = cut, kept
    if mixup and cutmix:
        mixed = tf.where(takes_mixup[:, None, None, None], blended, cut)
        share = tf.where(takes_mixup, mixup_share, kept)
    share = share[:, None]
    return mixed, share * labels + (1 - share) * other_labels


def random_affine(image: tf.Tensor, seed: tf.Tensor, settings: ConfigDict) -> tf.Tensor:
    """Moves, rotates and zooms an image at random, by at most the shares in `settings`."""
    amounts = tf.random.stateless_uniform([5], seed, -1.0, 1.0)
    height, width = tf.unstack(tf.cast(tf.shape(image)[:2], tf.float32))
    zoom_x, zoom_y = 1 + amounts[3] * settings.zoom, 1 + amounts[4] * settings.zoom
    if settings.zoom > 0.5:
        image = _without_details(image, tf.stack([zoom_y, zoom_x]))
    return affine(
        image,
        turn=amounts[0] * settings.rotate * 2 * math.pi,
        left=amounts[1] * settings.translate * width,
        up=amounts[2] * settings.translate * height,
        zoom_x=zoom_x,
        zoom_y=zoom_y,
    )


def _without_details(image: tf.Tensor, zoom: tf.Tensor) -> tf.Tensor:
    """Removes details that would alias at `zoom`, float32 [2]: (vertical, horizontal).

    `affine` interpolates each pixel from the nearest 2x2, so it skips none down to a zoom of 1/2.
    Below that, a side is first averaged to the number of pixels it will have.
    """
    shape = tf.shape(image)[:2]
    zoomed = tf.cast(tf.math.ceil(tf.cast(shape, tf.float32) * zoom), tf.int32)
    coarse = resize(image, tf.where(zoom < 0.5, zoomed, shape))
    return tf.ensure_shape(to_uint8(resize(coarse, shape)), image.shape)


def _rectangle(
    shape: tf.Tensor, height: tf.Tensor, width: tf.Tensor, down: tf.Tensor, across: tf.Tensor
) -> tf.Tensor:
    """Returns which pixels lie in a rectangle, bool [batch, height, width, 1].

    Its sides and position are shares of the image, float32 [batch].
    """

    def covers(pixels: tf.Tensor, side: tf.Tensor, place: tf.Tensor) -> tf.Tensor:
        steps = tf.cast(tf.range(pixels), tf.float32) + 0.5
        centres = steps / tf.cast(pixels, tf.float32)  # [pixels]
        begin = (place * (1 - side))[:, None]
        return (centres >= begin) & (centres < begin + side[:, None])  # [batch, pixels]

    rows = covers(shape[1], height, down)[:, :, None, None]
    return rows & covers(shape[2], width, across)[:, None, :, None]


def _beta(seed: tf.Tensor, alpha: float) -> tf.Tensor:
    """Draws from Beta(alpha, alpha), float32 [1], by two Gamma draws; 1 where alpha is 0."""
    if not alpha:
        return tf.ones([1])
    one, other = (tf.random.stateless_gamma([1], seed + (0, part), alpha) for part in (0, 1))
    return tf.where(one + other > 0, one / (one + other), 1.0)


def _equalized(channel: tf.Tensor) -> tf.Tensor:
    """Equalizes the histogram of uint8 [height, width], as PIL.ImageOps.equalize does."""
    histogram = tf.math.bincount(tf.cast(channel, tf.int32), minlength=256, maxlength=256)
    last = tf.reduce_max(tf.where(histogram > 0, tf.range(256), 0))
    step = (tf.reduce_sum(histogram) - histogram[last]) // 255
    table = (tf.cumsum(histogram, exclusive=True) + step // 2) // tf.maximum(step, 1)
    equalized = tf.gather(tf.clip_by_value(table, 0, 255), tf.cast(channel, tf.int32))
    return tf.where(step == 0, channel, tf.cast(equalized, tf.uint8))


def _smoothed(values: tf.Tensor) -> tf.Tensor:
    """Applies PIL's SMOOTH filter to all but the outermost pixels of float32 [height, width, 3]."""
    kernel = tf.constant([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    kernels = tf.tile(kernel[:, :, None, None], [1, 1, 3, 1])
    inner = tf.nn.depthwise_conv2d(values[None], kernels, [1, 1, 1, 1], 'VALID')[0]
    height, width = tf.unstack(tf.shape(values)[:2])
    border = [[1, 1], [1, 1], [0, 0]]
    edge = tf.pad(tf.zeros([height - 2, width - 2, 1], tf.bool), border, constant_values=True)
    return tf.where(edge, values, tf.pad(inner, border))
