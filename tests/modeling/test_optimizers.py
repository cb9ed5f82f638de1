"""An update in one of TensorFlow's operations is Keras' own."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from modeling import optimizers


def after_seven_updates(optimizer, is_alone=False):
    """All variables, one vector, from the same start and with the same gradients."""
    random = np.random.RandomState(0)
    variables = [keras.Variable(random.randn(*shape)) for shape in ((3, 4), (5,))]
    optimizer.exclude_from_weight_decay(var_list=variables[1:])
    optimizer.build(variables)

    @tf.function(autograph=False)
    def step(gradients):
        if is_alone:
            optimizer.apply_alone(gradients, variables, tf.constant(0.1, tf.float64))
        else:
            optimizer.apply(gradients, variables)

    for _ in range(7):
        step([tf.constant(random.randn(*variable.shape)) for variable in variables])
    values = [variable.numpy().ravel() for variable in (*variables, *optimizer.variables)]
    return np.concatenate(values)


@pytest.mark.parametrize(
    'name, theirs, arguments',
    [
        ('sgd', keras.optimizers.SGD, {}),
        ('sgd', keras.optimizers.SGD, {'momentum': 0.9}),
        ('sgd', keras.optimizers.SGD, {'momentum': 0.9, 'nesterov': True, 'weight_decay': 0.1}),
        ('rmsprop', keras.optimizers.RMSprop, {}),
        ('rmsprop', keras.optimizers.RMSprop, {'momentum': 0.9, 'rho': 0.8, 'epsilon': 1e-3}),
        ('rmsprop', keras.optimizers.RMSprop, {'momentum': 0.9, 'centered': True}),
        ('adam', keras.optimizers.Adam, {'beta_2': 0.9, 'epsilon': 1e-3}),
        ('adam', keras.optimizers.Adam, {'amsgrad': True}),
        ('adamw', keras.optimizers.AdamW, {'weight_decay': 0.1}),
    ],
)
def test_fused_updates_are_those_of_keras(float64, name, theirs, arguments):
    ours = after_seven_updates(optimizers.OPTIMIZERS[name](learning_rate=0.1, **arguments))
    expected = after_seven_updates(theirs(learning_rate=0.1, **arguments))
    np.testing.assert_allclose(ours, expected, rtol=1e-14, atol=1e-15)
    optimizer = optimizers.OPTIMIZERS[name](learning_rate=0.1, **arguments)
    if optimizer.is_fused:
        alone = after_seven_updates(optimizer, is_alone=True)
        np.testing.assert_allclose(alone, expected, rtol=1e-13, atol=1e-14)


@pytest.fixture
def float64():
    keras.config.set_floatx('float64')
    yield
    keras.config.set_floatx('float32')
