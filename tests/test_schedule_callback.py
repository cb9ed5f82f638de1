"""What `WarmupCosineDecayCallback` promises to someone who calls `model.fit`."""

import contextlib
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import schedules
from schedules import (
    WarmupCosineDecay,
    WarmupCosineDecayCallback,
    WarmupDecayCallback,
    lr_warmup_cosine_decay,
)
from tests.conftest import slow

# 2 steps of warmup, 1 of hold, and a cosine to step 12.
ARGUMENTS = {
    'start_lr': 0.01,
    'target_lr': 0.1,
    'warmup_steps': 2,
    'total_steps': 12,
    'hold': 1,
    'end_lr': 0.001,
}
PLANNED = lr_warmup_cosine_decay(np.arange(40), 2, 1, 12, 0.01, 0.1, 0.001)


def a_model(rate=0.5, optimizer=None, **compiled):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer='ones')])
    model.compile(
        optimizer or keras.optimizers.SGD(rate),
        keras.losses.MeanSquaredError(),
        **{'run_eagerly': True} | compiled,
    )
    return model


def fit(model, *callbacks, batches=4, **arguments):
    """One batch has one example; an epoch has 4 batches, if not told otherwise."""
    x = np.linspace(-1, 1, 2 * batches).reshape(batches, 2)
    return model.fit(
        x,
        3 * x.sum(1, keepdims=True),
        batch_size=1,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
        **arguments,
    )


def rate_of(model):
    return float(model.optimizer.learning_rate)


