"""Starts JAX's runtime in this process, and connects it to the other processes."""

import functools
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from common import console, machine, tpu_environment
from common.errors import RunError, counted, one_line
from devices import jax_packages, supervisor
from devices.cluster import Cluster, local_devices

# What to do where the device does not start although all packages are there.
START_FIXES = {
    'tpu': 'end what holds the TPU; on a slice, start the command on all hosts; or train without '
    'it: --config.strategy=one_device',
    'cuda': 'nvidia-smi, which shows whether the driver works, or train on the CPU: '
    'export CUDA_VISIBLE_DEVICES=-1',
    'cpu': 'train without JAX: --config.strategy=one_device',
}
HEARTBEAT_SECONDS = 30  # of silence after which a process counts as lost
PATIENCE_SECONDS = 30
STILL_WAITING = (
    'the devices have not started yet: a slice waits until the command runs on all its hosts; '
    'in another terminal --mode=check says who holds a TPU'
)


_joined: Cluster | None = None


def join(cluster: Cluster) -> None:
    """Prepares this process to be one of several once JAX starts. It returns in a child process."""
    set_cluster(cluster)
    supervisor.run_as_child()


def set_cluster(cluster: Cluster | None) -> None:
    """Sets the processes that this one meets once JAX starts; None if it is alone."""
    global _joined
    _joined = cluster


def await_report_of_loss(error: Exception) -> None:
    """Gives JAX's service the time to end this process if another one is lost.

    Call it with an error that may be the consequence; the service then names the lost process.
    """
    jax = sys.modules.get('jax')
    if not jax or not jax.distributed.is_initialized():
        return
    is_of_jax = isinstance(error, jax.errors.JaxRuntimeError)
    if is_of_jax and not str(error).startswith('RESOURCE_EXHAUSTED'):
        time.sleep(1.5 * HEARTBEAT_SECONDS)


def is_wanted(config: ConfigDict, environ: Mapping[str, str] = os.environ, root: str = '/') -> bool:
    """Returns whether the steps of this (possibly unchecked) config run on JAX's runtime here.

    With strategy='auto' they do on a TPU of this machine, unless TensorFlow's own TPU build is
    installed; and on a GPU, if only JAX has what it needs for one.
    """
    strategy = config.get('strategy', 'auto')
    if strategy != 'auto' or config.get('tpu', 'local') != 'local':
        return strategy == 'pjrt'
    if tpu_environment.is_tpu_expected(environ=environ, root=root):
        return not tpu_environment.build_version()
    is_set_for_gpus = machine.installed(jax_packages.CUDA_PLUGINS) and not machine.installed(
        ['tensorflow']
    )
    return bool(is_set_for_gpus) and expected_platform(config, environ, root) == 'cuda'


def expected_platform(
    config: ConfigDict, environ: Mapping[str, str] = os.environ, root: str = '/'
) -> str:
    """Returns which of JAX's platforms has to start here: 'tpu', 'cuda' or 'cpu'.

    A GPU counts if nvidia-smi lists it, or if a card is on the PCI bus and what JAX needs for one
    is installed.
    """
    if config.get('virtual_devices', 0):
        return 'cpu'
    if tpu_environment.is_tpu_expected(environ=environ, root=root):
        return 'tpu'
    if environ.get('CUDA_VISIBLE_DEVICES') in machine.NO_GPU:
        return 'cpu'
    has_plugin = machine.installed(jax_packages.CUDA_PLUGINS)
    has_gpu = machine.nvidia_smi()[0] or (has_plugin and machine.count_nvidia_cards(root))
    return 'cuda' if has_gpu else 'cpu'


def start(config: ConfigDict) -> None:
    """Starts JAX's runtime; does nothing the second time.

    Raises: RunError if JAX is missing, or does not start on the devices that are here.
    """
    _start(config.virtual_devices, expected_platform(config))
    _use_64_bits()


def gpus() -> list[Any]:
    """Returns the GPUs of this process that JAX has started, [] if it has not."""
    jax = sys.modules.get('jax')
    if not jax or not _start.cache_info().currsize:
        return []
    return [device for device in jax.local_devices() if device.platform == 'gpu']


def start_virtual(devices: int) -> None:
    """Starts JAX's runtime on that many virtual devices of the CPU."""
    _start(devices, 'cpu')
    _use_64_bits()


def _use_64_bits() -> None:
    import jax

    jax.config.update('jax_enable_x64', True)  # labels and counters have 64 bits


@functools.cache
def _start(virtual_devices: int, platform: str) -> None:
    import tensorflow as tf

    tf.config.set_visible_devices([], 'GPU')  # it is JAX's
    jax = import_jax(platform)
    cache = os.path.join(machine.cache_folder(), 'jax')
    jax.config.update('jax_compilation_cache_dir', cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    jax.config.update('jax_enable_preemption_service', False)  # see devices/preemption.py
    if virtual_devices:
        _split_cpu(jax, virtual_devices)
    if _joined:
        _connect(jax, _joined)
    patience = threading.Timer(PATIENCE_SECONDS, console.warning, [STILL_WAITING])
    patience.daemon = True
    patience.start()
    try:
        start_devices(jax, platform)
    finally:
        patience.cancel()


def import_jax(platform: str) -> Any:
    """Imports JAX, which will start on this platform or not at all.

    Raises: RunError if it is not installed as it has to be.
    """
    found = jax_packages.check(platform)
    try:
        import jax
    except Exception as error:  # of a damaged installation
        problem = f'{found} cannot be imported ({one_line(error)})'
        raise RunError(problem, jax_packages.repair(), 'strategy') from error
    # Of platforms that it looks for itself, JAX takes another one if one fails.
    jax.config.update('jax_platforms', platform if platform == 'cpu' else f'{platform},cpu')
    return jax


def start_devices(jax: Any, platform: str) -> list[Any]:
    """Returns the devices of all processes. Raises RunError if they are not of this platform."""
    name, fix = jax_packages.device_name(platform), START_FIXES[platform]
    try:
        devices = jax.devices()
    except RuntimeError as error:
        # Without JAX's advice to take another platform.
        reason = one_line(error).split(' (set JAX_PLATFORMS=')[0]
        raise RunError(f'JAX does not start the {name} ({reason})', fix, 'strategy') from error
    if devices[0].platform != {'cuda': 'gpu'}.get(platform, platform):
        raise RunError(f'JAX finds no {name}: its driver does not work', fix, 'strategy')
    return devices


def _split_cpu(jax: Any, devices: int) -> None:
    if jax.config.jax_num_cpu_devices == devices:
        return
    try:
        jax.config.update('jax_num_cpu_devices', devices)
    except RuntimeError as error:  # JAX has started
        problem = f'config.virtual_devices={devices}, but JAX has already started'
        raise RunError(problem, 'start a new process', 'virtual_devices') from error


def _connect(jax: Any, cluster: Cluster) -> None:
    """Meets the other processes."""
    others = 'the other processes'
    if cluster.num_processes:
        others = counted(cluster.num_processes - 1, 'other process', 'other processes')
    console.warning(f'waiting for {others}, up to 5 minutes')
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.num_processes,
            cluster.process_id,
            local_device_ids=None if cluster.coordinator else local_devices(),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except Exception as error:  # ValueError, JaxRuntimeError; of the launcher's variables
        place = f'at {cluster.coordinator}' if cluster.coordinator else 'that were launched'
        fix = 'give all of them the same --coordinator and --num_processes, each its --process_id'
        raise RunError(f'the processes {place} cannot connect ({one_line(error)})', fix) from error
