"""What evaluation and the exported model do with a picture: decode, take the central square, resize."""
import tensorflow as tf


def decode(encoded):
    """A JPEG, PNG, GIF (first frame) or BMP file, string [], to uint8 [height, width, 3]."""
    return tf.ensure_shape(tf.io.decode_image(encoded, channels=3, expand_animations=False), [None, None, 3])


def resize_picture(images, size, central_share=1.0):
    """The central square of pictures, resized by `resize`.

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
    return to_uint8(resize(square, (size, size)))


def resize(images: tf.Tensor, shape) -> tf.Tensor:
    """Resizes pictures: by a box filter along a side that shrinks, linearly along one that grows.

    Where a side shrinks, a pixel is the mean of what it covers, so none is skipped and fine
    patterns do not turn into coarse ones. A JPEG decoder that shrinks does the same. What this
    costs over plain bilinear is a tenth (500x375 pixels to 224) to 40 % (1600x1200) of what
    `antialias=True` costs over it.

    Args:
        images: uint8 or float, [height, width, channels] or [batch, height, width, channels].
        shape: (height, width) of the result, int32 [2] or a pair of int.

    Returns: float32, in the range of `images`.
    """
    smaller = tf.minimum(tf.shape(images)[-3:-1], shape)
    shrunk = tf.image.resize(images, smaller, method='area')
    return tf.image.resize(shrunk, shape)


def to_uint8(images):
    """Rounds numbers in 0..255 to whole ones; what lies outside is clipped."""
    return images if images.dtype == tf.uint8 else tf.cast(tf.round(tf.clip_by_value(images, 0, 255)), tf.uint8)
