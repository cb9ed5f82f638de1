"""What a picture file is good for: TensorFlow reads it right as it is, or a converted copy of it, or it is broken.

Verdicts and copies are kept in TFDS's data folder, so that a file is examined once, and again when it has changed.
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
import unicodedata
import uuid
import warnings
from typing import NamedTuple

import numpy as np
import PIL
import tensorflow as tf
import tensorflow_datasets as tfds
import tqdm
from PIL import ExifTags, Image, ImageOps

from errors import RunError, one_line
from inputs import file_signatures, heif

# What is looked at; what a file then is, its content decides. The last two are there to be named: Pillow reads none of them.
SUFFIXES = ('.jpg', '.jpeg', '.jpe', '.jfif', '.mpo', '.png', '.apng', '.gif', '.bmp', '.dib', '.webp', '.tif', '.tiff', '.avif',
            '.jp2', '.j2k', '.ppm', '.pgm', '.pbm', '.pnm', '.heic', '.heif', '.hif', '.jxl', '.svg')
# Formats that begin with a mark of their own, and that Pillow reads without another program (EPS would start Ghostscript).
FORMATS = ('JPEG', 'PNG', 'GIF', 'BMP', 'DIB', 'WEBP', 'TIFF', 'AVIF', 'JPEG2000', 'PPM', *heif.FORMATS)
LOSSY = ('JPEG', 'MPO', 'WEBP', 'AVIF', 'JPEG2000', 'HEIF')  # MPO: a JPEG file with further pictures behind the first
MOST_PIXELS = 2**27  # 400 MB as uint8 [height, width, 3]
MOST_BYTES = 8 * MOST_PIXELS  # of a file: as many pixels, with four channels of 16 bits
CHUNK = 64  # files that are examined between two looks at what was said to standard error
RULES = f'2, Pillow {PIL.__version__}, TensorFlow {tf.__version__}' + (f', pillow-heif {heif.VERSION}' if heif.VERSION else '')  # that verdicts were found by; count up what changes them


class Broken(Exception):
    """Why a file cannot be used."""


class Verdict(NamedTuple):
    """On one file.

    Attributes:
        digest: SHA-256 of its content; '' where that could not be read.
        num_bytes: of what is to be read.
        copy: path of the converted copy that is to be read, or '' for the file itself.
        broken: why it cannot be used, or ''.
    """

    digest: str = ''
    num_bytes: int = 0
    copy: str = ''
    broken: str = ''


def examine(root, paths):
    """Finds out which files can be used; converts those that TensorFlow would refuse or misread.

    Args:
        root: the user's folder.
        paths: of files below it.

    Returns: {path: Verdict}, in the order of `paths`. `list_of_broken(root)` then has those that are broken, if any are.

    Raises: RunError if the data folder cannot be written.
    """
    try:
        tf.io.gfile.makedirs(_copies(root))
        verdicts = _examine_new(root, paths)
        broken = [f'{shown(path)}: {verdicts[path].broken}\n' for path in paths if verdicts[path].broken]
        if broken:
            _write(list_of_broken(root), ''.join(broken).encode())
    except tf.errors.OpError as error:
        raise RunError(f'{_cache(root)} cannot be written ({_reason(error)}): set the environment variable TFDS_DATA_DIR '
                       'to a folder that can be, with room for converted pictures') from error
    return {path: verdicts[path] for path in paths}


def list_of_broken(root):
    """Path of the text file with all broken files, one a line."""
    return os.path.join(_cache(root), 'broken.txt')


def shown(name):
    """The name of a file as it can be printed, on one line."""
    return ascii(name) if any(unicodedata.category(letter) in ('Cc', 'Cs') for letter in name) else name


def _write(path, content):
    """Writes bytes to a file that is either whole or not there. Raises tf.errors.OpError."""
    partial = f'{path}.{uuid.uuid4().hex}'
    with tf.io.gfile.GFile(partial, 'wb') as file:
        file.write(content)
    tf.io.gfile.rename(partial, path, overwrite=True)


def _cache(root):
    place = root.rstrip('/') if '://' in root else os.path.abspath(root)
    name = re.sub('[^A-Za-z0-9._-]', '_', os.path.basename(place))
    return os.path.join(tfds.core.constants.DATA_DIR, 'folder', f'{name}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}')


def _copies(root):
    return os.path.join(_cache(root), 'copies')


def _examine_new(root, paths):
    """Verdicts on all files: those known from before where neither file nor copy has changed since."""
    manifest = os.path.join(_cache(root), 'manifest.json')
    known, copies = _read_manifest(manifest), {'', *(os.path.join(_copies(root), name) for name in tf.io.gfile.listdir(_copies(root)))}
    verdicts, changed = {}, []
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        ask = pool.map if '://' in root else map  # a local answer takes less time than to ask for it elsewhere
        stamps = dict(zip(paths, ask(lambda path: _stamp(os.path.join(root, path)), paths)))
    for path, stamp in stamps.items():
        if isinstance(stamp, Broken):
            verdicts[path] = Verdict(broken=str(stamp))
        elif path in known and known[path][0] == stamp and known[path][1].copy in copies:
            verdicts[path] = known[path][1]
        else:
            changed.append(path)
    if changed:
        print(f'examining {len(changed):,} files of {shown(root)}, once', flush=True)
        try:
            found = _examine_all([os.path.join(root, path) for path in changed], _copies(root))
            with tqdm.tqdm(total=len(changed), unit=' files', disable=None, delay=2, leave=False) as bar:
                for path, verdict in zip(changed, found):
                    verdicts[path] = verdict
                    bar.update()
        finally:  # also what an interrupted start has found out
            known |= {path: (stamps[path], verdicts[path]) for path in changed if path in verdicts and verdicts[path].digest}
            _write(manifest, json.dumps({'rules': RULES, 'files': known}).encode())
    return verdicts


def _read_manifest(path):
    """{path: (stamp, Verdict)}; nothing where there is no manifest, or a damaged one."""
    try:
        with tf.io.gfile.GFile(path, 'rb') as file:
            manifest = json.loads(file.read())
        if manifest['rules'] != RULES:
            return {}
        return {path: (tuple(stamp), Verdict(*verdict)) for path, (stamp, verdict) in manifest['files'].items()}
    except (tf.errors.OpError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _stamp(path):
    """(bytes, nanoseconds of the last change) of a regular file; or Broken."""
    try:
        if '://' in path:
            status = tf.io.gfile.stat(path)
            return status.length, status.mtime_nsec
        status = os.stat(path)
    except (OSError, tf.errors.OpError) as error:
        return Broken('a link to nothing' if os.path.islink(path) else _reason(error))
    if not stat.S_ISREG(status.st_mode):  # to open a pipe would be to wait for ever
        return Broken('no regular file')
    return status.st_size, status.st_mtime_ns


def _examine_all(paths, copies):
    """Yields the Verdict on each file, in order. Raises tf.errors.OpError if a copy cannot be written."""
    Image.init()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of Pillow: each file has its verdict
        for begin in range(0, len(paths), CHUNK):
            chunk = paths[begin:begin + CHUNK]
            with _standard_error() as said:
                verdicts = list(pool.map(lambda path: _verdict(path, copies), chunk))
                if b'Corrupt JPEG data' in said():
                    verdicts = [_listen(path, verdict) for path, verdict in zip(chunk, verdicts)]
            yield from verdicts


@contextlib.contextmanager
def _standard_error():
    """Collects what this process says to standard error, C libraries included; yields a function that returns what is new."""
    usual = os.dup(2)
    with tempfile.TemporaryFile(buffering=0) as said:
        os.dup2(said.fileno(), 2)
        heard = 0

        def new():
            nonlocal heard
            text = os.pread(said.fileno(), os.fstat(said.fileno()).st_size - heard, heard)
            heard += len(text)
            return text

        try:
            yield new
        finally:
            os.dup2(usual, 2)
            os.close(usual)


def _verdict(path, copies):
    digest = ''
    try:
        content = _read(path)
        digest = hashlib.sha256(content).hexdigest()
        converted = _convert(content)
    except MemoryError:  # there may be enough another time, so without digest
        return Verdict(broken='too large for the memory that is free')
    except Exception as error:  # a damaged file can make Pillow raise anything
        return Verdict(digest, broken=_reason(error))
    if converted is None:
        return Verdict(digest, len(content))
    copy = os.path.join(copies, digest + ('.png' if converted.startswith(b'\x89PNG') else '.jpg'))
    _write(copy, converted)
    return Verdict(digest, len(converted), copy)


def _read(path):
    with tf.io.gfile.GFile(path, 'rb') if '://' in path else open(path, 'rb') as file:  # GFile takes no name that is not UTF-8
        content = file.read(MOST_BYTES + 1)
    if not content:
        raise Broken('empty: 0 bytes')
    if len(content) > MOST_BYTES:
        raise Broken(f'too large: more than {MOST_BYTES:,} bytes')
    return content


def _convert(content):
    """The JPEG or PNG file to read in place of this one, or None where TensorFlow reads it right. Raises anything."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except PIL.UnidentifiedImageError:
        raise Broken(file_signatures.reason(content)) from None
    except Image.DecompressionBombError:
        raise Broken(f'too large: more than {MOST_PIXELS:,} pixels') from None
    raw = file_signatures.reason_of_raw(image, content)
    if raw:
        raise Broken(raw)
    width, height = image.size
    if not 0 < width * height <= MOST_PIXELS:
        raise Broken(f'too large: {width} x {height} is more than {MOST_PIXELS:,} pixels' if width * height else 'no pixels')
    turned, decodable = _is_turned(image), image.format in ('JPEG', 'MPO', 'PNG')
    if decodable:  # TensorFlow notices damage that Pillow does not, such as a wrong checksum
        decoded = tf.io.decode_image(content, channels=3, expand_animations=False)
        if decoded.shape[:2] != (height, width):
            raise Broken(f'{width} x {height} pixels for Pillow, {decoded.shape[1]} x {decoded.shape[0]} for TensorFlow')
    if decodable and image.mode in ('L', 'RGB') and not turned and not image.has_transparency_data:
        return None
    file_format, encoded = image.format, io.BytesIO()
    picture = _rgb(ImageOps.exif_transpose(image) if turned else image, file_format)
    if file_format in LOSSY:
        picture.save(encoded, 'JPEG', quality=95, subsampling=0)
    else:
        picture.save(encoded, 'PNG')
    return encoded.getvalue()


