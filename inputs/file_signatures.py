"""Identifies an unreadable file by its first bytes, and says what to do about it.

Sources: the formats' own documents, the register of ISO base media brands (mp4ra.org), and the
magic file of `file`.
"""

import re

from PIL import Image, TiffImagePlugin, features

from inputs import heif, jpeg_files

DAMAGED = 'it is damaged: copy or download it again'
UNREAD = 'it is damaged, or of an unsupported kind: save it as PNG'
UNKNOWN = 'download it again, or remove it'
CONVERT = 'convert it: magick FILE.{0} FILE.png'
RAW = 'convert it: darktable-cli FILE.{0} FILE.jpg'
FRAMES = 'extract frames: ffmpeg -i FILE.{0} -vf fps=1 FILE-%04d.jpg'
UNPACK = 'unpack it, and name the folder'

# Formats that Pillow reads, for files that it refused all the same: (pattern of the first bytes,
# name, Pillow feature required).
SUPPORTED = (
    (rb'\xff\xd8\xff', 'a JPEG file', None),
    (rb'\x89PNG', 'a PNG file', None),
    (rb'GIF8', 'a GIF file', None),
    (rb'RIFF....WEBP', 'a WebP file', 'webp'),
    (rb'\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51', 'a JPEG 2000 file', 'jpg_2000'),
    (rb'II[*+]\x00|MM\x00[*+]', 'a TIFF file', None),
    (rb'BM....\x00\x00\x00\x00', 'a BMP file', None),
    (rb'P[1-7][ \t\r\n]', 'a PPM file', None),
)
# Formats that are not read: (pattern, name, what to do). The first match counts.
UNSUPPORTED = (
    (rb'\xff\xd8\xff\xf7', 'a JPEG-LS image', CONVERT.format('jls')),
    (rb'\xff\x0a|\x00\x00\x00\x0cJXL ', 'a JPEG XL image', 'convert it: djxl FILE.jxl FILE.png'),
    (rb'II\xbc', 'a JPEG XR image', 'convert it: JxrDecApp -i FILE.jxr -o FILE.tif'),
    (rb'BPG\xfb', 'a BPG image', 'convert it: bpgdec -o FILE.png FILE.bpg'),
    (rb'FLIF', 'a FLIF image', 'convert it: flif -d FILE.flif FILE.png'),
    (rb'qoif', 'a QOI image', CONVERT.format('qoi')),
    (rb'8BPS', 'a Photoshop file (PSD)', "convert it: magick 'FILE.psd[0]' FILE.png"),
    (rb'gimp xcf', 'a GIMP file (XCF)', CONVERT.format('xcf')),
    (rb'\x00\x00[\x01\x02]\x00[^\x00]\x00', 'a Windows icon or cursor', CONVERT.format('ico')),
    (rb'icns', 'a Mac icon', CONVERT.format('icns')),
    (rb'DDS ', 'a DDS texture', CONVERT.format('dds')),
    (rb'v/1\x01', 'an OpenEXR image', CONVERT.format('exr')),
    (rb'#\?(RADIANCE|RGBE)', 'a Radiance HDR image', CONVERT.format('hdr')),
    (rb'\x0a[\x00\x02-\x05]\x01[\x01\x02\x04\x08]', 'a PCX image', CONVERT.format('pcx')),
    (rb'SIMPLE  =', 'a FITS image', CONVERT.format('fits')),
    (rb'.{128}DICM', 'a DICOM file', 'convert it: dcmj2pnm +on FILE.dcm FILE.png'),
    (rb'AT&TFORM', 'a DjVu document', 'convert it: ddjvu -format=tiff FILE.djvu FILE.tif'),
    (rb'%!PS|\xc5\xd0\xd3\xc6', 'PostScript', 'convert it: magick -density 300 FILE.eps FILE.png'),
    (rb'.{0,64}%PDF', 'a PDF document', 'convert it: pdftoppm -png FILE.pdf FILE'),
    (rb'FUJIFILMCCD-RAW', 'a Fujifilm raw file (RAF)', RAW.format('raf')),
    (rb'IIU\x00', 'a Panasonic raw file (RW2)', RAW.format('rw2')),
    (rb'IIR[OS]|MMOR', 'an Olympus raw file (ORF)', RAW.format('orf')),
    (rb'FOVb', 'a Sigma raw file (X3F)', RAW.format('x3f')),
    (rb'\x00MRM', 'a Minolta raw file (MRW)', RAW.format('mrw')),
    (rb'RIFF....AVI ', 'an AVI video', FRAMES.format('avi')),
    (rb'\x1aE\xdf\xa3', 'a Matroska or WebM video', FRAMES.format('mkv')),
    (rb'\x00\x00\x01[\xb3\xba]', 'an MPEG video', FRAMES.format('mpg')),
    (rb'FLV\x01', 'a Flash video', FRAMES.format('flv')),
    (rb'0&\xb2u\x8ef\xcf\x11', 'a Windows Media video', FRAMES.format('wmv')),
    (rb'[\x00-\x1f]...(moov|mdat|wide|free|skip|pnot)', 'a QuickTime video', FRAMES.format('mov')),
    (rb'version https://git-lfs', 'a Git LFS pointer', 'the image is elsewhere: git lfs pull'),
    (
        rb'[./]*(git/)?annex/objects/',
        'a git-annex pointer',
        'the image is elsewhere: git annex get .',
    ),
    (rb'\x00\x05\x16[\x00\x07]', "a Mac's metadata file (AppleDouble)", 'delete it'),
    (rb'PK(\x03\x04|\x05\x06)', 'a zip archive', UNPACK),
    (rb'\x1f\x8b', 'a gzip archive', UNPACK),
    (rb'BZh[1-9]', 'a bzip2 archive', UNPACK),
    (rb'\xfd7zXZ', 'an xz archive', UNPACK),
    (rb'\x28\xb5\x2f\xfd', 'a Zstandard archive', UNPACK),
    (rb'7z\xbc\xaf', 'a 7-Zip archive', UNPACK),
    (rb'Rar!', 'a RAR archive', UNPACK),
    (rb'.{257}ustar', 'a tar archive', UNPACK),
    (rb'\x93NUMPY', 'a NumPy array', 'save it as PNG: Image.fromarray(numpy.load(FILE)).save(...)'),
    (rb'\x89HDF', 'an HDF5 file', 'save its images as PNG files'),
    (rb'\xd0\xcf\x11\xe0', 'an Office document or Thumbs.db', 'delete it, or save its images'),
)
# Text formats, which may begin with a byte-order mark, white space and comments.
MARKUP = (
    (rb'<svg', 'a drawing (SVG)', 'convert it: rsvg-convert FILE.svg -o FILE.png'),
    (
        rb'<!doctype html|<html|<head|<body',
        'a web page (HTML)',
        'the download failed, or needs a login: get it again',
    ),
    (rb'<\?xml|<error', 'XML', 'the download may have failed: look at it, and download it again'),
    (
        rb'[{\[]\s*["{\[\]}]',
        'JSON',
        'the download may have failed: look at it, and download it again',
    ),
)
HEIC = (b'heic', b'heix', b'heim', b'heis', b'hevc', b'hevx', b'hevm', b'hevs')
HEIF = (b'mif1', b'mif2', b'msf1', b'miaf')  # generic brands: the codec varies
AVIF = (b'avif', b'avis')

