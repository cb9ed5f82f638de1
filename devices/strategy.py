"""Chooses a tf.distribute strategy for the hardware at hand."""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

import tensorflow as tf
from ml_collections import ConfigDict

from common import console, tpu_environment
from common.errors import ConfigError, RunError, counted, one_line
from devices import jax_start
from devices.lowering import OneOfMany


def make_strategy(config: ConfigDict) -> tuple[tf.distribute.Strategy, str]:
    """Chooses a TPU, else several workers, else several GPUs, else one device.

    `config.strategy` may choose another.

    Returns: (strategy, one line that says what was chosen and why).

    Raises:
        RunError: the strategy that the config asks for is not available, or a TPU is there and does
            not start. There is no silent fallback.
        ConfigError: virtual devices together with real ones.
    """
    wanted = config.strategy
    if jax_start.is_wanted(config):
        return _pjrt(config, wanted)
    if config.virtual_devices:
        _split_cpu(config.virtual_devices)
    if wanted == 'tpu' or (wanted == 'auto' and tpu_environment.is_tpu_expected(config.tpu)):
        return _tpu(config.tpu, wanted)
    workers = num_workers()
    if wanted == 'multi_worker' or (wanted == 'auto' and workers > 1):
        return _multi_worker(workers)
    gpus = [gpu.name for gpu in tf.config.list_logical_devices('GPU')]
    cpus = [cpu.name for cpu in tf.config.list_logical_devices('CPU')][
        : max(1, config.virtual_devices)
    ]
    cpu_kind = 'virtual CPU' if config.virtual_devices else 'CPU'
    devices, kind = (gpus, 'GPU') if gpus else (cpus, cpu_kind)
    reason = _reason(wanted, f'found {_found()}')
    if wanted == 'mirrored' or (wanted == 'auto' and len(devices) > 1):
        if len(devices) < 2:
            raise RunError(
                f"config.strategy='mirrored' needs several devices, but found {_found()}",
                '--config.strategy=auto, or try it on a CPU with --config.virtual_devices=2',
                'strategy',
            )
        # On CPUs one device sums, in a fixed order: that is repeatable, and two strategies in one
        # process do not share a collective.
        sums = None if gpus else tf.distribute.ReductionToOneDevice()
        strategy = tf.distribute.MirroredStrategy(devices, sums)
        return strategy, f'MirroredStrategy on {len(devices)} {kind}s: {reason}'
    strategy = tf.distribute.OneDeviceStrategy(devices[0])
    return strategy, f'OneDeviceStrategy on one {kind}: {reason}'


def device_kind(strategy: tf.distribute.Strategy) -> str:
    """Returns where the replicas compute: 'TPU', 'GPU' or 'CPU'."""
    if isinstance(strategy, OneOfMany):
        return strategy.kind
    if isinstance(strategy, tf.distribute.TPUStrategy):
        return 'TPU'
    return 'GPU' if any('GPU' in device for device in strategy.extended.worker_devices) else 'CPU'


def runs_as_chief(config: ConfigDict) -> bool:
    """Returns whether this process is the worker that writes; no strategy is needed.

    That is the chief, or worker 0 if there is no chief.
    """
    if jax_start.is_wanted(config):
        jax_start.start(config)
        from devices import pjrt

        return pjrt.is_first_process()
    if config.strategy not in ('auto', 'multi_worker') or num_workers() < 2:
        return True
    environment = json.loads(os.environ['TF_CONFIG'])
    first = 'chief' if environment['cluster'].get('chief') else 'worker'
    task = environment.get('task', {})
    return (task.get('type'), int(task.get('index', 0))) == (first, 0)


