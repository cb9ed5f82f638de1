"""Detects this machine's platform, packages, CPU cores, memory, disk and GPUs.

Reads /proc, /sys and the environment; does not import TensorFlow. `root` is the folder that
contains them.
"""

import glob
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from common import tpu_environment
from common.errors import counted

# PCI vendor ID, and the prefix of the device class of display and 3D controllers.
NVIDIA = '0x10de'
DISPLAY_CLASS = '0x03'
# Builds of TensorFlow, all of which install into the same folder.
TENSORFLOW_BUILDS = (
    'tensorflow',
    'tensorflow-cpu',
    'tensorflow-tpu',
    'tensorflow-gpu',
    'tf-nightly',
)
NO_GPU = ('', '-1')  # values of CUDA_VISIBLE_DEVICES that hide all GPUs


class Gpu(NamedTuple):
    name: str
    driver: str
    memory: str


def describe_platform(environ: Mapping[str, str] = os.environ, root: str = '/') -> str:
    """Returns the kind of host with system and architecture, such as 'Colab, Linux x86_64'.

    Kinds are Colab, Kaggle, TPU VM, Google Compute Engine, Slurm and plain machine.
    """
    chips = tpu_environment.chip_generations(root)
    if 'COLAB_RELEASE_TAG' in environ or 'COLAB_GPU' in environ:
        name = 'Colab'
    elif 'KAGGLE_KERNEL_RUN_TYPE' in environ:
        name = 'Kaggle'
    elif 'SLURM_JOB_ID' in environ:
        name = f'Slurm, job {environ["SLURM_JOB_ID"]}'
    elif chips or glob.glob(os.path.join(root, 'dev/accel[0-9]*')):
        name = 'TPU VM'
    elif _read(root, 'sys/class/dmi/id/product_name') == 'Google Compute Engine':
        name = 'Google Compute Engine'
    else:
        name = 'plain machine'
    tpus = f', {counted(len(chips), "TPU chip")} ({chips[0]})' if chips else ''
    return f'{name}, {platform.system()} {platform.machine()}{tpus}'


def installed(names: Iterable[str], search_path: list[str] | None = None) -> dict[str, str]:
    """Returns {name: version} of those distributions that are installed."""
    path = sys.path if search_path is None else search_path
    found: dict[str, str] = {}
    for name in names:
        for distribution in importlib.metadata.distributions(name=name, path=path):
            found.setdefault(name, distribution.version)
    return found


def requirements_of(name: str, search_path: list[str] | None = None) -> list[str]:
    """Returns what an installed distribution asks for, as its metadata write it; [] if none."""
    path = sys.path if search_path is None else search_path
    for distribution in importlib.metadata.distributions(name=name, path=path):
        return distribution.requires or []
    return []


def cores(root: str = '/') -> float:
    """Returns how many CPU cores this process may use; a container may have half of one."""
    allowed = float(os.cpu_count() or 1)
    if hasattr(os, 'sched_getaffinity'):
        allowed = float(len(os.sched_getaffinity(0)))
    for folder in _cgroup_folders(root, ''):
        quota, period = (_read(root, folder, 'cpu.max') or 'max 1').split()
        if quota != 'max':
            allowed = min(allowed, int(quota) / int(period))
    for folder in _cgroup_folders(root, 'cpu'):
        quota = _read(root, folder, 'cpu.cfs_quota_us') or '-1'
        period = _read(root, folder, 'cpu.cfs_period_us') or ''
        if period and int(quota) > 0:
            allowed = min(allowed, int(quota) / int(period))
    return allowed


