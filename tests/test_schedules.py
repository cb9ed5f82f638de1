"""What `schedules.py` promises as a function and as a Keras schedule; the callback is in
test_schedule_callback.py.
"""

import inspect
import json
import math
import os
import subprocess
import sys

import hypothesis
import keras
import numpy as np
import optax
import pytest
import tensorflow as tf
from hypothesis import strategies as st

import schedules
from schedules import WarmupCosineDecay, WarmupDecay, learning_rate, lr_warmup_cosine_decay
from tests.conftest import slow

COSINE_SETTINGS = [
    {'warmup_steps': 10, 'total_steps': 100, 'start_lr': 0.0, 'target_lr': 0.1, 'end_lr': 0.0},
    {'warmup_steps': 7, 'total_steps': 61, 'start_lr': 0.02, 'target_lr': 0.3, 'end_lr': 0.004},
    {'warmup_steps': 1, 'total_steps': 40, 'start_lr': 1e-6, 'target_lr': 1e-3, 'end_lr': 1e-5},
    {'warmup_steps': 0, 'total_steps': 50, 'start_lr': 0.0, 'target_lr': 0.1, 'end_lr': 0.01},
    {'warmup_steps': 30, 'total_steps': 31, 'start_lr': 0.5, 'target_lr': 0.1, 'end_lr': 0.0},
]
# For the other curves: 8 steps of warmup, 4 of hold and 64 of decay.
BEGIN, END = 12, 76
SETTING = {
    'warmup_steps': 8,
    'hold': 4,
    'total_steps': END,
    'start_lr': 0.01,
    'target_lr': 0.1,
    'end_lr': 0.002,
}
DECAYING = [curve for curve in schedules.CURVES if curve != 'constant']


def setting_of(curve):
    return SETTING | {'curve': curve} | ({'end_lr': 0.0} if curve == 'constant' else {})


def decay_of(curve, **arguments):
    """The rates of the decay alone, from its first step to the last before `end_lr`."""
    return learning_rate(np.arange(BEGIN, END), **SETTING | {'curve': curve} | arguments)


def each(schedule, steps):
    """The values of a schedule that takes one step at a time."""
    return np.array([float(schedule(int(step))) for step in steps])


# ---- The same numbers as other libraries


@pytest.mark.parametrize('setting', COSINE_SETTINGS)
def test_warmup_and_cosine_are_those_of_keras_at_every_step(setting):
    s = setting
    steps = np.arange(s['total_steps'] + 5)
    warmup = {
        'initial_learning_rate': s['start_lr'],
        'warmup_target': s['target_lr'],
        'warmup_steps': s['warmup_steps'],
    }
    if s['warmup_steps'] == 0:
        warmup = {'initial_learning_rate': s['target_lr']}
    oracle = keras.optimizers.schedules.CosineDecay(
        decay_steps=s['total_steps'] - s['warmup_steps'],
        alpha=s['end_lr'] / s['target_lr'],
        **warmup,
    )
    np.testing.assert_allclose(
        learning_rate(steps, **s), each(oracle, steps), rtol=2e-6, atol=2e-7 * s['target_lr']
    )


@pytest.mark.parametrize('setting', COSINE_SETTINGS)
def test_warmup_and_cosine_are_those_of_optax_at_every_step(setting):
    s = setting
    steps = np.arange(s['total_steps'] + 5)
    oracle = optax.warmup_cosine_decay_schedule(
        s['start_lr'],
        s['target_lr'],
        s['warmup_steps'],
        decay_steps=s['total_steps'],
        end_value=s['end_lr'],
    )
    np.testing.assert_allclose(
        learning_rate(steps, **s), oracle(steps), rtol=2e-6, atol=2e-7 * s['target_lr']
    )


def test_hold_keeps_the_target_and_shifts_keras_cosine():
    rates = learning_rate(np.arange(BEGIN, END + 5), **SETTING)
    oracle = keras.optimizers.schedules.CosineDecay(0.1, decay_steps=64, alpha=0.02)
    np.testing.assert_allclose(rates, each(oracle, range(69)), rtol=2e-6)
    assert (learning_rate(np.arange(8, BEGIN + 1), **SETTING) == 0.1).all()


def test_constant_is_that_of_optax_also_past_the_last_step():
    oracle = optax.warmup_constant_schedule(0.01, 0.1, 8)
    steps = np.arange(2 * END)
    rates = learning_rate(
        steps, curve='constant', warmup_steps=8, total_steps=END, start_lr=0.01, target_lr=0.1
    )
    np.testing.assert_allclose(rates, oracle(steps), rtol=1e-6)


@pytest.mark.parametrize(
    ('curve', 'arguments', 'power'),
    [
        ('linear', {}, 1.0),
        ('polynomial', {}, 2.0),
        ('polynomial', {'power': 0.5}, 0.5),
        ('polynomial', {'power': 3}, 3.0),
    ],
)
def test_linear_and_polynomial_are_those_of_keras_and_optax(curve, arguments, power):
    rates = decay_of(curve, **arguments)
    oracle = keras.optimizers.schedules.PolynomialDecay(
        0.1, 64, end_learning_rate=0.002, power=power
    )
    np.testing.assert_allclose(rates, each(oracle, range(64)), rtol=3e-6)
    np.testing.assert_allclose(
        rates, optax.polynomial_schedule(0.1, 0.002, power, 64)(np.arange(64)), rtol=3e-6
    )


def test_exponential_matches_keras_and_with_a_floor_optax():
    oracle = keras.optimizers.schedules.ExponentialDecay(0.1, decay_steps=64, decay_rate=0.003)
    np.testing.assert_allclose(
        decay_of('exponential', decay=0.003, end_lr=0.0), each(oracle, range(64)), rtol=3e-6
    )
    oracle = optax.exponential_decay(0.1, 64, 0.003, end_value=0.002)
    np.testing.assert_allclose(
        decay_of('exponential', decay=0.003), oracle(np.arange(64)), rtol=3e-6
    )


