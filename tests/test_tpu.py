"""The steps of the product become a TPU's graph under a real TPUStrategy that was told of a TPU
which is not there.

Nothing can be computed so, but what Python, Keras or TensorFlow refuse under TPUStrategy they
refuse while tracing.
"""

import collections
import glob
import importlib
import os

import keras
import pytest
import tensorflow as tf
from tensorflow.python.distribute.cluster_resolver import cluster_resolver
from tensorflow.python.tpu import tpu_system_metadata

from common.commands import ROOT
from experiment import planning, session
from inputs import augment, datasets, pipeline
from modeling import distillation, loops, models, optimizers, steps
from tests.modeling.test_pretrained import write_foreign_teacher

REPLICAS = 8
CONFIGS = sorted(
    os.path.basename(path)[:-3] for path in glob.glob(os.path.join(ROOT, 'configs', '[a-z]*.py'))
)
HOST = '/job:localhost/replica:0/task:0/device:'
HOST_ONLY = (
    'PyFunc',
    'EagerPyFunc',
    'IteratorGetNext',
    'StringFormat',
    'PrintV2',
    'Where',
    'Timestamp',
    'DecodeJpeg',
    'DecodeImage',
)
Device = collections.namedtuple('Device', 'name device_type')


class MadeUpTpu(cluster_resolver.SimpleClusterResolver):
    """Reports one host with so many cores."""

    def __init__(self, replicas):
        super().__init__(tf.train.ClusterSpec({}))
        self.replicas = replicas

    def get_tpu_system_metadata(self):
        cores = [Device(f'{HOST}TPU:{index}', 'TPU') for index in range(self.replicas)]
        return tpu_system_metadata.TPUSystemMetadata(
            num_cores=self.replicas,
            num_hosts=1,
            num_of_cores_per_host=self.replicas,
            topology=None,
            devices=[Device(f'{HOST}CPU:0', 'CPU'), *cores],
        )


@pytest.fixture
def strategy(monkeypatch, request):
    monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
    placement = tf.config.get_soft_device_placement()
    tf.config.set_soft_device_placement(True)
    strategy = tf.distribute.TPUStrategy(MadeUpTpu(getattr(request, 'param', REPLICAS)))
    strategy._enable_packed_variable_in_eager_mode = False  # packing needs the devices
    yield strategy
    tf.config.set_soft_device_placement(placement)


def build(config, strategy):
    plan = planning.make_plan(config, 100_000, 360, 10, strategy.num_replicas_in_sync)
    keras.config.set_dtype_policy('mixed_bfloat16')
    with strategy.scope():
        return session.build_state(models.build_model(config, 10), config, plan, 'mixed_bfloat16')


def operations(function):
    """How often each operation occurs in the graph of a tf.function and in the graphs it calls."""
    graph = function.get_concrete_function().graph
    called = graph.as_graph_def().library.function
    return collections.Counter(
        [op.type for op in graph.get_operations()]
        + [node.op for function in called for node in function.node_def]
    )


def test_the_training_step_adds_up_over_the_cores(still, strategy):
    still.grad_clip_norm = 1.0
    still.augment.flip = True
    still.augment.color_jitter = 0.4
    still.augment.random_erasing = 0.25
    still.augment.mixup = 0.2
    still.augment.cutmix = 1.0
    state = build(still, strategy)
    train_step = steps.make_train_step(
        state,
        still,
        augment.make_device_augment(still.augment, 10),
        num_classes=10,
        num_replicas=REPLICAS,
        jit_compile=False,
        on_tpu=True,
    )

    @tf.function(autograph=False)
    def step():
        drawn = {
            name: tf.stack([value] * 4)
            for name, value in augment.draw_numbers(
                still.augment, tf.constant([0, 1], tf.int64)
            ).items()
        }
        return loops.sum_over_replicas(
            strategy,
            strategy.run(
                train_step,
                args=(tf.zeros((4, 16, 16, 3), tf.uint8), tf.zeros((4,), tf.int64), drawn),
            ),
        )

    found = operations(step)
    assert found['TPUReplicateMetadata'] == 1
    # A sum of each gradient and of each batch normalisation in both directions.
    assert found['CrossReplicaSum'] >= len(state.model.trainable_variables) + 2 * 2


def test_evaluation_and_mean_of_statistics_are_a_graph(still, strategy):
    still.model.sync_batch_norm = False
    state = build(still, strategy)
    eval_step = steps.make_eval_step(state, num_classes=10)

    @tf.function(autograph=False)
    def step():
        return loops.sum_over_replicas(
            strategy,
            strategy.run(
                eval_step,
                args=(tf.zeros((4, 16, 16, 3), tf.uint8), tf.zeros((4,), tf.int64), tf.zeros((4,))),
            ),
        )

    assert operations(step)['TPUReplicateMetadata'] == 1
    assert operations(loops.make_average_statistics(strategy, state))['CrossReplicaSum'] > 0


def whole(config):
    """A shipped config as it is, but for what has to be downloaded."""
    config.dataset = {
        **config.dataset,
        'name': 'digits',
        'train_split': 'train',
        'eval_split': 'test',
    }
    config.model.weights = ''
    config.train_for, config.schedule.warmup, config.schedule.hold = '1000 steps', '10 steps', '0%'
    config.image_size = min(config.image_size, 64)
    return config


def small(config):
    """The same with the tiny model."""
    config.model.name, config.model.drop_path = 'tiny', 0.0
    return whole(config)


