"""Which pinned set fits this machine, and a Python that has it: for where nobody types `make`, such as a notebook. Imports no TensorFlow."""

import glob
import os
import platform
import subprocess
import sys

from packaging.requirements import Requirement

from common import machine, tpu_environment
from common.commands import ROOT
from common.errors import ConfigError, RunError, one_line
from diagnostics import packages

REQUIREMENTS = os.path.join(ROOT, 'requirements')
ENVIRONMENT = os.path.join(ROOT, '.venv')
ACCELERATORS = ('cpu', 'gpu', 'tpu', 'tpu220')
LOOKED_AT = {
    *packages.PACKAGES,
    *packages.BUILDS,
    'keras',
    'libtpu',
    'tensorboard',
    'tensorflow-metadata',
}  # and CUDA's; the rest follows them


def choose(environ=os.environ, root='/'):
    """'tpu', 'gpu' or 'cpu': the extra of pyproject.toml that fits this machine; its markers choose by the version of Python."""
    if tpu_environment.is_expected(environ=environ, root=root):
        return 'tpu'
    return 'gpu' if machine.nvidia_smi()[0] else 'cpu'


def ensure(accelerator, environment=ENVIRONMENT):
    """Path of a Python that has the set of one of ACCELERATORS: this one, or that of `environment`, which is made or changed where it has not.

    An environment of its own, because the pins are older or newer than what a notebook's kernel may have imported already.

    Raises: ConfigError for another name; RunError if it cannot be installed.
    """
    if accelerator not in ACCELERATORS:
        raise ConfigError(
            f'{accelerator!r} is no set of pins: write one of {", ".join(ACCELERATORS)}'
        )
    if not missing(accelerator):
        return sys.executable
    supported = packages.python_finding()
    if supported.status == 'FAIL':
        raise RunError(supported.found)
    for command in commands(accelerator, environment):
        print(
            'installing into', os.path.relpath(environment), flush=True
        ) if 'install' in command else None
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RunError(f'{" ".join(command)} failed: {one_line(done.stderr[-2000:], 2000)}')
    return os.path.join(environment, 'bin', 'python')


def commands(accelerator, environment):
    """What makes `environment` have the set, as lists of words; [] where it has it."""
    python = os.path.join(environment, 'bin', 'python')
    folders = glob.glob(os.path.join(environment, 'lib', 'python*', 'site-packages'))
    version = (
        os.path.basename(os.path.dirname(folders[0]))[len('python') :] + '.0'
        if folders
        else platform.python_version()
    )
    if folders and not missing(accelerator, folders, version):
        return []
    pip = [sys.executable, '-m', 'pip', '--python', python]
    builds = packages.installed(packages.BUILDS, folders) if folders else {}
    wanted = {name for name in pins(accelerator, version) if name in packages.BUILDS}
    return [
        *(
            [[sys.executable, '-m', 'venv', '--without-pip', environment]] if not folders else []
        ),  # some systems have no ensurepip
        *(
            [[*pip, 'uninstall', '--yes', *builds]] if builds and set(builds) != wanted else []
        ),  # the builds share one folder
        [
            *pip,
            'install',
            '--quiet',
            '--disable-pip-version-check',
            '-c',
            os.path.join(REQUIREMENTS, f'{accelerator}.txt'),
            f'{ROOT}[{accelerator}]',
            'pip',
        ],
    ]


def missing(accelerator, search_path=None, python=platform.python_version()):
    """The pins, such as 'keras==3.15.1', of which that version is not installed; `search_path` is that of another environment."""
    wanted = pins(accelerator, python)
    found = packages.installed(wanted, search_path)
    return [f'{name}=={version}' for name, version in wanted.items() if found.get(name) != version]


def pins(accelerator, python=platform.python_version()):
    """{name: version} that requirements/ has for this version of Python, of what is looked at."""
    values = {'python_full_version': python, 'python_version': '.'.join(python.split('.')[:2])}
    with open(os.path.join(REQUIREMENTS, f'{accelerator}.txt')) as file:
        lines = [Requirement(line.strip()) for line in file]
    return {
        line.name: next(iter(line.specifier)).version
        for line in lines
        if (line.name in LOOKED_AT or line.name.startswith('nvidia-'))
        and (line.marker is None or line.marker.evaluate(values))
    }
