"""What `WarmupCosineDecayCallback` promises to someone who calls `model.fit`."""
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from schedules import WarmupCosineDecay, WarmupCosineDecayCallback, lr_warmup_cosine_decay

# 2 steps of warmup, 1 of hold, and a cosine to step 12.
ARGUMENTS = dict(start_lr=0.01, target_lr=0.1, warmup_steps=2, total_steps=12, hold=1, end_lr=0.001)
PLANNED = lr_warmup_cosine_decay(np.arange(40), 2, 1, 12, 0.01, 0.1, 0.001)


def a_model(rate=0.5, optimizer=None, **compiled):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer='ones')])
    model.compile(optimizer or keras.optimizers.SGD(rate), keras.losses.MeanSquaredError(),
                  **{'run_eagerly': True} | compiled)
    return model


def fit(model, *callbacks, batches=4, **arguments):
    """One batch has one example; an epoch has 4 batches, if not told otherwise."""
    x = np.linspace(-1, 1, 2 * batches).reshape(batches, 2)
    return model.fit(x, 3 * x.sum(1, keepdims=True), batch_size=1, shuffle=False, verbose=0, callbacks=list(callbacks), **arguments)


def rate_of(model):
    return float(model.optimizer.learning_rate)


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


@pytest.mark.parametrize('jit_compile', [False, True])
def test_training_with_the_callback_and_with_the_schedule_ends_in_the_same_weights(jit_compile):
    compiled = dict(run_eagerly=False, jit_compile=jit_compile)
    with_callback, with_schedule = a_model(**compiled), a_model(WarmupCosineDecay(**ARGUMENTS), **compiled)
    fit(with_callback, WarmupCosineDecayCallback(**ARGUMENTS), epochs=3)
    fit(with_schedule, epochs=3)
    for one, other in zip(with_callback.get_weights(), with_schedule.get_weights()):
        assert not np.allclose(one, 1.0)
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_callback_sets_the_rate_of_its_own_model_and_continues_a_resumed_run(tmp_path):
    """Published: the callback reads a global `model` instead of its own, and restarts at 0 when a run is resumed."""
    bystander, model = a_model(0.25), a_model()
    fit(bystander, epochs=1)
    fit(model, WarmupCosineDecayCallback(**ARGUMENTS), epochs=1)
    assert rate_of(bystander) == 0.25
    assert rate_of(model) == pytest.approx(PLANNED[3])
    model.save(tmp_path / 'model.keras')
    resumed, callback = keras.models.load_model(tmp_path / 'model.keras'), WarmupCosineDecayCallback(**ARGUMENTS)
    fit(resumed, callback, initial_epoch=1, epochs=3)
    np.testing.assert_allclose(callback.lrs, PLANNED[4:12], rtol=1e-6)


def test_callback_continues_where_a_restored_optimizer_stands_whatever_rate_it_was_compiled_with():
    model, callback = a_model(0.77), WarmupCosineDecayCallback(**ARGUMENTS)
    model.optimizer.iterations.assign(5)
    fit(model, callback, epochs=1)
    np.testing.assert_allclose(callback.lrs, PLANNED[5:9], rtol=1e-6)


def test_what_reduce_lr_on_plateau_did_stays_as_a_factor():
    """Published: a rate set by the callback each batch silently undoes what `ReduceLROnPlateau` changed."""
    model, callback = a_model(), WarmupCosineDecayCallback(**ARGUMENTS)
    # No loss is better than the first by 1e9, so that every epoch but the first reduces the rate.
    plateau = keras.callbacks.ReduceLROnPlateau('loss', factor=0.5, patience=1, min_delta=1e9)
    fit(model, callback, plateau, epochs=3)
    np.testing.assert_allclose(callback.lrs, PLANNED[:12] * np.repeat([1, 1, 0.5], 4), rtol=1e-5)
    # The end of the last epoch reduced it as well, and that stays when the model is trained on.
    assert callback.factor == pytest.approx(0.25)
    fit(model, callback, initial_epoch=3, epochs=4)
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
    fit(model, callback, SetsAFixedRate(), batches=1, epochs=8)
    np.testing.assert_allclose(callback.lrs, lr_warmup_cosine_decay(np.arange(8), 2, 0, 6, 0.0, 0.1), rtol=1e-6)


