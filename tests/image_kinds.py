"""Image files of every kind that training accepts, each with the pixels that a viewer shows of
it.
"""

import io
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from PIL import Image, features

from inputs import heif

SHAPE = (24, 32)
ORIENTATIONS = range(2, 9)
JUNK = {'a zero': b'\0', 'zeros': bytes(5), 'a filling': b'\x55' * 20}
PNG_START = b'\x89PNG\r\n\x1a\n'


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
        suffix: of its name.
        make: uint8 pixels [height, width, 3] -> (the file, the uint8 pixels that a viewer shows).
        tolerance: the largest difference of what is read from these pixels, as lossy formats are.
        in_graph: whether `classify_encoded` reads the file as it is.
    """

    suffix: str
    make: Callable[[np.ndarray], tuple[bytes, np.ndarray]]
    tolerance: float
    in_graph: bool


def pixels_of(number: int) -> np.ndarray:
    """A smooth image of its own for each number, uint8 [24, 32, 3]."""
    random = np.random.RandomState(number)
    coarse = random.randint(0, 256, (4, 5, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(SHAPE[::-1], Image.Resampling.BICUBIC))


def encoded(array: np.ndarray, file_format: str, mode: str | None = None, **options) -> bytes:
    image, buffer = Image.fromarray(array), io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, file_format, **options)
    return buffer.getvalue()


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The closed form of what is seen of a transparent image, float [height, width, 3]; `alpha` in
    0..255.
    """
    share = alpha[..., None] / 255
    return rgb * share + 255 * (1 - share)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, -1)


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack('>I', len(content))
        + kind
        + content
        + struct.pack('>I', zlib.crc32(kind + content))
    )


def png(
    values: np.ndarray, depth: int, color_type: int, palette: bytes = b'', transparency: bytes = b''
) -> bytes:
    """A PNG file of samples [height, width, channels], written by hand: libraries write only some
    of all depths.
    """
    height, width, channels = values.shape
    bits = ((values.reshape(height, width * channels, 1) >> np.arange(depth)[::-1]) & 1).reshape(
        height, -1
    )
    rows = np.packbits(bits.astype(np.uint8), axis=1)
    header = struct.pack('>IIBBBBB', width, height, depth, color_type, 0, 0, 0)
    parts = [PNG_START, chunk(b'IHDR', header)]
    if palette:
        parts.append(chunk(b'PLTE', palette))
    if transparency:
        parts.append(chunk(b'tRNS', transparency))
    data = b''.join(b'\0' + row.tobytes() for row in rows)
    return b''.join([*parts, chunk(b'IDAT', zlib.compress(data)), chunk(b'IEND', b'')])


def grey_png(depth: int, is_transparent: bool) -> Callable:
    def make(pixels):
        values = (pixels[..., 0].astype(np.int64) * (2**depth - 1) + 127) // 255
        shown = grey(values * 255 / (2**depth - 1))
        if not is_transparent:
            return png(values[..., None], depth, 0), shown
        clear = int(np.median(values))
        shown[values == clear] = 255
        return png(values[..., None], depth, 0, transparency=struct.pack('>H', clear)), shown

    return make


def palette_png(depth: int, is_transparent: bool) -> Callable:
    def make(pixels):
        colors = pixels.reshape(-1, 3)[: 2**depth]
        values = np.arange(pixels[..., 0].size).reshape(pixels.shape[:2]) % len(colors)
        shown = colors[values].astype(float)
        alpha = np.resize([255, 0, 128, 255], len(colors)) if is_transparent else np.array([], int)
        if is_transparent:
            shown = over_white(shown, alpha[values])
        return png(
            values[..., None], depth, 3, colors.tobytes(), alpha.astype(np.uint8).tobytes()
        ), shown

    return make


def color_png(depth: int) -> Callable:
    """RGB with one transparent colour."""

    def make(pixels):
        values = pixels.astype(np.int64) * (257 if depth == 16 else 1)
        clear = values[3, 4]
        shown = pixels.astype(float)
        shown[(values == clear).all(-1)] = 255
        return png(values, depth, 2, transparency=struct.pack('>HHH', *clear)), shown

    return make


