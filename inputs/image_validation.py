"""Finds out how an image file can be used: as it is, as a converted copy, or not at all.

Training, evaluation and `predict.py` see a file through `as_decodable`. Checks and copies are
kept in TFDS' data folder, so that a file is examined once, and again when it has changed.
"""

import concurrent.futures
import contextlib
import hashlib
import io
import json
import os
import re
import stat
import tempfile
import uuid
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL
import tensorflow as tf
import tensorflow_datasets as tfds
import tqdm
from PIL import ExifTags, Image

from common import console
from common.console import printable
from common.errors import RunError, counted, one_line
from inputs import file_signatures, heif, image_ops, jpeg_files

# Extensions of files that are examined; the content decides what a file is. The last two are here
# only to be reported: Pillow cannot read them.
SUFFIXES = (
    '.jpg',
    '.jpeg',
    '.jpe',
    '.jfif',
    '.mpo',
    '.png',
    '.apng',
    '.gif',
    '.bmp',
    '.dib',
    '.webp',
    '.tif',
    '.tiff',
    '.avif',
    '.jp2',
    '.j2k',
    '.ppm',
    '.pgm',
    '.pbm',
    '.pnm',
    '.heic',
    '.heif',
    '.hif',
    '.jxl',
    '.svg',
)
# Formats that begin with a signature of their own, and that Pillow reads without another program
# (EPS would start Ghostscript).
FORMATS = (
    'JPEG',
    'PNG',
    'GIF',
    'BMP',
    'DIB',
    'WEBP',
    'TIFF',
    'AVIF',
    'JPEG2000',
    'PPM',
    *heif.FORMATS,
)
JPEGS = ('JPEG', 'MPO')  # MPO: a JPEG file with more images after the first
LOSSY = (*JPEGS, 'WEBP', 'AVIF', 'JPEG2000', 'HEIF')
MAX_PIXELS = 2**27  # 400 MB as uint8 [height, width, 3]
MAX_BYTES = 8 * MAX_PIXELS  # per file: MAX_PIXELS pixels of four 16-bit channels
TURNS = {  # EXIF orientation (EXIF 2.32, tag 0x0112) -> what a viewer does
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF 6.0, pages 29 and 37
# A doubt about at least this share, and at least this number, of the JPEG files is taken for a
# habit of the program that wrote them.
MIN_DOUBTFUL_SHARE = 0.9
MIN_DOUBTFUL = 3
CHUNK = 64  # files examined between two looks at standard error
ENDS_TOO_EARLY = 'the file ends too early: copy or download it again'
READERS = [
    f'Pillow {PIL.__version__}',
    f'TensorFlow {tf.__version__}',
    *([f'pillow-heif {heif.VERSION}'] if heif.VERSION else []),
]
# Version of the checks: increase the number when their results change.
RULES = ', '.join(['5', *READERS])


class Broken(Exception):
    """Raised for a file that cannot be used; the message says why."""


class FileCheck(NamedTuple):
    """The result of examining one file.

    Attributes:
        digest: SHA-256 of its content; '' where that could not be read.
        num_bytes: size of the file to be read.
        copy: path of the converted copy that is to be read, or '' for the file itself.
        broken: why it cannot be used, or ''.
        file_format: Pillow's name for the format, such as 'JPEG'; for a broken file 'JPEG' or ''.
        peak: the largest value of an image with more than 8 bits, 0 for others.
        remark: what libjpeg warns of although no pixel can have changed, or ''.
        doubt: a warning that may mean damage or be a habit of the camera, or ''.
        has_upper_bits_only: whether its colours have 16 bits of which only eight can be read.
    """

    digest: str = ''
    num_bytes: int = 0
    copy: str = ''
    broken: str = ''
    file_format: str = ''
    peak: int = 0
    remark: str = ''
    doubt: str = ''
    has_upper_bits_only: bool = False


class Decodable(NamedTuple):
    """A JPEG or PNG file that TensorFlow reads as a viewer shows it; see `FileCheck`."""

    content: bytes
    file_format: str
    peak: int = 0
    remark: str = ''
    doubt: str = ''
    has_upper_bits_only: bool = False


def as_decodable(content: bytes) -> bytes:
    """Returns a file as training reads it: itself, if TensorFlow decodes it to what viewers show.

    Otherwise a JPEG or PNG file: turned as EXIF says, in colours or greys that `image_ops.decode`
    reads. Possible damage is ignored; `decodable` reports it.

    Args:
        content: an image file of any of `FORMATS`.

    Raises: Broken: it cannot be used; the message says why.
    """
    return decodable(content).content


def decodable(content: bytes) -> Decodable:
    """Does what `as_decodable` does, and returns what it found.

    Whether a doubt counts depends on the other files: see `_settle_doubts`.

    Raises: Broken: it cannot be used; the message says why.
    """
    if not content:
        raise Broken('empty: 0 bytes')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                'ignore'
            )  # Pillow's warnings: what matters is checked here, and raised as an error
            with captured_stderr() as said:
                found = _convert(content)
                warns = bool(said())
            return _without_warning(content, found) if warns else found
    except Broken:
        raise
    except MemoryError:
        raise Broken('too large for the memory that is free') from None
    except Exception as error:  # a damaged file can make Pillow raise anything
        raise Broken(_fault(error, content)) from error


