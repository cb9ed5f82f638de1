"""The layers that stand in for Keras' compute what Keras' do: outputs, gradients and moving
statistics, to the rounding.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from modeling import models, pretrained
from modeling.fused_layers import (
    BatchNormalization,
    DepthwiseConv2D,
    SqueezeExcite,
    use_kernels,
)
from tests.modeling.test_models import config_for

SIZE = 32


def pair(name, policy, **settings):
    """(our model without dropout, the backbone of keras.applications with the same weights, its
    preprocessing).
    """
    keras.config.set_dtype_policy(policy)
    model = models.build_model(config_for(name, SIZE, dropout=0.0, **settings), 3)
    constructor, preprocess = models.find_application(name)
    plain = constructor(include_top=False, weights=None, input_shape=(SIZE, SIZE, 3), pooling='avg')
    for layer in plain._flatten_layers():
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    random = np.random.RandomState(0)
    for ours, theirs in zip(
        models.float_variables(model),
        models.float_variables(plain),
        strict=False,  # plain has no head
    ):
        value = (
            random.rand(*ours.shape) + 0.5
            if 'variance' in ours.path or 'gamma' in ours.path
            else random.randn(*ours.shape) * 0.1
        )
        ours.assign(value)
        theirs.assign(value)
    return model, plain, preprocess


def trained_once(model, plain, preprocess):
    """(outputs, gradients, weights with the moving statistics), of ours and of Keras', each a
    float64 array.
    """
    images = np.random.RandomState(1).randint(0, 256, (8, SIZE, SIZE, 3)).astype('float32')
    head = [
        tf.cast(variable.value, plain.compute_dtype)
        for variable in models.float_variables(model)[-2:]
    ]
    results = []
    for network, forward in (
        (model, lambda: model(images, training=True)),
        (plain, lambda: plain(preprocess(tf.constant(images)), training=True) @ head[0] + head[1]),
    ):
        trained = [variable.value for variable in network.trainable_variables][
            : len(plain.trainable_variables)
        ]
        with tf.GradientTape() as tape:
            outputs = tf.cast(forward(), tf.float64)
            loss = tf.reduce_sum(
                tf.nn.softmax_cross_entropy_with_logits(
                    tf.one_hot(np.arange(8) % 3, 3, dtype=tf.float64), outputs
                )
            )
        gradients = [
            tf.cast(gradient, tf.float64).numpy() for gradient in tape.gradient(loss, trained)
        ]
        statistics = [
            variable.numpy().astype('float64')
            for variable in models.float_variables(network)[: len(models.float_variables(plain))]
        ]
        results.append((outputs.numpy(), gradients, statistics))
    return results


def distance(one, other):
    """The relative distance of two lists of arrays."""
    return np.sqrt(
        sum(np.square(our - their).sum() for our, their in zip(one, other, strict=True))
        / sum(np.square(their).sum() for their in other)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, gates',
    [('EfficientNetV2B0', 16), ('EfficientNetB0', 16), ('ResNet50', 0), ('MobileNetV2', 0)],
)
def test_a_fused_model_trains_as_the_one_of_keras_applications(name, gates):
    model, plain, preprocess = pair(name, 'float64')
    layers = list(model._flatten_layers())
    assert sum(isinstance(layer, SqueezeExcite) for layer in layers) == gates
    normalisations = [
        layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)
    ]
    assert len(normalisations) > 20 and all(
        isinstance(layer, BatchNormalization) for layer in normalisations
    )
    ours, theirs = trained_once(model, plain, preprocess)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-8, atol=1e-10)
    largest = max(np.abs(gradient).max() for gradient in theirs[1])
    for our, their in zip(ours[1] + ours[2], theirs[1] + theirs[2], strict=True):
        np.testing.assert_allclose(our, their, rtol=1e-7, atol=1e-9 * largest)


@pytest.mark.slow
def test_a_fused_bfloat16_model_is_as_exact_as_keras():
    exact = trained_once(*pair('EfficientNetV2B0', 'float64'))[1]
    ours, theirs = trained_once(*pair('EfficientNetV2B0', 'mixed_bfloat16'))
    for part in (0, 1):
        assert distance(ours[part], exact[part]) < 1.2 * distance(theirs[part], exact[part])
        assert distance(theirs[part], exact[part]) > 1e-3  # it is rounded


@pytest.mark.slow
@pytest.mark.parametrize('policy', ['float32', 'mixed_bfloat16'])
def test_a_model_that_uses_kernels_is_as_exact_as_keras(policy):
    exact = trained_once(*pair('EfficientNetV2B0', 'float64'))[1]
    model, plain, preprocess = pair('EfficientNetV2B0', policy)
    use_kernels(model, True)
    ours, theirs = trained_once(model, plain, preprocess)
    for part in (0, 1):
        assert distance(ours[part], exact[part]) < 1.2 * distance(theirs[part], exact[part])


def of_one_step(layer, inputs):
    """[output, gradients of input and weights, moving statistics] of `layer` in training."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        output = layer(inputs, training=True)
        loss = tf.reduce_sum(tf.sin(output))
    weights = [variable.value for variable in layer.trainable_variables]
    moving = [variable.value.numpy() for variable in layer.non_trainable_variables]
    return [output, *tape.gradient(loss, [inputs, *weights]), *moving]