def alpha_png(depth: int, is_grey: bool) -> Callable:
    def make(pixels):
        colors, alpha = pixels[..., :1] if is_grey else pixels, pixels[::-1, :, 1]
        values = np.dstack([colors, alpha]).astype(np.int64) * (257 if depth == 16 else 1)
        return png(values, depth, 4 if is_grey else 6), over_white(
            np.broadcast_to(colors, pixels.shape), alpha
        )

    return make


def turned(file_format: str, orientation: int, **options) -> Callable:
    """A file whose EXIF tag 0x0112 says how to turn it (EXIF 2.32)."""

    def make(pixels):
        shown = {
            2: pixels[:, ::-1],
            3: pixels[::-1, ::-1],
            4: pixels[::-1],
            5: pixels.swapaxes(0, 1),
            6: np.rot90(pixels, -1),
            7: pixels[::-1, ::-1].swapaxes(0, 1),
            8: np.rot90(pixels),
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        return encoded(pixels, file_format, exif=exif, **options), shown

    return make


def turned_clear_png(pixels):
    exif = Image.Exif()
    exif[0x0112] = 3
    alpha = pixels[..., 1]
    return encoded(np.dstack([pixels, alpha]), 'PNG', exif=exif), over_white(pixels, alpha)[
        ::-1, ::-1
    ]


def plain(file_format: str, mode: str | None = None, **options) -> Callable:
    return lambda pixels: (encoded(pixels, file_format, mode, **options), pixels)


def deep(file_format: str) -> Callable:
    return lambda pixels: (
        encoded(pixels[..., 0].astype(np.uint16) * 257, file_format),
        grey(pixels[..., 0]),
    )


def clear(file_format: str, **options) -> Callable:
    def make(pixels):
        alpha = np.where(pixels[..., 1] > 127, 255, 0).astype(np.uint8)
        return encoded(np.dstack([pixels, alpha]), file_format, **options), over_white(
            pixels, alpha
        )

    return make


def clear_gif(pixels):
    """Two colours, one of them transparent."""
    dark = pixels[..., 0] < 128
    image = Image.fromarray(np.where(dark, 0, 1).astype(np.uint8), 'P')
    image.putpalette([200, 30, 40, 10, 20, 30])
    buffer = io.BytesIO()
    image.save(buffer, 'GIF', transparency=1)
    return buffer.getvalue(), np.where(dark[..., None], [200, 30, 40], 255)


def palette_bmp(pixels):
    image = Image.fromarray(pixels).quantize(16)
    buffer = io.BytesIO()
    image.save(buffer, 'BMP')
    return buffer.getvalue(), np.asarray(image.convert('RGB'))


def with_junk(junk: bytes, markers: set[int] | None = None, **options) -> Callable:
    """A JPEG file with bytes before these markers, or before all but the first; see
    `jpeg_parts`.
    """

    def make(pixels):
        file = encoded(pixels, 'JPEG', quality=95, subsampling=0, **options)
        return put_before_markers(file, junk, markers), pixels

    return make


def put_before_markers(file: bytes, junk: bytes, markers: set[int] | None = None) -> bytes:
    parts = jpeg_parts(file)
    return b''.join(
        (junk if index and kind >= 0 and (markers is None or kind in markers) else b'') + part
        for index, (kind, part) in enumerate(parts)
    )


def jpeg_parts(file: bytes) -> list[tuple[int, bytes]]:
    """(marker, bytes) of each segment of a JPEG file that PIL wrote, -1 for what is coded between
    them.
    """
    parts, place = [], 0
    while place < len(file):
        kind, end = file[place + 1], place + 2
        if kind not in (0xD8, 0xD9, *range(0xD0, 0xD8)):
            end += int.from_bytes(file[end : end + 2], 'big')
        parts.append((kind, file[place:end]))
        place = end
        if kind == 0xDA or kind in range(0xD0, 0xD8):
            while not (file[end] == 0xFF and file[end + 1] != 0):
                end += 1
            parts.append((-1, file[place:end]))
            place = end
    return parts


JPEG = {'quality': 95, 'subsampling': 0}
KINDS = {
    'JPEG': Kind('.jpg', plain('JPEG', **JPEG), 16, True),
    'progressive JPEG': Kind('.jpg', plain('JPEG', progressive=True, **JPEG), 16, True),
    'grey JPEG': Kind(
        '.jpg',
        lambda pixels: (encoded(pixels[..., 0], 'JPEG', quality=95), grey(pixels[..., 0])),
        16,
        True,
    ),
    'CMYK JPEG': Kind('.jpg', plain('JPEG', 'CMYK', **JPEG), 16, True),
    'JPEG with data behind it': Kind(
        '.jpg', lambda pixels: (encoded(pixels, 'JPEG', **JPEG) + b'more', pixels), 16, True
    ),
    'PNG': Kind('.png', plain('PNG'), 0, True),
    'PNG of 16 bits': Kind(
        '.png',
        lambda pixels: (tf.io.encode_png(pixels.astype(np.uint16) * 257).numpy(), pixels),
        0,
        True,
    ),
    'GIF': Kind('.gif', lambda pixels: (encoded(pixels, 'GIF'), pixels), 90, False),
    'GIF with a transparent colour': Kind('.gif', clear_gif, 0, False),
    'BMP': Kind('.bmp', plain('BMP'), 0, True),
    'BMP with a palette': Kind('.bmp', palette_bmp, 0, False),
    'WebP': Kind('.webp', plain('WEBP', quality=95), 40, False),
    'WebP with alpha': Kind('.webp', clear('WEBP', lossless=True, exact=True), 24, False),
    'TIFF': Kind('.tif', plain('TIFF'), 0, False),
    'TIFF with alpha': Kind('.tif', clear('TIFF'), 0, False),
    'TIFF of 16 bits': Kind('.tif', deep('TIFF'), 0, False),
    'PGM of 16 bits': Kind('.pgm', deep('PPM'), 0, False),
    'PPM': Kind('.ppm', plain('PPM'), 0, False),
    'JPEG 2000': Kind('.jp2', plain('JPEG2000'), 16, False),
    'turned PNG': Kind('.png', turned('PNG', 6), 0, False),
    'turned PNG with alpha': Kind('.png', turned_clear_png, 1, False),
    'turned TIFF': Kind('.tif', turned('TIFF', 6), 0, False),
    'turned WebP': Kind('.webp', turned('WEBP', 8, quality=95), 40, False),
    **{
        f'JPEG with orientation {number}': Kind('.jpg', turned('JPEG', number, **JPEG), 24, False)
        for number in ORIENTATIONS
    },
    **{
        f'{depth}-bit grey PNG{" with a transparent grey" * clear}': Kind(
            '.png', grey_png(depth, clear), 1, True
        )
        for depth in (1, 2, 4, 8, 16)
        for clear in (False, True)
    },
    **{
        f'{depth}-bit palette PNG{" with alpha" * clear}': Kind(
            '.png', palette_png(depth, clear), 0.51, True
        )
        for depth in (1, 2, 4, 8)
        for clear in (False, True)
    },
    **{
        f'{depth}-bit PNG with a transparent colour': Kind('.png', color_png(depth), 0, True)
        for depth in (8, 16)
    },
    **{
        f'{depth}-bit {name} PNG': Kind('.png', alpha_png(depth, name == 'LA'), 1, True)
        for depth in (8, 16)
        for name in ('LA', 'RGBA')
    },
    **{
        f'JPEG with {name} before each marker': Kind('.jpg', with_junk(junk), 16, False)
        for name, junk in JUNK.items()
    },
    'progressive JPEG with a zero before each marker': Kind(
        '.jpg', with_junk(b'\0', progressive=True), 16, False
    ),
    'JPEG of intervals with a zero before each marker': Kind(
        '.jpg', with_junk(b'\0', restart_marker_blocks=2), 16, False
    ),
}
if features.check('avif'):
    KINDS['AVIF'] = Kind('.avif', plain('AVIF', quality=95), 40, False)
if heif.VERSION:
    KINDS['HEIC'] = Kind('.heic', plain('HEIF', quality=95), 60, False)