def free_memory(root: str = '/') -> tuple[int, str]:
    """Returns the bytes of memory that can still be used, and what limits them.

    The limit is 'this machine' or 'this container or job'.
    """
    values = dict(
        line.split(':') for line in (_read(root, 'proc/meminfo') or '').splitlines() if ':' in line
    )
    if 'MemAvailable' in values:
        free = int(values['MemAvailable'].split()[0]) * 1024
    else:
        free = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    limits = [(folder, 'memory.max', 'memory.current') for folder in _cgroup_folders(root, '')]
    limits += [
        (folder, 'memory.limit_in_bytes', 'memory.usage_in_bytes')
        for folder in _cgroup_folders(root, 'memory')
    ]
    within = [
        int(limit) - int(_read(root, folder, used) or 0) + _reclaimable(root, folder)
        for folder, name, used in limits
        if (limit := _read(root, folder, name)) and limit.isdigit()
    ]
    return (
        (max(0, min(within)), 'this container or job')
        if within and min(within) < free
        else (free, 'this machine')
    )


def nvidia_smi(seconds: float = 20) -> tuple[list[Gpu], str]:
    """Returns (GPUs that nvidia-smi lists, why it failed or '').

    ([], '') means that nvidia-smi is not installed.
    """
    if not shutil.which('nvidia-smi'):
        return [], ''
    query = ['nvidia-smi', '--query-gpu=name,driver_version,memory.total', '--format=csv,noheader']
    try:
        done = subprocess.run(
            query, capture_output=True, text=True, errors='replace', timeout=seconds
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f'nvidia-smi does not answer ({type(error).__name__})'
    if done.returncode:
        return [], ' '.join((done.stdout + done.stderr).split())[
            :200
        ] or f'nvidia-smi ended with status {done.returncode}'
    return [
        Gpu(*(field.strip() for field in line.split(',')))
        for line in done.stdout.splitlines()
        if line.count(',') == 2
    ], ''


def count_nvidia_cards(root: str = '/') -> int:
    """Returns the number of NVIDIA cards on the PCI bus, whether or not the driver sees them."""
    devices = glob.glob(os.path.join(root, 'sys/bus/pci/devices/*'))
    return sum(
        _read(device, 'vendor') == NVIDIA
        and (_read(device, 'class') or '').startswith(DISPLAY_CLASS)
        for device in devices
    )


def free_disk(path: str) -> tuple[int, int]:
    """Returns the free bytes where `path` is or would be created, and the device's ID."""
    path = nearest_existing_path(path)
    return shutil.disk_usage(path).free, os.stat(path).st_dev


def cache_folder() -> str:
    """Returns the folder for what can be made again, such as compiled programs."""
    caches = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return os.path.join(caches, 'warmstart')


def nearest_existing_path(path: str) -> str:
    """Returns `path` or its nearest existing parent, which may be a file."""
    path = os.path.abspath(path)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def gib(number: float) -> str:
    """Formats a number of bytes: '1.5 GiB', '20 MiB', '0.4 MiB'."""
    return f'{number / 2**30:,.1f} GiB' if number >= 2**30 else f'{number / 2**20:,.3g} MiB'


def _cgroup_folders(root: str, controller: str) -> Iterator[str]:
    """Yields the folders of this process's cgroup, from the root down.

    Controller '' means cgroup v2; any other name means v1.
    """
    for line in (_read(root, 'proc/self/cgroup') or '').splitlines():
        _, controllers, path = line.split(':', 2)
        if controller in controllers.split(','):
            parts = [part for part in path.split('/') if part]
            base = os.path.join('sys/fs/cgroup', controller)
            yield from (os.path.join(base, *parts[:count]) for count in range(len(parts) + 1))


def _reclaimable(root: str, folder: str) -> int:
    """Returns the page cache that the group could drop, in bytes; the kernel counts it as used."""
    statistics = dict(
        line.split() for line in (_read(root, folder, 'memory.stat') or '').splitlines()
    )
    return int(statistics.get('total_inactive_file', statistics.get('inactive_file', 0)))


def _read(*path: str) -> str | None:
    try:
        with open(os.path.join(*path)) as file:
            return file.read().strip()
    except OSError:
        return None
