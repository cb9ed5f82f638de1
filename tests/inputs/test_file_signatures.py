"""A file that is no image is called what it is, with what to do about it; HEIC is read where
pillow-heif is there.
"""

import bz2
import gzip
import io
import json
import lzma
import struct
import subprocess
import sys
import tarfile
import zipfile

import h5py
import numpy as np
import pytest
from PIL import Image, features

from inputs import file_signatures, heif, image_folder, image_validation
from tests.conftest import refused
from tests.inputs.test_image_folder import (
    ALPHA,
    GREY,
    ORIENTED,
    PICTURE,
    READ,
    ROOT,
    dataset_config,
    encoded,
    fill,
    flat,
    grey,
    of_file,
    over_white,
    own_data_folder,  # noqa: F401 - a fixture
    turned,
    write,
)


def brands(main, *compatible, version=0):
    """The beginning of a file in the ISO base media format."""
    content = b'ftyp' + main.encode() + version.to_bytes(4, 'big') + ''.join(compatible).encode()
    return (4 + len(content)).to_bytes(4, 'big') + content + b'\0\0\0\x08free' + bytes(100)


def written(write_it):
    buffer = io.BytesIO()
    write_it(buffer)
    return buffer.getvalue()


def zipped(buffer):
    with zipfile.ZipFile(buffer, 'w') as archive:
        archive.writestr('x.png', flat(1))


def tarred(buffer):
    with tarfile.open(fileobj=buffer, mode='w') as archive:
        archive.addfile(tarfile.TarInfo('x.png'))


def hdf5(buffer):
    with h5py.File(buffer, 'w') as file:
        file['image'] = PICTURE


