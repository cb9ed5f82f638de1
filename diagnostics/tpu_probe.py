"""Starts the TPU in a process of its own, and says how far it came.

The steps: import, resolve, initialise, a matmul, an all-reduce.
"""

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from common import tpu_environment
from common.errors import RunError
from diagnostics import tpu_lock
from diagnostics.worker_process import WorkerProcess

SECONDS = 180.0  # a slice of several hosts and the first compilation may take most of it
STREAM_EXECUTOR = 'StreamExecutor'  # TensorFlow's name for the interface before PJRT


class StartMethod(NamedTuple):
    """How TensorFlow starts the TPU: a name for the table, and the variables that ask for it."""

    name: str
    variables: dict


class Outcome(NamedTuple):
    """Cores that computed, or 0 and the step that failed and why."""

    cores: int
    step: str = ''
    reason: str = ''


def start_methods(
    version: str,
    environ: Mapping[str, str] = os.environ,
    root: str = '/',
    library: str | None = None,
) -> list[StartMethod]:
    """Returns the ways in which this tensorflow-tpu can start, first the one of `main.py`.

    Args: see `tpu_environment.pjrt_variables`.
    """
    if any(variable in environ for variable in tpu_environment.PJRT_VARIABLES):
        return [StartMethod('the PJRT variables of your environment', {})]
    older = StartMethod(STREAM_EXECUTOR, {})
    chosen = tpu_environment.pjrt_variables(version, environ, root, library)
    if chosen:
        # main.py sets the three variables only if none of them is set.
        return [
            StartMethod('PJRT', chosen),
            StartMethod(STREAM_EXECUTOR, {'NEXT_PLUGGABLE_DEVICE_USE_C_API': 'false'}),
        ]
    library = library or tpu_environment.libtpu_path(environ)
    if version and version.startswith('2.19.') and library:
        return [
            older,
            StartMethod(
                'PJRT',
                dict(zip(tpu_environment.PJRT_VARIABLES, ('TPU', 'true', library), strict=True)),
            ),
        ]
    return [older]


def probe(
    function: str,
    argument: str,
    seconds: float = SECONDS,
    environ: Mapping[str, str] = os.environ,
    lock: str = tpu_lock.LOCK,
) -> Outcome:
    """Calls 'start_jax' or 'start_tensorflow' with its argument in a process of its own.

    A step that hangs is ended with its process after `seconds`.
    """
    had_no_lock = not os.path.exists(lock)
    step, cores = 'start', 0
    quiet = {**environ, 'TF_CPP_MIN_LOG_LEVEL': '2'}
    with WorkerProcess('diagnostics.tpu_probe', function, seconds, quiet) as process:
        process.send(argument)
        for message in process:
            step, cores = message.get('begin', step), message.get('cores', cores)
        reason = process.end
    if reason and had_no_lock and os.path.exists(lock) and tpu_lock.is_held(lock) is False:
        os.remove(lock)  # a killed process leaves it behind, and the next one would stop at it
    if reason or not cores:
        return Outcome(0, step, reason or 'it ended without a message')
    return Outcome(cores)


def start_jax(send: Callable[[dict], None], receive: Callable[[], Any]) -> None:
    """Starts JAX on a platform and computes on its devices, in a `WorkerProcess`."""
    platform = receive()
    send({'begin': 'import'})
    import numpy

    from devices import jax_start

    jax = jax_start.import_jax(platform)
    send({'begin': 'initialise'})
    try:
        devices = jax_start.start_devices(jax, platform)
    except RunError as error:
        raise RunError(error.problem) from error
    send({'begin': 'matmul'})
    for device in jax.local_devices():
        ones = jax.device_put(numpy.ones([128, 128], numpy.float32), device)
        check_results([float(jax.numpy.max(ones @ ones))], 128)
    send({'begin': 'all-reduce'})
    shards = jax.sharding.NamedSharding(
        jax.sharding.Mesh(numpy.array(devices), 'cores'), jax.sharding.PartitionSpec('cores')
    )
    ones = jax.make_array_from_callback(
        (len(devices),), shards, lambda index: numpy.ones([len(devices)], numpy.float32)[index]
    )
    check_results([float(jax.jit(jax.numpy.sum)(ones))], len(devices))
    send({'cores': len(devices)})


def start_tensorflow(send: Callable[[dict], None], receive: Callable[[], Any]) -> None:
    """Starts the TPU of that name with TensorFlow's TPU build, in a `WorkerProcess`."""
    name = receive()
    send({'begin': 'import'})
    import tensorflow as tf

    send({'begin': 'resolve'})
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
    tf.config.experimental_connect_to_cluster(resolver)
    send({'begin': 'initialise'})
    tf.tpu.experimental.initialize_tpu_system(resolver)
    strategy = tf.distribute.TPUStrategy(resolver)
    cores = strategy.num_replicas_in_sync

    def product() -> Any:
        return tf.reduce_max(tf.linalg.matmul(tf.ones([128, 128]), tf.ones([128, 128])))

    def total() -> Any:
        return tf.distribute.get_replica_context().all_reduce(
            tf.distribute.ReduceOp.SUM, tf.ones([])
        )

    for step, function, right in (('matmul', product, 128), ('all-reduce', total, cores)):
        send({'begin': step})
        compiled = tf.function(functools.partial(strategy.run, function), autograph=False)
        check_results(map(float, strategy.experimental_local_results(compiled())), right)
    send({'cores': cores})


def check_results(results: Iterable[float], right: float) -> None:
    """Raises ArithmeticError unless all results are right."""
    computed = list(results)
    if any(value != right for value in computed):
        raise ArithmeticError(f'it computed {computed} instead of {right}')