def _is_turned(image):
    try:
        return image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    except Exception:  # a picture is no worse for damage in what lies beside it
        return False


def _rgb(image, file_format):
    """The first frame in three channels of 8 bits; what can be seen through is white."""
    image.load()
    if image.mode.startswith('I;16') or (file_format, image.mode) == ('PPM', 'I'):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))  # 65535 / 257 = 255; Pillow would clip
    if image.mode in ('I', 'F'):
        raise Broken('float or 32-bit pixels, and nothing says which is white: save it with 8 or 16 bits')
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
    return image.convert('RGB')


def _listen(path, verdict):
    """The verdict, or a worse one if libjpeg complains of a file that it decodes to the end all the same."""
    content = b'' if verdict.broken else _read(path)
    if not content.startswith(b'\xff\xd8'):
        return verdict
    with _standard_error() as said:
        tf.io.decode_image(content, channels=3, expand_animations=False)
        damage = re.search(rb'Corrupt JPEG data: (.*)', said())
    if not damage:
        return verdict
    unread = re.match(rb'([0-9]+) extraneous bytes before marker 0xd9', damage[1])
    end = content.rfind(b'\xff\xd9')
    if unread and len(set(content[end - int(unread[1]):end])) == 1:  # some cameras fill up a file behind a whole picture
        return verdict
    return Verdict(verdict.digest, broken=f'damaged: {one_line(damage[1].decode(errors="replace"))}')


def _reason(error):
    text = getattr(error, 'strerror', None) or re.sub(r'\{\{.*?\}\}|\[Op:.*?\]', '', str(error))  # TensorFlow adds its own names
    return shown(one_line(text, 200)) or type(error).__name__