def examine(
    root: str, paths: Sequence[str], white_level: int = image_ops.WHITE_LEVEL
) -> dict[str, FileCheck]:
    """Finds out which files can be used; converts those that TensorFlow would refuse or misread.

    Args:
        root: the user's folder.
        paths: of files below it.
        white_level: of 16-bit images, as in `image_ops.decode`; if it is not the default, images of
            which only the upper eight bits can be read are broken.

    Returns: {path: FileCheck}, in the order of `paths`. `list_of_broken(root)` then has those that
        are broken, if any are.

    Raises: RunError if the data folder cannot be written.
    """
    try:
        tf.io.gfile.makedirs(_copies(root))
        checks = _settle_doubts(_examine_new(root, paths))
        if white_level != image_ops.WHITE_LEVEL:
            checks = _reject_upper_bits_only(checks)
        broken = [
            f'{printable(path)}: {checks[path].broken}\n' for path in paths if checks[path].broken
        ]
        if broken:
            _write(list_of_broken(root), ''.join(broken).encode())
    except tf.errors.OpError as error:
        raise RunError(
            f'{_cache(root)} cannot be written ({_reason(error)})',
            'set the environment variable TFDS_DATA_DIR to a writable folder with room for '
            'converted images',
        ) from error
    return {path: checks[path] for path in paths}


def list_of_broken(root: str) -> str:
    """Returns the path of the text file with all broken files, one a line."""
    return os.path.join(_cache(root), 'broken.txt')


def _write(path: str, content: bytes) -> None:
    """Writes a file atomically. Raises tf.errors.OpError."""
    partial = f'{path}.{uuid.uuid4().hex}'
    with tf.io.gfile.GFile(partial, 'wb') as file:
        file.write(content)
    tf.io.gfile.rename(partial, path, overwrite=True)


def _cache(root: str) -> str:
    place = root.rstrip('/') if '://' in root else os.path.abspath(root)
    name = re.sub('[^A-Za-z0-9._-]', '_', os.path.basename(place))
    return os.path.join(
        tfds.core.constants.DATA_DIR,
        'folder',
        f'{name}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}',
    )


def _copies(root: str) -> str:
    return os.path.join(_cache(root), 'copies')


