"""HEIC and HEIF pictures, as phones and cameras write them: read where the extra `heif` is installed, which is pillow-heif."""
try:
    import pillow_heif
except ImportError:
    VERSION = ''  # of pillow-heif
else:
    VERSION = pillow_heif.__version__
    pillow_heif.register_heif_opener()

FORMATS = ('HEIF',) if VERSION else ()  # as Pillow calls what it reads with it
