"""Starts JAX's runtime in this process: which devices, which other processes, where it caches."""

import dataclasses
import functools
import os
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from common import console, machine, tpu_environment
from common.errors import ConfigError, RunError, one_line
from devices import jax_packages, supervisor

# What to do where the device does not start although all packages are there.
STARTS_NOT = {
    'tpu': 'end what holds the TPU, or train without it: --config.strategy=one_device',
    'cuda': 'nvidia-smi, which shows whether the driver works, or train on the CPU: '
    'export CUDA_VISIBLE_DEVICES=-1',
    'cpu': 'train without JAX: --config.strategy=one_device',
}
# Seconds after which a process that is not heard of is lost.
HEARTBEAT_SECONDS = 30


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run, which meet at an address."""

    coordinator: str  # HOST:PORT of process 0
    num_processes: int
    process_id: int

    @classmethod
    def from_flags(
        cls, coordinator: str | None, num_processes: int | None, process_id: int | None
    ) -> 'Cluster | None':
        """Returns what the flags say, None if they say nothing. Raises ConfigError."""
        if coordinator is None and num_processes is None and process_id is None:
            return None
        if coordinator is None or num_processes is None or process_id is None:
            raise ConfigError(
                '--coordinator, --num_processes and --process_id belong together',
                'write all three, or none where the launcher of the processes is known',
            )
        if not re.fullmatch(r'[^\s:]+:\d+|\[[^\s\]]+\]:\d+', coordinator):
            problem = f'--coordinator={coordinator!r} is not an address'
            raise ConfigError(problem, 'write HOST:PORT of process 0')
        if not 0 <= process_id < num_processes:
            problem = f'--process_id={process_id} is none of {num_processes} processes'
            raise ConfigError(problem, f'write 0 to {num_processes - 1}')
        return cls(coordinator, num_processes, process_id)


_joined: Cluster | None = None


def may_have_peers(environ: Mapping[str, str] = os.environ) -> bool:
    """Returns whether a launcher may have started other processes of this run, to be found by JAX.

    JAX itself is not asked, because importing it takes time.
    """
    launched = environ.get('SLURM_NTASKS', '1') != '1' or 'JOB_COMPLETION_INDEX' in environ
    return launched or tpu_environment.is_tpu_expected(environ=environ)


def join(cluster: Cluster | None) -> None:
    """Prepares this process to be one of several once JAX starts. It returns in a child process.

    Without a cluster JAX looks for the other processes.
    """
    set_cluster(cluster)
    supervisor.run_as_child()


def set_cluster(cluster: Cluster | None) -> None:
    """Says whom this process meets once JAX starts."""
    global _joined
    _joined = cluster


def await_verdict() -> None:
    """Gives JAX's service the time to end this process because another one is lost.

    Call it after an error that may be the consequence; the service then names the lost process.
    """
    jax = sys.modules.get('jax')
    if jax and jax.distributed.is_initialized():
        time.sleep(1.5 * HEARTBEAT_SECONDS)


def is_wanted(config: ConfigDict, environ: Mapping[str, str] = os.environ, root: str = '/') -> bool:
    """Returns whether the steps of this (possibly unchecked) config run on JAX's runtime here.

    With strategy='auto' they do on a TPU of this machine, unless TensorFlow's own TPU build is
    installed.
    """
    strategy = config.get('strategy', 'auto')
    if strategy != 'auto' or config.get('tpu', 'local') != 'local':
        return strategy == 'pjrt'
    is_expected = tpu_environment.is_tpu_expected(environ=environ, root=root)
    return is_expected and not tpu_environment.build_version()


def expected_platform(
    config: ConfigDict, environ: Mapping[str, str] = os.environ, root: str = '/'
) -> str:
    """Returns which of JAX's platforms has to start here: 'tpu', 'cuda' or 'cpu'.

    A GPU counts if its driver answers, or if what JAX needs for one is installed.
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
    jax.config.update('jax_compilation_cache_dir', cache_folder())
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    jax.config.update('jax_enable_preemption_service', False)  # see devices/preemption.py
    if virtual_devices:
        _split_cpu(jax, virtual_devices)
    if _joined:
        _connect(jax, _joined)
    elif may_have_peers():
        _connect_found(jax)
    try:
        jax.devices()
    except RuntimeError as error:
        problem = f'JAX does not start on {platform} ({reason_of(error)})'
        raise RunError(problem, STARTS_NOT[platform], 'strategy') from error


def import_jax(platform: str) -> Any:
    """Imports JAX, which will start on this platform or not at all.

    Raises: RunError if it is not installed as it has to be.
    """
    found = jax_packages.check(platform)
    try:
        import jax
    except Exception as error:  # of a damaged installation
        problem = f'{found} cannot be imported ({one_line(error)})'
        raise RunError(problem, jax_packages.install(platform), 'strategy') from error
    # Named, a platform that fails is an error; of those that JAX looks for, it takes another.
    jax.config.update('jax_platforms', platform if platform == 'cpu' else f'{platform},cpu')
    return jax


def reason_of(error: RuntimeError) -> str:
    """Returns why a platform did not start, without JAX's advice to take another one."""
    return one_line(error).split(' (set JAX_PLATFORMS=')[0]


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
    console.warning(f'waiting for the other processes of {cluster.num_processes}')
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.num_processes,
            cluster.process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except Exception as error:  # ValueError, JaxRuntimeError
        raise RunError(
            f'the processes do not meet at {cluster.coordinator} ({one_line(error, 300)})',
            'give all of them the same --coordinator and --num_processes, each its --process_id',
        ) from error


def _connect_found(jax: Any) -> None:
    """Meets the other processes if a launcher that JAX knows has started some."""
    from jax._src.clusters import ClusterEnv

    try:
        kinds = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
        found = next((kind for kind in kinds if kind.is_env_present()), None)
        if found and found.get_process_count() > 1:
            console.warning(f'waiting for the other processes of {found.get_process_count()}')
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except Exception as error:  # of the launcher's variables, of the network
        raise RunError(
            f'the processes of this launcher do not meet ({one_line(error, 300)})',
            'write --coordinator, --num_processes and --process_id',
        ) from error


def cache_folder() -> str:
    """Returns the folder in which JAX keeps compiled programs."""
    return os.path.join(
        os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'warmstart', 'jax'
    )