# Extensions of images that are skipped, because none of our readers supports them. They do not
# count as broken: cameras write raw files next to their JPEG files.
SKIPPED_EXTENSIONS = frozenset(
    [
        '.3fr',
        '.arw',
        '.cr2',
        '.cr3',
        '.crw',
        '.dcr',
        '.dng',
        '.erf',
        '.iiq',
        '.k25',
        '.kdc',
        '.mef',
        '.mos',
        '.mrw',
        '.nef',
        '.nrw',
        '.orf',
        '.pef',
        '.raf',
        '.raw',
        '.rw2',
        '.rwl',
        '.sr2',
        '.srf',
        '.srw',
        '.x3f',
        '.bpg',
        '.cur',
        '.dcm',
        '.dds',
        '.djvu',
        '.eps',
        '.exr',
        '.fits',
        '.flif',
        '.hdr',
        '.icns',
        '.ico',
        '.jls',
        '.jxr',
        '.pcx',
        '.pdf',
        '.ps',
        '.psb',
        '.psd',
        '.qoi',
        '.tga',
        '.wdp',
        '.xcf',
    ]
)


def why_unreadable(content: bytes) -> str:
    """Returns why Pillow cannot read a file with these bytes, in at most 200 characters."""
    what, advice = _identify(content)
    if not what:
        return f'not a readable image: it begins with {content[:16]!r}; {UNKNOWN}'
    return f'not a readable image: {what}, which begins with {content[:16]!r}; {advice}'