def test_piecewise_is_that_of_keras_and_optax():
    rates = decay_of('piecewise', boundaries=[20, 0.5, 60], factors=[0.5, 0.1, 0.05])
    # Half of 76 is 38. Keras changes the rate after a boundary, optax at it; optax multiplies with
    # one factor after the other.
    oracle = keras.optimizers.schedules.PiecewiseConstantDecay(
        [19, 37, 59], [0.1, 0.05, 0.01, 0.005]
    )
    np.testing.assert_allclose(rates, each(oracle, range(BEGIN, END)), rtol=1e-6)
    oracle = optax.piecewise_constant_schedule(0.1, {20: 0.5, 38: 0.2, 60: 0.5})
    np.testing.assert_allclose(rates, [oracle(step) for step in range(BEGIN, END)], rtol=1e-6)


def test_piecewise_drops_at_epochs_30_60_and_80_of_90_by_default():
    at = learning_rate(
        [29, 30, 59, 60, 79, 80, 89, 90],
        curve='piecewise',
        warmup_steps=5,
        total_steps=90,
        target_lr=1.0,
    )
    np.testing.assert_allclose(at, [1.0, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0], rtol=1e-12)


@pytest.mark.parametrize('cycle_decay', [1.0, 0.5])
def test_triangular_is_straight_lines_between_troughs_and_peaks(cycle_decay):
    # 3 peaks, the first reached by warmup: down, up, down, up, down.
    knots = np.linspace(0, 64, 6)
    heights = [
        0.1,
        0.002,
        0.002 + 0.098 * cycle_decay,
        0.002,
        0.002 + 0.098 * cycle_decay**2,
        0.002,
    ]
    rates = decay_of('triangular', cycles=3, cycle_decay=cycle_decay)
    steps = np.arange(64)
    in_a_line = np.interp(steps, knots, heights)
    np.testing.assert_allclose(rates, in_a_line, rtol=1e-9)


@pytest.mark.parametrize('cycle_decay', [1.0, 0.5])
def test_cosine_restarts_are_those_of_keras(cycle_decay):
    oracle = keras.optimizers.schedules.CosineDecayRestarts(
        0.1, first_decay_steps=16, t_mul=1.0, m_mul=cycle_decay, alpha=0.02
    )
    rates = decay_of('cosine_restarts', cycles=4, cycle_decay=cycle_decay)
    np.testing.assert_allclose(rates, each(oracle, range(64)), rtol=3e-6)


def test_cosine_restarts_with_growing_cycles_are_those_of_optax():
    # 60 = 4 + 8 + 16 + 32 steps of decay.
    cycles = [
        {
            'init_value': 0.1,
            'peak_value': 0.1,
            'decay_steps': length,
            'warmup_steps': 0,
            'end_value': 0.002,
        }
        for length in (4, 8, 16, 32)
    ]
    oracle = optax.sgdr_schedule(cycles)
    rates = learning_rate(
        np.arange(BEGIN, BEGIN + 60),
        **SETTING | {'total_steps': BEGIN + 60},
        curve='cosine_restarts',
        cycles=4,
        cycle_mul=2.0,
    )
    np.testing.assert_allclose(rates, [oracle(step) for step in range(60)], rtol=3e-6)


def test_rsqrt_matches_the_transformer_paper_and_inverse_time():
    steps = np.arange(1, 1000)
    rates = learning_rate(steps, curve='rsqrt', warmup_steps=100, total_steps=1000, target_lr=0.3)
    paper = np.minimum(steps**-0.5, steps * 100**-1.5)
    np.testing.assert_allclose(rates, 0.3 * paper / paper.max(), rtol=1e-12)
    oracle = keras.optimizers.schedules.InverseTimeDecay(0.01, decay_steps=16, decay_rate=1.0)
    np.testing.assert_allclose(
        decay_of('rsqrt', timescale=16) ** 2, each(oracle, range(64)), rtol=3e-6
    )
    without_warmup = learning_rate(
        30_000, curve='rsqrt', warmup_steps=0, total_steps=10**6, target_lr=0.3
    )
    assert without_warmup == pytest.approx(0.3 / math.sqrt((10_000 + 30_000) / 10_000))


def test_trapezoid_matches_optax_lines_or_one_minus_square_root():
    steps = np.arange(END + 5)
    rates = learning_rate(steps, **SETTING, curve='trapezoid', cooldown=16, cooldown_power=1)
    lines = [
        optax.linear_schedule(0.01, 0.1, 8),
        optax.constant_schedule(0.1),
        optax.linear_schedule(0.1, 0.002, 16),
    ]
    oracle = optax.join_schedules(lines, [8, END - 16])
    np.testing.assert_allclose(rates, [oracle(step) for step in steps], rtol=3e-6)
    by_default = decay_of('trapezoid')  # the last 20 % of 76 steps, which are 15
    expected = [0.1] * 49 + [0.002 + 0.098 * (1 - math.sqrt(c / 15)) for c in range(15)]
    np.testing.assert_allclose(by_default, expected, rtol=1e-9)


# ---- One formula in all its forms


@pytest.mark.parametrize('curve', schedules.CURVES)
def test_numpy_tensor_compiled_and_schedule_agree_at_every_step(curve):
    setting = setting_of(curve)
    steps = np.arange(END + 10)
    in_numpy = learning_rate(steps, **setting)
    assert in_numpy.dtype == np.float64
    compiled = tf.function(lambda step: learning_rate(step, **setting), jit_compile=True)
    schedule = WarmupDecay(**setting)
    tensors = [
        learning_rate(tf.constant(steps), **setting),
        learning_rate(tf.constant(steps, tf.int32), **setting),
        compiled(tf.constant(steps)),
        schedule(tf.constant(steps)),
        tf.stack([schedule(step) for step in (0, 20, END)]),
    ]
    for tensor in tensors[:-1]:
        assert tensor.dtype == tf.float32
        np.testing.assert_allclose(in_numpy, tensor, rtol=3e-6, atol=1e-8)
    np.testing.assert_allclose(in_numpy[[0, 20, END]], tensors[-1], rtol=3e-6, atol=1e-8)


@pytest.fixture
def set_floatx():
    yield keras.config.set_floatx
    keras.config.set_floatx('float32')


