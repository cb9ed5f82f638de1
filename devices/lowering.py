"""Lowers a replica's step to a program for XLA's compilers, without the devices it is for."""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.python.distribute import one_device_strategy

from common import tpu_environment
from common.errors import RunError, one_line

HOST = '/job:localhost/replica:0/task:0/device:CPU:0'


class OneOfMany(tf.distribute.Strategy):
    """Stands for one of `num_replicas` replicas, without the others.

    Sums over replicas are traced as XLA's own all-reduce, and the replica's number as XLA's own.

    For tracing and lowering only; TensorFlow cannot run the result. Variables are created on the
    CPU.

    Attributes:
        kind: of the devices that the program is for, 'TPU', 'GPU' or 'CPU'.
    """

    kind = 'TPU'

    def __init__(self, num_replicas: int, extended: 'OneOfManyExtended | None' = None) -> None:
        super().__init__(extended or OneOfManyExtended(self, num_replicas))


class OneOfManyExtended(one_device_strategy.OneDeviceExtended):
    def __init__(self, strategy: OneOfMany, num_replicas: int) -> None:
        super().__init__(strategy, HOST)
        self._num_replicas = num_replicas

    @property
    def _num_replicas_in_sync(self) -> int:
        return self._num_replicas

    def _call_for_each_replica(self, fn: Callable, args: tuple, kwargs: dict) -> Any:
        strategy = self._container_strategy()
        number = gen_xla_ops.xla_replica_id() if self._num_replicas > 1 else 0
        with tf.device(HOST), tf.distribute.ReplicaContext(strategy, number):
            return fn(*args, **kwargs)

    def _use_merge_call(self) -> bool:
        return False  # all sums over replicas come through here

    def _replica_ctx_all_reduce(self, reduce_op: Any, value: Any, options: Any = None) -> Any:
        is_mean = reduce_op == tf.distribute.ReduceOp.MEAN

        def total(tensor: tf.Tensor) -> tf.Tensor:
            add = self._sum_of_rows if tensor.dtype == tf.float64 else self._sum
            share = tf.constant(1 / self._num_replicas if is_mean else 1, tensor.dtype)
            return add(tensor) * share  # a mean of integers has no share, and raises

        return tf.nest.map_structure(total, value)

    def _sum(self, tensor: tf.Tensor) -> tf.Tensor:
        group = tf.constant([list(range(self._num_replicas))], tf.int32)
        return gen_xla_ops.xla_all_reduce(
            input=tensor, group_assignment=group, reduce_op='Add', mode='CrossReplica'
        )

    def _sum_of_rows(self, tensor: tf.Tensor) -> tf.Tensor:
        """Sums float64, for which TensorFlow's operation has no kernel.

        Each replica fills a row of its own, as integers, so that the sum is all rows.
        """
        own = tf.one_hot(gen_xla_ops.xla_replica_id(), self._num_replicas, dtype=tf.uint32)
        bits = tf.bitcast(tensor, tf.uint32)[None]
        rows = self._sum(bits * tf.reshape(own, [-1] + [1] * (bits.shape.rank - 1)))
        return tf.reduce_sum(tf.bitcast(rows, tf.float64), axis=0)


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A replica's step as a program.

    Its parameters are the step's arguments, flattened, then what the step captures; its results
    what the step returns, flattened, then the new values of the variables that it assigns.

    Attributes:
        hlo: serialized HLO module.
        num_arguments: tensors that the step takes.
        results: tensors that the step returns.
        captured: resource handles of variables, and constants.
        variables: those that the step reads or assigns.
    """

    hlo: bytes
    num_arguments: int
    results: list[tf.TensorSpec]
    captured: list[tf.Tensor]
    variables: list[tf.Variable]


def lower(strategy: OneOfMany, step: Callable[..., Any], specs: tuple) -> Lowered:
    """Lowers a step as one replica runs it.

    Args:
        strategy: in whose scope the variables of the step were created.
        step: takes the arguments that `specs` describe.
        specs: nests of tf.TensorSpec.

    Raises: RunError if this build of TensorFlow cannot lower it.
    """
    flat = tf.nest.flatten(specs)

    @tf.function(jit_compile=True, autograph=False)
    def of_replica(*tensors: tf.Tensor) -> Any:
        return strategy.run(step, args=tf.nest.pack_sequence_as(specs, tensors))

    try:
        traced = of_replica.get_concrete_function(*flat)
        hlo = of_replica.experimental_get_compiler_ir(*flat)(
            stage='hlo_serialized', platform_name='CPU'
        )
    except (tf.errors.OpError, ValueError) as error:
        if tpu_environment.build_version():
            problem = f'tensorflow-tpu cannot lower the step ({one_line(error, 300)})'
            raise RunError(problem, "pip install '.[cpu]' in a separate environment") from error
        problem = f'XLA cannot compile the step ({one_line(error, 300)})'
        raise RunError(problem, '--verbosity=1 shows where') from error
    results = [tf.TensorSpec(result.shape, result.dtype) for result in traced.outputs]
    captured, variables = list(traced.captured_inputs), list(traced.graph.variables)
    return Lowered(hlo, len(flat), results, captured, variables)
