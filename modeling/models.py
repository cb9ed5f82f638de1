"""Keras models by name, with preprocessing inside: pictures in 0..255 go in, logits come out."""
import contextlib
import sys
import threading

import keras
import tensorflow as tf

from errors import ConfigError, RunError, did_you_mean, one_line
from modeling.batch_norm import SyncBatchNormalization

_traced = threading.local()  # the micro-batch that this thread traces; each replica is traced by a thread of its own
DEFAULT_DROP_RATE = 0.2  # what keras.applications builds its residual branches with


def build_model(config, num_classes):
    """The network of `config.model`, ending in global average pooling, dropout and a linear head.

    Args:
        config: the whole config: `model.*`, `image_size` and `progressive.stages` are used.
        num_classes: width of the head.

    Returns: a keras.Model, [batch, size, size, 3] in 0..255 -> logits [batch, num_classes], float32 (float64 under that
        policy). With `progressive.stages` it takes any size.

    Raises:
        ConfigError: no such model, or one that cannot be built so.
        RunError: its pretrained weights cannot be had.
    """
    size = config.image_size if config.progressive.stages == 1 else None
    shape = (size, size, 3)
    images = keras.Input(shape, name='images')
    if config.model.name == 'tiny':
        if config.model.weights or config.model.drop_path:
            raise ConfigError("config.model.name='tiny' has no pretrained weights and no drop-path: leave model.weights and model.drop_path at '' and 0")
        features = _tiny(config.model.sync_batch_norm)(images)
    else:
        features = _application(config.model, shape, images)
    dropped = keras.layers.Dropout(config.model.dropout, name='top_dropout')(features)
    policy = keras.config.dtype_policy()
    head_dtype = 'float64' if policy.compute_dtype == 'float64' else 'float32'  # never a half: the loss is computed from it
    logits = keras.layers.Dense(num_classes, dtype=head_dtype, name='predictions')(dropped)
    return keras.Model(images, logits, name=config.model.name)


def set_dropout(model, rate):
    """Changes the dropout before the head, for steps that are traced from now on."""
    model.get_layer('top_dropout').rate = rate


def derive_dropout_seeds(model, seed, updates):
    """Makes every mask a function of (seed, layer, update, micro-batch, replica) instead of a state that all replicas share.

    Keras' `SeedGenerator` holds the same state on each replica, so that masks would repeat across them, and it is not
    part of a `tf.train.Checkpoint`, so that a resumed run would draw other masks.

    Args:
        model: a keras.Model; changed in place.
        seed: int.
        updates: integer variable [] that counts updates.
    """
    layers = [layer for layer in model._flatten_layers() if isinstance(getattr(layer, 'seed_generator', None), keras.random.SeedGenerator)]
    for index, layer in enumerate(layers):
        def next_seed(ordered=True, key=(seed * 1_000_003 + index) % 2**31):
            context = tf.distribute.get_replica_context()
            index, count = getattr(_traced, 'micro_batch', (0, 1))
            draw = tf.cast(updates, tf.int32) * count + index
            draw = draw * context.num_replicas_in_sync + tf.cast(context.replica_id_in_sync_group, tf.int32)
            return tf.stack([tf.constant(key, tf.int32), draw])

        layer.seed_generator.next = next_seed


@contextlib.contextmanager
def micro_batch(index, count):
    """What is traced inside is the micro-batch `index` of `count`: it draws masks of its own."""
    _traced.micro_batch = index, count
    try:
        yield
    finally:
        _traced.micro_batch = 0, 1


def weights(model):
    """The variables of a model without the states of its random generators, which nothing here reads."""
    return [variable for variable in model.variables if variable.dtype in ('float16', 'bfloat16', 'float32', 'float64')]


def _tiny(sync_batch_norm):
    batch_norm = SyncBatchNormalization if sync_batch_norm else keras.layers.BatchNormalization
    layers = [keras.layers.Rescaling(1 / 127.5, offset=-1)]
    for filters in (16, 32):
        layers += [
            keras.layers.Conv2D(filters, 3, strides=2, padding='same', use_bias=False),
            batch_norm(momentum=0.9),
            keras.layers.ReLU(),
        ]
    return keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D()], name='features')


def _application(model_config, shape, images):
    constructors = {name for name in dir(keras.applications) if name[0].isupper()}
    if model_config.name not in constructors:
        hint = did_you_mean(model_config.name, sorted(constructors | {'tiny'}), cutoff=0.3) or '; take EfficientNetV2B0'
        raise ConfigError(f'config.model.name={model_config.name!r} is no model of keras.applications{hint}')
    constructor = getattr(keras.applications, model_config.name)
    try:
        plain = constructor(include_top=False, weights=model_config.weights or None, input_shape=shape, pooling='avg')
    except Exception as error:
        reason = one_line(error)
        if model_config.weights:
            raise RunError(f'config.model.weights={model_config.weights!r} could not be loaded into {model_config.name}: {reason}') from error
        raise ConfigError(f"{model_config.name} cannot be built for config.image_size={shape[0] or 'any'}: {reason}") from error
    features = keras.Model.from_config(_changed(plain.get_config(), model_config))
    if model_config.weights:
        for variable, value in zip(weights(features), weights(plain), strict=True):
            variable.assign(value)
    # The module of each family knows its own preprocessing; where that is part of the model it changes nothing.
    preprocess = sys.modules[constructor.__module__].preprocess_input
    return features(preprocess(images))


def _changed(model, model_config):
    """The Keras config of a model with drop-path and synchronized batch normalisation as ours asks for."""
    has_drop_path = False
    for layer in model['layers']:
        settings = layer['config']
        if layer['class_name'] == 'BatchNormalization' and model_config.sync_batch_norm:
            layer.update(keras.saving.serialize_keras_object(SyncBatchNormalization.from_config(settings)))
        elif layer['class_name'] == 'Dropout' and settings.get('noise_shape'):  # one draw per example: a residual branch
            settings['rate'] *= model_config.drop_path / DEFAULT_DROP_RATE  # keras.applications' rates grow linearly to 0.2
            has_drop_path = True
    if model_config.drop_path and not has_drop_path:
        raise ConfigError(f'config.model.drop_path={model_config.drop_path:g}, but {model_config.name} has no residual branches that drop: set it to 0')
    return model
