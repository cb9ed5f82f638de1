"""The network is keras.applications' own, with drop-path, dropout and batch normalisation as the
config asks.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from common.errors import ConfigError
from configs import default
from modeling import models
from tests.conftest import refused


def config_for(name, image_size=32, **values):
    config = default.get_config()
    config.model.name, config.image_size = name, image_size
    for key, value in values.items():
        config.model[key] = value
    return config


def dropouts(model):
    """The rates in the order of the data's way."""
    parts = [layer.layers if isinstance(layer, keras.Model) else [layer] for layer in model.layers]
    return [
        layer.rate for part in parts for layer in part if isinstance(layer, keras.layers.Dropout)
    ]


@pytest.mark.slow
def test_efficientnetv2b0_answers_as_keras_own_does():
    model = models.build_model(config_for('EfficientNetV2B0', drop_path=0.2), 1000)
    theirs = keras.applications.EfficientNetV2B0(
        weights=None, input_shape=(32, 32, 3), classifier_activation=None
    )
    assert (
        model.count_params() == theirs.count_params() == 7_200_312
    )  # 7.1 million trained ones and the statistics
    random = np.random.RandomState(0)
    values = [
        random.rand(*variable.shape)
        if 'variance' in variable.path
        else random.randn(*variable.shape) * 0.05
        for variable in models.float_variables(theirs)
    ]
    for network in (theirs, model):
        for variable, value in zip(models.float_variables(network), values, strict=True):
            variable.assign(value)
    images = random.randint(0, 256, (4, 32, 32, 3)).astype('float32')
    np.testing.assert_allclose(
        model(images, training=False), theirs(images, training=False), rtol=1e-4, atol=1e-4
    )
    rates = dropouts(model)
    assert (
        rates == pytest.approx(dropouts(theirs))
        and rates[-1] == 0.2
        and rates[0] < 0.02 < rates[-2] < 0.2
    )


@pytest.mark.slow
def test_a_progressive_model_is_the_same_network_at_any_size():
    any_size = config_for('EfficientNetV2B0', image_size=64)
    any_size.progressive.stages = 2
    progressive = models.build_model(any_size, 10)
    fixed = models.build_model(config_for('EfficientNetV2B0', image_size=32), 10)
    for ours, theirs in zip(
        models.float_variables(progressive), models.float_variables(fixed), strict=True
    ):
        ours.assign(theirs)
    images = np.random.RandomState(0).randint(0, 256, (2, 32, 32, 3)).astype('float32')
    np.testing.assert_array_equal(
        progressive(images, training=False), fixed(images, training=False)
    )
    assert progressive(np.repeat(np.repeat(images, 2, 1), 2, 2), training=False).shape == (2, 10)


def test_drop_path_grows_to_what_the_config_says():
    rates = dropouts(
        models.build_model(config_for('EfficientNetV2B0', drop_path=0.1, dropout=0.4), 10)
    )
    assert rates[:-1] == sorted(rates[:-1]) and 0.09 < rates[-2] < 0.1 and rates[-1] == 0.4