LFS = (
    b'version https://git-lfs.github.com/spec/v1\noid '
    b'sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n'
)
HEIC_SIGNS = {
    'HEIC': (brands('heic', 'mif1', 'heic'), 'an HEIC image'),
    'HEIC of an iPhone': (
        brands('heic', 'mif1', 'MiPr', 'miaf', 'MiHB', 'heic'),
        'an HEIC image',
    ),
    'HEIC with a general main brand': (brands('mif1', 'mif1', 'heic', 'hevc'), 'an HEIC image'),
    'HEIC of 10 bits': (brands('heix', 'mif1', 'heix'), 'an HEIC image'),
    'HEIC sequence': (brands('hevc', 'msf1', 'hevc'), 'an HEIC image'),
    'HEIF of another codec': (brands('mif1', 'mif1', 'jpeg'), 'an HEIF image'),
}
# {kind: (content, what it is called, a part of what to do)}
SIGNS = {
    'AVIF that is damaged': (brands('avif', 'avif', 'mif1', 'miaf'), 'an AVIF image', 'damaged'),
    'AVIF with a general main brand': (
        brands('mif1', 'avif', 'mif1'),
        'an AVIF image',
        'damaged',
    ),
    'AVIF sequence': (brands('avis', 'avif', 'avis', 'msf1'), 'an AVIF image', 'damaged'),
    'JPEG XL': (b'\xff\x0a' + bytes(100), 'a JPEG XL image', 'djxl FILE.jxl FILE.png'),
    'JPEG XL in a container': (
        b'\0\0\0\x0cJXL \r\n\x87\n' + brands('jxl ', 'jxl '),
        'a JPEG XL image',
        'djxl',
    ),
    'JPEG XR': (b'II\xbc\x01\x08\0\0\0' + bytes(100), 'a JPEG XR image', 'JxrDecApp'),
    'JPEG-LS': (
        b'\xff\xd8\xff\xf7\0\x0b' + bytes(100),
        'a JPEG-LS image',
        'magick FILE.jls FILE.png',
    ),
    'Photoshop': (
        b'8BPS\0\x01' + bytes(100),
        'a Photoshop file (PSD)',
        "magick 'FILE.psd[0]' FILE.png",
    ),
    'icon': (encoded(PICTURE, 'ICO'), 'a Windows icon or cursor', 'magick'),
    'Mac icon': (encoded(PICTURE, 'ICNS'), 'a Mac icon', 'magick'),
    'TGA': (encoded(PICTURE, 'TGA'), 'a TGA image', 'magick FILE.tga FILE.png'),
    'DDS': (encoded(PICTURE, 'DDS'), 'a DDS texture', 'magick FILE.dds FILE.png'),
    'PCX': (encoded(PICTURE, 'PCX'), 'a PCX image', 'magick'),
    'QOI': (b'qoif\0\0\0\x08\0\0\0\x08\x03\0' + bytes(100), 'a QOI image', 'magick'),
    'OpenEXR': (
        b'v/1\x01\x02\0\0\0' + bytes(100),
        'an OpenEXR image',
        'magick FILE.exr FILE.png',
    ),
    'Radiance': (
        b'#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n' + bytes(100),
        'a Radiance HDR image',
        'magick',
    ),
    'DICOM': (bytes(128) + b'DICM\x02\0\0\0' + bytes(100), 'a DICOM file', 'dcmj2pnm'),
    'FITS': (b'SIMPLE  =                    T' + bytes(100), 'a FITS image', 'magick'),
    'PDF': (encoded(PICTURE, 'PDF'), 'a PDF document', 'pdftoppm'),
    'EPS': (encoded(PICTURE, 'EPS'), 'PostScript', 'magick -density 300 FILE.eps FILE.png'),
    'EPS with a preview': (b'\xc5\xd0\xd3\xc6\x1e\0\0\0' + bytes(100), 'PostScript', 'magick'),
    'SVG': (
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        'a drawing (SVG)',
        'rsvg-convert',
    ),
    'SVG with a header': (
        b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- made by hand -->\n<svg width="9"/>',
        'a drawing (SVG)',
        'rsvg-convert',
    ),
    'raw file of Canon': (
        brands('crx ', 'crx ', 'isom'),
        'a Canon raw file (CR3)',
        'darktable-cli FILE.cr3 FILE.jpg',
    ),
    'raw file of Fujifilm': (
        b'FUJIFILMCCD-RAW 0201FF383501X-T1' + bytes(100),
        'a Fujifilm raw file (RAF)',
        'darktable-cli',
    ),
    'raw file of Panasonic': (
        b'IIU\0\x18\0\0\0' + bytes(100),
        'a Panasonic raw file (RW2)',
        'darktable-cli',
    ),
    'raw file of Olympus': (
        b'IIRO\x08\0\0\0' + bytes(100),
        'an Olympus raw file (ORF)',
        'darktable-cli',
    ),
    'raw file of Sigma': (
        b'FOVb\0\0\x02\0' + bytes(100),
        'a Sigma raw file (X3F)',
        'darktable-cli',
    ),
    'MP4': (
        brands('isom', 'isom', 'iso2', 'avc1', 'mp41', version=512),
        'an MP4 video',
        'ffmpeg -i FILE.mp4',
    ),
    'MP4 of a phone': (brands('mp42', 'isom', 'mp42'), 'an MP4 video', 'ffmpeg'),
    'MOV': (brands('qt  ', 'qt  '), 'a QuickTime video', 'ffmpeg -i FILE.mov'),
    'old MOV': (b'\0\0\0\x08wide\0\0\x10\0mdat' + bytes(100), 'a QuickTime video', 'ffmpeg'),
    'AVI': (b'RIFF\x24\0\0\0AVI LIST' + bytes(100), 'an AVI video', 'ffmpeg'),
    'WebM': (b'\x1aE\xdf\xa3\x01\0\0\0' + bytes(100), 'a Matroska or WebM video', 'ffmpeg'),
    'Git LFS': (LFS, 'a Git LFS pointer', 'git lfs pull'),
    'git-annex': (
        b'/annex/objects/SHA256E-s12345--4d7a2146.jpg\n',
        'a git-annex pointer',
        'git annex get',
    ),
    'git-annex link that became a file': (
        b'../../.git/annex/objects/x/y/SHA256E-s12345--4d7a2146.jpg',
        'a git-annex pointer',
        'git annex get',
    ),
    'web page': (
        b'\r\n <!DOCTYPE html>\n<html><body>404</body></html>',
        'a web page (HTML)',
        'get it again',
    ),
    'web page without a type': (
        b'<HTML><HEAD><TITLE>Sign in</TITLE>',
        'a web page (HTML)',
        'needs a login',
    ),
    'answer of a bucket': (
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        'XML',
        'download it again',
    ),
    'JSON': (json.dumps({'error': {'code': 403}}).encode(), 'JSON', 'download it again'),
    "a Mac's other file": (
        b'\0\x05\x16\x07\0\x02\0\0Mac OS X        ' + bytes(100),
        "a Mac's metadata file (AppleDouble)",
        'delete it',
    ),
    'zip': (written(zipped), 'a zip archive', 'unpack it'),
    'tar': (written(tarred), 'a tar archive', 'unpack it'),
    'gzip': (gzip.compress(flat(1)), 'a gzip archive', 'unpack it'),
    'bzip2': (bz2.compress(flat(1)), 'a bzip2 archive', 'unpack it'),
    'xz': (lzma.compress(flat(1)), 'an xz archive', 'unpack it'),
    'NumPy': (written(lambda buffer: np.save(buffer, PICTURE)), 'a NumPy array', 'save it as PNG'),
    'HDF5': (written(hdf5), 'an HDF5 file', 'PNG'),
    'zeros': (bytes(5000), 'nothing but zeros', 'copy or download it again'),
    'JPEG without its tables': (b'\xff\xd8\xff\xe0' + bytes(100), 'a JPEG file', 'it is damaged'),
    'PNG without a header': (b'\x89PNG\r\n\x1a\n' + bytes(100), 'a PNG file', 'it is damaged'),
    'PNG that was sent as text': (
        encoded(PICTURE).replace(b'\r\n', b'\n'),
        'a PNG file',
        'it is damaged',
    ),
}