def _examine_new(root: str, paths: Sequence[str]) -> dict[str, FileCheck]:
    """Returns the checks of all files; unchanged files keep their earlier ones."""
    manifest = os.path.join(_cache(root), 'manifest.json')
    known = _read_manifest(manifest)
    folder = _copies(root)
    copies = {'', *(os.path.join(folder, name) for name in tf.io.gfile.listdir(folder))}
    checks, changed = {}, []
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        # On a disk a stat takes less time than starting it in a thread.
        ask: Callable[..., Iterable] = pool.map if '://' in root else map
        found_stamps = ask(lambda path: _stamp(os.path.join(root, path)), paths)
        stamps: dict[str, Any] = dict(zip(paths, found_stamps, strict=True))
    for path, stamp in stamps.items():
        if isinstance(stamp, Broken):
            checks[path] = FileCheck(broken=str(stamp))
        elif path in known and known[path][0] == stamp and known[path][1].copy in copies:
            checks[path] = known[path][1]
        else:
            changed.append(path)
    if changed:
        console.line(
            f'examining {counted(len(changed), "file")} in {printable(root)} (new or changed)'
        )
        try:
            found = _examine_all([os.path.join(root, path) for path in changed], _copies(root))
            bar = tqdm.tqdm(total=len(changed), unit=' files', disable=None, delay=2, leave=False)
            # Ends its threads, even on an interrupt.
            with contextlib.closing(found), bar:
                for path, check in zip(changed, found, strict=True):
                    checks[path] = check
                    bar.update()
        finally:  # even an interrupted start keeps what it found
            known |= {
                path: (stamps[path], checks[path])
                for path in changed
                if path in checks and checks[path].digest
            }
            _write(manifest, json.dumps({'rules': RULES, 'files': known}).encode())
    return checks


def _settle_doubts(checks: dict[str, FileCheck]) -> dict[str, FileCheck]:
    """Marks doubtful files as broken, unless nearly all JPEG files are doubtful."""
    doubtful = {path: check for path, check in checks.items() if check.doubt}
    num_jpegs = sum(check.file_format in JPEGS for check in checks.values())
    if len(doubtful) >= max(MIN_DOUBTFUL, MIN_DOUBTFUL_SHARE * num_jpegs):
        return checks
    return checks | {
        path: FileCheck(check.digest, broken=f'damaged: {check.doubt}')
        for path, check in doubtful.items()
    }


def _reject_upper_bits_only(checks: dict[str, FileCheck]) -> dict[str, FileCheck]:
    """Marks files as broken if only the upper eight of their 16 bits can be read."""
    reason = (
        '16-bit colours, of which only the upper eight bits can be read: save it as a 16-bit PNG, '
        'so that config.dataset.white_level applies'
    )
    coarse = {path: check for path, check in checks.items() if check.has_upper_bits_only}
    return checks | {path: FileCheck(check.digest, broken=reason) for path, check in coarse.items()}


