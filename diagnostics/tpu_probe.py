"""Starts the TPU in a process of its own: import, resolve, initialise, a matmul, an all-reduce. Says how far it came."""

import os
from typing import NamedTuple

from common import tpu_environment
from diagnostics.worker_process import Apart

SECONDS = 180.0  # a slice of several hosts and the first compilation may take most of it
OLDER = 'StreamExecutor'  # what TensorFlow calls the interface before PJRT


class Way(NamedTuple):
    """A way to start the TPU: a name for the table, and the variables that ask for it."""

    name: str
    variables: dict


class Outcome(NamedTuple):
    """Cores that computed, or 0 and the step that failed and why."""

    cores: int
    step: str = ''
    reason: str = ''


def ways(version, environ=os.environ, root='/', library=None):
    """The ways in which this build can start, the one that `main.py` takes first.

    Args: see `tpu_environment.pjrt_variables`.
    """
    if any(variable in environ for variable in tpu_environment.PJRT_VARIABLES):
        return [Way('the PJRT variables of your environment', {})]
    older = Way(OLDER, {})
    chosen = tpu_environment.pjrt_variables(version, environ, root, library)
    if chosen:
        # What keeps main.py from setting the three is that one of them is set.
        return [Way('PJRT', chosen), Way(OLDER, {'NEXT_PLUGGABLE_DEVICE_USE_C_API': 'false'})]
    library = library or tpu_environment.libtpu_path(environ)
    if version and version.startswith('2.19.') and library:
        return [
            older,
            Way('PJRT', dict(zip(tpu_environment.PJRT_VARIABLES, ('TPU', 'true', library)))),
        ]
    return [older]


def probe(way, name='local', seconds=SECONDS, environ=os.environ, lock='/tmp/libtpu_lockfile'):
    """Tries one way; returns an Outcome. A step that hangs is ended with its process after `seconds`."""
    free = not os.path.exists(lock)
    step, cores = 'start', 0
    with Apart(
        'diagnostics.tpu_probe',
        'start_tpu',
        seconds,
        {**environ, 'TF_CPP_MIN_LOG_LEVEL': '2', **way.variables},
    ) as process:
        process.tell(name)
        for message in process:
            step, cores = message.get('begin', step), message.get('cores', cores)
        reason = process.end
    if reason and free and os.path.exists(lock):
        os.remove(
            lock
        )  # a process that is killed leaves it behind, and the next one would stop at it
    return (
        Outcome(0, step, reason or 'it ended without a word')
        if reason or not cores
        else Outcome(cores)
    )


def start_tpu(say, hear):
    """What the process does: see `worker_process.Apart`."""
    name = hear()
    say({'begin': 'import'})
    import tensorflow as tf

    say({'begin': 'resolve'})
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
    tf.config.experimental_connect_to_cluster(resolver)
    say({'begin': 'initialise'})
    tf.tpu.experimental.initialize_tpu_system(resolver)
    strategy = tf.distribute.TPUStrategy(resolver)
    cores = strategy.num_replicas_in_sync

    def product():
        return tf.reduce_max(tf.linalg.matmul(tf.ones([128, 128]), tf.ones([128, 128])))

    def total():
        return tf.distribute.get_replica_context().all_reduce(
            tf.distribute.ReduceOp.SUM, tf.ones([])
        )

    for step, function, right in (('matmul', product, 128), ('all-reduce', total, cores)):
        say({'begin': step})
        results = [
            float(value)
            for value in strategy.experimental_local_results(
                tf.function(lambda: strategy.run(function), autograph=False)()
            )
        ]
        if any(value != right for value in results):
            raise ArithmeticError(f'the TPU computed {results} where {right} is right')
    say({'cores': cores})