@pytest.mark.parametrize('shape', [(8, 5, 4, 3), (7, 1, 1, 3), (1, 1, 1, 3)])
@pytest.mark.parametrize('activation', ['linear', 'relu', 'silu'])
def test_kernels_normalise_as_the_passes_do(activation, shape):
    inputs = tf.constant(np.random.RandomState(0).randn(*shape).astype('float32')) + 2
    results = []
    for uses in (False, True):
        layer = BatchNormalization(activation=activation, momentum=0.5)
        layer.build(shape)
        layer.gamma.assign([0.5, 1.0, 2.0])
        layer.uses_kernels = uses
        results.append(of_one_step(layer, inputs))
    for passes, kernels in zip(*results, strict=True):
        np.testing.assert_allclose(kernels, passes, rtol=1e-4, atol=1e-4)


def test_kernels_squeeze_and_excite_as_the_passes_do():
    inputs = tf.constant(np.random.RandomState(0).randn(8, 5, 4, 6).astype('float32'))
    results, weights = [], None
    for uses in (False, True):
        layer = SqueezeExcite(
            BatchNormalization(activation='silu'),
            keras.layers.Conv2D(2, 1, activation='silu'),
            keras.layers.Conv2D(6, 1, activation='sigmoid'),
        )
        layer.build(inputs.shape)
        weights = weights or layer.get_weights()
        layer.set_weights(weights)
        layer.uses_kernels = layer.normalization.uses_kernels = uses
        results.append(of_one_step(layer, inputs))
    for passes, kernels in zip(*results, strict=True):
        np.testing.assert_allclose(kernels, passes, rtol=1e-4, atol=1e-4)


FEW = [
    (shape, kernel, strides, padding)
    for shape in ((1, 1), (1, 2), (2, 2), (4, 1), (1, 3))
    for kernel in (1, 2, 3, 5)
    for strides in (1, 2)
    for padding in ('same', 'valid')
    if padding == 'same' or kernel <= min(shape)
]


@pytest.mark.parametrize('shape, kernel, strides, padding', FEW)
def test_few_pixels_have_the_gradient_of_keras(shape, kernel, strides, padding):
    inputs = tf.constant(np.random.RandomState(0).randn(3, *shape, 4), tf.float64)
    keras.config.set_dtype_policy('float64')
    ours = DepthwiseConv2D(kernel, strides, padding, use_bias=False)
    theirs = keras.layers.DepthwiseConv2D(kernel, strides, padding, use_bias=False)
    for layer in (ours, theirs):
        layer.build(inputs.shape)
        layer.kernel.assign(np.random.RandomState(1).randn(*layer.kernel.shape))
    ours.uses_kernels = True
    for our, their in zip(of_one_step(ours, inputs), of_one_step(theirs, inputs), strict=True):
        np.testing.assert_allclose(our, their, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    'activation, theirs',
    [
        ('linear', keras.layers.Identity()),
        ('relu', keras.layers.ReLU()),
        ('silu', keras.layers.Activation('silu')),
    ],
)
def test_statistics_are_right_where_the_mean_is_far_from_zero(activation, theirs):
    inputs = (1e4 + np.random.RandomState(0).randn(512, 4)).astype('float32')
    ours = BatchNormalization(activation=activation, momentum=0.5)
    plain = keras.layers.BatchNormalization(momentum=0.5)
    for _ in range(30):  # the moving mean comes near
        ours(inputs, training=True)
    np.testing.assert_allclose(
        ours(inputs, training=True),
        theirs(plain(inputs.astype('float64'), training=True)),
        atol=2e-2,
    )
    np.testing.assert_allclose(ours.moving_variance, inputs.astype('float64').var(0), rtol=1e-3)


@pytest.mark.slow
def test_a_trained_backbone_fits_keras_applications(tmp_path):
    model, plain, _ = pair('EfficientNetV2B0', 'float32')
    path = str(tmp_path / 'backbone.weights.h5')
    pretrained.save_backbone(model, config_for('EfficientNetV2B0', SIZE), path)
    again = keras.applications.EfficientNetV2B0(
        include_top=False, weights=path, input_shape=(SIZE, SIZE, 3), pooling='avg'
    )
    for variable, saved in zip(
        models.float_variables(again),
        models.float_variables(plain),
        strict=False,  # plain has no head
    ):
        np.testing.assert_array_equal(variable, saved)
    config = config_for('EfficientNetV2B0', SIZE, weights=path)
    new = models.build_model(config, 3)
    pretrained.load_weights(new, config, [], None)
    for variable, saved in zip(
        models.float_variables(new),
        models.float_variables(plain),
        strict=False,  # plain has no head
    ):
        np.testing.assert_array_equal(variable, saved)


@pytest.mark.parametrize('policy', ['mixed_bfloat16', 'mixed_float16', 'float32', 'float64'])
def test_outputs_have_the_policys_dtype_for_any_input(policy):
    keras.config.set_dtype_policy(policy)
    layer = SqueezeExcite(
        BatchNormalization(activation='silu'),
        keras.layers.Conv2D(4, 1, activation='silu'),
        keras.layers.Conv2D(8, 1, activation='sigmoid'),
    )
    for training in (True, False):
        assert (
            layer(tf.ones([2, 3, 3, 8], tf.float32), training=training).dtype == layer.compute_dtype
        )


@pytest.mark.slow
def test_a_model_can_be_cloned():
    model = models.build_model(config_for('EfficientNetV2B0', drop_path=0.2), 10)
    cloned = keras.models.clone_model(model)
    cloned.set_weights(model.get_weights())
    images = np.random.RandomState(0).randint(0, 256, (2, 32, 32, 3)).astype('float32')
    np.testing.assert_array_equal(cloned(images, training=False), model(images, training=False))
