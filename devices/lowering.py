"""A replica's step as a program for the TPU compiler, written by TensorFlow on a machine that has no TPU."""

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.python.distribute import one_device_strategy

from common.errors import RunError, one_line

HOST = '/job:localhost/replica:0/task:0/device:CPU:0'


class OneOfMany(tf.distribute.Strategy):
    """One replica of `num_replicas` that are not there: what is traced in it sums over them with XLA's own all-reduce.

    For tracing and lowering only; what it makes cannot run here. Variables are created on the processor.
    """

    def __init__(self, num_replicas):
        super().__init__(_OneOfMany(self, num_replicas))


class _OneOfMany(one_device_strategy.OneDeviceExtended):
    def __init__(self, strategy, num_replicas):
        super().__init__(strategy, HOST)
        self._all = num_replicas

    @property
    def _num_replicas_in_sync(self):
        return self._all

    def _use_merge_call(self):
        return False  # all sums over replicas come through here

    def _replica_ctx_all_reduce(self, reduce_op, value, options=None):
        share = 1 / self._all if reduce_op == tf.distribute.ReduceOp.MEAN else 1

        def total(tensor):
            everyone = tf.constant([list(range(self._all))], tf.int32)
            summed = gen_xla_ops.xla_all_reduce(
                input=tensor, group_assignment=everyone, reduce_op='Add', mode='CrossReplica'
            )
            return summed * tf.cast(share, tensor.dtype)

        return tf.nest.map_structure(total, value)


def lower(strategy, step, specs):
    """The HLO module of a step as one replica runs it: bytes. Variables that it captures become parameters.

    Args:
        strategy: OneOfMany, in whose scope the variables of the step were created.
        step: a function of the arguments that `specs` describe.
        specs: a tuple of nests of tf.TensorSpec.

    Raises: RunError where this build of TensorFlow cannot lower it.
    """

    @tf.function(jit_compile=True, autograph=False)
    def of_replica(*tensors):
        return strategy.run(step, args=tf.nest.pack_sequence_as(specs, tensors))

    try:
        return of_replica.experimental_get_compiler_ir(*tf.nest.flatten(specs))(
            stage='hlo_serialized', platform_name='CPU'
        )
    except (tf.errors.OpError, ValueError) as error:
        raise RunError(
            f'this build of TensorFlow cannot lower the step ({one_line(error, 300)}): preflight takes the build for processors or for GPUs, '
            "pip install '.[cpu]' in an environment of its own"
        ) from error