@pytest.mark.parametrize('kind', SIGNS)
@pytest.mark.parametrize('ending', ['jpg', 'tif'])
def test_a_file_is_called_what_it_is_whatever_its_ending(tmp_path, kind, ending):
    content, what, advice = SIGNS[kind]
    write(tmp_path / f'x.{ending}', content)
    reason = of_file(str(tmp_path / f'x.{ending}'))[0].broken
    assert (
        reason.startswith(f'not a readable image: {what}, which begins with b')
        and advice in reason.split('; ', 1)[1]
    )
    assert len(reason) <= 200 and reason.isprintable()


@pytest.mark.parametrize(
    'content',
    [
        b'text',
        b'The free picture',
        b'BMW, a car',
        b'PKW, ein Auto',
        b'P.S. I write',
        b'a,b\n1,2\n',
        bytes(4) + b'x' * 600,
        b'\0\0\0\x18fty',
        np.random.RandomState(0).bytes(10_000),
    ],
)
def test_what_begins_with_no_sign_is_shown(content):
    assert (
        file_signatures.why_unreadable(content)
        == f'not a readable image: it begins with {content[:16]!r}; download it again, or '
        'remove it'
    )


@pytest.mark.parametrize('name', [name for name, *_ in READ.values()])
def test_no_picture_that_is_read_is_taken_for_something_else(name):
    """Every format that is read has a name of its own here, for when it is damaged, and no
    other.
    """
    content = next(content for other, content, *_ in READ.values() if other == name)
    what, advice = file_signatures._identify(content)
    assert what and advice == file_signatures.UNREAD


def test_every_reason_fits_a_line():
    for what, advice in [
        (what, advice) for _, what, advice in file_signatures.UNSUPPORTED + file_signatures.MARKUP
    ]:
        assert (
            len(f'not a readable image: {what}, which begins with {bytes(16)!r}; {advice}') <= 200
        )