@pytest.mark.parametrize('floatx', [slow('float16'), 'bfloat16', slow('float64')])
def test_a_schedule_is_float32_whatever_floatx_says(set_floatx, floatx):
    # float16 has nothing between 0 and 6e-8.
    tiny = {'start_lr': 1e-9, 'target_lr': 1e-8, 'end_lr': 2e-10}
    of_curves = [setting_of(curve) | tiny for curve in DECAYING]
    of_curves.append(SETTING | tiny | {'curve': 'constant', 'end_lr': 0.0})
    # Nothing decays: warmup and hold are the whole schedule.
    of_curves.append({'curve': 'linear', 'warmup_steps': 70, 'hold': 6, 'total_steps': 76} | tiny)
    steps = np.arange(END + 10)
    tensor = tf.constant(steps)
    set_floatx(floatx)
    for setting in of_curves:
        schedule = WarmupDecay(**setting)
        traced = tf.function(lambda step, s=setting: learning_rate(step, **s))
        compiled = tf.function(schedule.__call__, jit_compile=True)
        expected = learning_rate(steps, **setting)
        assert expected.dtype == np.float64
        for rates in (
            schedule(tensor),
            learning_rate(tensor, **setting),
            traced(tensor),
            compiled(tensor),
        ):
            assert rates.dtype == tf.float32
            np.testing.assert_allclose(rates, expected, rtol=3e-6, err_msg=setting['curve'])
        assert schedule.get_config() == WarmupDecay.from_config(schedule.get_config()).get_config()


def test_float32_variables_move_by_the_rate_whatever_floatx_says(set_floatx):
    set_floatx('float16')
    weight = keras.Variable(0.0, dtype='float32')
    optimizer = keras.optimizers.SGD(
        WarmupDecay(curve='constant', warmup_steps=2, total_steps=9, target_lr=1e-8)
    )
    optimizer.build([weight])
    places = [0.0]
    for _ in range(4):
        optimizer.apply([tf.constant(-1.0)], [weight])
        places.append(float(weight))
    np.testing.assert_allclose(np.diff(places), [0.0, 5e-9, 1e-8, 1e-8], rtol=1e-6)


WITH_JAX = """
import keras, numpy as np, jax, schedules
assert keras.backend.backend() == 'jax'
setting = dict(warmup_steps=np.array(3), total_steps=jax.numpy.array(20), target_lr=0.1, hold=2)
steps = np.arange(25)
expected = schedules.learning_rate(steps, **setting)
for floatx in ('float32', 'float16'):
    keras.config.set_floatx(floatx)
    for curve in ('cosine', 'piecewise'):
        schedule = schedules.WarmupDecay(curve=curve, **setting)
        for rates in (schedule(steps), jax.jit(schedule.__call__)(steps)):
            assert rates.dtype == 'float32'
            exact = schedules.learning_rate(steps, curve=curve, **setting)
            np.testing.assert_allclose(rates, exact, rtol=3e-6, atol=1e-8)
keras.config.set_floatx('float32')
count = keras.Variable(5, dtype='int32')
assert jax.numpy.isclose(schedules.learning_rate(count, **setting), 0.1)
symbolic = lambda steps: schedules.WarmupDecay(warmup_steps=0, total_steps=steps, target_lr=0.1)(3)
try:
    jax.jit(symbolic)(20)
except ValueError as error:
    assert 'total_steps is a symbolic tensor' in str(error)
else:
    raise AssertionError
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
model.compile(keras.optimizers.SGD(0.5), 'mse')
plateau = keras.callbacks.ReduceLROnPlateau('loss', factor=0.5, patience=1, min_delta=1e9)
callback = schedules.WarmupCosineDecayCallback(0.0, 0.1, 3, 20, 2)
data = np.ones((4, 2)), np.ones((4, 1))
model.fit(*data, batch_size=1, epochs=3, verbose=0, callbacks=[callback, plateau])
np.testing.assert_allclose(callback.lrs, expected[:12] * np.repeat([1, 1, 0.5], 4), rtol=1e-5)
"""


def test_it_works_without_tensorflow_as_the_backend():
    environment = os.environ | {'KERAS_BACKEND': 'jax', 'JAX_PLATFORMS': 'cpu'}
    done = subprocess.run(
        [sys.executable, '-c', WITH_JAX],
        env=environment,
        capture_output=True,
        text=True,
        cwd=os.path.dirname(schedules.__file__),
    )
    assert done.returncode == 0, done.stderr


def test_one_step_gives_a_float_and_an_array_its_shape():
    assert type(learning_rate(3, warmup_steps=5, total_steps=10, target_lr=0.1)) is float
    assert type(learning_rate(np.int32(3), warmup_steps=5, total_steps=10, target_lr=0.1)) is float
    assert learning_rate([[1, 2], [3, 4]], warmup_steps=5, total_steps=10, target_lr=0.1).shape == (
        2,
        2,
    )
    assert learning_rate([], warmup_steps=5, total_steps=10, target_lr=0.1).shape == (0,)
    assert learning_rate(
        tf.zeros((2, 3), tf.int64), warmup_steps=5, total_steps=10, target_lr=0.1
    ).shape == (2, 3)


def test_the_step_may_be_an_optimizers_iterations_variable():
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.iterations.assign(3)
    rates = [
        learning_rate(optimizer.iterations, warmup_steps=6, total_steps=10, target_lr=0.1),
        WarmupCosineDecay(0.0, 0.1, 6, 10)(optimizer.iterations),
    ]
    assert all(tf.is_tensor(rate) for rate in rates)
    np.testing.assert_allclose(rates, 0.05, rtol=1e-6)


def test_customary_names_and_orders_give_the_same_cosine():
    steps = np.arange(110)
    rates = learning_rate(
        steps, warmup_steps=5, total_steps=100, hold=10, start_lr=0.01, target_lr=0.2, end_lr=0.003
    )
    np.testing.assert_array_equal(
        rates, lr_warmup_cosine_decay(steps, 5, 10, 100, 0.01, 0.2, 0.003)
    )
    np.testing.assert_allclose(
        rates, WarmupCosineDecay(0.01, 0.2, 5, 100, 10, 0.003)(steps), rtol=3e-6
    )
    assert list(inspect.signature(lr_warmup_cosine_decay).parameters)[:6] == [
        'global_step',
        'warmup_steps',
        'hold',
        'total_steps',
        'start_lr',
        'target_lr',
    ]
    assert list(inspect.signature(WarmupCosineDecay).parameters)[:5] == [
        'start_lr',
        'target_lr',
        'warmup_steps',
        'total_steps',
        'hold',
    ]


