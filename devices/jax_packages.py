"""Finds what is wrong with the packages and variables that JAX's runtime needs; imports none."""

import mmap
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from packaging.requirements import Requirement

from common.commands import install_command, python_command
from common.errors import RunError
from common.machine import TENSORFLOW_BUILDS, installed, requirements_of

VERSION = '0.10.2'  # whose internals devices/pjrt.py calls; pinned in requirements/
REQUIREMENTS = f'jax=={VERSION} jaxlib=={VERSION}'
OLDEST_PYTHON = (3, 11)
# By platform, as JAX names it: the extra of pyproject.toml that has JAX and what it needs.
EXTRAS = {'tpu': 'tpu', 'cuda': 'gpu-jax'}
TPU_LIBRARIES = ('libtpu', 'libtpu-nightly')  # they share one folder
CUDA_PLUGINS = ('jax-cuda12-plugin', 'jax-cuda13-plugin')  # of which a process can load one
PLUGIN_FUNCTION = 'GetPjrtApi'  # what a library for JAX exports


def check(
    platform: str,
    environ: Mapping[str, str] = os.environ,
    search_path: list[str] | None = None,
    python: Sequence[Any] = sys.version_info,
) -> str:
    """Checks what JAX needs on 'tpu', 'cuda' or 'cpu'.

    Returns: what is installed, such as 'JAX 0.10.2 with libtpu 0.0.42.1'.

    Raises: RunError with what is wrong, and what fixes it.
    """
    if tuple(python[:2]) < OLDEST_PYTHON:
        extra = EXTRAS.get(platform, 'cpu')
        raise _error(
            f'JAX {VERSION} needs Python 3.11 or later, and this is {python[0]}.{python[1]}',
            f'rm -rf .venv && make train PYTHON=python3.12 ACCELERATOR={extra}   # docs/tpu.md '
            'says where to get one',
        )
    _check_jax(platform, search_path)
    _check_platforms(platform, environ)
    found = f'JAX {VERSION}'
    if platform == 'tpu':
        return f'{found} with {_check_tpu(environ, search_path)}'
    if platform == 'cuda':
        return f'{found} with {_check_cuda(search_path)}'
    return found


def device_name(platform: str) -> str:
    """Returns how users call a device of a platform: 'TPU', 'GPU' or 'CPU'."""
    return 'GPU' if platform == 'cuda' else platform.upper()


def install(platform: str) -> str:
    """Returns the command that installs JAX and what it needs on a platform."""
    if platform == 'cpu':  # whose extra has no JAX
        return f'{python_command()} -m pip install {REQUIREMENTS}'
    command = install_command(EXTRAS[platform])
    others = [name for name in installed(TENSORFLOW_BUILDS) if name != 'tensorflow-cpu']
    if others:  # they share one folder with the build of this extra
        return f'{python_command()} -m pip uninstall -y {" ".join(others)} && {command}'
    return command


def repair() -> str:
    """Returns the command that replaces a damaged JAX."""
    return f'{python_command()} -m pip install --force-reinstall --no-deps {REQUIREMENTS}'


def _check_jax(platform: str, search_path: list[str] | None) -> None:
    names = ('jax', 'jaxlib')
    found = installed(names, search_path)
    missing = [name for name in names if name not in found]
    if missing:
        raise _error(f'not installed: {" and ".join(missing)}', install(platform))
    wrong = [f'{name} {version}' for name, version in found.items() if version != VERSION]
    if wrong:
        problem = f'{" and ".join(wrong)} {"are" if len(wrong) > 1 else "is"} installed'
        raise _error(f'{problem}, and {VERSION} of both is needed', install(platform))