@pytest.mark.parametrize(
    'feature, content',
    [
        ('webp', READ['WebP'][1]),
        ('jpg_2000', READ['JPEG 2000'][1]),
        ('avif', brands('avif', 'avif', 'mif1')),
    ],
)
def test_a_pillow_that_lacks_a_format_is_named(monkeypatch, feature, content):
    monkeypatch.setattr(features, 'check', lambda name: name != feature)
    assert file_signatures.why_unreadable(content).endswith(
        'this build of Pillow cannot read it: python -m pip install --force-reinstall pillow'
    )


# Raw files of cameras that are TIFF files, of which Pillow would read the thumbnail.

RAW = {
    'DNG': ({50706: b'\1\4\0\0', 254: 1, 330: 8}, b'', 'darktable-cli FILE.dng'),
    'DNG with the whole image first': ({50706: b'\1\4\0\0'}, b'', 'darktable-cli FILE.dng'),
    'NEF': ({254: 1, 330: 8, 271: 'NIKON CORPORATION'}, b'', 'darktable-cli'),
    'CR2': ({271: 'Canon'}, b'CR\2\0', 'darktable-cli FILE.cr2'),
}


def tiff(tags, mark=b''):
    """A TIFF file with these tags. With a mark behind the eight bytes of its header, its directory
    is at its end.
    """
    content = encoded(PICTURE, 'TIFF', tiffinfo=tags)
    if not mark:
        return content
    (count,) = struct.unpack('<H', content[8:10])
    directory = content[8 : 10 + 12 * count + 4]
    return (
        content[:4]
        + struct.pack('<I', len(content))
        + mark.ljust(len(directory), b'\0')
        + content[8 + len(directory) :]
        + directory
    )


@pytest.mark.parametrize('kind', RAW)
def test_the_thumbnail_of_a_raw_file_is_no_picture(tmp_path, kind):
    tags, mark, advice = RAW[kind]
    write(tmp_path / 'x.tif', tiff(tags, mark))
    reason = of_file(str(tmp_path / 'x.tif'))[0].broken
    assert (
        reason.startswith("not a readable image: a camera's raw file")
        and advice in reason
        and len(reason) <= 200
    )


def test_a_tiff_file_whose_directory_is_at_its_end_is_read(tmp_path):
    write(tmp_path / 'x.tif', tiff({}, b'none'))
    np.testing.assert_array_equal(of_file(str(tmp_path / 'x.tif'))[1], PICTURE)


@pytest.mark.parametrize(
    'tags', [{271: 'NIKON CORPORATION'}, {330: 8}, {254: 0, 330: 8}, {254: 2}, {254: 1}]
)
def test_other_tiff_files_with_such_tags_are_read(tmp_path, tags):
    write(tmp_path / 'x.tif', tiff(tags))
    check, pixels = of_file(str(tmp_path / 'x.tif'))
    assert check.broken == ''
    np.testing.assert_array_equal(pixels, PICTURE)


def test_raw_camera_files_beside_jpegs_are_noted_not_broken(tmp_path):
    fill(tmp_path)
    for name in ('cat/1.CR2', 'cat/2.cr2', 'dog/1.NEF', 'dog/x.psd', 'dog/notes.txt'):
        write(tmp_path / name, b'II*\0')
    found = image_folder.find(dataset_config(tmp_path))
    assert found.broken == () and found.notes[:2] == (
        'not used, as their formats are not supported: 2 .cr2, 1 .nef, 1 .psd; convert them '
        'to JPEG or PNG',
        "not used, as their names do not end like an image's: 1 .txt",
    )


def test_a_class_of_such_files_alone_says_what_to_do(tmp_path):
    fill(tmp_path)
    write(tmp_path / 'owl' / '1.CR2', b'II*\0')
    with refused(image_folder.RunError, 'owl (1 .cr2)', fix='convert .cr2 to JPEG or PNG'):
        image_folder.find(dataset_config(tmp_path))


# HEIC.


@pytest.fixture
def without_heif(monkeypatch):
    monkeypatch.setattr(heif, 'VERSION', '')
    monkeypatch.setattr(
        image_validation,
        'FORMATS',
        tuple(name for name in image_validation.FORMATS if name != 'HEIF'),
    )


