"""A folder of images: what can be read is read right, what cannot is named, and nothing hangs or
trains on garbage.
"""

import collections
import cProfile
import io
import itertools
import os
import pstats
import re
import socket
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tqdm
from PIL import Image, features

from common.commands import ROOT
from common.errors import ConfigError, RunError
from configs import default
from inputs import datasets, image_folder, image_ops, image_validation
from tests.conftest import refused

ROWS, COLUMNS = np.mgrid[:48, :64]
PICTURE = np.stack([4 * COLUMNS, 5 * ROWS, 255 - 2 * ROWS - 2 * COLUMNS], -1).astype(
    np.uint8
)  # [48, 64, 3], smooth
GREY = PICTURE[..., 0]
ALPHA = PICTURE[..., 1]
DEEP = (PICTURE.astype(np.uint16) * 257) + COLUMNS[..., None].astype(np.uint16)  # 16 bits
MARKED = np.where(
    (COLUMNS // 16 + ROWS // 16)[..., None] % 2, np.uint8([250, 10, 20]), np.uint8([0, 120, 240])
)  # two colours


@pytest.fixture(autouse=True)
def own_data_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(
        image_validation.tfds.core.constants, 'DATA_DIR', str(tmp_path_factory.mktemp('data'))
    )


def dataset_config(root, **values):
    config = default.get_config().dataset
    config.update({'name': 'folder', 'data_dir': str(root), **values})
    return config


def write(path, content):
    path = os.fsencode(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb') as file:
        file.write(content)


def encoded(array, file_format='PNG', mode=None, **options):
    buffer, picture = io.BytesIO(), Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(buffer, file_format, **options)
    return buffer.getvalue()


def flat(value, file_format='PNG'):
    """An image of one colour, another one for each value below 65,536."""
    return encoded(np.full((8, 9, 3), [value % 256, value // 256, 0], np.uint8), file_format)


def fill(root, classes=('cat', 'dog'), count=5, split=''):
    """`count` images of their own in each class."""
    for label, name in enumerate(classes):
        for number in range(count):
            write(
                os.path.join(root, split, name, f'{number}.png'),
                flat(number + 1000 * label + 10_000 * (split == 'test')),
            )


def of_file(path):
    """The FileCheck on a file, and the uint8 [height, width, 3] that TensorFlow reads then."""
    name = os.path.basename(path)
    check = image_validation.examine(os.path.dirname(path), [name])[name]
    pixels = None if check.broken else image_ops.decode(tf.io.read_file(check.copy or path)).numpy()
    return check, pixels


# Images that are read, and how.


def over_white(rgb, alpha):
    share = alpha[..., None] / 255
    return rgb * share + 255 * (1 - share)


def grey(values):
    return np.repeat(values[..., None], 3, -1)


def with_frames(file_format, **options):
    frames = [Image.fromarray(MARKED), Image.fromarray(255 - MARKED)]
    buffer = io.BytesIO()
    frames[0].save(buffer, file_format, save_all=True, append_images=frames[1:], **options)
    return buffer.getvalue()


def turned(orientation, file_format, array=PICTURE, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(array, file_format, exif=exif, **options)


def with_transparent_colour(file_format):
    palette = Image.fromarray(MARKED).quantize(2)
    index = palette.getpixel((0, 0))
    buffer = io.BytesIO()
    palette.save(buffer, file_format, transparency=index)
    return buffer.getvalue()


JPEG = encoded(PICTURE, 'JPEG', quality=95)
CLEAR = np.where(
    (MARKED[0, 0] == MARKED).all(-1, keepdims=True), np.uint8(255), MARKED
)  # where that colour is transparent
BLACK_AND_WHITE = np.where(MARKED[..., 0] > 100, 255, 0).astype(np.uint8)
# What a viewer shows of PICTURE, stored with each EXIF orientation (EXIF 2.32, tag 0x0112): where
# row 0 and column 0 belong.
ORIENTED = {
    1: PICTURE,
    2: PICTURE[:, ::-1],
    3: PICTURE[::-1, ::-1],
    4: PICTURE[::-1],
    5: PICTURE.swapaxes(0, 1),
    6: np.rot90(PICTURE, -1),
    7: PICTURE[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90(PICTURE),
}

# {kind: (file name, content, what it shows, largest difference, whether a copy is made)}
READ = {
    'RGB JPEG': ('x.jpg', JPEG, PICTURE, 12, False),
    'progressive JPEG': (
        'x.jpeg',
        encoded(PICTURE, 'JPEG', quality=95, progressive=True),
        PICTURE,
        12,
        False,
    ),
    'grey JPEG': ('x.JPG', encoded(GREY, 'JPEG', quality=95), grey(GREY), 4, False),
    'CMYK JPEG': (
        'x.jpe',
        encoded(PICTURE, 'JPEG', 'CMYK', quality=95, subsampling=0),
        PICTURE,
        8,
        False,
    ),
    'JPEG of several images': (
        'x.mpo',
        with_frames('MPO', quality=95, subsampling=0),
        MARKED,
        60,
        False,
    ),
    'JPEG with data behind its end': ('x.jpg', JPEG + b'more' * 100, PICTURE, 12, False),
    'JPEG filled up before its end': (
        'x.jpg',
        JPEG[:-2] + bytes(100) + JPEG[-2:],
        PICTURE,
        12,
        True,
    ),
    'JPEG with damaged EXIF': (
        'x.jpg',
        encoded(PICTURE, 'JPEG', quality=95, exif=b'Exif\0\0nonsense'),
        PICTURE,
        12,
        False,
    ),
    'JPEG called PNG': ('x.png', JPEG, PICTURE, 12, False),
    'JPEG called HEIC': ('x.heic', JPEG, PICTURE, 12, False),
    'RGB PNG': ('x.png', encoded(PICTURE), PICTURE, 0, False),
    'PNG called JPEG': ('x.jpg', encoded(PICTURE), PICTURE, 0, False),
    'grey PNG': ('x.png', encoded(GREY), grey(GREY), 0, False),
    'grey PNG with alpha': (
        'x.png',
        encoded(np.stack([GREY, ALPHA], -1)),
        over_white(grey(GREY), ALPHA),
        1,
        False,
    ),
    'RGBA PNG': (
        'x.png',
        encoded(np.dstack([PICTURE, ALPHA])),
        over_white(PICTURE, ALPHA),
        1,
        False,
    ),
    '16-bit grey PNG': (
        'x.png',
        tf.io.encode_png(DEEP[..., :1]).numpy(),
        grey(DEEP[..., 0] / 257),
        1,
        False,
    ),
    '16-bit RGB PNG': ('x.png', tf.io.encode_png(DEEP).numpy(), DEEP / 257, 1, False),
    '16-bit RGBA PNG': (
        'x.png',
        tf.io.encode_png(np.dstack([DEEP, DEEP[..., 1]])).numpy(),
        over_white(DEEP / 257, DEEP[..., 1] / 257),
        2,
        False,
    ),
    'palette PNG': (
        'x.png',
        encoded(MARKED, 'PNG', 'P'),
        np.asarray(Image.fromarray(MARKED).convert('P').convert('RGB')),
        0,
        False,
    ),
    'palette PNG with a transparent colour': (
        'x.png',
        with_transparent_colour('PNG'),
        CLEAR,
        0,
        False,
    ),
    'black and white PNG': (
        'x.png',
        encoded(BLACK_AND_WHITE, 'PNG', '1'),
        grey(BLACK_AND_WHITE),
        0,
        False,
    ),
    'animated PNG': ('x.apng', with_frames('PNG'), MARKED, 0, False),
    'animated GIF': ('x.gif', with_frames('GIF'), MARKED, 0, True),
    'GIF with a transparent colour': ('x.gif', with_transparent_colour('GIF'), CLEAR, 0, True),
    'WebP': ('x.webp', encoded(PICTURE, 'WEBP', quality=95), PICTURE, 20, True),
    'WebP with alpha': (
        'x.webp',
        encoded(np.dstack([PICTURE, ALPHA]), 'WEBP', lossless=True, exact=True),
        over_white(PICTURE, ALPHA),
        8,
        True,
    ),
    'animated WebP': ('x.webp', with_frames('WEBP', lossless=True), MARKED, 60, True),
    'BMP': ('x.bmp', encoded(PICTURE, 'BMP'), PICTURE, 0, True),
    'TIFF': ('x.tif', encoded(PICTURE, 'TIFF'), PICTURE, 0, True),
    'compressed TIFF': (
        'x.tiff',
        encoded(PICTURE, 'TIFF', compression='tiff_lzw'),
        PICTURE,
        0,
        True,
    ),
    'CMYK TIFF': ('x.tif', encoded(PICTURE, 'TIFF', 'CMYK'), PICTURE, 0, True),
    'LAB TIFF': (
        'x.tif',
        encoded(np.full((9, 8, 3), [150, 90, 60], np.uint8), 'TIFF', 'LAB'),
        np.full((9, 8, 3), [150, 90, 60]),
        3,
        True,
    ),
    '16-bit grey TIFF': ('x.tif', encoded(DEEP[..., 0], 'TIFF'), grey(DEEP[..., 0] / 257), 1, True),
    '16-bit PGM': ('x.pgm', encoded(DEEP[..., 0], 'PPM'), grey(DEEP[..., 0] / 257), 1, True),
    'JPEG 2000': ('x.jp2', encoded(PICTURE, 'JPEG2000'), PICTURE, 8, True),
    **{
        f'JPEG with orientation {number}': (
            'x.jpg',
            turned(number, 'JPEG', quality=95, subsampling=0),
            shown,
            8,
            number > 1,
        )
        for number, shown in ORIENTED.items()
    },
    **{
        f'{kind} on its side': ('x.' + kind.lower(), turned(6, kind), ORIENTED[6], 0, True)
        for kind in ('PNG', 'TIFF')
    },
}
if features.check('avif'):
    READ['AVIF'] = ('x.avif', encoded(PICTURE, 'AVIF', quality=95), PICTURE, 20, True)


@pytest.mark.parametrize('kind', READ)
def test_tensorflow_reads_it_as_it_was_made(tmp_path, kind):
    name, content, expected, tolerance, converted = READ[kind]
    write(tmp_path / name, content)
    check, pixels = of_file(str(tmp_path / name))
    assert check.broken == '' and bool(check.copy) == converted
    assert (
        pixels.shape == expected.shape
        and np.abs(pixels - expected.astype(float)).max() <= tolerance
    )
    read = tf.io.read_file(check.copy or str(tmp_path / name))
    if tf.io.is_jpeg(read):  # a random crop asks for its size
        assert tuple(tf.io.extract_jpeg_shape(read))[:2] == expected.shape[:2]
    assert check.num_bytes == os.path.getsize(check.copy or tmp_path / name)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize(
    'name',
    [
        'with space.png',
        'ünïcödé 猫.png',
        'new\nline.png',
        b'latin-\xe4.png',
        'quote\'".png',
        '[a-b]*?.png',
        '-rf.png',
        'x' * 200 + '.png',
        '%s{0}.png',
    ],
)
def test_a_file_may_have_any_name(tmp_path, name, capsys):
    fill(tmp_path / 'data')
    write(
        os.path.join(os.fsencode(tmp_path), b'data', b'dog', os.fsencode(name)), flat(99 * 256 + 1)
    )
    write(os.path.join(os.fsencode(tmp_path), b'data', b'dog', b'broken ' + os.fsencode(name)), b'')
    source = datasets.load(dataset_config(tmp_path / 'data'))
    colours = {
        bytes(tf.io.decode_image(content)[0, 0].numpy()): label
        for split in ('train', 'test')
        for content, label in source.examples(split).as_numpy_iterator()
    }
    assert colours[bytes([1, 99, 0])] == 1 and len(colours) == 11
    (line,) = [note for note in source.notes if 'empty: 0 bytes' in note]
    assert line.isprintable() and line.encode() and 'broken ' in line


# Files that are broken.


def chunk(kind, content):
    return (
        struct.pack('>I', len(content))
        + kind
        + content
        + struct.pack('>I', zlib.crc32(kind + content))
    )


def changed(content, place, new):
    return content[:place] + new + content[place + len(new) :]


NOISE = np.random.RandomState(0).randint(0, 256, (200, 300, 3)).astype(np.uint8)
LARGE, LYING = encoded(NOISE, 'JPEG', quality=95), turned(6, 'JPEG', NOISE)
PNG, PALETTE, MIDDLE = encoded(NOISE), encoded(NOISE, 'PNG', 'P'), len(LARGE) // 2
SIZE = LARGE.index(b'\xff\xc0') + 5  # height and width, 16 bits each

TOO_SHORT = 'the file ends too early: copy or download it again'
# {kind: (file name, content, what is said)}
BROKEN = {
    'nothing': ('x.jpg', b'', 'empty: 0 bytes'),
    'JPEG cut off': ('x.jpg', LARGE[:MIDDLE], TOO_SHORT),
    'JPEG without its last bytes': ('x.jpg', LARGE[:-20], TOO_SHORT),
    'progressive JPEG cut off': (
        'x.jpg',
        encoded(NOISE, 'JPEG', progressive=True)[:20_000],
        TOO_SHORT,
    ),
    'JPEG on its side, cut off': ('x.jpg', LYING[:20_000], TOO_SHORT),
    'JPEG of which half is zeros': (
        'x.jpg',
        changed(LARGE, MIDDLE, bytes(len(LARGE) - MIDDLE)),
        TOO_SHORT,
    ),
    'JPEG with noise in its middle': (
        'x.jpg',
        changed(LARGE, MIDDLE, NOISE.tobytes()[:4096]),
        'Invalid JPEG data',
    ),
    'JPEG with a little noise': (
        'x.jpg',
        changed(LARGE, MIDDLE, NOISE.tobytes()[:60]),
        'damaged: ',
    ),
    'JPEG with a disk block of zeros': ('x.jpg', changed(LARGE, MIDDLE, bytes(4096)), 'damaged: '),
    'JPEG that lacks a part': ('x.jpg', LARGE[:MIDDLE] + LARGE[MIDDLE + 500 :], 'damaged: '),
    'JPEG on its side, that lacks a part': ('x.jpg', LYING[:20_000] + LYING[20_500:], 'damaged: '),
    'JPEG that says it is wider': (
        'x.jpg',
        changed(LARGE, SIZE, struct.pack('>HH', 200, 900)),
        'damaged: ',
    ),
    'JPEG that says it is a huge square': (
        'x.jpg',
        changed(LARGE, SIZE, struct.pack('>HH', 65_000, 65_000)),
        'too large',
    ),
    'JPEG without pixels': ('x.jpg', changed(LARGE, SIZE, struct.pack('>HH', 0, 0)), ''),
    'JPEG of a start and an end': ('x.jpg', b'\xff\xd8\xff\xd9', 'not a readable image'),
    'PNG cut off': ('x.png', PNG[: len(PNG) // 2], TOO_SHORT),
    'PNG without its end': ('x.png', PNG[:-12], TOO_SHORT),
    'PNG with a wrong checksum': ('x.png', changed(PNG, len(PNG) - 20, b'\0'), 'Invalid PNG data'),
    'palette PNG with a wrong checksum': (
        'x.png',
        changed(PALETTE, len(PALETTE) - 20, b'\0'),
        'Invalid PNG data',
    ),
    'PNG bomb': (
        'x.png',
        PNG[:8]
        + chunk(b'IHDR', struct.pack('>IIBBBBB', 60_000, 60_000, 8, 2, 0, 0, 0))
        + chunk(b'IDAT', zlib.compress(b'')),
        'too large',
    ),
    'GIF cut off': ('x.gif', encoded(NOISE, 'GIF')[:5000], TOO_SHORT),
    'GIF without an image': ('x.gif', b'GIF89a\x08\0\x08\0\0\0\0;', ''),
    'WebP cut off': ('x.webp', encoded(NOISE, 'WEBP')[:5000], TOO_SHORT),
    'WebP of noise': ('x.webp', b'RIFF\x00\x10\0\0WEBPVP8 ' + NOISE.tobytes()[:4096], ''),
    'BMP cut off': ('x.bmp', encoded(NOISE, 'BMP')[:5000], TOO_SHORT),
    'BMP with a wrong header': ('x.bmp', changed(encoded(NOISE, 'BMP'), 14, b'\xff\xff'), ''),
    'TIFF cut off': ('x.tif', encoded(NOISE, 'TIFF', compression='tiff_lzw')[:5000], TOO_SHORT),
    'float TIFF': ('x.tif', encoded(GREY.astype(np.float32), 'TIFF'), 'float or 32-bit pixels'),
    '32-bit TIFF': ('x.tif', encoded(GREY.astype(np.int32), 'TIFF'), 'float or 32-bit pixels'),
    'TIFF of noise': ('x.tif', b'II*\0\x08\0\0\0' + NOISE.tobytes()[:4096], ''),
    'noise': ('x.jpg', NOISE.tobytes()[:10_000], 'not a readable image'),
    'error page': (
        'x.jpg',
        b'<!DOCTYPE html><html><body>404 Not Found</body></html>',
        "begins with b'<!DOCTYPE html>",
    ),
    'text': ('x.png', b'a pointer to a large file\n', "begins with b'a pointer"),
    'text of another encoding': (
        'x.png',
        'not an image'.encode('utf-16'),
        'not a readable image',
    ),
    'PDF': ('x.jpg', b'%PDF-1.4\n%\xe2\xe3\xcf\xd3\n', "begins with b'%PDF"),
    'PostScript': (
        'x.jpg',
        b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n',
        "begins with b'%!PS",
    ),
    'SVG': (
        'x.svg',
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "begins with b'<svg",
    ),
    'HEIC': ('x.heic', b'\0\0\0\x18ftypheic\0\0\0\0mif1heic' + bytes(100), 'ftypheic'),
    'JPEG XL': ('x.jxl', b'\xff\x0a' + bytes(100), 'not a readable image'),
    'zip': ('x.jpg', b'PK\x03\x04' + bytes(100), "begins with b'PK"),
}


def assert_skipped(root, path, says, capfd):
    """The file is named with its reason, and the ten images beside it are all that is there."""
    found = image_folder.find(dataset_config(root))
    assert (
        [name for name, _ in found.broken] == [path]
        and says in found.broken[0][1]
        and '\n' not in found.broken[0][1]
    )
    assert sum(map(len, found.splits.values())) == 10
    for picture in (picture for pictures in found.splits.values() for picture in pictures):
        assert tf.io.decode_image(tf.io.read_file(picture.path)).shape == (8, 9, 3)
    assert '1 of 11 files are broken and skipped' in ' '.join(found.notes)
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('kind', BROKEN)
def test_a_broken_file_is_skipped_and_named(tmp_path, kind, capfd):
    name, content, says = BROKEN[kind]
    fill(tmp_path)
    write(tmp_path / 'cat' / name, content)
    assert_skipped(tmp_path, f'cat/{name}', says, capfd)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as end:
        here = os.getcwd()
        os.chdir(os.path.dirname(path))  # a socket's path is short
        end.bind('x.jpg')
        os.chdir(here)


NO_FILES = {
    'pipe': (os.mkfifo, 'not a regular file'),
    'socket': (make_socket, 'not a regular file'),
    'device': (lambda path: os.symlink('/dev/zero', path), 'not a regular file'),
    'link to nothing': (lambda path: os.symlink('nowhere.jpg', path), 'a link to nothing'),
    'link to itself': (lambda path: os.symlink('x.jpg', path), 'a link to nothing'),
}


@pytest.mark.parametrize('kind', NO_FILES)
def test_what_is_no_file_is_skipped_and_named_without_waiting(tmp_path, kind, capfd):
    make, says = NO_FILES[kind]
    fill(tmp_path)
    make(str(tmp_path / 'cat' / 'x.jpg'))
    assert_skipped(tmp_path, 'cat/x.jpg', says, capfd)


def test_an_unreadable_file_is_skipped_and_tried_again(tmp_path, monkeypatch, capfd):
    fill(tmp_path)
    write(tmp_path / 'cat' / 'x.png', flat(99))
    read = image_validation.read

    def refuse(path):
        if path.endswith('cat/x.png'):
            raise PermissionError(13, 'Permission denied', path)
        return read(path)

    with monkeypatch.context() as patched:
        patched.setattr(image_validation, 'read', refuse)
        assert_skipped(tmp_path, 'cat/x.png', 'Permission denied', capfd)
    assert image_folder.find(dataset_config(tmp_path)).broken == ()


def test_a_picture_that_is_too_large_is_not_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(image_validation, 'MAX_PIXELS', 48 * 64 - 1)
    monkeypatch.setattr(image_validation.tf.io, 'decode_image', None)
    write(tmp_path / 'x.png', encoded(PICTURE))
    assert 'too large: 64 x 48' in of_file(str(tmp_path / 'x.png'))[0].broken


def test_every_picture_among_damaged_ones_is_judged_by_itself(tmp_path):
    contents = {
        f'{number:03}.jpg': (
            JPEG,
            LARGE[:MIDDLE] + LARGE[MIDDLE + 500 :],
            LARGE,
            b'',
            LARGE[:MIDDLE],
        )[number % 5]
        for number in range(150)
    }
    for name, content in contents.items():
        write(tmp_path / name, content)
    checks = image_validation.examine(str(tmp_path), list(contents))
    assert [name for name in contents if not checks[name].broken] == [
        name for number, name in enumerate(contents) if number % 5 in (0, 2)
    ]


def test_a_damaged_jpeg_is_hardly_ever_taken_for_whole(tmp_path):
    random = np.random.RandomState(1)
    for number in range(100):
        begin, length = random.randint(1000, len(LARGE) - 2000), random.randint(1, 1000)
        write(tmp_path / f'{number}.jpg', changed(LARGE, begin, random.bytes(length)))
    checks = image_validation.examine(str(tmp_path), sorted(os.listdir(tmp_path)))
    assert sum(not check.broken for check in checks.values()) <= 3


# Folders.


def test_content_decides_the_type_and_other_files_are_left_alone(tmp_path):
    fill(tmp_path / 'data')
    for name in (
        'notes.txt',
        '.hidden.jpg',
        '.ipynb_checkpoints/0.jpg',
        '__MACOSX/0.jpg',
        'Thumbs.db',
        'labels.csv',
        'x.jpg.part',
        'noending',
    ):
        write(tmp_path / 'data' / 'cat' / name, b'nonsense')
    write(tmp_path / 'data' / '.git' / '0.jpg', flat(1))
    write(tmp_path / 'data' / '__MACOSX' / '0.jpg', flat(1))
    write(tmp_path / 'data' / 'README.md', b'nonsense')
    write(tmp_path / 'data' / 'cat' / 'more' / 'of them.jpg' / '0.png', flat(250))
    found = image_folder.find(dataset_config(tmp_path / 'data'))
    assert (
        found.class_names == ('cat', 'dog')
        and found.broken == ()
        and sum(map(len, found.splits.values())) == 11
    )
    (note,) = [note for note in found.notes if 'held out' not in note]
    assert (
        note.startswith('not used, as their names do not end like')
        and '1 .txt' in note
        and '1 without extension' in note
    )


LEFT_BY_SYSTEMS = [
    'lost+found',
    '$RECYCLE.BIN',
    'System Volume Information',
    '.Trashes',
    '.Spotlight-V100',
    '.fseventsd',
    '@eaDir',
    '__MACOSX',
    '#recycle',
    '#snapshot',
    '@Recycle',
    '@Recently-Snapshot',
    '.@__thumb',
    '.ipynb_checkpoints',
    '__pycache__',
    'LOST.DIR',
    'FOUND.000',
    'RECYCLER',
    'RECYCLED',
    '$WINDOWS.~BT',
    'WindowsApps',
    'Network Trash Folder',
    'Temporary Items',
    '.AppleDouble',
    '.git',
    '$recycle.bin',
    'SYSTEM VOLUME INFORMATION',
    'Lost+Found',
    '@EADIR',
]


@pytest.mark.parametrize('name', LEFT_BY_SYSTEMS)
@pytest.mark.parametrize('place', ['', 'cat', 'train', 'train/cat'])
def test_what_a_system_leaves_is_not_even_read(tmp_path, monkeypatch, place, name):
    root = tmp_path / 'data'
    fill(root, split='train' if place.startswith('train') else '')
    before = image_folder.find(dataset_config(root))
    write(root / place / name / 'S-1-5-18' / '0.png', flat(77))
    for file in ('Thumbs.db', 'THUMBS.DB', 'desktop.ini', 'Desktop.ini', '.DS_Store', '._0.png'):
        write(root / place / file, b'nonsense')
    scandir = os.scandir

    def refuse(path):
        if name in str(path):
            raise PermissionError(13, 'Permission denied', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    assert image_folder.find(dataset_config(root)) == before and before.class_names == (
        'cat',
        'dog',
    )


@pytest.mark.parametrize(
    'name',
    [
        'found',
        'lost',
        'recycle',
        'found.1',
        'desktop',
        'thumbs',
        'recycled',
        '$100',
        '#1',
        '@home',
        'system volume',
    ],
)
def test_a_class_may_be_called_almost_as_what_a_system_leaves(tmp_path, name):
    fill(tmp_path, ('cat', name))
    assert image_folder.find(dataset_config(tmp_path)).class_names == tuple(sorted(('cat', name)))


def test_links_are_followed_once(tmp_path):
    fill(tmp_path / 'data')
    fill(tmp_path, ['elsewhere'], count=7)
    os.symlink('../../elsewhere', tmp_path / 'data' / 'cat' / 'more')
    os.symlink('..', tmp_path / 'data' / 'cat' / 'up')
    os.symlink('.', tmp_path / 'data' / 'dog' / 'loop')
    found = image_folder.find(dataset_config(tmp_path / 'data'))
    assert collections.Counter(
        picture.label for pictures in found.splits.values() for picture in pictures
    ) == {0: 12, 1: 5}


def no_such_folder(root):
    return os.path.join(root, 'nowhere')


def archive(root):
    write(root / 'data.zip', b'PK\x03\x04')
    return root / 'data.zip'


def pictures_without_classes(root):
    for number in range(3):
        write(root / f'{number}.png', flat(number))


def texts(root):
    for name in ('cat', 'dog'):
        write(root / name / 'a.txt', b'text')


def splits_without_classes(root):
    for split in ('train', 'test'):
        write(root / split / '0.png', flat(0))


def make(*names, split='', also=()):
    """A maker of a folder with these classes, and empty folders `also`."""

    def maker(root):
        fill(root, names, split=split)
        for name in also:
            os.makedirs(os.path.join(os.fsencode(root), os.fsencode(name)))

    return maker


def then(*makers):
    def maker(root):
        for each in makers:
            each(root)

    return maker


def file_in(name, content):
    return lambda root: write(os.path.join(root, name), content)


def loop(root):
    fill(root)
    os.symlink('.', root / 'loop')


def one_each(root):
    fill(root, count=1)


def mvtec(root):
    """Two data sets side by side, as MVTec AD comes: each has good parts to train on, and other
    ones to test.
    """
    for name in ('bottle', 'cable'):
        fill(root, ('good',), split=f'{name}/train')
        fill(root, ('good', 'broken_large', 'contamination'), split=f'{name}/test')
        fill(root, ('broken_large', 'contamination'), split=f'{name}/ground_truth')


IMPOSSIBLE = {
    'no folder named': (
        lambda root: '',
        {},
        ConfigError,
        (),
        '--config.dataset.data_dir=DIR',
    ),
    'folder that is not there': (no_such_folder, {}, RunError, (), 'it should hold'),
    'archive': (archive, {}, RunError, (), 'unpack it'),
    'part of a split': (
        make('cat', 'dog', split='train'),
        {'train_split': 'train[:50%]'},
        ConfigError,
        ("'train[:50%]'",),
        'config.dataset.eval_share',
    ),
    'sum of splits': (
        make('cat', 'dog', split='train'),
        {'train_split': 'train+val'},
        ConfigError,
        ("'train+val'",),
        '',
    ),
    'split without name': (
        make('cat', 'dog', split='train'),
        {'eval_split': ''},
        ConfigError,
        ("''",),
        '',
    ),
    'split that leads out': (
        make('cat', 'dog', split='train'),
        {'eval_split': '../other'},
        ConfigError,
        ("'../other'",),
        '',
    ),
    'empty folder': (lambda root: None, {}, RunError, ('is empty',), ''),
    'images without classes': (
        pictures_without_classes,
        {},
        RunError,
        ('3 files',),
        '',
    ),
    'classes of texts': (
        texts,
        {},
        RunError,
        ('cat (1 .txt), dog (1 .txt)',),
        '',
    ),
    'empty class': (
        make('cat', 'dog', also=['bird']),
        {},
        RunError,
        ('bird (empty)',),
        'fill them',
    ),
    'empty class in a split': (
        then(make('cat', 'dog', split='train', also=['train/bird']), make('cat', split='test')),
        {},
        RunError,
        ('bird (empty)',),
        '',
    ),
    'class of hidden files': (
        then(make('cat', 'dog'), file_in('bird/.0.jpg', b'')),
        {},
        RunError,
        ('bird (empty)',),
        '',
    ),
    'class that is a loop': (loop, {}, RunError, ('loop (empty)',), ''),
    'class of broken files': (
        then(make('cat', 'dog'), file_in('bird/0.jpg', b'')),
        {},
        RunError,
        (),
        'bird',
    ),
    'one class': (
        make('cat'),
        {},
        RunError,
        ('one class folder, cat',),
        '',
    ),
    'one class in a split': (
        then(make('cat', split='train'), make('cat', split='test')),
        {},
        RunError,
        ('one class folder, cat',),
        '',
    ),
    'names that differ in case': (
        make('cat', 'Cat', 'dog'),
        {},
        RunError,
        ("'Cat', 'cat'",),
        '',
    ),
    'names that differ in a space': (
        make('cat', 'cat ', 'dog'),
        {},
        RunError,
        ("'cat', 'cat '",),
        '',
    ),
    'names that differ in their letters': (
        make('k\u00e4tzchen', 'ka\u0308tzchen'),
        {},
        RunError,
        ('look the same',),
        '',
    ),
    'name that is no text': (
        make('cat', 'dog', also=[b'\xe4\xff']),
        {},
        RunError,
        ("'\\udce4\\udcff'",),
        'rename',
    ),
    'name of two lines': (
        make('cat', 'dog\ncat'),
        {},
        RunError,
        ("'dog\\ncat'",),
        'rename',
    ),
    'classes that training lacks': (
        then(make('cat', 'dog', split='train'), make('cat', 'dogs', split='test')),
        {},
        RunError,
        ('did you mean dog?',),
        '',
    ),
    'nothing to train on': (
        make('cat', 'dog', split='test'),
        {},
        RunError,
        ('train', 'test'),
        '--config.dataset.train_split=NAME',
    ),
    'another name to evaluate': (
        then(make('cat', 'dog', split='train'), make('cat', 'dog', split='val')),
        {},
        RunError,
        ('test', 'val'),
        '--config.dataset.eval_split=val',
    ),
    'other names': (
        then(make('cat', 'dog', split='Train'), make('cat', 'dog', split='Valid')),
        {},
        RunError,
        (),
        '--config.dataset.train_split=Train --config.dataset.eval_split=Valid',
    ),
    'splits without classes': (
        splits_without_classes,
        {},
        RunError,
        ('test, train',),
        '',
    ),
    'evaluation without classes': (
        then(make('cat', 'dog', split='train'), file_in('test/0.png', b'')),
        {},
        RunError,
        ('/test',),
        '--config.dataset.eval_split=held_out',
    ),
    'one level too high': (
        make('cat', 'dog', split='mine/train'),
        {},
        RunError,
        (),
        '--config.dataset.data_dir=',
    ),
    'data sets side by side': (
        mvtec,
        {},
        RunError,
        ('/bottle', 'test and train'),
        '--config.dataset.data_dir=',
    ),
    'data set for finding what is unlike the rest': (
        then(make('good', split='train'), make('good', 'broken', split='test')),
        {},
        RunError,
        (),
        '--config.dataset.train_split=test --config.dataset.eval_split=held_out',
    ),
    'data set beside something else': (
        then(
            make('cat', 'dog', split='photos/train'),
            make('cat', 'dog', split='photos/test'),
            make('tools'),
        ),
        {},
        RunError,
        ('/photos', 'test and train'),
        '--config.dataset.data_dir=',
    ),
    'splits of one class of several': (
        then(make('cat', 'dog'), make('train', 'test', split='cow')),
        {},
        RunError,
        ('test and train', 'train in cat, dog'),
        '',
    ),
    'one split in each class, not the same': (
        then(make('train', split='cat'), make('test', split='dog')),
        {},
        RunError,
        ('test and train', 'train in dog'),
        '',
    ),
    'splits below something in a class': (
        then(make('train', 'test', split='cat/images'), make('dog')),
        {},
        RunError,
        ('/cat/images', 'test and train'),
        'if cat is a class, sort',
    ),
    'parts of classes below splits': (
        then(make('a', 'b', split='cat/train'), make('a', 'b', split='cat/test'), make('dog')),
        {},
        RunError,
        (),
        'if cat is a class, sort',
    ),
    'splits below a split': (
        then(make('train', 'val', split='train/cat'), make('dog', split='train')),
        {},
        RunError,
        ('/train', 'cat/train, cat/val'),
        '',
    ),
    'splits in a split': (
        then(make('cat', 'dog', split='train/train'), make('cat', 'dog', split='train/val')),
        {},
        RunError,
        ('/train', 'train, val'),
        '--config.dataset.data_dir=',
    ),
    'splits that differ in case': (
        then(make('cat', 'dog', split='train'), make('cat', 'dog', split='Train')),
        {},
        RunError,
        ('Train, train',),
        'merge or rename',
    ),
    'splits in classes that differ in case': (
        then(make('train', 'test', split='cat'), make('Train', 'test', split='dog')),
        {},
        RunError,
        ('CLASS', 'Train, train'),
        '',
    ),
    'other names in classes': (
        then(make('Train', 'Val', split='cat'), make('Train', 'Val', split='dog')),
        {},
        RunError,
        ('CLASS', 'Train, Val'),
        '--config.dataset.train_split=Train --config.dataset.eval_split=Val',
    ),
    'another name to evaluate in classes': (
        then(make('train', 'val', split='cat'), make('train', 'val', split='dog')),
        {},
        RunError,
        ('CLASS', 'test', 'val'),
        '--config.dataset.eval_split=val',
    ),
    'classes below something in a split': (
        then(make('cat', 'dog', split='train/images'), make('cat', 'dog', split='test/images')),
        {},
        RunError,
        ('one class folder, images',),
        'if cat, dog in it',
    ),
    'one image in each class': (one_each, {}, RunError, (), 'add more'),
    'too many broken files': (
        then(make('cat', 'dog'), file_in('cat/x.jpg', b''), file_in('dog/y.jpg', b'text')),
        {},
        RunError,
        ('2 of 12 files',),
        '',
    ),
    'a broken file where none may be': (
        then(make('cat', 'dog'), file_in('cat/x.jpg', b'')),
        {'max_broken': 0.0},
        RunError,
        ('1 of 11 files',),
        '',
    ),
}


@pytest.mark.parametrize('kind', IMPOSSIBLE)
def test_a_folder_that_cannot_be_trained_on_is_one_line(tmp_path, kind):
    maker, values, error, data, fix = IMPOSSIBLE[kind]
    (tmp_path / 'data').mkdir()
    root = maker(tmp_path / 'data')
    with refused(error, *data, fix=fix) as caught:
        image_folder.find(dataset_config(tmp_path / 'data' if root is None else root, **values))
    str(caught.value).encode()


def test_too_many_broken_files_are_named_counted_and_listed(tmp_path):
    fill(tmp_path)
    for number in range(12):
        write(tmp_path / 'cat' / f'broken{number:02}.jpg', b'text')
    path = Path(image_validation.list_of_broken(str(tmp_path)))
    fix = '--config.dataset.max_broken=0.55'
    with refused(RunError, '12 of 22 files', '54.55%', '50.00%', fix=fix) as caught:
        image_folder.find(dataset_config(tmp_path, max_broken=0.5))
    text = str(caught.value)
    assert 'cat/broken00.jpg' in text
    assert 'broken09' in text
    assert 'broken10' not in text
    listed = path.read_text().splitlines()
    assert str(path) in text
    assert len(listed) == 12
    assert listed[-1].startswith('cat/broken11.jpg: ')
    assert len(image_folder.find(dataset_config(tmp_path, max_broken=0.55)).broken) == 12


def test_a_folder_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    fill(tmp_path)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith('dog'):
            raise PermissionError(13, 'Permission denied', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    with refused(RunError, 'Permission denied', 'dog'):
        image_folder.find(dataset_config(tmp_path))


def test_a_data_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    fill(tmp_path / 'data')
    write(tmp_path / 'file', b'')
    monkeypatch.setattr(image_validation.tfds.core.constants, 'DATA_DIR', str(tmp_path / 'file'))
    with refused(RunError, tmp_path / 'file', fix='TFDS_DATA_DIR'):
        image_folder.find(dataset_config(tmp_path / 'data'))


def test_no_room_for_a_converted_picture_is_no_broken_file(tmp_path, monkeypatch):
    fill(tmp_path)
    write(tmp_path / 'cat' / 'x.bmp', flat(3, 'BMP'))
    write_file = image_validation._write

    def refuse(path, content):
        if path.endswith('.png'):
            raise tf.errors.ResourceExhaustedError(None, None, 'No space left on device')
        write_file(path, content)

    monkeypatch.setattr(image_validation, '_write', refuse)
    with refused(RunError, 'No space left on device'):
        image_folder.find(dataset_config(tmp_path))


# Splits.


def names_of(found, split):
    return {os.path.join(*picture.path.split(os.sep)[-2:]) for picture in found.splits[split]}


def test_two_splits_are_taken_as_they_are(tmp_path):
    fill(tmp_path, split='train')
    fill(tmp_path, count=2, split='test')
    fill(tmp_path, ['cat'], count=2, split='val')
    write(tmp_path / 'train' / 'x.png', flat(7))
    found = image_folder.find(dataset_config(tmp_path))
    assert names_of(found, 'train') == {
        f'{name}/{number}.png' for name in ('cat', 'dog') for number in range(5)
    }
    assert names_of(found, 'test') == {
        f'{name}/{number}.png' for name in ('cat', 'dog') for number in range(2)
    }
    assert all(
        picture.label == ('dog' in picture.path)
        for pictures in found.splits.values()
        for picture in pictures
    )
    assert found.notes == (
        f'not used: val in {tmp_path}',
        f'not used: 1 images in {tmp_path}/train itself, outside any class folder',
    )


@pytest.mark.parametrize('split', ['', 'train'])
def test_a_part_of_each_class_is_held_out_by_a_seed(tmp_path, split):
    for name, count in (('cat', 40), ('dog', 10), ('fox', 1), ('owl', 2)):
        for number in range(count):
            write(tmp_path / split / name / f'{number}.png', flat(number, 'PNG') + name.encode())
    found, again = (image_folder.find(dataset_config(tmp_path)) for _ in range(2))
    assert found.splits == again.splits
    assert (
        not names_of(found, 'train') & names_of(found, 'test')
        and len(found.splits['train']) + len(found.splits['test']) == 53
    )
    assert collections.Counter(picture.label for picture in found.splits['test']) == {
        0: 8,
        1: 2,
        3: 1,
    }
    assert any('no evaluation images of fox' in note for note in found.notes) and any(
        '0.2 of each class' in note for note in found.notes
    )
    assert names_of(image_folder.find(dataset_config(tmp_path, split_seed=1)), 'test') != names_of(
        found, 'test'
    )
    assert (
        len(image_folder.find(dataset_config(tmp_path, eval_share=0.5)).splits['test'])
        == 20 + 5 + 1
    )

    write(
        tmp_path / split / 'dog' / 'new.png', flat(99)
    )  # what another class holds, or how a file is called, is nothing to the others
    os.rename(tmp_path / split / 'cat' / '0.png', tmp_path / split / 'cat' / 'z.png')
    cats, before = (
        {name for name in names_of(result, 'test') if 'cat' in name}
        for result in (image_folder.find(dataset_config(tmp_path)), found)
    )
    assert cats == {'cat/z.png' if name == 'cat/0.png' else name for name in before}


def contents(found):
    """{split: sorted (label, digest) of its images}."""
    return {
        split: sorted((picture.label, picture.digest) for picture in pictures)
        for split, pictures in found.splits.items()
    }


@pytest.mark.parametrize(
    'where',
    [
        '{name}/{split}',
        '{name}/{split}/images',
        '{split}/{name}/images',
        '{split}/{name}/images/of/it',
    ],
)
@pytest.mark.parametrize(
    'splits, values',
    [
        (('train', 'test'), {}),
        (('train', 'test', 'val'), {}),
        (('train', 'test', 'val'), {'eval_split': 'val'}),
        (('Training', 'Validation'), {'train_split': 'Training', 'eval_split': 'Validation'}),
        (('train', 'test'), {'train_split': 'test', 'eval_split': 'train'}),
        (('train', 'test'), {'eval_split': 'held_out'}),
        (('train', 'test'), {'train_split': 'test', 'eval_split': 'held_out'}),
    ],
)
def test_classes_may_stand_above_the_splits(tmp_path, where, splits, values):
    for root, place in (('usual', '{split}/{name}'), ('other', where)):
        for number, (split, name) in enumerate(itertools.product(splits, ('cat', 'dog'))):
            for index in range(5):
                write(
                    tmp_path / root / place.format(split=split, name=name) / f'{index}.png',
                    flat(100 * number + index),
                )
    usual, other = (
        image_folder.find(dataset_config(tmp_path / root, **values)) for root in ('usual', 'other')
    )
    assert contents(other) == contents(usual) and other.class_names == usual.class_names == (
        'cat',
        'dog',
    )
    assert all(len(pictures) in (2, 8, 10) for pictures in other.splits.values())


ARRANGEMENTS = sorted(
    {
        '/'.join(parts)
        for extra in ((), ('x',), ('images', 'x'))
        for parts in itertools.permutations(('{name}', '{split}', *extra))
    }
)


@pytest.mark.parametrize('where', ARRANGEMENTS)
def test_pictures_of_two_splits_are_never_mixed(tmp_path, where):
    paths = [
        where.format(name=name, split=split)
        for name in ('cat', 'dog')
        for split in ('train', 'test')
    ]
    for number, path in enumerate(paths):
        for index in range(5):
            write(tmp_path / 'data' / path / f'{index}.png', flat(100 * number + index))
    try:
        found = image_folder.find(dataset_config(tmp_path / 'data'))
    except RunError as error:
        assert '\n' not in str(error)
        assert any(way in error.fix for way in ('--config.dataset.data_dir=', 'sort', 'move'))
        assert not re.fullmatch('({name}/{split}|{split}/{name})(/images)?(/x)?', where)
    else:
        assert {split: len(pictures) for split, pictures in found.splits.items()} == {
            'train': 10,
            'test': 10,
        } and found.class_names == ('cat', 'dog')
        for split, pictures in found.splits.items():
            assert all(
                split in picture.path.split(os.sep)
                and found.class_names[picture.label] in picture.path
                for picture in pictures
            )


def test_what_lies_beside_the_splits_of_classes_is_counted(tmp_path):
    for name in ('cat', 'dog'):
        fill(tmp_path, ('train', 'test', 'val'), split=name)
    for number, path in enumerate(('cat/0.png', 'dog/more/0.png', 'cat/train/0.txt', '0.png')):
        write(tmp_path / path, flat(50_000 + number))
    found = image_folder.find(dataset_config(tmp_path))
    assert {split: len(pictures) for split, pictures in found.splits.items()} == {
        'train': 10,
        'test': 10,
    }
    assert found.notes[:4] == (
        f'the splits are the folders train and test in each class folder of {tmp_path}',
        f'not used: 12 images in class folders of {tmp_path}, but not in train or test',
        "not used, as their names do not end like an image's: 1 .txt",
        f'not used: 1 images in {tmp_path} itself, outside any class folder',
    )


def test_a_single_split_in_each_class_is_a_folder_like_any_other(tmp_path):
    for name in ('cat', 'dog'):
        fill(tmp_path, ('train',), split=name)
    assert {
        split: len(pictures)
        for split, pictures in image_folder.find(dataset_config(tmp_path)).splits.items()
    } == {'train': 8, 'test': 2}


def test_evaluation_images_per_class_suffice_without_training(tmp_path):
    for name in ('cat', 'dog'):
        fill(tmp_path, ('test',), split=name)
    source = datasets.load(dataset_config(tmp_path), needs_training=False)
    assert (source.num_train, source.num_eval, source.class_names) == (0, 10, ('cat', 'dog'))


def test_a_part_can_be_held_out_beside_other_splits(tmp_path):
    for split in ('train', 'val', 'test'):
        fill(tmp_path, split=split)
    found = image_folder.find(dataset_config(tmp_path, eval_split='held_out'))
    assert {split: len(pictures) for split, pictures in found.splits.items()} == {
        'train': 8,
        'held_out': 2,
    }
    assert found.notes[0] == f'not used: test, val in {tmp_path}'


def test_anomaly_data_is_classified_as_advised(tmp_path):
    mvtec(tmp_path)
    found = image_folder.find(
        dataset_config(tmp_path / 'bottle', train_split='test', eval_split='held_out')
    )
    assert found.class_names == ('broken_large', 'contamination', 'good') and found.notes[
        0
    ].startswith('not used: ground_truth, train in ')
    assert {split: len(pictures) for split, pictures in found.splits.items()} == {
        'test': 12,
        'held_out': 3,
    }


# How much is done: a folder of 20,000 images is looked at, at every start.


@pytest.mark.parametrize('split', ['', 'train'])
@pytest.mark.parametrize('do', [image_folder.find, image_folder.count])
def test_each_folder_is_listed_once(tmp_path, monkeypatch, do, split):
    fill(tmp_path, [f'class{number}' for number in range(30)], count=2, split=split)
    write(tmp_path / split / 'class0' / 'more' / '0.png', flat(1))
    listed, scandir = [], os.scandir
    monkeypatch.setattr(
        os, 'scandir', lambda path: listed.append(os.path.relpath(path, tmp_path)) or scandir(path)
    )
    do(dataset_config(tmp_path))
    monkeypatch.undo()
    assert sorted(listed) == sorted(
        os.path.relpath(place, tmp_path) for place, _, _ in os.walk(tmp_path)
    )


def test_no_list_is_searched_for_each_file(tmp_path):
    """A search goes through a list, so that one for each file takes a time that grows with files
    times classes.
    """
    fill(tmp_path, [f'class{number}' for number in range(30)], count=4)
    profile = cProfile.Profile()
    profile.runcall(image_folder.find, dataset_config(tmp_path))
    calls = {name: number for (_, _, name), (number, *_) in pstats.Stats(profile).stats.items()}
    assert calls['_stamp'] == 120
    assert (
        sum(
            number
            for name, number in calls.items()
            if re.search(r"method '(index|count|remove|insert)' of '(tuple|list)'", name)
        )
        < 30
    )


def test_a_class_may_be_called_as_a_split_is(tmp_path):
    fill(tmp_path, ('car', 'plane', 'train'))
    assert image_folder.find(dataset_config(tmp_path)).class_names == ('car', 'plane', 'train')


def test_duplicates_are_never_on_both_sides_of_a_holdout(tmp_path):
    for name in ('cat', 'dog'):
        for number in range(30):
            write(tmp_path / name / f'{number}.png', flat(number // 3) + name.encode())
    found = image_folder.find(dataset_config(tmp_path))
    assert len(found.splits['test']) == 12 and not any(
        'byte for byte' in note for note in found.notes
    )


def test_images_in_both_splits_or_two_classes_are_counted(tmp_path):
    fill(tmp_path, split='train')
    fill(tmp_path, split='test')
    write(tmp_path / 'test' / 'cat' / 'again.png', flat(1))
    write(tmp_path / 'test' / 'dog' / 'other.png', flat(2))
    notes = image_folder.find(dataset_config(tmp_path)).notes
    assert (
        notes[0].startswith('2 evaluation images are training images as well')
        and 'test/cat/again.png' in notes[0]
    )
    assert (
        notes[1]
        == '1 images are in more than one class, byte for byte, such as test/dog/other.png, '
        'train/cat/2.png'
    )


def test_a_part_of_a_split_has_all_classes(tmp_path):
    fill(tmp_path, [f'class{number}' for number in range(4)], count=50)
    labels = [
        picture.label for picture in image_folder.find(dataset_config(tmp_path)).splits['train']
    ]
    assert min(labels[: len(labels) // 2].count(label) for label in range(4)) >= 10


def test_evaluation_images_suffice_without_training(tmp_path):
    fill(tmp_path, split='test')
    source = datasets.load(dataset_config(tmp_path), needs_training=False)
    assert (source.num_train, source.num_eval, source.class_names) == (0, 10, ('cat', 'dog'))


# What is kept.


@pytest.fixture
def examined(monkeypatch):
    """The files that were decoded."""
    names, check = [], image_validation._check_file
    monkeypatch.setattr(
        image_validation,
        '_check_file',
        lambda path, *rest, **more: (
            names.append(os.path.basename(path)) or check(path, *rest, **more)
        ),
    )
    return names


def test_a_file_is_examined_once_and_again_when_it_changes(tmp_path, examined):
    fill(tmp_path)
    write(tmp_path / 'cat' / 'x.bmp', flat(3, 'BMP'))
    write(tmp_path / 'cat' / 'broken.jpg', b'text')
    first = image_folder.find(dataset_config(tmp_path))
    assert len(examined) == 12
    assert image_folder.find(dataset_config(tmp_path)) == first and len(examined) == 12
    write(tmp_path / 'dog' / '0.png', b'other')
    write(tmp_path / 'dog' / 'new.png', flat(77))
    examined.clear()
    assert [
        name for name, _ in image_folder.find(dataset_config(tmp_path, max_broken=0.5)).broken
    ] == ['cat/broken.jpg', 'dog/0.png']
    assert sorted(examined) == ['0.png', 'new.png']


def test_a_copy_that_is_gone_is_made_again(tmp_path, examined):
    fill(tmp_path)
    write(tmp_path / 'cat' / 'x.bmp', flat(3, 'BMP'))
    (copy,) = [
        picture.path
        for pictures in image_folder.find(dataset_config(tmp_path)).splits.values()
        for picture in pictures
        if 'copies' in picture.path
    ]
    os.remove(copy)
    examined.clear()
    image_folder.find(dataset_config(tmp_path))
    assert os.path.exists(copy) and examined == ['x.bmp']


def test_files_are_examined_again_by_new_rules(tmp_path, examined, monkeypatch):
    fill(tmp_path)
    image_folder.find(dataset_config(tmp_path))
    monkeypatch.setattr(image_validation, 'RULES', 'others')
    for _ in range(2):
        image_folder.find(dataset_config(tmp_path))
    assert len(examined) == 20


@pytest.mark.parametrize(
    'content', [b'', b'{', b'[]', b'{"rules": "0", "files": {}}', b'\xff\xfe', None]
)
def test_what_is_kept_may_be_damaged(tmp_path, examined, content):
    fill(tmp_path)
    first = image_folder.find(dataset_config(tmp_path))
    manifest = os.path.join(
        os.path.dirname(image_validation.list_of_broken(str(tmp_path))), 'manifest.json'
    )
    whole = Path(manifest).read_bytes()
    write(manifest, whole.replace(b'""', b'5, 6, 7', 1) if content is None else content)
    examined.clear()
    assert image_folder.find(dataset_config(tmp_path)) == first and len(examined) == 10


def test_an_interrupted_examination_goes_on(tmp_path, examined, monkeypatch):
    fill(tmp_path, count=50)
    monkeypatch.setattr(image_validation, 'CHUNK', 8)
    check = image_validation._check_file

    def interrupt(path, *rest, **more):
        if len(examined) == 40:
            raise KeyboardInterrupt
        return check(path, *rest, **more)

    monkeypatch.setattr(image_validation, '_check_file', interrupt)
    with pytest.raises(KeyboardInterrupt):
        image_folder.find(dataset_config(tmp_path))
    monkeypatch.setattr(image_validation, '_check_file', check)
    examined.clear()
    image_folder.find(dataset_config(tmp_path))
    assert 50 <= len(examined) <= 70


def test_an_interrupted_examination_leaves_no_thread(tmp_path, monkeypatch):
    """Garbage collection would end them otherwise, wherever it happens to run."""
    fill(tmp_path)
    before = set(threading.enumerate())

    class Interrupted(tqdm.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    monkeypatch.setattr(image_validation.tqdm, 'tqdm', Interrupted)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        image_folder.find(dataset_config(tmp_path))
    left = [thread for thread in set(threading.enumerate()) - before if 'ThreadPool' in thread.name]
    assert left == [], interrupt  # whose traceback keeps what it passed


# The command line.


def call(tmp_path, *arguments):
    return subprocess.run(
        [
            sys.executable,
            os.path.join(ROOT, 'main.py'),
            f'--config={ROOT}/configs/folder.py',
            f'--workdir={tmp_path}/run',
            f'--config.dataset.data_dir={tmp_path}/data',
            '--config.model.name=tiny',
            '--config.model.drop_path=0.0',
            '--config.image_size=16',
            '--config.batch_size=4',
            '--config.train_for=4 steps',
            '--config.checkpoint_every=4 steps',
            *arguments,
        ],
        capture_output=True,
        text=True,
        env={**os.environ, 'TFDS_DATA_DIR': f'{tmp_path}/kept'},
    )


@pytest.mark.slow
def test_a_run_finishes_despite_a_broken_file_and_reports_it(tmp_path):
    fill(tmp_path / 'data')
    write(tmp_path / 'data' / 'cat' / 'x.gif', with_frames('GIF'))
    write(tmp_path / 'data' / 'dog' / 'page.jpg', b'<html>')
    done = call(tmp_path)
    assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr
    assert '1 of 12 files are broken and skipped' in done.stdout
    assert '\n          dog/page.jpg: not a readable image' in done.stdout
    report = (tmp_path / 'run' / 'report.md').read_text()
    assert (
        "dog/page.jpg: not a readable image: a web page (HTML), which begins with b'<html>'; "
        in report
        and '1 of 12 files are broken' in report
    )
    assert (tmp_path / 'run' / 'export' / 'labels.txt').read_text().split() == ['cat', 'dog']


def test_too_many_broken_files_is_one_line_and_status_1(tmp_path):
    fill(tmp_path / 'data')
    for number in range(3):
        write(tmp_path / 'data' / 'dog' / f'page{number}.jpg', LARGE[:MIDDLE])
    done = call(tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert (
        done.stderr.startswith(f'error: 3 of 13 files in {tmp_path}/data are broken')
        and 'dog/page2.jpg: ' in done.stderr
    )