def test_every_argument_of_a_curve_is_in_its_documentation():
    for name, curve in schedules.CURVES.items():
        for argument in curve.__kwdefaults__ or {}:
            assert argument in curve.__doc__, (name, argument)


def test_a_compiled_optimizer_step_moves_by_the_scheduled_rate():
    weight = keras.Variable(0.0)
    optimizer = keras.optimizers.SGD(WarmupCosineDecay(0.01, 0.1, 3, 12, 2, 0.005))
    optimizer.build([weight])
    step = tf.function(lambda: optimizer.apply([tf.constant(-1.0)], [weight]), jit_compile=True)
    places = [0.0]
    for _ in range(14):
        step()
        places.append(float(weight))
    np.testing.assert_allclose(
        np.diff(places),
        lr_warmup_cosine_decay(np.arange(14), 3, 2, 12, 0.01, 0.1, 0.005),
        rtol=1e-4,
    )


# ---- The bugs of published schedules, one test each; those of callbacks are in
# test_schedule_callback.py


@pytest.mark.parametrize('curve', schedules.CURVES)
def test_start_lr_is_used_by_every_curve(curve):
    """Published: `start_lr` is accepted and ignored."""
    for start_lr in (0.0, 0.03, 0.2):
        rates = learning_rate(np.arange(9), **setting_of(curve) | {'start_lr': start_lr})
        np.testing.assert_allclose(rates, np.linspace(start_lr, 0.1, 9), rtol=1e-12)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize(
    ('warmup', 'hold', 'total'),
    [
        (0, 0, 1),
        (0, 0, 5),
        (1, 0, 1),
        (5, 0, 5),
        (0, 5, 5),
        (3, 2, 5),
        (4, 0, 5),
        (0, 4, 5),
        (1, 1, 5),
        (2, 0, 40),
        (0, 3, 40),
    ],
)
def test_no_division_by_zero_and_no_nan_at_the_edges(warmup, hold, total):
    """Published: `hold == 0`, `W == 0` or `W + H == T` divide by zero."""
    steps = np.arange(total + 3)
    for curve in schedules.CURVES:
        fitting = {
            'trapezoid': {'cooldown': 1},
            'piecewise': {'boundaries': [total], 'factors': [0.1]},
            'cosine_restarts': {'cycles': 1},
        }.get(curve, {})
        setting = dict(
            curve=curve,
            warmup_steps=warmup,
            hold=hold,
            total_steps=total,
            target_lr=0.1,
            start_lr=0.01,
            **fitting,
        )
        rates, tensor = learning_rate(steps, **setting), WarmupDecay(**setting)(steps).numpy()
        assert np.isfinite(rates).all() and np.isfinite(tensor).all()
        np.testing.assert_allclose(rates, tensor, rtol=3e-6, atol=1e-8)
        np.testing.assert_allclose(
            rates[:warmup], 0.01 + 0.09 * np.arange(warmup) / max(1, warmup), rtol=1e-12
        )
        assert (rates[warmup : warmup + hold + 1] == 0.1).all()
        assert (
            rates[max(total, warmup + hold + 1) :] == (0.1 if curve == 'constant' else 0.0)
        ).all()


def tiny_model(schedule):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    # The loss as an object: Keras 3 cannot load an .h5 file back whose loss was given as 'mse'.
    model.compile(keras.optimizers.SGD(schedule), keras.losses.MeanSquaredError(), run_eagerly=True)
    return model


SAVED = [
    WarmupCosineDecay(0.01, 0.1, 3, 20, 2, 0.001, gradient_accumulation_steps=2),
    WarmupDecay(
        curve='piecewise',
        warmup_steps=3,
        total_steps=20,
        target_lr=0.1,
        start_lr=0.01,
        hold=1,
        end_lr=1e-4,
        boundaries=(0.5, 15),
        factors=(0.3, 0.03),
    ),
    WarmupDecay(
        curve='trapezoid',
        warmup_steps=np.int64(3),
        total_steps=20,
        target_lr=np.float32(0.1),
        cooldown=0.3,
    ),
]


@pytest.mark.parametrize('suffix', ['keras', 'h5'])
@pytest.mark.parametrize('schedule', SAVED, ids=['cosine', 'piecewise', 'trapezoid'])
def test_models_load_with_their_schedule_with_or_without_objects(tmp_path, schedule, suffix):
    """Published: `custom_objects` given as a set, and two spellings of the class."""
    path = tmp_path / f'model.{suffix}'
    tiny_model(schedule).save(path)
    name = type(schedule).__name__
    for custom_objects in (None, {name: type(schedule)}):
        loaded = keras.models.load_model(
            path, custom_objects=custom_objects
        ).optimizer._learning_rate
        assert type(loaded) is type(schedule)
        assert loaded.get_config() == schedule.get_config()
        np.testing.assert_array_equal(loaded(np.arange(45)), schedule(np.arange(45)))
    assert keras.saving.get_registered_name(type(schedule)) == f'warmstart>{name}'
    classes = [item for item in vars(schedules).values() if inspect.isclass(item)]
    spellings = [
        c for c in classes if issubclass(c, keras.optimizers.schedules.LearningRateSchedule)
    ]
    assert spellings == [WarmupDecay, WarmupCosineDecay]


def test_config_round_trip_gives_the_same_schedule():
    """Published: no `get_config`, or one that leaves arguments out."""
    for curve, function in schedules.CURVES.items():
        schedule = WarmupDecay(**setting_of(curve), gradient_accumulation_steps=3)
        config = schedule.get_config()
        arguments = set(inspect.signature(WarmupDecay).parameters) - {'curve_arguments'} | set(
            function.__kwdefaults__ or {}
        )
        assert set(config) == arguments
        again = WarmupDecay.from_config(json.loads(json.dumps(config)))
        assert again.get_config() == config
        np.testing.assert_array_equal(again(np.arange(250)), schedule(np.arange(250)))
    given = {
        'start_lr': 0.02,
        'target_lr': 0.3,
        'warmup_steps': 4,
        'total_steps': 50,
        'hold': 3,
        'end_lr': 0.01,
        'gradient_accumulation_steps': 2,
    }
    assert WarmupCosineDecay(**given).get_config() == given
    serialized = keras.optimizers.schedules.serialize(WarmupCosineDecay(**given))
    assert (
        keras.optimizers.schedules.deserialize(json.loads(json.dumps(serialized))).get_config()
        == given
    )