@pytest.mark.usefixtures('without_heif')
@pytest.mark.parametrize('kind', HEIC_SIGNS)
def test_heic_is_named_with_what_reads_it(tmp_path, kind):
    content, what = HEIC_SIGNS[kind]
    write(tmp_path / 'x.jpg', content)
    reason = of_file(str(tmp_path / 'x.jpg'))[0].broken
    assert (
        reason.startswith(f'not a readable image: {what}, which begins with ')
        and len(reason) <= 200
    )
    assert (
        'python -m pip install pillow-heif to read it, or convert it: heif-convert FILE.hei'
        in reason
    )


@pytest.mark.slow
def test_checks_are_those_of_what_was_installed():
    """With pillow-heif installed or taken away, files are examined again."""
    show = (
        'import sys; {}; from inputs import image_validation; print(image_validation.RULES, '
        '"HEIF" in image_validation.FORMATS)'
    )
    without = subprocess.run(
        [sys.executable, '-c', show.format('sys.modules["pillow_heif"] = None')],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    assert (
        without.startswith(image_validation.RULES.split(', pillow-heif')[0])
        and without.endswith(' False\n')
        and 'pillow-heif' not in without
    )
    assert (
        (f', pillow-heif {heif.VERSION}' in image_validation.RULES)
        == ('HEIF' in image_validation.FORMATS)
        == bool(heif.VERSION)
    )


needs_heif = pytest.mark.skipif(
    not heif.VERSION, reason="pillow-heif is not installed: python -m pip install '.[heif]'"
)


def heic(array, mode=None, **options):
    return encoded(array, 'HEIF', mode, quality=95, **options)


def made_of_two():
    import pillow_heif

    file = pillow_heif.from_pillow(Image.fromarray(255 - PICTURE))
    file.add_from_pillow(Image.fromarray(PICTURE))
    return written(lambda buffer: file.save(buffer, quality=95, primary_index=1))


def heic_turned(orientation):
    """As a phone writes it: the file itself says how it is to be turned (irot, imir), and EXIF says
    it once more.
    """
    exif = Image.Exif()
    exif[0x0112] = orientation
    return heic(PICTURE, exif=exif.tobytes())


HEIC = {
    'of colours': (lambda: heic(PICTURE), PICTURE),
    'of greys': (lambda: heic(GREY), grey(GREY)),
    'of 16 bits': (lambda: heic(GREY.astype(np.uint16) * 257), grey(GREY)),
    'that can be seen through': (
        lambda: heic(np.dstack([PICTURE, ALPHA])),
        over_white(PICTURE, ALPHA),
    ),
    'of several images': (made_of_two, PICTURE),
    'with an orientation in EXIF alone, which is not what turns a HEIC': (
        lambda: turned(6, 'HEIF', quality=95),
        PICTURE,
    ),
    **{
        f'with orientation {number}': (lambda number=number: heic_turned(number), shown)
        for number, shown in ORIENTED.items()
    },
}


@needs_heif
@pytest.mark.parametrize('name', ['x.heic', 'x.HEIF', 'x.hif', 'x.jpg'])
@pytest.mark.parametrize('kind', HEIC)
def test_heic_is_read_as_it_was_made(tmp_path, kind, name):
    make, expected = HEIC[kind]
    write(tmp_path / name, make())
    check, pixels = of_file(str(tmp_path / name))
    assert check.broken == '' and check.copy.endswith('.png' if kind == 'of 16 bits' else '.jpg')
    assert pixels.shape == expected.shape and np.abs(pixels - expected.astype(float)).max() <= 16


@needs_heif
@pytest.mark.parametrize('part', [0.05, 0.3, 0.9, 0.99])
def test_heic_that_is_cut_off_is_broken(tmp_path, part):
    content = heic(PICTURE)
    fill(tmp_path)
    write(tmp_path / 'cat' / 'x.heic', content[: int(part * len(content))])
    found = image_folder.find(dataset_config(tmp_path))
    assert [path for path, _ in found.broken] == ['cat/x.heic']