def make_sum_over_workers(
    strategy: tf.distribute.Strategy,
) -> Callable[[Sequence[float]], list[float]]:
    """Returns a function that sums over the workers, so that they can decide together.

    It takes numbers, float [n], and returns their sums; every worker must call it at the same
    point. With one process it returns the numbers themselves.
    """
    if isinstance(strategy, OneOfMany):
        from devices import pjrt

        return pjrt.sum_over_processes
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return lambda numbers: [float(number) for number in numbers]
    local_replicas = strategy.num_replicas_in_sync // strategy.extended._num_workers

    @tf.function(autograph=False)
    def total(numbers: tf.Tensor) -> tf.Tensor:
        sums = strategy.run(
            lambda: tf.distribute.get_replica_context().all_reduce(
                tf.distribute.ReduceOp.SUM, tf.identity(numbers)
            )
        )
        return strategy.experimental_local_results(sums)[0] / local_replicas

    return lambda numbers: total(tf.constant(numbers, tf.float64)).numpy().tolist()


def resolve_precision(precision: str, kind: str) -> str:
    """Returns the Keras dtype policy for `config.precision` on a 'TPU', 'GPU' or 'CPU'.

    It is 'float32', 'float64', 'mixed_bfloat16' or 'mixed_float16'.
    """
    if precision == 'auto':
        capable = kind == 'TPU' or (
            kind == 'GPU' and all(capability >= (8, 0) for capability in _compute_capabilities())
        )
        precision = 'bfloat16' if capable else 'float32'
    return precision if precision in ('float32', 'float64') else f'mixed_{precision}'


def resolve_jit_compile(jit_compile: str, kind: str) -> bool:
    """Returns whether TensorFlow has XLA compile forward and backward.

    It does on GPUs, not on CPUs, where it is slower; a TPU compiles anyway.

    Raises: ConfigError for jit_compile='true' on a TPU, whose TensorFlow builds have no XLA for the
        host.
    """
    if kind == 'TPU' and jit_compile == 'true':
        raise ConfigError(
            "config.jit_compile='true' on a TPU would compile for the host, which fails; "
            "a TPU's step is compiled anyway",
            '--config.jit_compile=auto',
            'jit_compile',
        )
    return kind == 'GPU' if jit_compile == 'auto' else jit_compile == 'true'


def check_jit_compile_on_tpu(config: ConfigDict) -> None:
    """Raises ConfigError for a `jit_compile` that a TPU refuses.

    TensorFlow's TPU builds refuse 'true', JAX's runtime refuses 'false'.
    """
    if config.strategy == 'tpu':
        resolve_jit_compile(config.jit_compile, 'TPU')
    else:
        _check_pjrt_compiles(config)


def _check_pjrt_compiles(config: ConfigDict) -> None:
    if config.jit_compile == 'false':
        raise ConfigError(
            "config.jit_compile='false', but JAX runs compiled steps alone",
            '--config.jit_compile=auto',
            'jit_compile',
        )


def _pjrt(config: ConfigDict, wanted: str) -> tuple[tf.distribute.Strategy, str]:
    _check_pjrt_compiles(config)
    jax_start.start(config)
    from devices.pjrt import PjrtStrategy  # imports JAX

    strategy = PjrtStrategy()
    kind = 'virtual CPU' if config.virtual_devices else strategy.kind
    devices = counted(strategy.num_replicas_in_sync, kind)
    reason = _reason(wanted, f'found {strategy.kind}s that JAX drives')
    return strategy, f"JAX's runtime on {devices}: {reason}"


def _split_cpu(count: int) -> None:
    if tf.config.list_physical_devices('GPU'):
        raise ConfigError(
            'config.virtual_devices is for CPUs only, and a GPU was found',
            'set it to 0, or hide the GPU with CUDA_VISIBLE_DEVICES=-1',
            'virtual_devices',
        )
    cpu = tf.config.list_physical_devices('CPU')[0]
    try:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * count
        )
    except RuntimeError:
        if len(tf.config.list_logical_devices('CPU')) < count:
            raise RunError(
                f'config.virtual_devices={count}, but TensorFlow has already started '
                'with fewer devices',
                'start a new process',
                'virtual_devices',
            ) from None