def test_a_rate_that_was_switched_off_can_be_switched_on_again():
    class Freezes(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            # At the end of epoch 1 the last planned rate is that of step 7.
            if epoch < 2:
                self.model.optimizer.learning_rate = [0.0, 0.5 * PLANNED[7]][epoch]

    model, callback = a_model(), WarmupCosineDecayCallback(**ARGUMENTS)
    fit(model, callback, Freezes(), epochs=3)
    np.testing.assert_allclose(callback.lrs, PLANNED[:12] * np.repeat([1, 0, 0.5], 4), rtol=1e-5)


def test_without_total_steps_it_is_warmup_alone_and_the_rest_is_left_to_other_callbacks(tmp_path):
    arguments = ARGUMENTS | dict(total_steps=None, end_lr=0.0)
    model, callback = a_model(), WarmupCosineDecayCallback(**arguments)
    fit(model, callback, SetsRate({1: 0.1, 2: 0.5}), epochs=4)
    np.testing.assert_allclose(callback.lrs, [0.01, 0.055] + 6 * [0.1] + 4 * [0.01] + 4 * [0.005], rtol=1e-6)
    model.save(tmp_path / 'model.keras')
    resumed, callback = keras.models.load_model(tmp_path / 'model.keras'), WarmupCosineDecayCallback(**arguments)
    fit(resumed, callback, epochs=1)
    np.testing.assert_allclose(callback.lrs, 4 * [0.005], rtol=1e-6)


def test_a_change_during_warmup_alone_stays():
    callback = WarmupCosineDecayCallback(0.0, 0.1, warmup_steps=6)
    fit(a_model(), callback, SetsRate({0: 0.5}), epochs=2)
    np.testing.assert_allclose(callback.lrs, 0.1 * np.array([0, 1, 2, 3, 2, 2.5, 3, 3]) / 6, rtol=1e-6)


def test_callback_counts_updates_and_not_accumulated_batches():
    """Published: micro-steps are counted instead of updates."""
    callback = WarmupCosineDecayCallback(**ARGUMENTS)
    fit(a_model(optimizer=keras.optimizers.SGD(0.5, gradient_accumulation_steps=2)), callback, epochs=4)
    np.testing.assert_allclose(callback.lrs, np.repeat(PLANNED[:8], 2), rtol=1e-6)


def test_callback_works_with_a_loss_scaling_optimizer():
    callback = WarmupCosineDecayCallback(**ARGUMENTS)
    inner = keras.optimizers.SGD(0.5)
    fit(a_model(optimizer=keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0)), callback, epochs=2)
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
    model = a_model(optimizer=keras.optimizers.LossScaleOptimizer(optimizer) if wrapped else optimizer)
    with pytest.raises(ValueError, match='is a schedule, which this callback cannot set: compile with a number') as error:
        fit(model, WarmupCosineDecayCallback(**ARGUMENTS))
    assert '\n' not in str(error.value)


def test_an_end_lr_without_a_decay_is_refused():
    with pytest.raises(ValueError, match='end_lr=0.001 would never be used'):
        WarmupCosineDecayCallback(**ARGUMENTS | dict(total_steps=None))


# ---- Other people's programs


def two_devices():
    return tf.distribute.MirroredStrategy(['CPU:0', 'CPU:1'])


def fit_on(strategy, *callbacks, optimizer=keras.optimizers.SGD, epochs=3):
    """As `fit`, with an example for each of two replicas."""
    with strategy.scope():
        model = a_model(optimizer=optimizer(0.5), run_eagerly=False)
    x = np.linspace(-1, 1, 16).reshape(8, 2)
    model.fit(x, 3 * x.sum(1, keepdims=True), batch_size=2, shuffle=False, verbose=0, callbacks=list(callbacks), epochs=epochs)
    return model


def scaling(rate):
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(rate), initial_scale=2.0)


