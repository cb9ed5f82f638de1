"""What is installed, without importing it: Python, the build of TensorFlow, Keras, libtpu, the other packages."""

import importlib.metadata
import importlib.util
import os
import re
import sys

from common import tpu_environment
from common.commands import install_command, python_command
from diagnostics.check_result import fail, ok, warn

BUILDS = (
    'tensorflow',
    'tensorflow-cpu',
    'tensorflow-tpu',
    'tensorflow-gpu',
    'tf-nightly',
)  # all of them fill one folder
OLDEST, NEWEST = (2, 19, 1), (2, 21)  # that the tests pass with
FITTING_LIBTPU = {'2.19': '0.0.10', '2.20': '0.0.21.1'}  # as pyproject.toml pins
PACKAGES = (
    'absl-py',
    'importlib-resources',
    'matplotlib',
    'ml-collections',
    'numpy',
    'pillow',
    'psutil',
    'pyelftools',
    'scikit-learn',
    'tensorflow-datasets',
    'tqdm',
)


def installed(names, search_path=None):
    """{name: version} of those distributions that are there."""
    found = {}
    for name in names:
        for distribution in importlib.metadata.distributions(
            name=name, path=sys.path if search_path is None else search_path
        ):
            found.setdefault(name, distribution.version)
    return found


def python_finding(version=sys.version_info):
    """Whether this Python is one that TensorFlow has builds for."""
    number = '.'.join(map(str, version[:3]))
    if (3, 10) <= tuple(version[:2]) <= (3, 13):
        return ok('Python', f'{number}, {sys.executable}')
    return fail(
        'Python',
        f'{number}; TensorFlow and this repository need 3.10 to 3.13',
        'rm -rf .venv && make train PYTHON=python3.12',
    )


def tensorflow_finding(accelerator, search_path=None):
    """Which build of TensorFlow is installed, and whether it fits 'cpu', 'gpu' or 'tpu': (Finding, name or '', version)."""
    builds, install = installed(BUILDS, search_path), install_command(accelerator)
    if len(builds) > 1:
        names = ' and '.join(f'{name} {version}' for name, version in builds.items())
        return (
            fail(
                'TensorFlow',
                f'{names} are installed, and share one folder: each overwrites files of the other',
                reinstall(builds, install),
            ),
            '',
            '',
        )
    if not builds:
        if search_path is None and importlib.util.find_spec('tensorflow'):
            return ok('TensorFlow', 'a build without a package name'), 'tensorflow', ''
        return fail('TensorFlow', 'not installed', install), '', ''
    ((name, version),) = builds.items()
    number = numbers(version)
    if number < OLDEST:
        found = fail(
            'TensorFlow',
            f'{name} {version} is too old: 2.19.1 to 2.21 are supported',
            reinstall(builds, install),
        )
    elif accelerator == 'tpu' and name != 'tensorflow-tpu':
        found = fail(
            'TensorFlow',
            f'{name} {version} cannot use the TPU of this machine: only tensorflow-tpu can',
            reinstall(builds, install),
        )
    elif accelerator == 'gpu' and name != 'tensorflow':
        found = warn(
            'TensorFlow',
            f'{name} {version} cannot use the GPU of this machine: it trains on the processor',
            reinstall(builds, install),
        )
    elif accelerator != 'tpu' and name == 'tensorflow-tpu':
        found = warn(
            'TensorFlow',
            f'{name} {version}, but no TPU is here: it trains on the processor',
            reinstall(builds, install),
        )
    elif number[:2] > NEWEST or name not in BUILDS[:3]:
        found = warn(
            'TensorFlow',
            f'{name} {version} has not been tried: 2.19.1 to 2.21 have',
            reinstall(builds, install),
        )
    else:
        found = ok('TensorFlow', f'{name} {version}')
    return found, name, version


def reinstall(builds, install):
    """The command that takes these builds away and then installs; what they had in common is broken by taking away one."""
    return f'{python_command()} -m pip uninstall -y {" ".join(builds)} && {install}'


def keras_finding(version=sys.version_info, search_path=None):
    """Keras from 3.13 on; on Python 3.10, for which that is not made, 3.12."""
    oldest, wanted = (
        ((3, 12), 'keras==3.12.4') if tuple(version[:2]) < (3, 11) else ((3, 13), 'keras==3.15.1')
    )
    install = f'{python_command()} -m pip install {wanted}'
    found = installed(['keras'], search_path).get('keras')
    if found is None:
        return fail('Keras', 'not installed', install)
    if numbers(found)[:2] < oldest:
        return fail(
            'Keras', f'{found} is too old: it takes {".".join(map(str, oldest))} or later', install
        )
    return ok('Keras', f'{found}, on TensorFlow')


def packages_finding(accelerator, search_path=None):
    """The other packages that are imported."""
    missing = [name for name in PACKAGES if name not in installed(PACKAGES, search_path)]
    if missing:
        return fail(
            'packages', f'not installed: {", ".join(missing)}', install_command(accelerator)
        )
    return ok('packages', f'all {len(PACKAGES)} others are installed')


def libtpu_finding(tensorflow_version, tensorflow_folder=None, library=None):
    """Whether libtpu has all functions that tensorflow-tpu looks up: where one is missing, its import ends the process."""
    fitting = FITTING_LIBTPU.get(tensorflow_version[:4], FITTING_LIBTPU['2.20'])
    install = f'{python_command()} -m pip install libtpu=={fitting}'
    library = library or tpu_environment.libtpu_path()
    if not library:
        return fail(
            'libtpu', f'not installed, and tensorflow-tpu {tensorflow_version} needs it', install
        )
    try:
        from diagnostics import libtpu

        needed = libtpu.functions_needed(
            tensorflow_folder or os.path.dirname(importlib.util.find_spec('tensorflow').origin)
        )
        missing = sorted(needed - libtpu.functions_exported(library))
    except Exception as error:  # pyelftools is missing, or the file is no library
        return fail(
            'libtpu',
            f'{library} cannot be read ({type(error).__name__}: {error})',
            f'{install} pyelftools',
        )
    version = installed(['libtpu']).get('libtpu', '')
    if missing:
        return fail(
            'libtpu',
            f'{version or library} lacks {len(missing)} of {len(needed)} functions that tensorflow-tpu {tensorflow_version} calls, '
            f'such as {missing[0]}: import tensorflow would end the process',
            install,
        )
    return ok(
        'libtpu',
        f'{version or library} has all {len(needed)} functions that tensorflow-tpu {tensorflow_version} calls',
    )


def numbers(version):
    """'2.20.0rc1' -> (2, 20, 0)."""
    return tuple(int(number) for number in re.findall('[0-9]+', version)[:3])