def ends_too_early(content: bytes) -> bool:
    """Returns whether a JPEG, PNG or WebP file lacks its end."""
    if content.startswith(b'\xff\xd8'):
        return not jpeg_files.has_end(content)
    if content.startswith(b'\x89PNG'):
        return b'IEND' not in content
    is_webp = content.startswith(b'RIFF') and content[8:12] == b'WEBP'
    return is_webp and len(content) < 8 + int.from_bytes(content[4:8], 'little')


def lacks_directory(content: bytes) -> bool:
    """Returns whether a TIFF file ends before its first directory.

    Pillow does not recognize such a file.
    """
    if content.startswith(b'II*\0'):
        return len(content) < int.from_bytes(content[4:8], 'little')
    return content.startswith(b'MM\0*') and len(content) < int.from_bytes(content[4:8], 'big')


def depth_of_jpeg2000(content: bytes) -> int:
    """Returns the bit depth of the first channel, from the SIZ marker (ISO/IEC 15444-1, A.5.1)."""
    sizes = content.find(b'\xff\x4f\xff\x51') + 2
    return (content[sizes + 40] & 0x7F) + 1


def why_raw_is_unreadable(image: Image.Image, content: bytes) -> str:
    """Returns why a camera's raw file, which Pillow takes for TIFF, cannot be read; else ''.

    DNG, NEF, ARW and others are TIFF/EP: their first page is a thumbnail, marked as reduced, which
    points to the full image.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return ''
    tags = image.tag_v2
    is_reduced = bool(int(tags.get(254, 0)) & 1)  # NewSubfileType
    has_others = 330 in tags  # SubIFDs
    is_dng = 50706 in tags  # DNGVersion
    is_cr2 = content[8:10] == b'CR'
    if not (is_dng or is_cr2 or (is_reduced and has_others)):
        return ''
    extension = 'nef'
    if is_cr2:
        extension = 'cr2'
    if is_dng:
        extension = 'dng'
    return (
        "not a readable image: a camera's raw file, of which a TIFF reader sees "
        f'only the thumbnail; {RAW.format(extension)}'
    )


def _identify(content: bytes) -> tuple[str, str]:
    """Returns (what the file is, what to do about it), or ('', '')."""
    if content[4:8] == b'ftyp':
        return _name_of_brands(content)
    for pattern, what, advice in UNSUPPORTED:
        if re.match(pattern, content[:512], re.DOTALL):
            return what, advice
    if content[-18:-2] == b'TRUEVISION-XFILE':
        return 'a TGA image', CONVERT.format('tga')
    for pattern, what, feature in SUPPORTED:
        if re.match(pattern, content[:16], re.DOTALL):
            return what, _advice_on_supported(feature)
    begin = content[:1024].removeprefix(b'\xef\xbb\xbf').lstrip().lower()
    is_xml = begin.startswith((b'<?xml', b'<!--', b'<!doctype svg'))
    if is_xml and b'<svg' in content[:4096].lower():
        begin = b'<svg'
    for pattern, what, advice in MARKUP:
        if re.match(pattern, begin):
            return what, advice
    return ('nothing but zeros', DAMAGED) if not content.strip(b'\0') else ('', '')


def _advice_on_supported(feature: str | None) -> str:
    if feature and not features.check(feature):
        return 'this build of Pillow cannot read it: python -m pip install --force-reinstall pillow'
    return UNREAD


def _name_of_brands(content: bytes) -> tuple[str, str]:
    """Identifies an ISO base media file by its brands (ISO/IEC 14496-12, 4.3)."""
    length = min(int.from_bytes(content[:4], 'big'), len(content), 256)
    main = content[8:12]
    compatible = {content[begin : begin + 4] for begin in range(16, length - 3, 4)}
    if main in AVIF or (main in HEIF and compatible.intersection(AVIF)):
        return 'an AVIF image', _advice_on_supported('avif')
    if main in HEIC or (main in HEIF and compatible.intersection(HEIC)):
        return 'an HEIC image', _advice_on_heif('heic')
    if main in HEIF:
        return 'an HEIF image', _advice_on_heif('heif')
    if main == b'crx ':
        return 'a Canon raw file (CR3)', RAW.format('cr3')
    if main == b'jxl ':
        return 'a JPEG XL image', 'convert it: djxl FILE.jxl FILE.png'
    if main == b'qt  ':
        return 'a QuickTime video', FRAMES.format('mov')
    return 'an MP4 video', FRAMES.format('mp4')


def _advice_on_heif(ending: str) -> str:
    if heif.VERSION:
        return DAMAGED
    return (
        'python -m pip install pillow-heif to read it, or convert it: '
        f'heif-convert FILE.{ending} FILE.jpg'
    )
