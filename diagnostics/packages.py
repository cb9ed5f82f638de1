"""Checks what is installed, without importing it."""

import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from common import tpu_environment
from common.commands import install_command, python_command
from common.machine import TENSORFLOW_BUILDS, installed
from diagnostics.check_result import CheckResult, fail, ok, warn

OLDEST, NEWEST = (2, 19, 1), (2, 21)  # versions that the tests pass with
FITTING_LIBTPU = {'2.19': '0.0.10', '2.20': '0.0.21.1'}  # of builds of tensorflow-tpu
# Where not 3.10 to 3.13.
PYTHONS = {
    'tpu': ((3, 11), (3, 13)),
    'gpu-jax': ((3, 11), (3, 13)),
    'tpu-tf': ((3, 10), (3, 12)),
}
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


def check_python(
    accelerator: str = 'cpu', version: Sequence[Any] = sys.version_info
) -> CheckResult:
    """Checks that what an extra of pyproject.toml pins is made for this Python."""
    number = '.'.join(map(str, version[:3]))
    oldest, newest = PYTHONS.get(accelerator, ((3, 10), (3, 13)))
    if oldest <= tuple(version[:2]) <= newest:
        return ok('Python', f'{number}, {sys.executable}')
    supported = f'3.{oldest[1]} to 3.{newest[1]}'
    return fail(
        'Python',
        f'{number}; TensorFlow and this repository need {supported} for {accelerator}',
        f'rm -rf .venv && make train PYTHON=python3.12 ACCELERATOR={accelerator}',
    )


def check_tensorflow(
    accelerator: str, search_path: list[str] | None = None
) -> tuple[CheckResult, str, str]:
    """Checks that one build of TensorFlow is installed, and that it fits one of ACCELERATORS.

    Returns: (result, name of the build or '', its version).
    """
    builds, install = installed(TENSORFLOW_BUILDS, search_path), install_command(accelerator)
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
    elif accelerator == 'tpu-tf' and name != 'tensorflow-tpu':
        found = fail(
            'TensorFlow',
            f'{name} {version} cannot use the TPU of this machine: tensorflow-tpu can, and JAX '
            'can with --config.strategy=auto',
            reinstall(builds, install),
        )
    elif accelerator == 'gpu' and name != 'tensorflow':
        found = warn(
            'TensorFlow',
            f'{name} {version} cannot use the GPU of this machine: it trains on the CPU',
            reinstall(builds, install),
        )
    elif accelerator != 'tpu-tf' and name == 'tensorflow-tpu':
        found = warn(
            'TensorFlow',
            f'{name} {version}, but this run uses no TPU through TensorFlow',
            reinstall(builds, install),
        )
    elif number[:2] > NEWEST or name not in TENSORFLOW_BUILDS[:3]:
        found = warn(
            'TensorFlow',
            f'{name} {version} has not been tested: 2.19.1 to 2.21 have',
            reinstall(builds, install),
        )
    else:
        found = ok('TensorFlow', f'{name} {version}')
    return found, name, version


def reinstall(builds: Iterable[str], install: str) -> str:
    """Returns the command that removes these builds and then installs.

    Removing one breaks the files they share.
    """
    return f'{python_command()} -m pip uninstall -y {" ".join(builds)} && {install}'


def check_keras(
    version: Sequence[Any] = sys.version_info, search_path: list[str] | None = None
) -> CheckResult:
    """Checks for Keras 3.13 or later; on Python 3.10, which has none, for 3.12."""
    oldest, wanted = (3, 13), 'keras==3.15.1'
    if tuple(version[:2]) < (3, 11):
        oldest, wanted = (3, 12), 'keras==3.12.4'
    install = f'{python_command()} -m pip install {wanted}'
    found = installed(['keras'], search_path).get('keras')
    if found is None:
        return fail('Keras', 'not installed', install)
    if numbers(found)[:2] < oldest:
        return fail(
            'Keras', f'{found} is too old: {".".join(map(str, oldest))} or later is needed', install
        )
    return ok('Keras', f'{found}, on TensorFlow')


def check_packages(accelerator: str, search_path: list[str] | None = None) -> CheckResult:
    """Checks the other packages that are imported."""
    missing = [name for name in PACKAGES if name not in installed(PACKAGES, search_path)]
    if missing:
        return fail(
            'packages', f'not installed: {", ".join(missing)}', install_command(accelerator)
        )
    return ok('packages', f'all {len(PACKAGES)} other packages are installed')


def check_libtpu(
    tensorflow_version: str, tensorflow_folder: str | None = None, library: str | None = None
) -> CheckResult:
    """Checks that libtpu has all functions that tensorflow-tpu needs: without, it crashes."""
    fitting = FITTING_LIBTPU.get(tensorflow_version[:4], FITTING_LIBTPU['2.20'])
    install = f'{python_command()} -m pip install libtpu=={fitting}'
    library = library or tpu_environment.libtpu_path()
    if not library:
        return fail(
            'libtpu', f'not installed, and tensorflow-tpu {tensorflow_version} needs it', install
        )
    try:
        from diagnostics import libtpu

        needed = libtpu.functions_needed(tensorflow_folder or _folder_of('tensorflow'))
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
            f'{version or library} lacks {len(missing)} of {len(needed)} functions that '
            f'tensorflow-tpu {tensorflow_version} calls, '
            f'such as {missing[0]}: import tensorflow would end the process',
            install,
        )
    return ok(
        'libtpu',
        f'{version or library} has all {len(needed)} functions that tensorflow-tpu '
        f'{tensorflow_version} calls',
    )


def numbers(version: str) -> tuple[int, ...]:
    """Parses a version: '2.20.0rc1' -> (2, 20, 0)."""
    return tuple(int(number) for number in re.findall('[0-9]+', version)[:3])


def _folder_of(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f'No module named {name!r}')
    return os.path.dirname(spec.origin)
