"""Describes the packages, devices and commit that a run used."""

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

import tensorflow as tf

PACKAGES = (
    'tensorflow',
    'tensorflow-cpu',
    'tensorflow-tpu',
    'keras',
    'tensorflow-datasets',
    'ml-collections',
    'numpy',
    'libtpu',
)


def describe_environment() -> dict[str, Any]:
    """Returns versions, devices and git commit for environment.json."""
    return {
        'python': platform.python_version(),
        'platform': platform.platform(),
        'cpu_cores': len(os.sched_getaffinity(0))
        if hasattr(os, 'sched_getaffinity')
        else os.cpu_count(),
        'packages': {name: version for name in PACKAGES if (version := _version(name))},
        'devices': [_device(device) for device in tf.config.list_logical_devices()],
        'git_commit': _git('rev-parse', 'HEAD'),
        'git_changed_files': (
            _git('status', '--porcelain', '--untracked-files=no') or ''
        ).splitlines(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(device: Any) -> str:
    name = device.name
    if device.device_type == 'GPU':
        gpus = tf.config.list_physical_devices('GPU')
        details = tf.config.experimental.get_device_details(
            gpus[int(name.rsplit(':', 1)[1]) % len(gpus)]
        )
        name += f' ({details.get("device_name", "GPU")})'
    return name


def _git(*arguments: str) -> str | None:
    try:
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        return subprocess.run(
            ['git', *arguments], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
