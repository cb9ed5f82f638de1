"""The steps of the product become a TPU's graph under a real TPUStrategy that was told of a TPU which is not there.

Nothing can be computed so, but what Python, Keras or TensorFlow refuse under TPUStrategy they refuse while tracing.
"""
import collections

import keras
import pytest
import tensorflow as tf
from tensorflow.python.distribute.cluster_resolver import cluster_resolver
from tensorflow.python.tpu import tpu_system_metadata

import plan as planning
import session
from inputs import augment
from modeling import steps

REPLICAS = 8
HOST = '/job:localhost/replica:0/task:0/device:'
Device = collections.namedtuple('Device', 'name device_type')


class MadeUpTpu(cluster_resolver.SimpleClusterResolver):
    """Reports one host with `REPLICAS` cores."""

    def get_tpu_system_metadata(self):
        cores = [Device(f'{HOST}TPU:{index}', 'TPU') for index in range(REPLICAS)]
        return tpu_system_metadata.TPUSystemMetadata(num_cores=REPLICAS, num_hosts=1, num_of_cores_per_host=REPLICAS, topology=None,
                                                     devices=[Device(f'{HOST}CPU:0', 'CPU'), *cores])


@pytest.fixture
def strategy(monkeypatch):
    monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
    placement = tf.config.get_soft_device_placement()
    tf.config.set_soft_device_placement(True)
    strategy = tf.distribute.TPUStrategy(MadeUpTpu(tf.train.ClusterSpec({})))
    strategy._enable_packed_variable_in_eager_mode = False  # packing needs the devices
    yield strategy
    tf.config.set_soft_device_placement(placement)


def build(config, strategy):
    plan = planning.make_plan(config, 1437, 360, 10, REPLICAS)
    keras.config.set_dtype_policy('mixed_bfloat16')
    with strategy.scope():
        return session.build_state(config, plan, 'mixed_bfloat16')


def operations(function):
    """How often each operation occurs in the graph of a tf.function and in the graphs it calls."""
    graph = function.get_concrete_function().graph
    called = graph.as_graph_def().library.function
    return collections.Counter([op.type for op in graph.get_operations()] + [node.op for function in called for node in function.node_def])


def test_the_training_step_adds_up_over_the_cores(still, strategy):
    still.grad_clip_norm = 1.0
    still.augment.flip, still.augment.color_jitter, still.augment.random_erasing, still.augment.mixup, still.augment.cutmix = True, 0.4, 0.25, 0.2, 1.0
    state = build(still, strategy)
    train_step = steps.make_train_step(state, still, augment.on_device(still.augment, 10), num_classes=10, num_replicas=REPLICAS, jit_compile=False)

    @tf.function(autograph=False)
    def step():
        drawn = {name: tf.stack([value] * 4) for name, value in augment.draws(still.augment, tf.constant([0, 1], tf.int64)).items()}
        return steps._sum_over_replicas(strategy, strategy.run(train_step, args=(tf.zeros((4, 16, 16, 3), tf.uint8), tf.zeros((4,), tf.int64), drawn)))

    found = operations(step)
    assert found['TPUReplicateMetadata'] == 1
    # A sum of each gradient and of each batch normalisation in both directions.
    assert found['CrossReplicaSum'] >= len(state.model.trainable_variables) + 2 * 2


def test_the_evaluation_step_and_the_mean_of_statistics_are_a_graph(still, strategy):
    still.model.sync_batch_norm = False
    state = build(still, strategy)
    eval_step = steps.make_eval_step(state, num_classes=10)

    @tf.function(autograph=False)
    def step():
        return steps._sum_over_replicas(strategy, strategy.run(eval_step, args=(tf.zeros((4, 16, 16, 3), tf.uint8), tf.zeros((4,), tf.int64), tf.zeros((4,)))))

    assert operations(step)['TPUReplicateMetadata'] == 1
    assert operations(steps.make_average_statistics(strategy, state))['CrossReplicaSum'] > 0