def _read_manifest(path: str) -> dict[str, tuple[tuple, FileCheck]]:
    """Returns {path: (stamp, FileCheck)}; nothing if the manifest is missing or damaged."""
    try:
        with tf.io.gfile.GFile(path, 'rb') as file:
            manifest = json.loads(file.read())
        if manifest['rules'] != RULES:
            return {}
        return {
            path: (tuple(stamp), FileCheck(*check))
            for path, (stamp, check) in manifest['files'].items()
        }
    except (tf.errors.OpError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _stamp(path: str) -> 'tuple[int, int] | Broken':
    """Returns (bytes, nanoseconds of the last change) of a regular file, or Broken."""
    try:
        if '://' in path:
            status = tf.io.gfile.stat(path)
            return status.length, status.mtime_nsec
        status = os.stat(path)
    except (OSError, tf.errors.OpError) as error:
        return Broken('a link to nothing' if os.path.islink(path) else _reason(error))
    try:
        _require_regular(status)
    except Broken as broken:
        return broken
    return status.st_size, status.st_mtime_ns


def _require_regular(status: os.stat_result) -> None:
    """Raises Broken unless it is a regular file: opening a pipe would block forever."""
    if not stat.S_ISREG(status.st_mode):
        raise Broken('not a regular file')


def _examine_all(paths: Sequence[str], copies: str) -> Generator[FileCheck, None, None]:
    """Yields the FileCheck of each file, in order.

    Raises: tf.errors.OpError if a copy cannot be written.
    """
    Image.init()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # Pillow's warnings: each file is checked anyway
        for begin in range(0, len(paths), CHUNK):
            chunk = paths[begin : begin + CHUNK]
            with captured_stderr() as read_new:
                checks = list(pool.map(lambda path: _check_file(path, copies), chunk))
                warns = bool(read_new())  # some file: libjpeg does not say which
            if warns:
                checks = [
                    _recheck_alone(path, check, copies)
                    for path, check in zip(chunk, checks, strict=True)
                ]
            yield from checks


@contextlib.contextmanager
def captured_stderr() -> Iterator[Callable[[], bytes]]:
    """Collects what this process writes to standard error, C libraries included.

    Yields a function that returns what is new.
    """
    usual = os.dup(2)
    with tempfile.TemporaryFile(buffering=0) as file:
        os.dup2(file.fileno(), 2)
        num_read = 0

        def read_new() -> bytes:
            nonlocal num_read
            text = os.pread(file.fileno(), os.fstat(file.fileno()).st_size - num_read, num_read)
            num_read += len(text)
            return text

        try:
            yield read_new
        finally:
            os.dup2(usual, 2)
            os.close(usual)


def _check_file(path: str, copies: str, checks_warnings: bool = False) -> FileCheck:
    """Examines one file, libjpeg's warnings too if asked; writes its copy if it needs one."""
    content, digest, file_format = b'', '', ''
    try:
        content = read(path)
        digest = hashlib.sha256(content).hexdigest()
        file_format = 'JPEG' if content.startswith(jpeg_files.START_OF_IMAGE) else ''
        found = _convert(content)
        if checks_warnings:
            found = _without_warning(content, found)
    except MemoryError:  # without a digest it is examined again, perhaps with more memory
        return FileCheck(broken='too large for the memory that is free')
    except Exception as error:  # a damaged file can make Pillow raise anything
        return FileCheck(digest, broken=_fault(error, content), file_format=file_format)
    copy = ''
    if found.content is not content:
        ending = '.png' if found.content.startswith(image_ops.PNG_SIGNATURE) else '.jpg'
        copy = os.path.join(copies, digest + ending)
        _write(copy, found.content)
    return FileCheck(digest, len(found.content), copy, '', *found[1:])


def _recheck_alone(path: str, check: FileCheck, copies: str) -> FileCheck:
    """Examines a file again, by itself, if it may be the one that libjpeg warned about."""
    if check.broken or check.file_format not in JPEGS:
        return check
    with captured_stderr():
        return _check_file(path, copies, checks_warnings=True)


def read(path: str) -> bytes:
    """Returns the content of an image file, on a disk or in a bucket.

    Raises: Broken, OSError, tf.errors.OpError.
    """
    if '://' not in path:
        _require_regular(os.stat(path))
    # GFile accepts only UTF-8 names.
    with tf.io.gfile.GFile(path, 'rb') if '://' in path else open(path, 'rb') as file:
        content = file.read(MAX_BYTES + 1)
    if not content:
        raise Broken('empty: 0 bytes')
    if len(content) > MAX_BYTES:
        raise Broken(f'too large: more than {MAX_BYTES:,} bytes')
    return content


def _convert(content: bytes) -> Decodable:
    """Returns the file in a form that TensorFlow reads correctly; `content` itself if it does.

    May raise any exception.
    """
    recognizable = jpeg_files.with_marker_first(content)
    if recognizable is not content:
        found = _convert(recognizable)
        return found._replace(remark=found.remark or 'bytes before the first marker')
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except PIL.UnidentifiedImageError:
        if file_signatures.lacks_directory(content):
            raise Broken(ENDS_TOO_EARLY) from None
        raise Broken(file_signatures.why_unreadable(content)) from None
    except Image.DecompressionBombError:
        raise Broken(f'too large: more than {MAX_PIXELS:,} pixels') from None
    raw = file_signatures.why_raw_is_unreadable(image, content)
    if raw:
        raise Broken(raw)
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise Broken(
            f'too large: {width} x {height} is more than {MAX_PIXELS:,} pixels'
            if width * height
            else 'no pixels'
        )
    if image.format in JPEGS or image.format == 'PNG':
        return _convert_decodable(content, image)
    image.load()
    if image.mode.startswith('I;16') or (image.format, image.mode) == ('PPM', 'I'):
        greys = _oriented(_deep_greys(image), image)
        if _white_is_unknown(image, content):
            return Decodable(_encoded_deep(greys), image.format, int(greys.max()))
        # Pillow has scaled them by the white that the file names.
        shallow = np.rint(greys / 257).astype(np.uint8)
        return Decodable(_encoded(shallow.repeat(3, axis=-1), 'PNG'), image.format)
    colors = np.asarray(_over_white(image))
    if _white_is_unknown(image, content):  # Pillow keeps the upper eight bits
        deep = _oriented(colors, image).astype(np.uint16) * 257
        brightest = int(colors.max())
        # Pillow rounds the values of a PPM file, and truncates others.
        peak = int((brightest - 0.5) * 257) if image.format == 'PPM' else brightest * 256 + 255
        return Decodable(_encoded_deep(deep), image.format, max(0, peak), has_upper_bits_only=True)
    return Decodable(_encoded(_oriented(colors, image), image.format), image.format)


def _convert_decodable(content: bytes, image: Image.Image) -> Decodable:
    """Checks a JPEG or PNG file, decoded by TensorFlow alone; turns it if its EXIF data say so."""
    # Also notices damage that Pillow does not, such as a wrong checksum.
    decoded = image_ops.decode(content).numpy()
    width, height = image.size
    if decoded.shape[:2] != (height, width):
        raise Broken(
            f'{width} x {height} pixels for Pillow, {decoded.shape[1]} x {decoded.shape[0]} for '
            'TensorFlow'
        )
    if _png_depth(content) != 16:
        turned = _encoded(_oriented(decoded, image), image.format) if _is_turned(image) else content
        return Decodable(turned, image.format)
    deep = tf.io.decode_png(content, channels=4, dtype=tf.uint16).numpy()  # [height, width, 4]
    turned = _encoded_deep(_oriented(deep, image)) if _is_turned(image) else content
    return Decodable(turned, image.format, int(deep[..., :3].max()))


def _png_depth(content: bytes) -> int:
    """Returns the bits of a channel, or 0 for a file that is not PNG."""
    return content[image_ops.PNG_DEPTH_OFFSET] if content.startswith(image_ops.PNG_SIGNATURE) else 0


def _encoded(pixels: np.ndarray, file_format: str) -> bytes:
    """Encodes uint8 [height, width, 3] as PNG, or as JPEG if `file_format` was lossy already."""
    encoded = io.BytesIO()
    if file_format in LOSSY:
        Image.fromarray(pixels).save(encoded, 'JPEG', quality=95, subsampling=0)
    else:
        Image.fromarray(pixels).save(encoded, 'PNG')
    return encoded.getvalue()


def _encoded_deep(pixels: np.ndarray) -> bytes:
    """Encodes uint16 [height, width, 1, 3 or 4] as PNG, which does not say which value is white."""
    return tf.io.encode_png(pixels).numpy()


def _oriented(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    """Turns pixels [height, width, channels] as the EXIF data of `image` say."""
    if not _is_turned(image):
        return pixels
    channels = [
        Image.fromarray(pixels[..., index]).transpose(_turn(image))
        for index in range(pixels.shape[-1])
    ]
    return np.stack([np.asarray(channel) for channel in channels], -1)


def _turn(image: Image.Image) -> Any:
    return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))


