"""Decodes, centre-crops and resizes images, for training, evaluation and the exported model."""

import tensorflow as tf

PNG_SIGNATURE = b'\x89PNG\r\n\x1a\n'
PNG_DEPTH_OFFSET = 24  # of the byte with the bits per channel
BMP_SIGNATURE = b'BM'
GIF_SIGNATURE = b'GIF8'
WHITE_LEVEL = 2**16 - 1  # of a 16-bit PNG file, unless its values use fewer bits
BMP_HEADER = 34  # bytes, up to and including the compression field
# Bytes 28 to 33: 24 or 32 bits per pixel, no compression, no masks.
PLAIN_BMP = (b'\x18\0\0\0\0\0', b'\x20\0\0\0\0\0')


def decode(encoded: tf.Tensor, white_level: int = WHITE_LEVEL) -> tf.Tensor:
    """Decodes an image file for training, evaluation and the exported model alike.

    Transparent parts of a PNG file are laid over white. A graph ignores the EXIF orientation and
    sees transparent parts of a GIF as black: `image_validation.as_decodable` corrects both
    beforehand.

    Args:
        encoded: string [], a JPEG, PNG or GIF file (its first frame), or a BMP file without palette
            or masks.
        white_level: the value of white in PNG files of 16 bits, `config.dataset.white_level`.

    Returns: uint8 [height, width, 3].

    Raises: tf.errors.InvalidArgumentError: it is none of these, or damaged.
    """

    def decode_png() -> tf.Tensor:
        return _decode_png(encoded, white_level)

    def decode_opaque() -> tf.Tensor:
        return _decode_opaque(encoded)

    is_png = _begins_with(encoded, PNG_SIGNATURE) & (tf.strings.length(encoded) > PNG_DEPTH_OFFSET)
    image = tf.cond(is_png, decode_png, decode_opaque)
    return tf.ensure_shape(image, [None, None, 3])


