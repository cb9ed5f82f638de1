"""Lets Pillow read HEIC and HEIF images, as phones write them, if the extra `heif` is installed."""

try:
    import pillow_heif
except ImportError:
    VERSION = ''  # of pillow-heif
else:
    VERSION = pillow_heif.__version__
    pillow_heif.register_heif_opener()

FORMATS = ('HEIF',) if VERSION else ()  # Pillow's names for what the plugin reads