def _is_turned(image: Image.Image) -> bool:
    try:
        return _turn(image) is not None
    except Exception:  # damaged EXIF data does not harm the pixels
        return False


def _over_white(image: Image.Image) -> Image.Image:
    """Returns the first frame of an image that TensorFlow cannot read, as RGB over white.

    Raises: Broken: the file does not say which value is white.
    """
    if image.mode in ('I', 'F'):
        raise Broken(
            'float or 32-bit pixels, and nothing says which value is white: save it with 8 or 16 '
            'bits'
        )
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
    return image.convert('RGB')


def _deep_greys(image: Image.Image) -> np.ndarray:
    """Returns grey values of more than 8 bits, uint16 [height, width, 1]; 0 is black."""
    greys = np.asarray(image)[..., None].astype(np.uint16)  # Pillow's conversion clips
    if image.format == 'TIFF' and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        return 2 ** max(_bits_of_tiff(image)) - 1 - greys
    return greys


def _white_is_unknown(image: Image.Image, content: bytes) -> bool:
    """Returns whether a file has 16 bits a channel, or in TIFF more than 8.

    It may not use all of them, and nothing in it says which value is white.
    """
    if image.format == 'TIFF':
        return max(_bits_of_tiff(image)) > 8
    if image.format == 'PPM':
        return _largest_of_ppm(content) == 2**16 - 1
    return image.format == 'JPEG2000' and file_signatures.depth_of_jpeg2000(content) == 16