# `make test-tpu` traces all of them; the real model, which all configs have, takes half a minute.
TRACES_ALL = os.environ.get('TRACE') == 'all'
LOOPS = [
    (REPLICAS, small, 'digits'),
    (1, small, 'digits'),
    (32, small, 'imagenet'),
    *((REPLICAS, small, name) for name in CONFIGS if name != 'digits'),
    (REPLICAS, whole, 'imagenet_strong'),
]
OPTIMIZERS = ['adamw', *sorted(set(optimizers.OPTIMIZERS) - {'adamw'})]


@pytest.mark.parametrize(
    'strategy, change, name', LOOPS if TRACES_ALL else LOOPS[:1], indirect=['strategy']
)
def test_the_loops_of_every_config_are_fit_for_a_tpu(strategy, change, name):
    config = change(importlib.import_module(f'configs.{name}').get_config())
    replicas = strategy.num_replicas_in_sync
    config.batch_size = config.eval_batch_size = 4 * replicas
    source, state = datasets.load(config.dataset), build(config, strategy)
    plan = planning.make_plan(config, source.num_train, source.num_eval, 10, replicas)
    train_step = steps.make_train_step(
        state,
        config,
        augment.make_device_augment(config.augment, 10),
        num_classes=10,
        num_replicas=replicas,
        jit_compile=False,
        on_tpu=True,
    )
    batches = pipeline.training_batches(source, config, plan, 0, plan.total_steps, strategy)
    sums = checked_sums(loops.make_train_loop, strategy, train_step, batches)
    normalisations = sum(
        getattr(layer, 'synchronized', False) for layer in state.model._flatten_layers()
    )
    assert (
        sums <= len(state.model.trainable_variables) + 2 * normalisations
    )  # each gradient once, each statistic once each way
    assert sums == 0 if replicas == 1 else sums >= 2 * normalisations + 1

    evaluated, _ = pipeline.evaluation_batches(source, config, plan, strategy)
    assert (
        checked_sums(
            loops.make_eval_loop, strategy, steps.make_eval_step(state, num_classes=10), evaluated
        )
        == 0
    )


@pytest.mark.slow
@pytest.mark.parametrize('name', OPTIMIZERS if TRACES_ALL else OPTIMIZERS[:1])
def test_everything_at_once_fits_a_tpu_with_every_optimizer(tiny, strategy, name, tmp_path):
    write_foreign_teacher(str(tmp_path / 'teacher'))
    tiny.distill.teacher = str(tmp_path / 'teacher')
    tiny.model.freeze = 'block1'
    tiny.model.layer_decay = 0.8
    tiny.accumulate_steps = 2
    tiny.optimizer = {'name': name}
    tiny.weight_decay = 0.1
    tiny.grad_clip_norm = 1.0
    tiny.ema_decay = 0.99
    tiny.model.dropout = 0.2
    source, state = datasets.load(tiny.dataset), build(tiny, strategy)
    plan = planning.make_plan(tiny, source.num_train, source.num_eval, 10, REPLICAS)
    with strategy.scope():
        teacher = distillation.make_teacher(tiny, source.class_names)
    train_step = steps.make_train_step(
        state,
        tiny,
        augment.make_device_augment(tiny.augment, 10),
        num_classes=10,
        num_replicas=REPLICAS,
        jit_compile=False,
        on_tpu=True,
        teacher=teacher.predict,
    )
    batches = pipeline.training_batches(source, tiny, plan, 0, plan.total_steps, strategy)
    # Each gradient once, and each micro-batch's statistics of the one normalisation that is not
    # frozen, in either direction.
    assert (
        checked_sums(loops.make_train_loop, strategy, train_step, batches)
        <= len(state.model.trainable_variables) + 2 * 2
    )


def checked_sums(make_loop, strategy, step, batches):
    """Traces a loop of steps over batches, checks what runs on the cores, and counts its sums over
    them.
    """
    bodies = []

    def watched(*batch):
        bodies.append(tf.compat.v1.get_default_graph())
        return step(*batch)

    graph = make_loop(strategy, watched).get_concrete_function(iter(batches), tf.constant(4)).graph
    (body,) = bodies
    assert [op.type for op in graph.get_operations()].count(
        'While'
    ) == 1  # all steps are one call from the host
    functions = {
        function.signature.name: function for function in graph.as_graph_def().library.function
    }
    (name,) = [
        name
        for name, function in functions.items()
        if any(node.op == 'TPUReplicateMetadata' for node in function.node_def)
    ]
    del functions[name]  # that is the body
    on_cores = [op for op in body.get_operations() if '_tpu_replicate' in op.node_def.attr]
    assert len(on_cores) > 100
    called = [node for function in functions.values() for node in function.node_def]
    # None in a conditional. In the loop over micro-batches all cores turn equally often.
    sums = [node.name for node in called if 'CrossReplicaSum' in node.op]
    assert all(name.startswith('while/while/') for name in sums)
    assert not [
        node.name
        for node in (*called, *(op.node_def for op in body.get_operations()))
        if node.attr['_XlaMustCompile'].b
    ]
    assert not [
        node.name for node in (*called, *(op.node_def for op in on_cores)) if node.op in HOST_ONLY
    ]
    assert not [op.name for op in on_cores for output in op.outputs if output.dtype == tf.string]
    assert not [
        op.name
        for op in on_cores
        for output in op.outputs
        if output.dtype.is_numpy_compatible and not output.shape.is_fully_defined()
    ]
    return sum(op.type == 'CrossReplicaSum' for op in on_cores)