@pytest.mark.parametrize('synchronized', [True, False])
@pytest.mark.parametrize('name', ['tiny', 'MobileNetV2'])
def test_batch_normalisation_is_synchronized_when_asked(name, synchronized):
    model = models.build_model(config_for(name, sync_batch_norm=synchronized), 10)
    layers = [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    assert layers and all(layer.synchronized == synchronized for layer in layers)


@pytest.mark.parametrize(
    'name, module',
    [('MobileNetV2', keras.applications.mobilenet_v2), ('ResNet50', keras.applications.resnet50)],
)
def test_preprocessing_is_inside_the_model(name, module):
    model = models.build_model(config_for(name), 10)
    images = np.random.RandomState(0).randint(0, 256, (2, 32, 32, 3)).astype('float32')
    backbone = next(layer for layer in model.layers if isinstance(layer, keras.Model))
    outside = model.get_layer('predictions')(
        backbone(module.preprocess_input(images.copy()), training=False)
    )
    np.testing.assert_allclose(model(images, training=False), outside, rtol=1e-4, atol=1e-5)


def test_dropout_masks_differ_by_layer_update_and_replica():
    model = keras.Sequential(
        [keras.Input((50,)), keras.layers.Dropout(0.5), keras.layers.Dropout(0.5)]
    )
    strategy = tf.distribute.MirroredStrategy(
        ['CPU:0', 'CPU:1'], tf.distribute.ReductionToOneDevice()
    )
    with strategy.scope():
        updates = tf.Variable(
            0, dtype=tf.int64, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA
        )
    models.derive_dropout_seeds(model, 7, updates)
    first, second = model.layers

    @tf.function
    def masks():
        results = strategy.run(
            lambda: (
                first(tf.ones([1, 50]), training=True),
                second(tf.ones([1, 50]), training=True),
            )
        )
        return [strategy.experimental_local_results(result) for result in results]

    def drawn():
        return np.array(
            [[mask.numpy() for mask in replicas] for replicas in masks()]
        )  # [layer, replica, 1, 50]

    before = drawn()
    updates.assign(1)
    after = drawn()
    flat = [mask.tobytes() for mask in np.concatenate([before, after]).reshape(8, 50)]
    assert len(set(flat)) == 8
    updates.assign(0)
    np.testing.assert_array_equal(drawn(), before)


@pytest.mark.parametrize(
    'config, key, fix',
    [
        (config_for('EfficientNetV2B'), 'model.name', '--config.model.name=EfficientNetV2B'),
        (config_for('preprocess_input'), 'model.name', ''),
        (config_for('ResNet50', drop_path=0.1), 'model.drop_path', 'set it to 0'),
        (config_for('EfficientNetV2B0', image_size=16), 'image_size', ''),
        (config_for('tiny', drop_path=0.1), 'model.drop_path', '--config.model.drop_path=0'),
        (config_for('tiny', freeze='block3'), 'model.freeze', 'stem, block1, block2'),
    ],
)
def test_a_model_that_cannot_be_had_is_one_line(config, key, fix):
    with refused(ConfigError, key=key, fix=fix):
        models.build_model(config, 10)


def test_drop_path_drops_examples_at_layer_rates():
    model = keras.Sequential(
        [keras.Input((3, 2)), models.DropPath(0.25), models.DropPath(0.5), models.DropPath(0.0)]
    )
    models.derive_dropout_seeds(model, 7, tf.Variable(3))
    quarter, half, none = model.layers
    ones = tf.ones([20_000, 3, 2])
    kept = []
    for layer, scale in ((quarter, 4 / 3), (half, 2.0)):
        output = tf.function(layer)(ones, training=True).numpy().reshape(-1, 6)
        assert (output == output[:, :1]).all() and np.allclose(np.unique(output), [0, scale])
        np.testing.assert_allclose(output.mean(), 1, atol=4 * np.sqrt((scale - 1) / 20_000))
        kept.append(output[:, 0] > 0)
    assert abs(np.corrcoef(kept)[0, 1]) < 0.03  # a row of the draw for each layer
    np.testing.assert_array_equal(none(ones, training=True), ones)
    np.testing.assert_array_equal(half(ones, training=False), ones)
    np.testing.assert_array_equal(tf.function(half)(ones, training=True)[:, 0, 0] > 0, kept[1])


@pytest.mark.parametrize('jit_compile', [False, True])
@pytest.mark.parametrize('seed', [(0, 0), (12345, 7), (-5, 2**31 - 1)])
@pytest.mark.parametrize('shape', [[1], [3, 5], [1000, 77]])
def test_the_same_numbers_are_drawn_with_and_without_xla(shape, seed, jit_compile):
    """They are those of TensorFlow's kernel, bit for bit; XLA's own of this seed are others."""

    @tf.function(jit_compile=jit_compile)
    def drawn(seed):
        return models.stateless_uniform(shape, seed)

    expected = tf.random.stateless_uniform(shape, seed)
    np.testing.assert_array_equal(drawn(tf.constant(seed, tf.int32)), expected)


def test_dropout_in_float32_is_that_of_keras():
    ours, plain = models.Dropout(0.3, seed=1), keras.layers.Dropout(0.3, seed=1)
    for layer in (ours, plain):
        layer.seed_generator.next = lambda ordered=True: tf.constant([3, 4])
    values = tf.random.stateless_normal([64, 50], [0, 0])
    np.testing.assert_array_equal(ours(values, training=True), plain(values, training=True))
    np.testing.assert_array_equal(ours(values, training=False), values)


def test_branches_have_the_drop_rates_of_keras_applications():
    model = models.build_model(config_for('EfficientNetV2B0', drop_path=0.2), 10)
    models.derive_dropout_seeds(model, 7, tf.Variable(3))
    branches = [layer for layer in model._flatten_layers() if isinstance(layer, models.DropPath)]
    plain = keras.applications.EfficientNetV2B0(
        weights=None, include_top=False, input_shape=(32, 32, 3)
    )
    assert {layer.name: layer.rate for layer in branches} == {
        layer.name: layer.rate for layer in plain.layers if isinstance(layer, keras.layers.Dropout)
    }
    assert [layer.row for layer in branches] == list(range(15)) and {
        layer.num_rows for layer in branches
    } == {15}


def test_xla_makes_one_draw_of_those_of_all_branches():
    model = keras.Sequential([keras.Input((4,)), *(models.DropPath(0.5) for _ in range(3))])
    models.derive_dropout_seeds(model, 7, tf.Variable(3))

    def operations_for_random_bits(*layers):
        program = tf.function(
            lambda images: [layer(images, training=True) for layer in layers], jit_compile=True
        )
        return program.experimental_get_compiler_ir(tf.TensorSpec((8, 4)))('optimized_hlo').count(
            ' xor('
        )

    assert (
        0 < operations_for_random_bits(*model.layers) <= operations_for_random_bits(model.layers[0])
    )
