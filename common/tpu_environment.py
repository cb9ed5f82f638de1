"""Detects a TPU host, and sets the variables that TensorFlow's TPU build needs.

They must be set before TensorFlow is imported, so this module does not import it.

The tensorflow-tpu 2.19.1 wheel can drive a TPU in two ways: through the PJRT plugin interface,
which the VM images for v5e, v5p and v6e use, if three environment variables request it; otherwise
through the older StreamExecutor. 2.20.0 has only the older one.
"""

import glob
import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping

from ml_collections import ConfigDict

# PCI device IDs of Google's (vendor 0x1ae0) TPU chips. Source: JAX's cloud_tpu_init.py.
GOOGLE_VENDOR_ID = '0x1ae0'
CHIP_GENERATIONS = {
    '0x0027': 'v2 or v3',
    '0x005e': 'v4',
    '0x0062': 'v5p',
    '0x0063': 'v5e',
    '0x006f': 'v6e',
    '0x0076': 'v7x',
}
CORES = {'v2 or v3': 2, 'v7x': 2}  # cores per chip that a program sees; 1 for other generations
ACCELERATOR_TYPES = {
    'v2': 'v2 or v3',
    'v3': 'v2 or v3',
    'v4': 'v4',
    'v5p': 'v5p',
    'v5litepod': 'v5e',
    'v5e': 'v5e',
    'v6e': 'v6e',
    'v7x': 'v7x',
    'tpu7x': 'v7x',
}
WITH_PJRT = ('v5e', 'v5p', 'v6e')
PJRT_VARIABLES = (
    'PJRT_DEVICE',
    'NEXT_PLUGGABLE_DEVICE_USE_C_API',
    'TF_PLUGGABLE_DEVICE_LIBRARY_PATH',
)


def is_tpu_expected(
    name: str = 'local', environ: Mapping[str, str] = os.environ, root: str = '/'
) -> bool:
    """Returns whether `config.tpu` or the environment names a TPU, or one is attached.

    Only TPUs have /dev/accel*; /dev/vfio/* may belong to other devices, so it counts only if libtpu
    is installed. A chip on the PCI bus is enough: if its device files are missing, a run should say
    so instead of starting on the CPU.
    """
    named = name != 'local' or any(
        environ.get(variable) for variable in ('TPU_NAME', 'COLAB_TPU_ADDR', 'TPU_ACCELERATOR_TYPE')
    )
    vfio = glob.glob(os.path.join(root, 'dev/vfio/[0-9]*')) and importlib.util.find_spec('libtpu')
    return bool(
        named or glob.glob(os.path.join(root, 'dev/accel[0-9]*')) or vfio or chip_generations(root)
    )


def should_use_tpu(
    config: ConfigDict, environ: Mapping[str, str] = os.environ, root: str = '/'
) -> bool:
    """Returns whether a run of this (possibly unchecked) config should use a TPU."""
    strategy = config.get('strategy', 'auto')
    return (
        strategy == 'tpu'
        or strategy == 'auto'
        and is_tpu_expected(config.get('tpu', 'local'), environ, root)
    )


def chip_generations(root: str = '/') -> list[str]:
    """Returns the generation of each TPU chip on the PCI bus, such as ['v5e', 'v5e']."""
    found = [
        (_text(os.path.join(device, 'vendor')), _text(os.path.join(device, 'device')))
        for device in sorted(glob.glob(os.path.join(root, 'sys/bus/pci/devices/*')))
    ]
    return [
        CHIP_GENERATIONS[device]
        for vendor, device in found
        if vendor == GOOGLE_VENDOR_ID and device in CHIP_GENERATIONS
    ]


def generation(environ: Mapping[str, str] = os.environ, root: str = '/') -> str:
    """Returns the generation of this host's TPU, such as 'v5e', or '' if it is unknown."""
    return next(
        iter(chip_generations(root)),
        ACCELERATOR_TYPES.get(environ.get('TPU_ACCELERATOR_TYPE', '').split('-')[0], ''),
    )


def pjrt_variables(
    version: str | None,
    environ: Mapping[str, str] = os.environ,
    root: str = '/',
    library: str | None = None,
) -> dict[str, str]:
    """Returns the PJRT variables to set before TensorFlow is imported: none or all three.

    Args:
        version: the installed version of tensorflow-tpu, or None.
        library: path of libtpu.so; by default that of the installed package.
    """
    library = library or libtpu_path(environ)
    set_by_the_user = any(variable in environ for variable in PJRT_VARIABLES)
    if (
        set_by_the_user
        or version is None
        or not version.startswith('2.19.')
        or generation(environ, root) not in WITH_PJRT
        or not library
    ):
        return {}
    return dict(zip(PJRT_VARIABLES, ('TPU', 'true', library), strict=True))


def set_pjrt_variables(config: ConfigDict) -> None:
    """Sets the PJRT variables in this process if the run will use a TPU that needs them."""
    if should_use_tpu(config):
        os.environ.update(pjrt_variables(build_version()))


def without_tpu(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns an environment in which a TPU build of TensorFlow does not claim the TPU."""
    kept = {key: value for key, value in environ.items() if key not in PJRT_VARIABLES}
    return {**kept, 'TPU_LOAD_LIBRARY': '0', 'TPU_SKIP_MDS_QUERY': '1'}


def without_accelerators(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns an environment in which TensorFlow uses the CPU and claims no accelerator."""
    return {**without_tpu(environ), 'CUDA_VISIBLE_DEVICES': '-1', 'TF_CPP_MIN_LOG_LEVEL': '2'}


def build_version() -> str | None:
    """Returns the installed version of tensorflow-tpu, or None."""
    try:
        return importlib.metadata.version('tensorflow-tpu')
    except importlib.metadata.PackageNotFoundError:
        return None


def libtpu_path(environ: Mapping[str, str] = os.environ) -> str | None:
    """Returns the path of libtpu.so, or None."""
    package = importlib.util.find_spec('libtpu')
    path = environ.get('TPU_LIBRARY_PATH') or (
        package and package.origin and os.path.join(os.path.dirname(package.origin), 'libtpu.so')
    )
    return path if path and os.path.exists(path) else None


def _text(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip().lower()
    except OSError:
        return ''