def the_warning(model, *callbacks, **arguments):
    """The only warning of a `fit`, in one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always', UserWarning)
        fit(model, *callbacks, **arguments)
    messages = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert len(messages) == 1 and '\n' not in messages[0]
    return messages[0]


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        yield


class SetsRate(keras.callbacks.Callback):
    """Multiplies the rate at the end of some epochs, as `ReduceLROnPlateau` does."""

    def __init__(self, factors):
        super().__init__()
        self.factors = factors

    def on_epoch_end(self, epoch, logs=None):
        if epoch in self.factors:
            self.model.optimizer.learning_rate = rate_of(self.model) * self.factors[epoch]


def test_callback_uses_and_keeps_the_rates_of_the_function():
    callback = WarmupCosineDecayCallback(**ARGUMENTS)
    fit(a_model(), callback, epochs=4)
    assert len(callback.lrs) == 16
    np.testing.assert_allclose(callback.lrs, PLANNED[:16], rtol=1e-6)


@pytest.mark.parametrize('curve', schedules.CURVES)
def test_a_callback_follows_any_curve(curve):
    arguments = {**ARGUMENTS, 'curve': curve, 'end_lr': 0.0, 'total_steps': 16}
    if curve == 'piecewise':
        arguments.update(boundaries=[6, 9], factors=[0.5, 0.1])
    callback = WarmupDecayCallback(**arguments)
    fit(a_model(), callback, epochs=4)
    expected = schedules.learning_rate(np.arange(16), **arguments)
    np.testing.assert_allclose(callback.lrs, expected, rtol=1e-6)


def test_a_curve_needs_a_total():
    with pytest.raises(ValueError, match='write total_steps'):
        WarmupDecayCallback(curve='linear', warmup_steps=2, target_lr=0.1)


def test_the_history_has_the_rate_at_the_end_of_each_epoch():
    history = fit(a_model(), WarmupCosineDecayCallback(**ARGUMENTS), SetsRate({1: 0.5}), epochs=4)
    expected = [PLANNED[3], PLANNED[7], PLANNED[11] / 2, PLANNED[15] / 2]
    np.testing.assert_allclose(history.history['learning_rate'], expected, rtol=1e-6)


@pytest.mark.parametrize('jit_compile', [False, True])
def test_callback_and_schedule_end_in_the_same_weights(jit_compile):
    compiled = {'run_eagerly': False, 'jit_compile': jit_compile}
    with_callback = a_model(**compiled)
    with_schedule = a_model(WarmupCosineDecay(**ARGUMENTS), **compiled)
    fit(with_callback, WarmupCosineDecayCallback(**ARGUMENTS), epochs=3)
    fit(with_schedule, epochs=3)
    for one, other in zip(with_callback.get_weights(), with_schedule.get_weights(), strict=True):
        assert not np.allclose(one, 1.0)
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_callback_sets_its_own_models_rate_and_resumes(tmp_path):
    """Published: the callback reads a global `model` instead of its own, and restarts at 0 when a
    run is resumed.
    """
    bystander, model = a_model(0.25), a_model()
    fit(bystander, epochs=1)
    fit(model, WarmupCosineDecayCallback(**ARGUMENTS), epochs=1)
    assert rate_of(bystander) == 0.25
    assert rate_of(model) == pytest.approx(PLANNED[3])
    model.save(tmp_path / 'model.keras')
    resumed = keras.models.load_model(tmp_path / 'model.keras')
    callback = WarmupCosineDecayCallback(**ARGUMENTS)
    fit(resumed, callback, initial_epoch=1, epochs=3)
    np.testing.assert_allclose(callback.lrs, PLANNED[4:12], rtol=1e-6)


def test_callback_continues_where_a_restored_optimizer_stands():
    model, callback = a_model(0.77), WarmupCosineDecayCallback(**ARGUMENTS)
    model.optimizer.iterations.assign(5)
    assert 'a learning rate of 0.77, 7.937 times the planned one' in the_warning(
        model, callback, epochs=1
    )
    np.testing.assert_allclose(callback.lrs, PLANNED[5:9], rtol=1e-6)


def test_what_reduce_lr_on_plateau_did_stays_as_a_factor():
    """Published: a rate set by the callback each batch silently undoes what `ReduceLROnPlateau`
    changed.
    """
    model, callback = a_model(), WarmupCosineDecayCallback(**ARGUMENTS)
    # No loss is better than the first by 1e9, so that every epoch but the first reduces the rate.
    plateau = keras.callbacks.ReduceLROnPlateau('loss', factor=0.5, patience=1, min_delta=1e9)
    fit(model, callback, plateau, epochs=3)
    np.testing.assert_allclose(callback.lrs, PLANNED[:12] * np.repeat([1, 1, 0.5], 4), rtol=1e-5)
    # The end of the last epoch reduced it as well, and that stays when the model is trained on.
    assert callback.factor == pytest.approx(0.25)
    assert '12 updates are done and total_steps=12' in the_warning(
        model, callback, initial_epoch=3, epochs=4
    )
    np.testing.assert_allclose(callback.lrs[12:], PLANNED[12:16] * 0.25, rtol=1e-5)


@pytest.mark.parametrize('callback_first', [True, False])
def test_changes_of_several_callbacks_multiply_in_either_order(callback_first):
    model, callback = a_model(), WarmupCosineDecayCallback(**ARGUMENTS)
    others = [SetsRate({0: 0.5}), SetsRate({0: 0.2, 1: 3.0})]
    fit(model, *([callback, *others] if callback_first else [*others, callback]), epochs=3)
    np.testing.assert_allclose(callback.lrs, PLANNED[:12] * np.repeat([1, 0.1, 0.3], 4), rtol=1e-5)


def test_a_change_where_the_planned_rate_is_zero_is_not_kept():
    class SetsAFixedRate(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                self.model.optimizer.learning_rate = 0.3

    # One batch in an epoch, so that the change follows the first step, whose rate is 0.
    model, callback = a_model(), WarmupCosineDecayCallback(0.0, 0.1, 2, 6)
    assert 'stays at end_lr=0' in the_warning(
        model, callback, SetsAFixedRate(), batches=1, epochs=8
    )
    np.testing.assert_allclose(
        callback.lrs, lr_warmup_cosine_decay(np.arange(8), 2, 0, 6, 0.0, 0.1), rtol=1e-6
    )


def test_a_rate_that_was_switched_off_can_be_switched_on_again():
    class Freezes(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            # At the end of epoch 1 the last planned rate is that of step 7.
            if epoch < 2:
                self.model.optimizer.learning_rate = [0.0, 0.5 * PLANNED[7]][epoch]

    model, callback = a_model(), WarmupCosineDecayCallback(**ARGUMENTS)
    fit(model, callback, Freezes(), epochs=3)
    np.testing.assert_allclose(callback.lrs, PLANNED[:12] * np.repeat([1, 0, 0.5], 4), rtol=1e-5)


def test_without_total_steps_the_callback_only_warms_up(tmp_path):
    arguments = ARGUMENTS | {'total_steps': None, 'end_lr': 0.0}
    model, callback = a_model(), WarmupCosineDecayCallback(**arguments)
    fit(model, callback, SetsRate({1: 0.1, 2: 0.5}), epochs=4)
    np.testing.assert_allclose(
        callback.lrs, [0.01, 0.055] + 6 * [0.1] + 4 * [0.01] + 4 * [0.005], rtol=1e-6
    )
    model.save(tmp_path / 'model.keras')
    resumed = keras.models.load_model(tmp_path / 'model.keras')
    callback = WarmupCosineDecayCallback(**arguments)
    fit(resumed, callback, epochs=1)
    np.testing.assert_allclose(callback.lrs, 4 * [0.005], rtol=1e-6)


def test_a_change_during_warmup_alone_stays():
    callback = WarmupCosineDecayCallback(0.0, 0.1, warmup_steps=6)
    fit(a_model(), callback, SetsRate({0: 0.5}), epochs=2)
    np.testing.assert_allclose(
        callback.lrs, 0.1 * np.array([0, 1, 2, 3, 2, 2.5, 3, 3]) / 6, rtol=1e-6
    )


def test_callback_counts_updates_and_not_accumulated_batches():
    """Published: micro-steps are counted instead of updates."""
    callback = WarmupCosineDecayCallback(**ARGUMENTS)
    fit(
        a_model(optimizer=keras.optimizers.SGD(0.5, gradient_accumulation_steps=2)),
        callback,
        epochs=4,
    )
    np.testing.assert_allclose(callback.lrs, np.repeat(PLANNED[:8], 2), rtol=1e-6)


def test_callback_works_with_a_loss_scaling_optimizer():
    callback = WarmupCosineDecayCallback(**ARGUMENTS)
    inner = keras.optimizers.SGD(0.5)
    fit(
        a_model(optimizer=keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0)),
        callback,
        epochs=2,
    )
    np.testing.assert_allclose(callback.lrs, PLANNED[:8], rtol=1e-6)
    assert float(inner.learning_rate) == pytest.approx(PLANNED[7])


def test_several_steps_per_execution_share_the_rate_of_the_first():
    callback = WarmupCosineDecayCallback(**ARGUMENTS)
    fit(a_model(run_eagerly=False, jit_compile=False, steps_per_execution=2), callback, epochs=2)
    np.testing.assert_allclose(callback.lrs, PLANNED[:8:2], rtol=1e-6)


def test_a_new_run_with_the_same_callback_starts_anew():
    callback = WarmupCosineDecayCallback(**ARGUMENTS)
    fit(a_model(), callback, SetsRate({0: 0.1}), epochs=2)
    assert callback.factor == pytest.approx(0.1)
    fit(a_model(), callback, epochs=1)
    assert callback.factor == 1.0
    np.testing.assert_allclose(callback.lrs, PLANNED[:4], rtol=1e-6)


def test_a_factor_can_be_carried_over_to_another_process():
    model, callback = a_model(), WarmupCosineDecayCallback(**ARGUMENTS)
    model.optimizer.iterations.assign(5)
    callback.factor = 0.1
    fit(model, callback, epochs=1)
    np.testing.assert_allclose(callback.lrs, 0.1 * PLANNED[5:9], rtol=1e-6)


@pytest.mark.parametrize('wrapped', [False, True])
def test_an_optimizer_with_a_schedule_is_refused_in_one_line(wrapped):
    optimizer = keras.optimizers.SGD(WarmupCosineDecay(**ARGUMENTS))
    model = a_model(
        optimizer=keras.optimizers.LossScaleOptimizer(optimizer) if wrapped else optimizer
    )
    with pytest.raises(
        ValueError, match='is a schedule, which this callback cannot set: compile with a number'
    ) as error:
        fit(model, WarmupCosineDecayCallback(**ARGUMENTS))
    assert '\n' not in str(error.value)


def test_an_end_lr_without_a_decay_is_refused():
    with pytest.raises(ValueError, match='end_lr=0.001 would never be used'):
        WarmupCosineDecayCallback(**ARGUMENTS | {'total_steps': None})


# ---- On several devices


class RecordsReplicas(keras.callbacks.Callback):
    """Keeps the rate of each replica before each batch; to be placed after what sets it."""

    def __init__(self):
        super().__init__()
        self.rates = []

    def on_train_batch_begin(self, batch, logs=None):
        rate = self.model.optimizer.learning_rate.value
        replicas = self.model.distribute_strategy.experimental_local_results(rate)
        self.rates.append([float(rate) for rate in replicas])


def sgd():
    return keras.optimizers.SGD(0.5)


def loss_scaling():
    return keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=2.0)


@pytest.fixture(scope='module')
def two_devices():
    return tf.distribute.MirroredStrategy(['CPU:0', 'CPU:1'])


def fit_on(strategy, arguments=ARGUMENTS, optimizer=sgd, plateau=True):
    with strategy.scope():
        model = a_model(optimizer=optimizer(), run_eagerly=False, jit_compile=False)
    callback, replicas = WarmupCosineDecayCallback(**arguments), RecordsReplicas()
    others = []
    if plateau:
        others = [keras.callbacks.ReduceLROnPlateau('loss', factor=0.5, patience=1, min_delta=1e9)]
    x = np.linspace(-1, 1, 16).reshape(8, 2)
    model.fit(
        x,
        3 * x.sum(1, keepdims=True),
        batch_size=2,
        shuffle=False,
        verbose=0,
        epochs=4,
        callbacks=[callback, replicas, *others],
    )
    return callback, np.array(replicas.rates), model


# Under MirroredStrategy Keras' fit itself fails with accumulation, XLA and steps_per_execution.
@pytest.mark.parametrize(
    ('optimizer', 'plateau'), [(sgd, True), slow(sgd, False), slow(loss_scaling, True)]
)
def test_two_devices_train_with_the_rates_of_one(two_devices, optimizer, plateau):
    arguments = ARGUMENTS | {'total_steps': 16}
    planned = lr_warmup_cosine_decay(np.arange(16), 2, 1, 16, 0.01, 0.1, 0.001)
    alone, _, model_alone = fit_on(tf.distribute.get_strategy(), arguments, optimizer, plateau)
    together, of_replicas, model_together = fit_on(two_devices, arguments, optimizer, plateau)
    factors = np.repeat([1, 1, 0.5, 0.25], 4) if plateau else 1.0
    np.testing.assert_allclose(alone.lrs, planned * factors, rtol=1e-5)
    assert together.lrs == alone.lrs
    assert together.factor == alone.factor == (0.125 if plateau else 1.0)
    np.testing.assert_array_equal(of_replicas, np.stack([alone.lrs, alone.lrs], axis=1))
    # The weights tell which rates were really used.
    for one, other in zip(model_together.get_weights(), model_alone.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_two_devices_leave_the_rate_alone_after_warmup_alone(two_devices):
    callback, of_replicas, _ = fit_on(two_devices, ARGUMENTS | {'total_steps': None, 'end_lr': 0.0})
    np.testing.assert_allclose(
        callback.lrs, [0.01, 0.055] + 6 * [0.1] + 4 * [0.05] + 4 * [0.025], rtol=1e-6
    )
    np.testing.assert_array_equal(of_replicas[:, 0], of_replicas[:, 1])


def test_accumulated_batches_share_an_update_on_two_devices(two_devices):
    with two_devices.scope():
        model = a_model(optimizer=keras.optimizers.SGD(0.5, gradient_accumulation_steps=2))
    callback, replicas = WarmupCosineDecayCallback(**ARGUMENTS), RecordsReplicas()
    for each in (callback, replicas):
        each.set_model(model)
    # Keras' fit cannot accumulate in a graph here, so the updates are only counted.
    callback.on_train_begin()
    for batch in range(8):
        callback.on_train_batch_begin(batch)
        replicas.on_train_batch_begin(batch)
        model.optimizer._iterations.assign_add(1)
        if batch == 3:
            # As a callback at the end of an epoch does.
            model.optimizer.learning_rate = 0.5 * callback.lrs[-1]
    expected = PLANNED[np.arange(8) // 2] * np.repeat([1, 0.5], 4)
    np.testing.assert_allclose(callback.lrs, expected, rtol=1e-6)
    np.testing.assert_allclose(replicas.rates, np.stack([expected, expected], axis=1), rtol=1e-6)


@pytest.mark.slow
def test_a_strategy_of_one_device_trains_with_the_same_rates():
    callback, _, _ = fit_on(
        tf.distribute.OneDeviceStrategy('CPU:1'), ARGUMENTS | {'total_steps': 40}, plateau=False
    )
    expected = lr_warmup_cosine_decay(np.arange(16), 2, 1, 40, 0.01, 0.1, 0.001)
    np.testing.assert_allclose(callback.lrs, expected, rtol=1e-6)


def test_a_schedule_is_refused_on_two_devices_too(two_devices):
    with pytest.raises(ValueError, match='is a schedule, which this callback cannot set'):
        fit_on(two_devices, optimizer=lambda: keras.optimizers.SGD(WarmupCosineDecay(**ARGUMENTS)))


def test_in_mixed_precision_skipped_updates_do_not_count():
    class Counts(keras.callbacks.Callback):
        updates = []

        def on_train_batch_begin(self, batch, logs=None):
            self.updates.append(int(self.model.optimizer.iterations))

    keras.config.set_dtype_policy('mixed_float16')
    model, callback = a_model(1.0), WarmupCosineDecayCallback(**ARGUMENTS)
    fit(model, callback, SetsRate({0: 0.5}), Counts(), epochs=2)
    # `compile` has wrapped the optimizer, whose first scales are so large that gradients overflow.
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert 0 < Counts.updates[-1] < 7
    np.testing.assert_allclose(
        callback.lrs, PLANNED[Counts.updates] * np.repeat([1, 0.5], 4), rtol=1e-5
    )


# ---- A run that goes on


class Crash(Exception):
    pass


class CrashesInEpoch(keras.callbacks.Callback):
    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise Crash


@pytest.mark.parametrize('callback_first', [True, False])
@pytest.mark.parametrize('new_process', [True, False])
def test_a_run_restored_while_fit_begins_keeps_its_factor(tmp_path, callback_first, new_process):
    def callbacks(callback, *others):
        backup = keras.callbacks.BackupAndRestore(tmp_path / 'backup')
        return [callback, *others, backup] if callback_first else [backup, callback, *others]

    callback = WarmupCosineDecayCallback(**ARGUMENTS)
    with pytest.raises(Crash):
        fit(a_model(), *callbacks(callback, SetsRate({0: 0.5}), CrashesInEpoch(2)), epochs=3)
    assert callback.factor == pytest.approx(0.5)
    if new_process:
        factor, callback = callback.factor, WarmupCosineDecayCallback(**ARGUMENTS)
        callback.factor = factor
    used = len(callback.lrs)
    with no_warning():
        fit(a_model(), *callbacks(callback), epochs=3)
    np.testing.assert_allclose(callback.lrs[used:], 0.5 * PLANNED[8:12], rtol=1e-5)
    assert used == (0 if new_process else 8)


def test_a_new_run_beside_backup_and_restore_starts_anew(tmp_path):
    callback = WarmupCosineDecayCallback(**ARGUMENTS)
    fit(a_model(), callback, SetsRate({0: 0.1}), epochs=1)
    with no_warning():
        fit(a_model(), callback, keras.callbacks.BackupAndRestore(tmp_path / 'backup'), epochs=1)
    np.testing.assert_allclose(callback.lrs, PLANNED[:4], rtol=1e-6)


def test_a_run_still_accumulating_its_first_update_keeps_factor():
    model = a_model(optimizer=keras.optimizers.SGD(0.5, gradient_accumulation_steps=6))
    callback = WarmupCosineDecayCallback(**ARGUMENTS)
    fit(model, callback, SetsRate({0: 0.5}), epochs=1)
    assert int(model.optimizer.iterations) == 0
    fit(model, callback, initial_epoch=1, epochs=2)
    np.testing.assert_allclose(
        callback.lrs, PLANNED[[0] * 6 + [1] * 2] * ([1] * 4 + [0.5] * 4), rtol=1e-5
    )


def test_the_factor_can_be_saved_at_the_end_of_each_epoch():
    class Saves(keras.callbacks.Callback):
        factors = []

        def on_epoch_end(self, epoch, logs=None):
            self.factors.append(callback.factor)

    callback = WarmupCosineDecayCallback(**ARGUMENTS)
    fit(a_model(), callback, SetsRate({0: 0.5, 1: 0.1}), Saves(), epochs=3)
    np.testing.assert_allclose(Saves.factors, [0.5, 0.05, 0.05], rtol=1e-6)
    np.testing.assert_allclose(callback.lrs, PLANNED[:12] * np.repeat([1, 0.5, 0.05], 4), rtol=1e-5)


def test_the_factor_does_not_follow_the_rate_after_training():
    model, callback = a_model(), WarmupCosineDecayCallback(**ARGUMENTS)
    fit(model, callback, epochs=1)
    model.optimizer.learning_rate = 0.3
    assert callback.factor == 1.0


def test_a_factor_set_in_training_replaces_what_others_did():
    class Sets(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            callback.factor = 2.0

    callback = WarmupCosineDecayCallback(**ARGUMENTS)
    fit(a_model(), callback, SetsRate({0: 0.5}), Sets(), epochs=2)
    np.testing.assert_allclose(callback.lrs, PLANNED[:8] * np.repeat([1, 2], 4), rtol=1e-5)


# ---- Rates that nobody wants are not used in silence


@pytest.mark.parametrize('total_steps', [12, None])
def test_a_run_resumed_from_weights_alone_says_so(total_steps):
    arguments = ARGUMENTS | (
        {'total_steps': 12} if total_steps else {'total_steps': None, 'end_lr': 0.0}
    )
    trained, model = a_model(), a_model()
    fit(trained, WarmupCosineDecayCallback(**arguments), epochs=2)
    model.set_weights(trained.get_weights())
    callback = WarmupCosineDecayCallback(**arguments)
    message = the_warning(model, callback, initial_epoch=2, epochs=3)
    assert message.startswith(
        'training begins with initial_epoch=2, but the optimizer has made no update, '
        'so the schedule starts over'
    )
    assert 'keras.models.load_model' in message
    assert 'model.optimizer.iterations.assign(UPDATES)' in message
    np.testing.assert_allclose(
        callback.lrs, PLANNED[:4] if total_steps else [0.01, 0.055, 0.1, 0.1], rtol=1e-6
    )


def test_an_accumulating_optimizer_is_not_told_to_assign():
    model = a_model(optimizer=keras.optimizers.SGD(0.5, gradient_accumulation_steps=2))
    message = the_warning(model, WarmupCosineDecayCallback(**ARGUMENTS), initial_epoch=2, epochs=3)
    assert 'load_model' in message and 'assign' not in message


def test_what_the_warning_says_to_assign_continues_the_curve():
    model, callback = a_model(PLANNED[7]), WarmupCosineDecayCallback(**ARGUMENTS)
    model.optimizer.iterations.assign(8)
    with no_warning():
        fit(model, callback, initial_epoch=2, epochs=3)
    np.testing.assert_allclose(callback.lrs, PLANNED[8:12], rtol=1e-6)


@pytest.mark.parametrize(('step', 'end_lr'), [(12, 0.001), (12, 0.0), (30, 0.001)])
def test_a_run_that_begins_past_the_schedule_says_so(step, end_lr):
    callback = WarmupCosineDecayCallback(**ARGUMENTS | {'end_lr': end_lr})
    model = a_model(end_lr)
    model.optimizer.iterations.assign(step)
    assert the_warning(model, callback, epochs=2) == (
        f'{step} updates are done and total_steps=12, so the learning rate stays at '
        f'end_lr={end_lr:g}: write a larger total_steps, or train no further'
    )
    np.testing.assert_allclose(callback.lrs, end_lr, rtol=1e-6)


def test_a_run_that_gets_to_a_rate_of_zero_says_so_once():
    callback = WarmupCosineDecayCallback(**ARGUMENTS | {'end_lr': 0.0})
    assert the_warning(a_model(), callback, epochs=5).startswith(
        '12 updates are done and total_steps=12'
    )
    # An end_lr that was chosen is there to be trained with.
    with no_warning():
        fit(a_model(), WarmupCosineDecayCallback(**ARGUMENTS), epochs=5)


def test_a_factor_that_was_not_carried_over_is_named(tmp_path):
    model = a_model()
    fit(model, WarmupCosineDecayCallback(**ARGUMENTS), SetsRate({0: 0.5}), epochs=2)
    model.save(tmp_path / 'model.keras')
    restored = keras.models.load_model(tmp_path / 'model.keras')
    message = the_warning(
        restored, WarmupCosineDecayCallback(**ARGUMENTS), initial_epoch=2, epochs=3
    )
    assert message.startswith(
        f'before update 8 the optimizer has a learning rate of {PLANNED[7] / 2:.4g}, '
        '0.5 times the planned one'
    )
    assert 'factor = 0.5' in message
    restored = keras.models.load_model(tmp_path / 'model.keras')
    callback = WarmupCosineDecayCallback(**ARGUMENTS)
    callback.factor = 0.5
    with no_warning():
        fit(restored, callback, initial_epoch=2, epochs=3)
    np.testing.assert_allclose(callback.lrs, 0.5 * PLANNED[8:12], rtol=1e-5)


USUAL = {
    'plain': {},
    'accumulating': {'optimizer': lambda: keras.optimizers.SGD(0.5, gradient_accumulation_steps=3)},
    'several_steps': {'run_eagerly': False, 'jit_compile': False, 'steps_per_execution': 3},
    'loss_scaling': {'optimizer': loss_scaling},
}


@pytest.mark.parametrize('compiled', USUAL.values(), ids=USUAL)
@pytest.mark.parametrize('decays', [True, False])
def test_usual_runs_and_their_continuation_do_not_warn(tmp_path, compiled, decays):
    arguments = ARGUMENTS | (
        {'total_steps': 40} if decays else {'total_steps': None, 'end_lr': 0.0}
    )
    optimizer = compiled.get('optimizer', sgd)()
    model = a_model(**compiled | {'optimizer': optimizer})
    with no_warning():
        fit(model, WarmupCosineDecayCallback(**arguments), epochs=1)
        model.save(tmp_path / 'model.keras')
        for continued in (model, keras.models.load_model(tmp_path / 'model.keras')):
            continued.run_eagerly = compiled.get('run_eagerly', True)
            fit(continued, WarmupCosineDecayCallback(**arguments), initial_epoch=1, epochs=3)


@pytest.mark.parametrize('floatx', ['float16', 'bfloat16', 'float64'])
def test_the_factor_is_exact_whatever_floatx_says(floatx):
    plateau = keras.callbacks.ReduceLROnPlateau('loss', factor=0.5, patience=1, min_delta=1e9)
    keras.config.set_floatx(floatx)
    try:
        callback = WarmupCosineDecayCallback(**ARGUMENTS)
        with no_warning():
            fit(a_model(), callback, plateau, epochs=3)
        assert callback.factor == 0.25
        rounding = {'float16': 2**-11, 'bfloat16': 2**-8, 'float64': 1e-15}[floatx]
        np.testing.assert_allclose(
            callback.lrs, PLANNED[:12] * np.repeat([1, 1, 0.5], 4), rtol=1.01 * rounding
        )
    finally:
        keras.config.set_floatx('float32')


def test_a_rate_that_the_optimizer_cannot_hold_is_named():
    keras.config.set_floatx('float16')
    try:
        model = a_model()
    finally:
        keras.config.set_floatx('float32')
    message = the_warning(model, WarmupCosineDecayCallback(0.0, 1e-8, 2, 12), epochs=2)
    assert message.startswith(
        'the optimizer keeps its learning rate in float16, which turns 5e-09 into 0:'
    )
    assert "keras.config.set_dtype_policy('mixed_float16')" in message
