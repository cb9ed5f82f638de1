"""Whether this is a TPU host, and the variables that TensorFlow's TPU build wants set before it is imported. Imports no TensorFlow.

The wheel of tensorflow-tpu 2.19.1 can drive a TPU in two ways: through the interface of PJRT plugins, which the images of v5e,
v5p and v6e use, when three variables ask for it; else through the older one (StreamExecutor). 2.20.0 has only the older one.
"""

import glob
import importlib.metadata
import importlib.util
import os

# Of Google's PCI devices, vendor 0x1ae0: those that are TPU chips. Source: cloud_tpu_init.py of JAX.
GOOGLE, CHIPS = (
    '0x1ae0',
    {
        '0x0027': 'v2 or v3',
        '0x005e': 'v4',
        '0x0062': 'v5p',
        '0x0063': 'v5e',
        '0x006f': 'v6e',
        '0x0076': 'v7x',
    },
)
CORES = {'v2 or v3': 2, 'v7x': 2}  # that a program sees of a chip; one of the others
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


def is_expected(name='local', environ=os.environ, root='/'):
    """Whether a TPU is named by the config (`config.tpu`) or the environment, or one is attached.

    /dev/accel* are a TPU's own device files; /dev/vfio/* are other devices' too, so there its library has to be there. A chip on the bus
    is enough: where its device files are missing, a run should say so, and not begin on the host.
    """
    named = name != 'local' or any(
        environ.get(variable) for variable in ('TPU_NAME', 'COLAB_TPU_ADDR', 'TPU_ACCELERATOR_TYPE')
    )
    vfio = glob.glob(os.path.join(root, 'dev/vfio/[0-9]*')) and importlib.util.find_spec('libtpu')
    return bool(named or glob.glob(os.path.join(root, 'dev/accel[0-9]*')) or vfio or chips(root))


def is_wanted(config, environ=os.environ, root='/'):
    """Whether the run of this config is to use a TPU. The config may not have been checked yet."""
    strategy = config.get('strategy', 'auto')
    return (
        strategy == 'tpu'
        or strategy == 'auto'
        and is_expected(config.get('tpu', 'local'), environ, root)
    )


def chips(root='/'):
    """The generation of each TPU chip on the PCI bus, such as ['v5e', 'v5e']."""
    found = [
        (_text(os.path.join(device, 'vendor')), _text(os.path.join(device, 'device')))
        for device in sorted(glob.glob(os.path.join(root, 'sys/bus/pci/devices/*')))
    ]
    return [CHIPS[device] for vendor, device in found if vendor == GOOGLE and device in CHIPS]


def generation(environ=os.environ, root='/'):
    """'v5e', 'v6e', ... of the TPU here, or '' where nothing says so."""
    return next(
        iter(chips(root)),
        ACCELERATOR_TYPES.get(environ.get('TPU_ACCELERATOR_TYPE', '').split('-')[0], ''),
    )


def pjrt_variables(version, environ=os.environ, root='/', library=None):
    """What to add to the environment before TensorFlow is imported: {} or the three variables.

    Args:
        version: of tensorflow-tpu, or None.
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
    return dict(zip(PJRT_VARIABLES, ('TPU', 'true', library)))


def prepare(config):
    """Sets these variables in this process, if the run of this config is going to use a TPU that wants them."""
    if is_wanted(config):
        os.environ.update(pjrt_variables(build_version()))


def without_tpu(environ=os.environ):
    """An environment in which a TPU build of TensorFlow leaves the TPU to the process that has it."""
    kept = {key: value for key, value in environ.items() if key not in PJRT_VARIABLES}
    return {**kept, 'TPU_LOAD_LIBRARY': '0', 'TPU_SKIP_MDS_QUERY': '1'}


def without_accelerators(environ=os.environ):
    """An environment in which TensorFlow computes on the processor and leaves TPU and GPUs to the process that has them."""
    return {**without_tpu(environ), 'CUDA_VISIBLE_DEVICES': '-1', 'TF_CPP_MIN_LOG_LEVEL': '2'}


def build_version():
    """The version of tensorflow-tpu that is installed, or None."""
    try:
        return importlib.metadata.version('tensorflow-tpu')
    except importlib.metadata.PackageNotFoundError:
        return None


def libtpu_path(environ=os.environ):
    """Path of libtpu.so, or None."""
    package = importlib.util.find_spec('libtpu')
    path = environ.get('TPU_LIBRARY_PATH') or (
        package and package.origin and os.path.join(os.path.dirname(package.origin), 'libtpu.so')
    )
    return path if path and os.path.exists(path) else None


def _text(path):
    try:
        with open(path) as file:
            return file.read().strip().lower()
    except OSError:
        return ''