@pytest.mark.parametrize('curve', DECAYING)
def test_large_step_counts_lose_no_precision(curve):
    """Published: int64 steps meet float32 arithmetic. At 10**12, float32 tells only every 65536th
    step from its neighbours.
    """
    shift = 10**12
    fitting = {
        'rsqrt': {'timescale': 50},
        'piecewise': {'boundaries': [0.3, 0.6], 'factors': [0.1, 0.01]},
    }.get(curve, {})
    short = {
        'curve': curve,
        'warmup_steps': 0,
        'total_steps': 1000,
        'target_lr': 0.1,
        'end_lr': 0.001,
    } | fitting
    if curve == 'piecewise':
        fitting = {'boundaries': [shift + 300, shift + 600], 'factors': [0.1, 0.01]}
    if curve == 'trapezoid':
        fitting = {'cooldown': 200}
    long = short | {'hold': shift, 'total_steps': shift + 1000} | fitting
    steps = np.arange(1010)
    expected = learning_rate(steps, **short)
    np.testing.assert_array_equal(learning_rate(steps + shift, **long), expected)
    np.testing.assert_allclose(WarmupDecay(**long)(steps + shift), expected, rtol=1e-5, atol=1e-8)
    compiled = tf.function(lambda step: learning_rate(step, **long), jit_compile=True)
    np.testing.assert_allclose(compiled(tf.constant(steps + shift)), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize('curve', schedules.CURVES)
@pytest.mark.parametrize('hold', [0, 500])
def test_the_rate_does_not_jump_where_warmup_and_hold_hand_over(curve, hold):
    """Published: the decay runs during warmup, so that it has come down a good way where warmup
    ends.
    """
    setting = {
        'curve': curve,
        'warmup_steps': 3000,
        'hold': hold,
        'total_steps': 10_000,
        'target_lr': 0.1,
    }
    if curve == 'piecewise':
        setting |= {'boundaries': [0.5, 0.8], 'factors': [0.1, 0.01]}
    rates = learning_rate(np.arange(10_001), **setting)
    assert rates[3000] == rates.max() == 0.1
    near = rates[2990 : 3000 + hold + 11]
    assert near.min() > 0.098 and np.abs(np.diff(near)).max() < 0.1 / 500


@pytest.mark.parametrize('curve', DECAYING)
def test_past_the_last_step_the_rate_stays_at_end_lr(curve):
    """Published: the rate rises again, or goes negative, past the last step."""
    steps = np.concatenate([np.arange(END, 4 * END), [10**6, 10**12, 2**62]])
    for end_lr in (0.0, 0.002):
        setting = SETTING | {'curve': curve, 'end_lr': end_lr}
        assert (learning_rate(steps, **setting) == end_lr).all()
        assert (WarmupDecay(**setting)(steps).numpy() == np.float32(end_lr)).all()


@pytest.mark.parametrize('curve', DECAYING)
def test_the_last_step_reaches_the_floor(curve):
    """Published: the last step never reaches the floor."""
    for total in (16, 17, 100, 12345):
        # Those whose defaults do not fit into a decay of 4 steps.
        fitting = {'piecewise': {'boundaries': [13, 14, 15]}, 'trapezoid': {'cooldown': 3}}.get(
            curve, {}
        )
        setting = SETTING | {'curve': curve, 'total_steps': total} | fitting
        assert learning_rate(total, **setting) == 0.002
        assert float(WarmupDecay(**setting)(total)) == np.float32(0.002)


def test_the_cosine_comes_to_the_floor_smoothly():
    rates = learning_rate(
        np.arange(1001), warmup_steps=50, total_steps=1000, target_lr=0.1, end_lr=0.01
    )
    assert 0 < rates[999] - rates[1000] < 1e-6


def test_schedule_counts_updates_and_not_accumulated_batches():
    """Published: micro-steps are counted instead of updates, as Keras optimizers call their
    schedule with those.
    """
    schedule = WarmupCosineDecay(0.01, 0.1, 2, 8, 1, 0.005, gradient_accumulation_steps=3)
    expected = lr_warmup_cosine_decay(np.arange(10), 2, 1, 8, 0.01, 0.1, 0.005)
    np.testing.assert_allclose(schedule(np.arange(30)), np.repeat(expected, 3), rtol=1e-6)
    weight = keras.Variable(0.0)
    optimizer = keras.optimizers.SGD(schedule, gradient_accumulation_steps=3)
    optimizer.build([weight])
    places = [0.0]
    for batch in range(30):
        optimizer.apply([tf.constant(-1.0)], [weight])
        if batch % 3 == 2:
            places.append(float(weight))
    np.testing.assert_allclose(np.diff(places), expected, rtol=1e-5)
    without = WarmupCosineDecay(0.01, 0.1, 2, 8, gradient_accumulation_steps=None)
    assert without.get_config()['gradient_accumulation_steps'] == 1


@pytest.mark.parametrize('curve', schedules.CURVES)
def test_a_start_lr_above_zero_wastes_no_first_update(curve):
    """Published: the first update has rate 0."""
    setting = setting_of(curve) | {'start_lr': 0.01}
    assert learning_rate(0, **setting) == 0.01
    weight = keras.Variable(0.0)
    optimizer = keras.optimizers.SGD(WarmupDecay(**setting))
    optimizer.build([weight])
    optimizer.apply([tf.constant(-1.0)], [weight])
    assert float(weight) == pytest.approx(0.01)


def test_a_resumed_model_keeps_its_curve_for_any_epochs(tmp_path):
    """Published: changing the number of epochs on resume silently moves the whole curve."""
    data = np.ones((4, 2)), np.ones((4, 1))
    model = tiny_model(WarmupCosineDecay(0.01, 0.1, 2, 8))
    model.fit(*data, batch_size=1, epochs=1, verbose=0)
    planned = model.optimizer._learning_rate(np.arange(20)).numpy()
    model.save(tmp_path / 'model.keras')
    resumed = keras.models.load_model(tmp_path / 'model.keras')
    resumed.fit(*data, batch_size=1, initial_epoch=1, epochs=4, verbose=0)
    assert int(resumed.optimizer.iterations) == 16
    assert resumed.optimizer._learning_rate.get_config()['total_steps'] == 8
    np.testing.assert_array_equal(resumed.optimizer._learning_rate(np.arange(20)), planned)
    assert float(resumed.optimizer.learning_rate) == 0.0


# ---- True of any arguments


@st.composite
def settings(draw, curves=tuple(schedules.CURVES), longest=10**12):
    """Arguments of `learning_rate` that it must accept, from one step to `longest`."""
    curve = draw(st.sampled_from(curves))
    total = draw(st.one_of(st.integers(1, 200), st.integers(1, longest)))
    warmup = draw(st.integers(0, total))
    hold = draw(st.integers(0, total - warmup))
    left = total - warmup - hold
    target = draw(st.floats(1e-5, 10.0))
    end = target * draw(st.floats(0.0, 1.0))
    arguments = {
        'constant': lambda: {'end_lr': 0.0},
        'polynomial': lambda: {'power': draw(st.floats(0.25, 4.0))},
        'exponential': lambda: {'decay': draw(st.floats(1e-3, 1.0))},
        'piecewise': lambda: {
            'boundaries': sorted(total - draw(st.integers(0, max(0, left - 1))) for _ in range(2)),
            'factors': [draw(st.floats(0.0, 1.0)) for _ in range(2)],
        },
        'triangular': lambda: {
            'cycles': draw(st.integers(1, 9)),
            'cycle_decay': draw(st.floats(0.1, 1.0)),
        },
        'cosine_restarts': lambda: {
            'cycles': draw(st.integers(1, max(1, min(9, left)))),
            'cycle_decay': draw(st.floats(0.1, 1.0)),
        },
        'rsqrt': lambda: {'timescale': draw(st.one_of(st.none(), st.integers(1, 10**6)))},
        'trapezoid': lambda: {
            'cooldown': draw(st.integers(0, left)),
            'cooldown_power': draw(st.floats(0.25, 2.0)),
        },
    }.get(curve, dict)()
    return {
        'curve': curve,
        'warmup_steps': warmup,
        'hold': hold,
        'total_steps': total,
        'start_lr': draw(st.floats(0.0, 10.0)),
        'target_lr': target,
        'end_lr': end,
    } | arguments


def steps_of(setting):
    """Some 200 steps over the whole run, all that are near its corners, and some far past its
    end.
    """
    corners = [
        0,
        setting['warmup_steps'],
        setting['warmup_steps'] + setting['hold'],
        setting['total_steps'],
    ]
    near = [corner + offset for corner in corners for offset in range(-2, 3)]
    even = np.linspace(0, setting['total_steps'], 200).astype(np.int64)
    return np.unique(
        np.clip(np.concatenate([even, near, [2 * corners[-1], 10**13]]), 0, None)
    ).astype(np.int64)


@hypothesis.given(settings())
@hypothesis.settings(deadline=None, max_examples=150)
def test_the_rate_is_finite_and_between_its_three_rates(setting):
    rates = learning_rate(steps_of(setting), **setting)
    bounds = [setting[name] for name in ('start_lr', 'target_lr', 'end_lr')]
    assert np.isfinite(rates).all()
    assert min(bounds) * (1 - 1e-12) <= rates.min() and rates.max() <= max(bounds) * (1 + 1e-12)


@hypothesis.given(settings())
@hypothesis.settings(deadline=None, max_examples=60)
def test_tensors_agree_with_numpy(setting):
    steps = steps_of(setting)
    rates = learning_rate(steps, **setting)
    np.testing.assert_allclose(
        WarmupDecay(**setting)(steps), rates, rtol=1e-5, atol=2e-7 * rates.max()
    )


@hypothesis.given(settings(curves=DECAYING))
@hypothesis.settings(deadline=None, max_examples=100)
def test_the_rate_is_end_lr_from_the_last_step_on(setting):
    hypothesis.assume(setting['warmup_steps'] + setting['hold'] < setting['total_steps'])
    assert learning_rate(setting['total_steps'], **setting) == setting['end_lr']
    assert learning_rate(10**13, **setting) == setting['end_lr']


@hypothesis.given(settings())
@hypothesis.settings(deadline=None, max_examples=100)
def test_warmup_goes_only_one_way_and_in_equal_steps(setting):
    warmup = setting['warmup_steps']
    hypothesis.assume(warmup > 0)
    steps = np.unique(np.linspace(0, warmup, 100).astype(np.int64))
    rates = learning_rate(steps, **setting)
    rise = setting['target_lr'] - setting['start_lr']
    assert (np.diff(rates) * np.sign(rise) >= 0).all()
    scale = max(setting['target_lr'], setting['start_lr'])
    np.testing.assert_allclose(
        rates, setting['start_lr'] + rise * (steps / warmup), rtol=1e-9, atol=1e-12 * scale
    )


@hypothesis.given(
    settings(
        curves=['cosine', 'linear', 'polynomial', 'exponential', 'rsqrt', 'trapezoid', 'constant']
    )
)
@hypothesis.settings(deadline=None, max_examples=150)
def test_after_warmup_the_rate_never_rises(setting):
    steps = steps_of(setting)
    rates = learning_rate(steps[steps >= setting['warmup_steps']], **setting)
    assert (np.diff(rates) <= 1e-12 * setting['target_lr']).all()


@hypothesis.given(settings(curves=['cosine']))
@hypothesis.settings(deadline=None, max_examples=150)
def test_no_cosine_step_exceeds_its_steepest_slope(setting):
    corners = [
        setting['warmup_steps'],
        setting['warmup_steps'] + setting['hold'],
        setting['total_steps'],
    ]
    left = setting['total_steps'] - corners[1]
    warming = abs(setting['target_lr'] - setting['start_lr']) / max(1, setting['warmup_steps'])
    cooling = (setting['target_lr'] - setting['end_lr']) * (math.pi / 2 / left if left else 1.0)
    for corner in corners:
        steps = np.arange(max(0, corner - 3), corner + 4)
        changes = np.abs(np.diff(learning_rate(steps, **setting)))
        assert changes.max() <= max(warming, cooling) * (1 + 1e-9) + 1e-14


# ---- Mistakes are answered in one line that says what to write


MISTAKES = [
    ({'warmup_steps': -1}, 'warmup_steps=-1: write a whole number, 0 or more'),
    ({'warmup_steps': 2.5}, 'warmup_steps=2.5: write a whole number'),
    ({'warmup_steps': '5'}, "warmup_steps='5': write a whole number"),
    ({'warmup_steps': math.nan}, 'warmup_steps=nan: write a whole number'),
    ({'hold': -3}, 'hold=-3: write a whole number'),
    ({'hold': True}, 'hold=True: write a whole number'),
    ({'total_steps': 0, 'warmup_steps': 0}, 'total_steps=0: write a whole number, 1 or more'),
    ({'total_steps': math.inf}, 'total_steps=inf: write a whole number'),
    ({'total_steps': 19}, 'warmup_steps=10 and hold=10 exceed total_steps=19'),
    ({'start_lr': -0.1}, 'start_lr=-0.1: write a number, 0 or more'),
    ({'target_lr': math.nan}, 'target_lr=nan: write a number'),
    ({'target_lr': math.inf}, 'target_lr=inf: write a number'),
    ({'target_lr': None}, 'target_lr=None: write a number'),
    ({'target_lr': '0.1'}, "target_lr='0.1': write a number"),
    ({'end_lr': -1e-9}, 'end_lr=-1e-09: write a number'),
    ({'end_lr': 0.5}, 'end_lr=0.5 is above target_lr=0.1'),
]
CURVE_MISTAKES = [
    ({'curve': 'cosin'}, "there is no curve 'cosin': did you mean 'cosine'?"),
    ({'curve': 'wsd'}, "there is no curve 'wsd': write one of cosine, constant, linear"),
    (
        {'curve': 'polynomial', 'powr': 2},
        "curve 'polynomial' has no argument 'powr': did you mean 'power'?",
    ),
    ({'warmup': 5}, "curve 'cosine' has no argument 'warmup': did you mean 'warmup_steps'?"),
    ({'curve': 'linear', 'decay': 0.1}, "curve 'linear' has no argument 'decay'"),
    ({'curve': 'polynomial', 'power': -1}, 'power=-1: write a number, 0 or more'),
    ({'curve': 'exponential', 'decay': 1.5}, 'decay=1.5: write a number, from 0 to 1'),
    ({'curve': 'constant', 'end_lr': 0.05}, 'end_lr=0.05 would never be used'),
    (
        {'curve': 'piecewise', 'boundaries': [50], 'factors': [0.1, 0.2]},
        '1 boundaries but 2 factors',
    ),
    (
        {'curve': 'piecewise', 'boundaries': [60, 50], 'factors': [0.1, 0.2]},
        'write them in increasing order',
    ),
    ({'curve': 'piecewise', 'boundaries': [0.1], 'factors': [0.1]}, 'after warmup and hold (20)'),
    ({'curve': 'piecewise', 'boundaries': [101], 'factors': [0.1]}, 'up to total_steps (100)'),
    (
        {'curve': 'piecewise', 'boundaries': [50], 'factors': [1.2]},
        'factors=1.2: write a number, from 0 to 1',
    ),
    (
        {'curve': 'piecewise', 'boundaries': [30.5], 'factors': [0.1]},
        'boundaries=30.5: write a whole number',
    ),
    ({'curve': 'triangular', 'cycles': 0}, 'cycles=0: write a whole number, 1 or more'),
    (
        {'curve': 'cosine_restarts', 'cycles': 81},
        'cycles=81 with cycle_mul=1 leaves a cycle without a step',
    ),
    ({'curve': 'cosine_restarts', 'cycles': 5000, 'cycle_mul': 3.0}, 'write fewer cycles'),
    ({'curve': 'rsqrt', 'timescale': 0}, 'timescale=0: write a whole number, 1 or more'),
    ({'curve': 'trapezoid', 'cooldown': 81}, 'cooldown=81 is 81 steps, but 80 are left'),
    ({'curve': 'trapezoid', 'cooldown': -0.2}, 'cooldown=-0.2: write a number, 0 or more'),
]
RIGHT = {'warmup_steps': 10, 'hold': 10, 'total_steps': 100, 'target_lr': 0.1}


@pytest.mark.parametrize(('mistake', 'answer'), MISTAKES + CURVE_MISTAKES, ids=str)
def test_an_impossible_argument_is_one_line(mistake, answer):
    for make in (
        WarmupDecay,
        lambda **arguments: learning_rate(0, **arguments),
        lambda **arguments: learning_rate(tf.constant(0), **arguments),
    ):
        with pytest.raises(ValueError) as error:
            make(**RIGHT | mistake)
        assert answer in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(('mistake', 'answer'), MISTAKES, ids=str)
def test_aliases_and_callback_refuse_the_same_arguments(mistake, answer):
    arguments = RIGHT | {'start_lr': 0.0} | mistake
    for make in (
        WarmupCosineDecay,
        lambda **arguments: lr_warmup_cosine_decay(0, **arguments),
        schedules.WarmupCosineDecayCallback,
    ):
        with pytest.raises(ValueError) as error:
            make(**arguments)
        assert answer in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('step', [-1, 2.5, math.nan, math.inf, 'ten', None, [0, 1, -2], [0.0, 0.5]])
def test_an_impossible_step_is_answered_in_one_line(step):
    with pytest.raises(ValueError, match='write whole numbers, 0 or more'):
        learning_rate(step, **RIGHT)


def test_a_negative_step_in_a_tensor_counts_as_zero():
    assert float(learning_rate(tf.constant(-5), **RIGHT | {'start_lr': 0.02})) == np.float32(0.02)


@pytest.mark.parametrize('count', [0, -1, 1.5])
def test_an_impossible_gradient_accumulation_is_one_line(count):
    with pytest.raises(
        ValueError, match='gradient_accumulation_steps=.*: write a whole number, 1 or more'
    ):
        WarmupCosineDecay(0.0, 0.1, 10, 100, gradient_accumulation_steps=count)


def test_whole_numbers_may_be_of_any_type():
    rates = [
        learning_rate(
            np.float64(5.0),
            warmup_steps=np.int32(10),
            hold=10.0,
            total_steps=np.float64(100),
            target_lr=0.1,
        ),
        learning_rate(5, **RIGHT),
    ]
    assert rates[0] == rates[1] == 0.05


def scalars(number):
    """A whole number in every type in which it may come."""
    return [
        number,
        float(number),
        np.int64(number),
        np.uint8(number),
        np.float32(number),
        np.array(number),
        np.array(float(number)),
        tf.constant(number, tf.int64),
        tf.constant(number, tf.int32),
        tf.constant(float(number)),
        tf.constant(float(number), tf.bfloat16),
        tf.Variable(number),
        keras.Variable(number, dtype='int64'),
        keras.Variable(float(number)),
        keras.ops.convert_to_tensor(number),
    ]


def test_scalar_tensors_arrays_and_variables_are_numbers():
    for ten, one in zip(scalars(10), scalars(1), strict=True):
        arguments = {
            'warmup_steps': ten,
            'hold': ten,
            'total_steps': 10 * one * 10,
            'target_lr': one,
            'start_lr': one,
            'end_lr': one,
            'gradient_accumulation_steps': one,
            'curve': 'piecewise',
            'boundaries': [5 * ten, 0.75],
            'factors': [one, tf.constant(0.5, tf.float64)],
        }
        config = WarmupDecay(**arguments).get_config()
        assert config == {
            'warmup_steps': 10,
            'hold': 10,
            'total_steps': 100,
            'target_lr': 1.0,
            'start_lr': 1.0,
            'end_lr': 1.0,
            'gradient_accumulation_steps': 1,
            'curve': 'piecewise',
            'boundaries': [50, 0.75],
            'factors': [1, 0.5],
        }
        assert json.loads(json.dumps(config)) == config
    for curve, argument in [
        ('triangular', 'cycles'),
        ('cosine_restarts', 'cycles'),
        ('rsqrt', 'timescale'),
        ('trapezoid', 'cooldown'),
        ('polynomial', 'power'),
        ('cosine_restarts', 'cycle_mul'),
    ]:
        for one in scalars(1):
            config = WarmupDecay(**RIGHT, curve=curve, **{argument: one}).get_config()
            assert config[argument] == 1 and type(config[argument]) in (int, float)


def test_the_cardinality_of_a_data_set_is_a_number_of_steps():
    ds = tf.data.Dataset.range(20).batch(4)
    epochs = 3
    schedule = WarmupCosineDecay(
        0.0, 0.1, ds.cardinality(), ds.cardinality() * epochs, hold=ds.cardinality() // 5
    )
    assert [schedule.get_config()[name] for name in ('warmup_steps', 'total_steps', 'hold')] == [
        5,
        15,
        1,
    ]
    rates = lr_warmup_cosine_decay(np.arange(16), ds.cardinality(), 0, ds.cardinality() * epochs)
    np.testing.assert_array_equal(rates, lr_warmup_cosine_decay(np.arange(16), 5, 0, 15))
    schedules.WarmupCosineDecayCallback(0.0, 0.1, np.array(5), ds.cardinality())
    schedules.WarmupCosineDecayCallback(0.0, 0.1, ds.cardinality())


@pytest.mark.parametrize(
    'ds',
    [tf.data.Dataset.range(4).repeat(), tf.data.Dataset.range(4).filter(lambda x: x > 1)],
    ids=['infinite', 'unknown'],
)
@pytest.mark.parametrize(
    'convert',
    [lambda steps: steps, int, lambda steps: steps * 10, lambda steps: steps.numpy()],
    ids=['tensor', 'int', 'product', 'numpy'],
)
def test_a_negative_cardinality_is_answered_with_what_to_write(ds, convert):
    steps = convert(ds.cardinality())
    for make in (WarmupCosineDecay, schedules.WarmupCosineDecayCallback):
        for name in ('total_steps', 'warmup_steps', 'hold'):
            with pytest.raises(ValueError) as error:
                make(
                    **{'start_lr': 0.0, 'target_lr': 0.1, 'warmup_steps': 0, 'total_steps': 100}
                    | {name: steps}
                )
            assert str(error.value).startswith(f'{name}={int(steps)}: write a whole number')
            assert str(error.value).endswith('write steps_per_epoch * epochs')
            assert '\n' not in str(error.value)
    with pytest.raises(ValueError) as error:
        WarmupCosineDecay(0.0, 0.1, 0, 100, gradient_accumulation_steps=-1)
    assert 'cardinality' not in str(error.value)


@pytest.mark.parametrize(
    ('value', 'shown'),
    [
        (np.array([100]), '[100]'),
        (tf.constant([100]), '[100]'),
        (np.ones((2, 2)), '[[1.0, 1.0], [1.0, 1.0]]'),
        (np.arange(1000), '[0, 1, 2, 3, 4, 5, ...]'),
        (tf.constant('5'), "b'5'"),
        (tf.constant(True), 'True'),
        (np.bool_(True), 'True'),
        (tf.constant(math.nan), 'nan'),
    ],
    ids=['array of one', 'tensor of one', 'matrix', 'long', 'string', 'bool tensor', 'bool', 'nan'],
)
def test_what_is_not_one_number_is_answered_in_one_line(value, shown):
    for name in ('total_steps', 'target_lr'):
        with pytest.raises(ValueError) as error:
            WarmupDecay(**RIGHT | {name: value})
        assert f'{name}={shown}: write a' in str(error.value) and '\n' not in str(error.value)


def test_a_symbolic_tensor_is_answered_in_one_line():
    def answer(**wrong):
        with pytest.raises(ValueError) as error:
            WarmupDecay(**RIGHT | wrong)
        assert '\n' not in str(error.value)
        return str(error.value)

    variable = tf.Variable(100)

    @tf.function
    def trace(number):
        for value in (number, variable, variable + 1):
            for name in ('total_steps', 'warmup_steps', 'target_lr', 'gradient_accumulation_steps'):
                expected = f'{name} is a symbolic tensor, which has no value yet: write a number'
                assert answer(**{name: value}) == expected
        assert answer(curve='piecewise', boundaries=[number]).startswith(
            'boundaries is a symbolic tensor'
        )

    trace(tf.constant(100))
    assert answer(total_steps=keras.Input(())).startswith('total_steps is a symbolic tensor')


def test_arguments_of_curves_may_be_any_sequence():
    for boundaries in (
        [30, 60],
        (30, 60),
        range(30, 61, 30),
        np.array([30, 60]),
        tf.constant([30, 60]),
    ):
        config = WarmupDecay(
            **RIGHT, curve='piecewise', boundaries=boundaries, factors=(0.5, 0.1)
        ).get_config()
        assert (config['boundaries'], config['factors']) == ([30, 60], [0.5, 0.1])