def _decode_opaque(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes a JPEG, GIF or BMP file, string [], to uint8 [height, width, 3]."""
    is_bmp = _begins_with(encoded, BMP_SIGNATURE) & (tf.strings.length(encoded) >= BMP_HEADER)
    # TensorFlow would read palette indices as greys, and ignore masks.
    is_plain_bmp = tf.cond(
        is_bmp, lambda: tf.reduce_any(tf.strings.substr(encoded, 28, 6) == PLAIN_BMP), lambda: False
    )
    is_readable = tf.io.is_jpeg(encoded) | _begins_with(encoded, GIF_SIGNATURE) | is_plain_bmp
    check = tf.debugging.Assert(
        is_readable, ['not a JPEG, PNG, GIF or plain BMP file: convert it to PNG']
    )
    with tf.control_dependencies([check] if check is not None else []):
        return tf.io.decode_image(encoded, channels=3, expand_animations=False)


def _begins_with(encoded: tf.Tensor, signature: bytes) -> tf.Tensor:
    return tf.strings.substr(encoded, 0, len(signature)) == signature


def _decode_png(encoded: tf.Tensor, white_level: int) -> tf.Tensor:
    """Decodes a PNG file, string [], to uint8 [height, width, 3], laid over white."""
    depth = tf.cast(
        tf.io.decode_raw(tf.strings.substr(encoded, PNG_DEPTH_OFFSET, 1), tf.uint8)[0], tf.int32
    )

    def decode_8_bits() -> tf.Tensor:
        return tf.io.decode_png(encoded, channels=4)

    def decode_16_bits() -> tf.Tensor:
        return _with_white_at(white_level, tf.io.decode_png(encoded, channels=4, dtype=tf.uint16))

    if white_level == WHITE_LEVEL:  # TensorFlow takes the upper eight bits
        image = decode_8_bits()
    else:
        image = tf.cond(depth == 16, decode_16_bits, decode_8_bits)
    # TensorFlow gives an opaque file of 1, 2 or 4 bits an alpha of 1, 3 or 15.
    opaque = tf.cast(2 ** tf.minimum(depth, 8) - 1, tf.uint8)
    return tf.cond(
        tf.reduce_all(image[..., 3] == opaque), lambda: image[..., :3], lambda: over_white(image)
    )


def _with_white_at(white_level: int, image: tf.Tensor) -> tf.Tensor:
    """Scales colours from 0..white_level and alpha from 16 bits: uint16 [..., 4] to uint8."""
    whites = tf.constant([white_level] * 3 + [WHITE_LEVEL], tf.float32)
    return to_uint8(tf.cast(image, tf.float32) * (255 / whites))


def over_white(image: tf.Tensor) -> tf.Tensor:
    """Lays an image with alpha, uint8 [height, width, 4], over white: uint8 [height, width, 3]."""
    opacity = tf.cast(image[..., 3:], tf.int32)
    blended = tf.cast(image[..., :3], tf.int32) * opacity + 255 * (255 - opacity)
    return tf.cast((blended + 127) // 255, tf.uint8)  # rounded: 255 is odd, so nothing lies halfway


def center_crop_and_resize(images: tf.Tensor, size: int, central_share: float = 1.0) -> tf.Tensor:
    """Crops the central square of images and resizes it.

    Args:
        images: uint8 or float in 0..255, [..., height, width, 3].
        size: pixels of the result.
        central_share: side of the square as a share of the shorter side.

    Returns: uint8 [..., size, size, 3].
    """
    height, width = tf.unstack(tf.shape(images)[-3:-1])
    shorter = tf.cast(tf.minimum(height, width), tf.float32)
    side = tf.maximum(1, tf.cast(tf.round(central_share * shorter), tf.int32))
    top, left = (height - side) // 2, (width - side) // 2
    square = images[..., top : top + side, left : left + side, :]
    return to_uint8(resize(square, (size, size)))


def resize(images: tf.Tensor, shape: tf.Tensor | tuple[int, int]) -> tf.Tensor:
    """Resizes images: by a box filter along a side that shrinks, linearly along one that grows.

    Where a side shrinks, a pixel is the mean of what it covers, so none is skipped and fine
    patterns do not turn into coarse ones. A JPEG decoder that shrinks does the same. The filter's
    extra cost over plain bilinear is 10 % (500x375 pixels to 224) to 40 % (1600x1200) of that of
    `antialias=True`.

    Args:
        images: uint8 or float, [height, width, channels] or [batch, height, width, channels].
        shape: (height, width) of the result, int32 [2] or a pair of int.

    Returns: float32, in the range of `images`.
    """
    sides = tf.shape(images)[-3:-1]

    def shrink() -> tf.Tensor:
        return tf.image.resize(images, shape, method='area')

    def enlarge() -> tf.Tensor:
        return tf.image.resize(tf.cast(images, tf.float32), shape)

    def shrink_and_enlarge() -> tf.Tensor:
        smaller = tf.image.resize(images, tf.minimum(sides, shape), method='area')
        return tf.image.resize(smaller, shape)

    # shrink_and_enlarge would do for all, but even a filter that changes nothing takes time.
    grows, shrinks = tf.reduce_any(sides < shape), tf.reduce_any(sides > shape)
    kind = tf.where(grows, tf.where(shrinks, 2, 1), 0)
    return tf.switch_case(kind, [shrink, enlarge, shrink_and_enlarge])


def to_uint8(images: tf.Tensor) -> tf.Tensor:
    """Rounds values to integers and clips them to 0..255."""
    if images.dtype == tf.uint8:
        return images
    # One pass; rounding, clipping and casting would take three.
    quantized = tf.raw_ops.QuantizeV2(
        input=tf.cast(images, tf.float32), min_range=0.0, max_range=255.0, T=tf.quint8
    )
    return tf.bitcast(quantized.output, tf.uint8)