@pytest.mark.parametrize('strategy', [two_devices, lambda: tf.distribute.OneDeviceStrategy('CPU:0')], ids=['mirrored', 'one device'])
@pytest.mark.parametrize('optimizer', [keras.optimizers.SGD, keras.optimizers.AdamW, scaling])
def test_it_sets_the_rate_of_every_replica(strategy, optimizer):
    callback, strategy = WarmupCosineDecayCallback(**ARGUMENTS), strategy()
    model = fit_on(strategy, callback, optimizer=optimizer)
    np.testing.assert_allclose(callback.lrs, PLANNED[:12], rtol=1e-6)
    rate = model.optimizer.learning_rate.value
    copies = strategy.experimental_local_results(rate)
    np.testing.assert_allclose([float(copy) for copy in copies], PLANNED[11], rtol=1e-6)


def test_two_devices_and_one_use_the_same_rates_beside_reduce_lr_on_plateau():
    plateau = keras.callbacks.ReduceLROnPlateau('loss', factor=0.5, patience=1, min_delta=1e9)
    callback = WarmupCosineDecayCallback(**ARGUMENTS)
    fit_on(two_devices(), callback, plateau, epochs=4)
    np.testing.assert_allclose(callback.lrs, PLANNED[:16] * np.repeat([1, 1, 0.5, 0.25], 4), rtol=1e-5)


def test_two_devices_and_one_end_in_the_same_weights():
    models = [fit_on(strategy, WarmupCosineDecayCallback(**ARGUMENTS)) for strategy in (two_devices(), tf.distribute.OneDeviceStrategy('CPU:0'))]
    for one, other in zip(*(model.get_weights() for model in models)):
        np.testing.assert_allclose(one, other, rtol=1e-5)


class Stops(keras.callbacks.Callback):
    """The process ends in the middle of a run."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize('callback_first', [True, False])
def test_a_run_that_backup_and_restore_brings_back_goes_on_with_its_factor(tmp_path, callback_first):
    def interrupted(callback):
        backup = keras.callbacks.BackupAndRestore(tmp_path / 'backup')
        return [callback, backup] if callback_first else [backup, callback]

    callback = WarmupCosineDecayCallback(**ARGUMENTS)
    with pytest.raises(KeyboardInterrupt):
        fit(a_model(), *interrupted(callback), SetsRate({0: 0.5}), Stops(), epochs=4)
    assert callback.factor == pytest.approx(0.5)
    carried = WarmupCosineDecayCallback(**ARGUMENTS)
    carried.factor = callback.factor
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        fit(a_model(), *interrupted(carried), epochs=4)
    np.testing.assert_allclose(carried.lrs, 0.5 * PLANNED[8:16], rtol=1e-5)


def test_weights_without_their_optimizer_start_the_warmup_over_with_a_warning():
    callback = WarmupCosineDecayCallback(**ARGUMENTS)
    with pytest.warns(UserWarning, match=r'fit begins at epoch 2, but the optimizer has made no update.*iterations\.assign') as caught:
        fit(a_model(), callback, initial_epoch=2, epochs=4)
    said = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert len(said) == 1 and '\n' not in said[0]
    np.testing.assert_allclose(callback.lrs, PLANNED[:8], rtol=1e-6)


@pytest.mark.parametrize('step, warns', [(11, False), (12, True), (30, True)])
def test_training_past_the_end_of_the_curve_is_said(step, warns):
    model = a_model()
    model.optimizer.iterations.assign(step)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        fit(model, WarmupCosineDecayCallback(**ARGUMENTS), epochs=2)
    said = [str(warning.message) for warning in caught if warning.category is UserWarning]
    expected = f'training begins at update {step}, but the curve has ended at total_steps=12: the rate stays at end_lr=0.001'
    assert [text.startswith(expected) for text in said] == [True] * warns


@pytest.mark.filterwarnings('error::UserWarning')
def test_usual_runs_are_not_warned_of():
    callback = WarmupCosineDecayCallback(**ARGUMENTS)
    model = a_model()
    fit(model, callback, epochs=2)
    fit(model, callback, initial_epoch=2, epochs=3)
    fit(a_model(), WarmupCosineDecayCallback(0.01, 0.1, 2), epochs=4)  # without an end there is none to be past
