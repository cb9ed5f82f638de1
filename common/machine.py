"""What this machine is and has, read from /proc, /sys and the environment: platform, processors, memory, GPUs. Imports no TensorFlow.

`root` is where these folders lie.
"""

import glob
import os
import platform
import shutil
import subprocess
from typing import NamedTuple

from common import tpu_environment

NVIDIA, DISPLAY_CLASS = (
    '0x10de',
    '0x03',
)  # PCI vendor, and how the class of graphics and 3D controllers begins


class Gpu(NamedTuple):
    name: str
    driver: str
    memory: str


def describe_platform(environ=os.environ, root='/'):
    """'Colab', 'Kaggle', 'TPU VM', 'Google Compute Engine', 'Slurm' or 'plain machine', with system and architecture."""
    chips = tpu_environment.chips(root)
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
    tpus = f', {len(chips)} TPU chip{"s" * (len(chips) > 1)} ({chips[0]})' if chips else ''
    return f'{name}, {platform.system()} {platform.machine()}{tpus}'


def cores(root='/'):
    """Processor cores that this process may use, a float: a container may have half of one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    for quota, period in (
        (_read(root, folder, 'cpu.max') or 'max 1').split() for folder in _groups(root, '')
    ):
        if quota != 'max':
            allowed = min(allowed, int(quota) / int(period))
    for folder in _groups(root, 'cpu'):
        quota, period = (
            _read(root, folder, 'cpu.cfs_quota_us'),
            _read(root, folder, 'cpu.cfs_period_us'),
        )
        if quota and period and int(quota) > 0:
            allowed = min(allowed, int(quota) / int(period))
    return allowed


def free_memory(root='/'):
    """(bytes of memory that can still be taken, what limits them: 'this machine' or 'this container or job')."""
    values = dict(
        line.split(':') for line in (_read(root, 'proc/meminfo') or '').splitlines() if ':' in line
    )
    if 'MemAvailable' in values:
        free = int(values['MemAvailable'].split()[0]) * 1024
    else:
        free = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    limits = [(folder, 'memory.max', 'memory.current') for folder in _groups(root, '')]
    limits += [
        (folder, 'memory.limit_in_bytes', 'memory.usage_in_bytes')
        for folder in _groups(root, 'memory')
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


def nvidia_smi(seconds=20):
    """(list of Gpu, '') as the driver's own program says; ([], why not) where it fails; ([], '') where there is none."""
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


def nvidia_on_the_bus(root='/'):
    """How many NVIDIA graphics cards the PCI bus has, whatever the driver says."""
    devices = glob.glob(os.path.join(root, 'sys/bus/pci/devices/*'))
    return sum(
        _read(device, 'vendor') == NVIDIA
        and (_read(device, 'class') or '').startswith(DISPLAY_CLASS)
        for device in devices
    )


def free_disk(path):
    """(bytes free where `path` is or would be made, a number for the file system)."""
    path = nearest(path)
    return shutil.disk_usage(path).free, os.stat(path).st_dev


def nearest(path):
    """`path`, or the nearest of the folders above it that is there; a file in the way counts."""
    path = os.path.abspath(path)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def gib(number):
    """Bytes in words: '1.5 GiB', '20 MiB', '0.4 MiB'."""
    return f'{number / 2**30:,.1f} GiB' if number >= 2**30 else f'{number / 2**20:,.3g} MiB'


def _groups(root, controller):
    """Folders, from the root of the tree to this process, of its control group: of version 2 for controller '', else of version 1."""
    for line in (_read(root, 'proc/self/cgroup') or '').splitlines():
        _, controllers, path = line.split(':', 2)
        if controller in controllers.split(','):
            parts = [part for part in path.split('/') if part]
            base = os.path.join('sys/fs/cgroup', controller)
            yield from (os.path.join(base, *parts[:count]) for count in range(len(parts) + 1))


def _reclaimable(root, folder):
    """Bytes of files that the group has read and that can be dropped: they count as used."""
    statistics = dict(
        line.split() for line in (_read(root, folder, 'memory.stat') or '').splitlines()
    )
    return int(statistics.get('total_inactive_file', statistics.get('inactive_file', 0)))


def _read(*path):
    try:
        with open(os.path.join(*path)) as file:
            return file.read().strip()
    except OSError:
        return None