def _check_platforms(platform: str, environ: Mapping[str, str]) -> None:
    """Checks that JAX_PLATFORMS, which a user may have set, does not hide the accelerator."""
    wanted = environ.get('JAX_PLATFORMS', '')
    names = {'cuda': {'cuda', 'gpu'}}.get(platform, {platform})
    if platform != 'cpu' and wanted and not names & set(wanted.split(',')):
        raise _error(
            f'JAX_PLATFORMS={wanted} hides the {device_name(platform)} of this machine',
            'unset JAX_PLATFORMS, or train without JAX: --config.strategy=one_device',
        )


def _check_tpu(environ: Mapping[str, str], search_path: list[str] | None) -> str:
    """Returns the name and version of the TPU library that JAX will load."""
    if installed(['tensorflow-tpu'], search_path):
        remove = f'{python_command()} -m pip uninstall -y tensorflow-tpu libtpu'
        raise _error(
            'tensorflow-tpu and JAX are both installed, and only one of them can use the TPU',
            f'{remove} && {install("tpu")}',
        )
    path = environ.get('TPU_LIBRARY_PATH')
    if path:
        _check_library(path)
        return path
    found = installed(TPU_LIBRARIES, search_path)
    if not found:
        raise _error('libtpu is not installed', install('tpu'))
    if len(found) > 1:
        names = ' and '.join(f'{name} {version}' for name, version in found.items())
        remove = f'{python_command()} -m pip uninstall -y {" ".join(found)}'
        raise _error(
            f'{names} are installed, and share one folder: each overwrites files of the other',
            f'{remove} && {install("tpu")}',
        )
    ((name, version),) = found.items()
    needed = _libtpu_of_jax(search_path)
    if name != 'libtpu' or (needed and version not in needed.specifier):
        wanted = str(needed.specifier).removeprefix('==') if needed else 'itself'
        problem = f'{name} {version} is installed, and JAX {VERSION} needs libtpu {wanted}'
        remove = f'{python_command()} -m pip uninstall -y {name}'
        raise _error(problem, f'{remove} && {install("tpu")}')
    return f'{name} {version}'


def _check_library(path: str) -> None:
    fix = 'unset TPU_LIBRARY_PATH: the libtpu that is installed beside JAX is then used'
    if not os.path.exists(path):
        raise _error(f'TPU_LIBRARY_PATH={path} does not exist', fix)
    try:
        with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
            has_function = content.find(PLUGIN_FUNCTION.encode()) >= 0
    except (OSError, ValueError) as error:  # it may not be read, or is empty
        raise _error(f'TPU_LIBRARY_PATH={path} cannot be read ({error})', fix) from error
    if not has_function:
        problem = f'TPU_LIBRARY_PATH={path} is not a library for JAX: it has no {PLUGIN_FUNCTION}'
        raise _error(problem, fix)


def _libtpu_of_jax(search_path: list[str] | None) -> Requirement | None:
    """Returns which libtpu the installed JAX asks for."""
    asked = map(Requirement, requirements_of('jax', search_path))
    return next((each for each in asked if each.name == 'libtpu'), None)


def _check_cuda(search_path: list[str] | None) -> str:
    """Returns the name and version of the CUDA plugin that JAX will load."""
    found = installed(CUDA_PLUGINS, search_path)
    fix = install('cuda')
    if not found:
        raise _error('no jax-cuda13-plugin is installed, and JAX needs it for a GPU', fix)
    if len(found) > 1:
        raise _error(
            f'{" and ".join(found)} are installed, and JAX can load only one of them',
            f'{python_command()} -m pip uninstall -y jax-cuda12-plugin jax-cuda12-pjrt',
        )
    ((plugin, version),) = found.items()
    runtime = plugin.replace('plugin', 'pjrt')
    runtime_version = installed([runtime], search_path).get(runtime)
    for name, number in ((plugin, version), (runtime, runtime_version)):
        if number != VERSION:
            has = f'{name} {number} is installed' if number else f'{name} is not installed'
            raise _error(f'{has}, and {VERSION} is needed', fix)
    return f'{plugin} {version}'


def _error(problem: str, fix: str) -> RunError:
    return RunError(problem, fix, 'strategy')
