"""The training step means what plain Keras means, on any number of replicas, with and without
XLA.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from benchmarks.same_step import without_batch
from configs import default
from experiment import planning
from experiment import session as sessions
from inputs import augment
from modeling import loops, models, optimizers, steps
from tests.conftest import refused, slow

RANDOM = np.random.RandomState(0)
UNCHANGED = augment.make_device_augment(default.get_config().augment, 10)
IMAGES, LABELS = RANDOM.randint(0, 256, (32, 16, 16, 3)).astype(np.uint8), RANDOM.randint(0, 10, 32)


def strategy_for(devices):
    names = [f'CPU:{index}' for index in range(devices)]
    return (
        tf.distribute.MirroredStrategy(names, tf.distribute.ReductionToOneDevice())
        if devices > 1
        else tf.distribute.OneDeviceStrategy('CPU:0')
    )


def build(config, devices=1, dtype_policy='float32'):
    """(strategy, state, plan) for `config`, from the same initial weights each time."""
    strategy = strategy_for(devices)
    plan = planning.make_plan(config, 1437, 360, 10, devices)
    keras.config.set_dtype_policy(dtype_policy)
    with strategy.scope():
        sessions.random.seed(config.seed)
        return (
            strategy,
            sessions.build_state(models.build_model(config, 10), config, plan, dtype_policy),
            plan,
        )


def batches(strategy, devices, images=IMAGES, labels=LABELS):
    """An endless iterator over one global batch."""
    size = len(images) // devices
    return iter(
        strategy.distribute_datasets_from_function(
            lambda context: (
                tf.data.Dataset.from_tensor_slices((images, labels))
                .map(lambda image, label: (image, label, {}))
                .batch(size)
                .repeat()
            )
        )
    )


def run(config, num_steps, devices=1, jit_compile=False, dtype_policy='float32', **data):
    """(results of each step, state) after `num_steps` updates."""
    strategy, state, plan = build(config, devices, dtype_policy)
    loop = loops.make_train_loop(
        strategy,
        steps.make_train_step(
            state,
            config,
            UNCHANGED,
            num_classes=10,
            num_replicas=devices,
            jit_compile=jit_compile,
            on_cpu=devices == 1,
        ),
    )
    iterator = batches(strategy, devices, **data)
    return [
        {key: float(value) for key, value in loop(iterator, tf.constant(1)).items()}
        for _ in range(num_steps)
    ], state


def by_hand(config, num_steps):
    """The same updates with plain Keras: a GradientTape, Keras' loss, metrics and optimizer.
    Returns (losses, model).
    """
    _, state, plan = build(config)
    model, optimizer = state.model, state.optimizer
    loss_of = keras.losses.CategoricalCrossentropy(
        from_logits=True, label_smoothing=config.label_smoothing
    )
    losses = []
    for _ in range(num_steps):
        with tf.GradientTape() as tape:
            loss = loss_of(
                keras.utils.to_categorical(LABELS, 10),
                model(IMAGES.astype('float32'), training=True),
            )
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        losses.append(float(loss))
    return losses, model


@pytest.mark.parametrize('jit_compile', [False, True])
def test_a_step_is_what_plain_keras_computes(still, jit_compile):
    results, state = run(still, 5, jit_compile=jit_compile)
    losses, model = by_hand(still, 5)
    np.testing.assert_allclose([result['loss'] for result in results], losses, rtol=1e-5)
    for ours, theirs in zip(
        models.float_variables(state.model), models.float_variables(model), strict=True
    ):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    'changes',
    [{}, {'grad_clip_norm': 0.1}, {'l2_regularization': 0.01}],
    ids=['plain', 'clipped', 'l2'],
)
def test_first_losses_match_on_1_2_and_4_devices_and_with_xla(still, changes):
    still.update(changes)
    cases = [(1, False), (1, True), (2, True), (4, False)]
    runs = {case: run(still, 20 if not changes else 8, *case) for case in cases}
    expected, first = runs[1, False]
    for results, state in runs.values():
        for key in ('loss', 'correct', 'grad_norm', 'learning_rate'):
            np.testing.assert_allclose(
                [result[key] for result in results],
                [result[key] for result in expected],
                rtol=1e-4,
                err_msg=key,
            )
        np.testing.assert_allclose(
            [result['loss'] for result in results],
            [result['loss'] for result in expected],
            rtol=0,
            atol=1e-4,
        )
        for ours, theirs in zip(
            models.float_variables(state.model), models.float_variables(first.model), strict=True
        ):
            np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-3, atol=2e-4)
    assert expected[0]['loss'] > expected[-1]['loss']


@pytest.mark.parametrize(
    'devices, jit_compile', [(1, False), (2, True), slow(1, True), slow(2, False), slow(4, False)]
)
def test_the_gradient_is_that_of_plain_keras_in_float64(still, devices, jit_compile):
    still.optimizer, still.weight_decay, still.ema_decay = {'name': 'sgd'}, 0.0, 0.0
    still.schedule.name = 'constant'
    still.schedule.warmup = '0%'
    still.schedule.peak_lr = 1.0
    still.schedule.start_lr = 1.0
    still.model.sync_batch_norm = False
    _, plain, _ = build(still, dtype_policy='float64')  # Keras' own layers
    model, before = plain.model, [variable.numpy() for variable in plain.model.trainable_variables]
    with tf.GradientTape() as tape:
        loss_of = keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=still.label_smoothing, dtype='float64'
        )
        loss = loss_of(
            keras.utils.to_categorical(LABELS, 10).astype('float64'),
            model(IMAGES.astype('float64'), training=True),
        )
    expected = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
    still.model.sync_batch_norm = True
    results, state = run(still, 1, devices, jit_compile, dtype_policy='float64')
    assert results[0]['loss'] == pytest.approx(float(loss), rel=1e-6)  # it is reported in float32
    for variable, start, gradient in zip(
        state.model.trainable_variables, before, expected, strict=True
    ):
        np.testing.assert_allclose(
            start - variable.numpy(), gradient, rtol=1e-7, atol=1e-12
        )  # rate 1: the step is the gradient


@pytest.fixture
def without_batch_norm(monkeypatch):
    """The tiny model with statistics of each example, which do not depend on what else is in a
    batch.
    """
    monkeypatch.setattr(models, 'BatchNormalization', without_batch)


@pytest.mark.parametrize('jit_compile', [False, slow(True)])
@pytest.mark.parametrize('devices', [slow(1), 2])
def test_an_update_from_micro_batches_is_that_of_the_whole_batch(
    still, without_batch_norm, devices, jit_compile
):
    still.grad_clip_norm, still.ema_decay = 0.5, 0.9
    expected, whole = run(still, 5)
    still.accumulate_steps = 4
    results, state = run(still, 5, devices, jit_compile)
    for key in ('loss', 'correct', 'grad_norm', 'learning_rate'):
        np.testing.assert_allclose(
            [result[key] for result in results],
            [result[key] for result in expected],
            rtol=2e-5,
            err_msg=key,
        )
    for ours, theirs in zip(
        state.variables()['model'] + state.average,
        whole.variables()['model'] + whole.average,
        strict=True,
    ):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-3, atol=1e-4)
    assert state.optimizer.iterations.numpy() == 5


@pytest.mark.parametrize(
    'batch_size, image_size, on_tpu, count',
    [
        (4096, 224, True, 8),
        (4096, 224, False, 1),
        (4 * 128, 224, True, 1),
        (4096, 384, True, 32),  # 128 images of 224 pixels have as many as 43 of 384
        (4 * 130, 224, True, 2),
        (4 * 131, 224, True, 131),  # a prime
        (4096, 8192, True, 1024),  # a single image has more
    ],
)
def test_auto_keeps_a_micro_batch_within_the_memory_of_a_tpu(
    tiny, batch_size, image_size, on_tpu, count
):
    tiny.accumulate_steps, tiny.batch_size, tiny.image_size = 'auto', batch_size, image_size
    assert steps.num_micro_batches(tiny, 4, on_tpu) == count
    tiny.accumulate_steps = 2
    assert steps.num_micro_batches(tiny, 4, on_tpu) == 2


@pytest.mark.parametrize('mixes', [False, True])
@pytest.mark.parametrize('count', [1, 2, 3, 4])
def test_micro_batches_augmented_alone_are_parts_of_the_batch(tiny, count, mixes):
    settings = tiny.augment
    settings.flip, settings.color_jitter, settings.random_erasing = True, 0.3, 0.5
    settings.mixup = settings.cutmix = 0.5 * mixes
    seeds = tf.stack([tf.zeros([24], tf.int64), tf.range(24, dtype=tf.int64)], 1)
    draws = tf.map_fn(
        lambda seed: augment.draw_numbers(settings, seed),
        seeds,
        fn_output_signature=tf.nest.map_structure(
            tf.TensorSpec.from_tensor, augment.draw_numbers(settings, seeds[0])
        ),
    )
    batch = tf.constant(IMAGES[:24]), tf.constant(LABELS[:24]), draws
    change = augment.make_device_augment(settings, 10)
    whole, parts = change(*batch), steps.augmented_parts(change, batch, count, mixes)
    for index in range(count):
        for part, expected in zip(parts(tf.constant(index)), whole, strict=True):
            np.testing.assert_allclose(part, expected[index::count], rtol=1e-5, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('devices', [2, 4])
def test_micro_batch_statistics_match_on_any_number_of_devices(still, devices):
    still.accumulate_steps = 4
    (expected, alone), (results, shared) = run(still, 8), run(still, 8, devices)
    np.testing.assert_allclose(
        [result['loss'] for result in results], [result['loss'] for result in expected], rtol=1e-4
    )
    for ours, theirs in zip(
        models.float_variables(shared.model), models.float_variables(alone.model), strict=True
    ):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-3, atol=2e-4)


def test_micro_batches_drop_differently(still, monkeypatch):
    """All examples are the same: only the masks of dropout can make the losses of two micro-batches
    differ.
    """
    still.model.dropout, still.accumulate_steps = 0.5, 2
    seen, original = [], tf.nn.softmax_cross_entropy_with_logits

    def watched(labels, logits):
        tf.py_function(lambda value: seen.append(value.numpy()), [logits], [])
        return original(labels, logits)

    monkeypatch.setattr(tf.nn, 'softmax_cross_entropy_with_logits', watched)
    run(still, 2, images=np.repeat(IMAGES[:1], 32, 0))
    assert len(seen) == 4 and len({logits.tobytes() for logits in seen}) == 4


def test_xla_compiles_forward_and_backward_without_optimizer(still):
    strategy, state, _ = build(still, 2)
    loop = loops.make_train_loop(
        strategy,
        steps.make_train_step(
            state, still, UNCHANGED, num_classes=10, num_replicas=2, jit_compile=True
        ),
    )
    graph = loop.get_concrete_function(batches(strategy, 2), tf.constant(1)).graph.as_graph_def()
    nodes = [node for function in graph.library.function for node in function.node_def]
    marked = {
        kind: {'_XlaCompile' in node.attr for node in nodes if node.op == kind}
        for kind in (
            'Conv2D',
            'Conv2DBackpropFilter',
            'SoftmaxCrossEntropyWithLogits',
            'Cos',
            'AssignSubVariableOp',
            'IteratorGetNext',
        )
    }
    assert marked == {
        'Conv2D': {True},
        'Conv2DBackpropFilter': {True},
        'SoftmaxCrossEntropyWithLogits': {True},
        'Cos': {False},
        'AssignSubVariableOp': {False},
        'IteratorGetNext': {False},
    }


def test_the_gradient_is_clipped_after_it_is_summed(still):
    still.optimizer, still.weight_decay = {'name': 'sgd'}, 0.0
    still.schedule.name = 'constant'
    still.schedule.warmup = '0%'
    still.schedule.peak_lr = 1.0
    still.schedule.start_lr = 1.0
    for clip in (0.0, 0.05):
        still.grad_clip_norm = clip
        _, before, _ = build(still, 2)
        initial = [variable.numpy() for variable in before.model.trainable_variables]
        results, state = run(still, 1, devices=2)
        moved = np.sqrt(
            sum(
                np.sum((after.numpy() - before) ** 2)
                for after, before in zip(state.model.trainable_variables, initial, strict=True)
            )
        )
        assert moved == pytest.approx(
            min(clip or np.inf, results[0]['grad_norm']), rel=1e-3
        )  # rate 1: the step is the gradient
        assert results[0]['grad_norm'] > 0.1


@pytest.mark.parametrize(
    'name', sorted({'adamw', 'lion', 'muon', 'sgd'} & set(optimizers.OPTIMIZERS))
)
@pytest.mark.parametrize('weight_decay', [0.0, 0.5])
def test_weight_decay_leaves_biases_and_normalisation_alone(still, name, weight_decay):
    still.optimizer, still.weight_decay = {'name': name}, weight_decay
    _, state, _ = build(still)
    initial = {variable.path: variable.numpy() for variable in state.model.trainable_variables}
    state.optimizer.apply(
        [tf.zeros_like(variable) for variable in state.model.trainable_variables],
        state.model.trainable_variables,
    )
    rate = still.schedule.start_lr
    for variable in state.model.trainable_variables:
        factor = 1 - weight_decay * rate if len(variable.shape) > 1 else 1
        np.testing.assert_allclose(variable.numpy(), initial[variable.path] * factor, rtol=1e-6)


def test_the_average_follows_its_formula_and_is_evaluated(still):
    still.ema_decay = 0.9
    strategy, state, _ = build(still)
    expected = [variable.numpy() for variable in models.float_variables(state.model)]
    loop = loops.make_train_loop(
        strategy,
        steps.make_train_step(
            state, still, UNCHANGED, num_classes=10, num_replicas=1, jit_compile=False
        ),
    )
    iterator = batches(strategy, 1)
    for update in range(1, 6):
        loop(iterator, tf.constant(1))
        decay = min(0.9, (1 + update) / (10 + update))
        expected = [
            average * decay + variable.numpy() * (1 - decay)
            for average, variable in zip(expected, models.float_variables(state.model), strict=True)
        ]
    for average, value in zip(state.average, expected, strict=True):
        np.testing.assert_allclose(average.numpy(), value, rtol=1e-5, atol=1e-7)
    logits = steps.make_predict(state)(IMAGES)
    assert not np.allclose(logits, state.model(IMAGES.astype('float32'), training=False), atol=1e-3)
    state.model.set_weights(expected)
    np.testing.assert_allclose(
        logits, state.model(IMAGES.astype('float32'), training=False), rtol=1e-4, atol=1e-5
    )


def everything(state):
    """Copies of all numbers of a state but the counters of updates and of those skipped."""
    parts = state.variables()
    parts['optimizer'] = [
        variable.value
        for variable in state.optimizer.variables
        if variable is not state.optimizer.iterations
    ]
    return [
        variable.numpy() for part in ('model', 'average', 'optimizer') for variable in parts[part]
    ]


@pytest.mark.parametrize('devices', [slow(1), 2])
def test_float16_skips_a_nonfinite_update_and_halves_its_scale(still, devices):
    still.schedule.peak_lr = 1e-3
    results, state = run(still, 3, devices, dtype_policy='mixed_float16')
    assert (
        state.skipped_updates.numpy() == 0
        and state.finite_updates.numpy() == 3
        and state.optimizer.iterations.numpy() == 3
    )
    assert state.loss_scale.numpy() == steps.LOSS_SCALE_START and results[0][
        'loss'
    ] == pytest.approx(2.4, abs=0.5)

    strategy, state, _ = build(still, devices, 'mixed_float16')
    state.loss_scale.assign(1e38)  # overflows
    before = everything(state)
    loop = loops.make_train_loop(
        strategy,
        steps.make_train_step(
            state,
            still,
            UNCHANGED,
            num_classes=10,
            num_replicas=devices,
            jit_compile=False,
            on_cpu=devices == 1,
        ),
    )
    assert (
        float(loop(batches(strategy, devices), tf.constant(1))['grad_norm']) == 0
    )  # and not inf, which no JSON can say
    assert state.skipped_updates.numpy() == 1 and state.loss_scale.numpy() == pytest.approx(0.5e38)
    for now, value in zip(everything(state), before, strict=True):
        np.testing.assert_array_equal(now, value)


def spoiling(bad):
    """A loss that is not a number, on the first replica alone, in batches whose first label is in
    `bad`.
    """
    change = augment.make_device_augment(default.get_config().augment, 10)

    def spoiled(images, labels, draws):
        images, targets = change(images, labels, draws)
        is_bad = tf.reduce_any(labels[0] == tf.constant(bad, labels.dtype))
        return images, tf.where(
            is_bad & tf.equal(tf.distribute.get_replica_context().replica_id_in_sync_group, 0),
            float('nan'),
            targets,
        )

    return spoiled


@pytest.mark.parametrize(
    'name, devices',
    [
        ('adamw', 2),
        ('sgd', 1),
        *(slow(name, 1) for name in sorted({*optimizers.OPTIMIZERS} - {'muon', 'sgd'})),
    ],
)
def test_a_nan_loss_changes_nothing_and_is_counted(still, name, devices):
    still.optimizer = {'name': name}
    still.ema_decay = 0.9
    still.grad_clip_norm = 1.0
    still.model.layer_decay = 0.9
    strategy, state, plan = build(still, devices)
    step = steps.make_train_step(
        state,
        still,
        spoiling([7]),
        num_classes=10,
        num_replicas=devices,
        jit_compile=False,
        on_cpu=devices == 1,
    )
    loop = loops.make_train_loop(strategy, step)
    good, bad = [np.full(32, label) for label in (3, 7)]
    loop(batches(strategy, devices, labels=good), tf.constant(2))
    before = everything(state)
    results = {
        key: float(value)
        for key, value in loop(batches(strategy, devices, labels=bad), tf.constant(3)).items()
    }
    for now, value in zip(everything(state), before, strict=True):
        np.testing.assert_array_equal(now, value)
    assert (
        results['skipped'],
        results['skipped_in_a_row'],
        results['loss'],
        results['correct'],
        results['grad_norm'],
    ) == (3, 3, 0, 0, 0)
    assert state.optimizer.iterations.numpy() == 5  # so that the rate stays that of the step
    assert results['learning_rate'] == pytest.approx(
        float(planning.planned_rates(still, plan)[1][4]), rel=1e-6
    )
    results = loop(batches(strategy, devices, labels=good), tf.constant(1))
    assert (
        float(results['skipped']) == float(results['skipped_in_a_row']) == 0
        and float(results['loss']) > 0
    )
    assert state.skipped_updates.numpy() == 3 and not all(
        np.array_equal(*pair) for pair in zip(everything(state), before, strict=True)
    )


def test_float16_gradients_are_those_of_float32(still):
    still.optimizer, still.weight_decay = {'name': 'sgd'}, 0.0
    single, _ = run(still, 3)
    half, _ = run(still, 3, dtype_policy='mixed_float16')
    np.testing.assert_allclose(
        [result['grad_norm'] for result in half],
        [result['grad_norm'] for result in single],
        rtol=0.02,
    )


def test_several_steps_in_one_call_are_the_same_steps(still):
    one_by_one, expected = run(still, 6)
    strategy, state, _ = build(still)
    loop = loops.make_train_loop(
        strategy,
        steps.make_train_step(
            state, still, UNCHANGED, num_classes=10, num_replicas=1, jit_compile=False, on_cpu=True
        ),
    )
    iterator = batches(strategy, 1)
    together = [loop(iterator, tf.constant(count)) for count in (4, 2)]
    assert loop.experimental_get_tracing_count() == 1
    assert float(together[0]['loss']) == pytest.approx(
        sum(result['loss'] for result in one_by_one[:4]), rel=1e-6
    )
    assert float(together[1]['learning_rate']) == pytest.approx(one_by_one[-1]['learning_rate'])
    for ours, theirs in zip(
        models.float_variables(state.model), models.float_variables(expected.model), strict=True
    ):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_the_rate_of_each_update_is_the_scheduled_one(still):
    results, _ = run(still, 6, devices=2)
    plan = planning.make_plan(still, 1437, 360, 10, 2)
    np.testing.assert_allclose(
        [result['learning_rate'] for result in results],
        planning.learning_rate_of(still, plan)(range(6)),
        rtol=1e-5,
    )


def test_unsynchronized_statistics_drift_apart_and_are_averaged(still):
    still.model.sync_batch_norm, still.ema_decay = False, 0.0
    strategy, state, _ = build(still, 2)
    loop = loops.make_train_loop(
        strategy,
        steps.make_train_step(
            state, still, UNCHANGED, num_classes=10, num_replicas=2, jit_compile=True
        ),
    )
    images = np.concatenate([IMAGES[:16] // 8, IMAGES[16:]])  # dark images for the first replica
    loop(batches(strategy, 2, images=images), tf.constant(3))
    statistic = next(
        variable.value
        for variable in state.model.non_trainable_variables
        if 'moving_variance' in variable.path
    )
    first, second = (value.numpy() for value in strategy.experimental_local_results(statistic))
    assert not np.allclose(first, second, rtol=0.01)
    loops.make_average_statistics(strategy, state)()
    for value in strategy.experimental_local_results(statistic):
        np.testing.assert_allclose(value.numpy(), (first + second) / 2, rtol=1e-6)


@pytest.mark.parametrize('devices', [1, 2, 4])
def test_evaluation_counts_what_top_k_counts(still, devices):
    strategy, state, _ = build(still, devices)
    loop = loops.make_eval_loop(strategy, steps.make_eval_step(state, num_classes=10))
    mask = (np.arange(32) < 21).astype('float32')
    size = 32 // devices
    iterator = iter(
        strategy.distribute_datasets_from_function(
            lambda context: tf.data.Dataset.from_tensor_slices((IMAGES, LABELS, mask)).batch(size)
        )
    )
    sums = {key: float(value) for key, value in loop(iterator, tf.constant(1)).items()}
    logits = state.model(IMAGES[:21].astype('float32'), training=False)
    expected = {
        'examples': 21,
        'correct': 21 * float(keras.metrics.SparseCategoricalAccuracy()(LABELS[:21], logits)),
        'top5': 21 * float(keras.metrics.SparseTopKCategoricalAccuracy(5)(LABELS[:21], logits)),
        'loss': 21
        * float(keras.losses.SparseCategoricalCrossentropy(from_logits=True)(LABELS[:21], logits)),
    }
    assert sums == pytest.approx(expected, rel=1e-5)


def test_label_rank_matches_top_k_and_nan_is_never_correct():
    logits = np.random.RandomState(1).randint(0, 4, (200, 7)).astype('float32')  # many ties
    labels = np.random.RandomState(2).randint(0, 7, 200)
    order = tf.math.top_k(logits, 7).indices.numpy()
    broken = tf.fill([3, 7], np.nan)
    for rank in (
        steps.label_rank,
        tf.function(steps.label_rank),
    ):  # a graph is simplified, by rules that hold for numbers
        np.testing.assert_array_equal(
            rank(tf.constant(logits), tf.constant(labels)),
            [list(row).index(label) for row, label in zip(order, labels, strict=True)],
        )
        assert (rank(broken, tf.constant([0, 3, 6])).numpy() >= 5).all()
        assert (rank(tf.constant([[1.0, np.nan]]), tf.constant([0])).numpy() > 0).all()


FEW = ('adamw', 'lamb', 'sgd')  # the others only repeat the call


@pytest.mark.parametrize(
    'name', [name if name in FEW else slow(name) for name in sorted(optimizers.OPTIMIZERS)]
)
def test_every_optimizer_trains(still, name):
    """That it does the same on two replicas, tests/benchmarks/test_same_step.py shows."""
    still.optimizer, still.schedule.peak_lr = {'name': name}, 1e-3
    results, _ = run(still, 4)
    assert results[-1]['loss'] < results[0]['loss']


@pytest.mark.parametrize(
    'optimizer, key, data, fix',
    [
        ({'name': 'admw'}, 'name', 'admw', '--config.optimizer.name=adamw'),
        ({'name': 'sgd', 'momentun': 0.9}, 'momentun', 'did you mean momentum', ''),
        ({'name': 'sgd', 'learning_rate': 0.1}, 'learning_rate', 'config.schedule.peak_lr', ''),
        ({'name': 'sgd', 'momentum': 7.0}, 'momentum', '7.0', 'at least 0 and below 1'),
        ({'name': 'sgd', 'momentum': (1, 2)}, 'momentum', '(1, 2)', ''),
        (
            {'name': 'sgd', 'gradient_accumulation_steps': 4},
            'gradient_accumulation_steps',
            '',
            'config.accumulate_steps',
        ),
        ({'name': 'sgd', 'loss_scale_factor': 128}, 'loss_scale_factor', 'config.precision', ''),
    ],
)
def test_an_impossible_optimizer_is_one_line(still, optimizer, key, data, fix):
    still.optimizer = optimizer
    with refused(optimizers.ConfigError, data, key=f'optimizer.{key}', fix=fix):
        build(still)


@pytest.mark.skipif(
    'muon' not in optimizers.OPTIMIZERS,
    reason='Keras 3.12, all that Python 3.10 gets, has no Muon that runs',
)
def test_muon_takes_its_layers_and_refuses_float64(still):
    still.optimizer = {'name': 'muon', 'exclude_layers': ('block1',)}
    _, state, _ = build(still)
    assert state.optimizer.exclude_layers == ('block1',)
    with refused(optimizers.ConfigError, 'float64'):
        build(still, dtype_policy='float64')


def test_keras_fit_still_cannot_compile_under_two_replicas(still):
    """What our loop is for: when this fails because `fit` works, docs/architecture.md should say
    so.
    """
    strategy = strategy_for(2)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((16, 16, 3)),
                keras.layers.Conv2D(4, 3),
                keras.layers.BatchNormalization(),
                keras.layers.GlobalAveragePooling2D(),
                keras.layers.Dense(10),
            ]
        )
        model.compile(
            'sgd', keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=True
        )
    with pytest.raises(Exception, match='replica_1|different device'):
        model.fit(IMAGES.astype('float32'), LABELS, batch_size=16, epochs=1, verbose=0)


@pytest.mark.parametrize('finite', [True, False])
def test_joint_selects_for_a_tpu_match_single_ones(finite):
    shapes = [(5,)] * steps.MIN_SHARED + [(3,)] * (steps.MIN_SHARED - 1) + [(5, 3), (5, 5), ()]
    random = np.random.RandomState(0)
    old, new = (
        [tf.constant(random.normal(size=shape), tf.float32) for shape in shapes] for _ in range(2)
    )
    if not finite:
        new = [value * float('nan') for value in new]

    def chosen(on_tpu):
        function = tf.function(
            lambda finite, new, old: steps.make_select(finite, on_tpu)(new, old), jit_compile=True
        )
        program = function.experimental_get_compiler_ir(tf.constant(finite), new, old)('hlo')
        return function(tf.constant(finite), new, old), program.count(' opt-barrier(')

    (together, shared), (apart, none) = chosen(True), chosen(False)
    assert (shared, none) == (1, 0)
    for ours, theirs, expected in zip(together, apart, new if finite else old, strict=True):
        np.testing.assert_array_equal(ours, expected)
        np.testing.assert_array_equal(theirs, expected)


def test_the_norm_of_vectors_and_matrices_is_that_of_all_numbers():
    random = np.random.RandomState(0)
    for shapes in ([(5,), (3, 2), (4,), (2, 2, 1, 3), ()], [(3, 2)], [(3,)]):
        gradients = [random.normal(size=shape) for shape in shapes]
        np.testing.assert_allclose(
            steps._global_norm([tf.constant(gradient) for gradient in gradients]),
            np.linalg.norm(np.concatenate([gradient.ravel() for gradient in gradients])),
            rtol=1e-14,
        )