def _bits_of_tiff(image: Image.Image) -> tuple[int, ...]:
    bits = image.tag_v2.get(BITS_PER_SAMPLE, 1)
    return bits if isinstance(bits, tuple) else (bits,)


def _largest_of_ppm(content: bytes) -> int:
    """Returns the value of white, the fourth word of a PGM or PPM file; 1 for PBM."""
    words = re.sub(rb'#[^\n]*', b'', content[:1000]).split(maxsplit=4)
    return 1 if words[0] in (b'P1', b'P4') else int(words[3])


def _without_warning(content: bytes, found: Decodable) -> Decodable:
    """Returns what to read in place of a file about which libjpeg may warn.

    Args:
        content: the file.
        found: what `_convert` made of it.

    Returns: `found`, with the warning as a remark (harmless) or a doubt. Its content has the same
        pixels, and causes no warning.

    Raises: Broken: the warning is of damage.
    """
    if found.file_format not in JPEGS:
        return found
    recognizable = jpeg_files.with_marker_first(content)
    quiet = jpeg_files.without_faults(recognizable, _decode_with_warning)
    if quiet.damage:
        raise Broken(f'damaged: {quiet.damage}')
    if found.content != recognizable:  # a converted copy is quiet anyway
        return found._replace(remark=quiet.remark, doubt=quiet.doubt)
    return found._replace(content=quiet.content, remark=quiet.remark, doubt=quiet.doubt)


def _decode_with_warning(content: bytes) -> tuple[np.ndarray, str]:
    """Returns a JPEG file's pixels, uint8 [height, width, 3], and libjpeg's warning."""
    with captured_stderr() as said:
        pixels = image_ops.decode(content).numpy()
        return pixels, one_line(said().decode(errors='replace'))


def _fault(error: Exception, content: bytes) -> str:
    """Returns why a file cannot be used, on one line; `content` is what could be read of it."""
    reason = _reason(error)
    if isinstance(error, Broken) or not content:
        return reason
    # 'truncated' is Pillow's word.
    if file_signatures.ends_too_early(content) or 'truncated' in reason.lower():
        return ENDS_TOO_EARLY
    return f'it cannot be decoded ({reason}): copy or download it again, or convert it to PNG'


def _reason(error: Exception) -> str:
    # TensorFlow adds the names of its nodes and operations.
    text = getattr(error, 'strerror', None) or re.sub(r'\{\{.*?\}\}|\[Op:.*?\]', '', str(error))
    return printable(one_line(text, 200)) or type(error).__name__
