"""Lowers a replica's step to a program for the TPU compiler, on a machine without a TPU."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.python.distribute import one_device_strategy

from common.errors import RunError, one_line

HOST = '/job:localhost/replica:0/task:0/device:CPU:0'


class OneOfMany(tf.distribute.Strategy):
    """Stands for one of `num_replicas` replicas, without the others.

    Sums over replicas are traced as XLA's own all-reduce.

    For tracing and lowering only; the result cannot run here. Variables are created on the CPU.
    """

    def __init__(self, num_replicas: int) -> None:
        super().__init__(_OneOfMany(self, num_replicas))


class _OneOfMany(one_device_strategy.OneDeviceExtended):
    def __init__(self, strategy: OneOfMany, num_replicas: int) -> None:
        super().__init__(strategy, HOST)
        self._num_replicas = num_replicas

    @property
    def _num_replicas_in_sync(self) -> int:
        return self._num_replicas

    def _use_merge_call(self) -> bool:
        return False  # all sums over replicas come through here

    def _replica_ctx_all_reduce(self, reduce_op: Any, value: Any, options: Any = None) -> Any:
        share = 1 / self._num_replicas if reduce_op == tf.distribute.ReduceOp.MEAN else 1

        def total(tensor: tf.Tensor) -> tf.Tensor:
            group = tf.constant([list(range(self._num_replicas))], tf.int32)
            summed = gen_xla_ops.xla_all_reduce(
                input=tensor, group_assignment=group, reduce_op='Add', mode='CrossReplica'
            )
            return summed * tf.cast(share, tensor.dtype)

        return tf.nest.map_structure(total, value)


def lower(strategy: OneOfMany, step: Callable[..., Any], specs: tuple) -> bytes:
    """Returns the HLO module of a step as one replica runs it.

    Variables that the step captures become parameters.

    Args:
        strategy: in whose scope the variables of the step were created.
        step: takes the arguments that `specs` describe.
        specs: nests of tf.TensorSpec.

    Raises: RunError if this build of TensorFlow cannot lower it.
    """

    @tf.function(jit_compile=True, autograph=False)
    def of_replica(*tensors: tf.Tensor) -> Any:
        return strategy.run(step, args=tf.nest.pack_sequence_as(specs, tensors))

    try:
        return of_replica.experimental_get_compiler_ir(*tf.nest.flatten(specs))(
            stage='hlo_serialized', platform_name='CPU'
        )
    except (tf.errors.OpError, ValueError) as error:
        raise RunError(
            f'this build of TensorFlow cannot lower the step ({one_line(error, 300)})',
            "preflight needs the CPU or GPU build: pip install '.[cpu]' in a separate environment",
        ) from error
