"""Chooses the pinned packages that fit this machine, and finds or makes a Python that has them.

For places without `make`, such as a notebook. It imports no TensorFlow.
"""

import glob
import os
import platform
import subprocess
import sys
from collections.abc import Mapping

from packaging.requirements import Requirement

from common import console, machine, tpu_environment
from common.commands import ROOT
from common.errors import ConfigError, RunError, one_line
from diagnostics import packages

REQUIREMENTS = os.path.join(ROOT, 'requirements')
ENVIRONMENT = os.path.join(ROOT, '.venv')
ACCELERATORS = ('cpu', 'gpu', 'tpu', 'gpu-jax', 'tpu-tf')  # extras of pyproject.toml
# Pins whose versions are compared, besides CUDA's; the rest depends on these.
COMPARED = {
    *packages.PACKAGES,
    *machine.TENSORFLOW_BUILDS,
    'keras',
    'libtpu',
    'tensorboard',
    'tensorflow-metadata',
}
WITH_JAX = ('tpu', 'gpu-jax')  # in the other sets JAX is only what a test needs
# What compiles for a TPU: --mode=preflight takes these of 'tpu'.
COMPILER = ('jax', 'jaxlib', 'libtpu', 'ml-dtypes', 'numpy', 'opt-einsum', 'scipy')


def choose(environ: Mapping[str, str] = os.environ, root: str = '/') -> str:
    """Returns the extra of pyproject.toml that fits this machine: 'tpu', 'gpu' or 'cpu'."""
    if tpu_environment.is_tpu_expected(environ=environ, root=root):
        return 'tpu'
    return 'gpu' if machine.nvidia_smi()[0] else 'cpu'


def ensure(accelerator: str, environment: str = ENVIRONMENT) -> str:
    """Returns a Python with the pinned packages of one of ACCELERATORS.

    That is this Python or the one of `environment`, which is created or updated if needed. It is
    separate because the pins are older or newer than what a notebook's kernel may have imported
    already.

    Raises: ConfigError for another name; RunError if it cannot be installed.
    """
    if accelerator not in ACCELERATORS:
        raise ConfigError(
            f'{accelerator!r} has no pinned packages', f'write one of {", ".join(ACCELERATORS)}'
        )
    if not missing(accelerator):
        return sys.executable
    supported = packages.check_python(accelerator)
    if supported.status == 'FAIL':
        raise RunError(supported.message)
    for command in commands(accelerator, environment):
        if 'install' in command:
            console.line(f'installing into {os.path.relpath(environment)}')
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RunError(f'{" ".join(command)} failed: {one_line(done.stderr[-2000:], 2000)}')
    return os.path.join(environment, 'bin', 'python')


def commands(accelerator: str, environment: str) -> list[list[str]]:
    """Returns the commands that install missing pinned packages into `environment`."""
    python = os.path.join(environment, 'bin', 'python')
    folders = glob.glob(os.path.join(environment, 'lib', 'python*', 'site-packages'))
    version = platform.python_version()
    if folders:
        version = os.path.basename(os.path.dirname(folders[0])).removeprefix('python') + '.0'
    if folders and not missing(accelerator, folders, version):
        return []
    needed = []
    if not folders:  # without pip, because some systems have no ensurepip
        needed.append([sys.executable, '-m', 'venv', '--without-pip', environment])
    pip = [sys.executable, '-m', 'pip', '--python', python]
    builds = machine.installed(machine.TENSORFLOW_BUILDS, folders) if folders else {}
    wanted = {name for name in pins(accelerator, version) if name in machine.TENSORFLOW_BUILDS}
    if builds and set(builds) != wanted:  # the builds share one folder
        needed.append([*pip, 'uninstall', '--yes', *builds])
    constraints = os.path.join(REQUIREMENTS, f'{accelerator}.txt')
    quietly = ['--quiet', '--disable-pip-version-check']
    needed.append([*pip, 'install', *quietly, '-c', constraints, f'{ROOT}[{accelerator}]', 'pip'])
    return needed


def missing(
    accelerator: str, search_path: list[str] | None = None, python: str = platform.python_version()
) -> list[str]:
    """Returns the pins, such as 'keras==3.15.1', whose version is not installed.

    `search_path` is that of another environment.
    """
    return missing_of(pins(accelerator, python), search_path)


def missing_of(wanted: Mapping[str, str], search_path: list[str] | None = None) -> list[str]:
    """Returns those of {name: version}, such as 'keras==3.15.1', that are not installed."""
    found = machine.installed(wanted, search_path)
    return [f'{name}=={version}' for name, version in wanted.items() if found.get(name) != version]


def pins(accelerator: str, python: str = platform.python_version()) -> dict[str, str]:
    """Returns {name: version} of the checked packages in requirements/ for this Python."""
    with_jax = accelerator in WITH_JAX
    return {
        name: version
        for name, version in all_pins(accelerator, python).items()
        if name in COMPARED or name.startswith('nvidia-') or (with_jax and name.startswith('jax'))
    }


def compiler_pins(python: str = platform.python_version()) -> dict[str, str]:
    """Returns {name: version} of what compiles for a TPU, as the set 'tpu' has it."""
    pinned = all_pins('tpu', python)
    return {name: pinned[name] for name in COMPILER}


def all_pins(accelerator: str, python: str) -> dict[str, str]:
    values = {'python_full_version': python, 'python_version': '.'.join(python.split('.')[:2])}
    with open(os.path.join(REQUIREMENTS, f'{accelerator}.txt')) as file:
        lines = [Requirement(line.strip()) for line in file]
    return {
        line.name: next(iter(line.specifier)).version
        for line in lines
        if line.marker is None or line.marker.evaluate(values)
    }