def _tpu(name: str, wanted: str) -> tuple[tf.distribute.Strategy, str]:
    name = os.environ.get('TPU_NAME', name) if name == 'local' else name
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        strategy = tf.distribute.TPUStrategy(resolver)
    except Exception as error:
        # TensorFlow raises ValueError, NotFoundError, InvalidArgumentError, ... here.
        reason = one_line(error, 200)
        raise RunError(
            f'the TPU {name!r} does not start ({type(error).__name__}: {reason}); found {_found()}',
            "for JAX's runtime --config.strategy=auto --config.tpu=local, without tensorflow-tpu; "
            "TensorFlow's own needs pip install '.[tpu-tf]', and a TPU that no process holds",
        ) from error
    return (
        strategy,
        f'TPUStrategy on {strategy.num_replicas_in_sync} cores: '
        f'{_reason(wanted, "a TPU was found")}',
    )


def num_workers() -> int:
    """Returns how many workers TF_CONFIG names; 0 without it. Raises RunError if it is invalid."""
    try:
        cluster = json.loads(os.environ.get('TF_CONFIG', '{}')).get('cluster', {})
        # A chief is a worker that also writes.
        return len(cluster.get('chief', [])) + len(cluster.get('worker', []))
    except (ValueError, AttributeError) as error:
        raise RunError(
            f'the environment variable TF_CONFIG is not the JSON of a cluster ({error})',
            'fix it or unset it',
        ) from None


def _multi_worker(workers: int) -> tuple[tf.distribute.Strategy, str]:
    if workers < 1:
        raise RunError(
            "config.strategy='multi_worker' needs the environment variable "
            'TF_CONFIG with the addresses of all workers, but it names none; found '
            f'{_found()}',
            key='strategy',
        )
    # The loss of a worker is an error for the others, not something to wait for.
    os.environ.setdefault('GRPC_FAIL_FAST', 'use_caller')
    if workers > 1:
        console.warning(f'waiting for the other workers that TF_CONFIG names, {workers} in all')
    try:
        with _ended_by_signals():
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except Exception as error:
        # ValueError for a wrong task, an OpError for an address that cannot be used.
        raise RunError(
            f'the environment variable TF_CONFIG does not work here ({one_line(error)})',
            'fix it or unset it',
        ) from error
    return (
        strategy,
        f'MultiWorkerMirroredStrategy on {workers} workers, {strategy.num_replicas_in_sync} '
        'replicas: TF_CONFIG names them',
    )


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Lets signals end the process at once while TensorFlow waits for other workers.

    Nothing has begun yet, and no Python handler would run during that wait. SIGINT always works,
    SIGTERM only until TensorFlow sets a handler of its own, which merely records it. The previous
    handlers are restored afterwards.
    """
    usual = {}
    if threading.current_thread() is threading.main_thread():
        usual = {
            number: signal.getsignal(number) or signal.SIG_DFL
            for number in (signal.SIGINT, signal.SIGTERM)
        }
    for number, handler in usual.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _reason(wanted: str, otherwise: str) -> str:
    return 'config.strategy asks for it' if wanted != 'auto' else otherwise


def _found() -> str:
    counts = [(len(tf.config.list_logical_devices(kind)), kind) for kind in ('TPU', 'GPU', 'CPU')]
    return ', '.join(f'{count} {kind}{"s" * (count > 1)}' for count, kind in counts if count)


def _compute_capabilities() -> list[tuple[int, int]]:
    gpus = jax_start.gpus()
    if gpus:
        numbers = [gpu.compute_capability.split('.') for gpu in gpus]
        return [(int(major), int(minor)) for major, minor in numbers]
    details = [
        tf.config.experimental.get_device_details(gpu)
        for gpu in tf.config.list_physical_devices('GPU')
    ]
    return [detail.get('compute_capability') or (0, 0) for detail in details]
