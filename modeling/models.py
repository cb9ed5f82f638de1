"""Keras models by name, with preprocessing inside: pictures in 0..255 go in, logits come out."""

import contextlib
import re
import sys
import threading

import keras
import tensorflow as tf

from common.errors import ConfigError, did_you_mean, one_line
from modeling.fused_layers import BatchNormalization, fuse

_traced = (
    threading.local()
)  # the micro-batch that this thread traces; each replica is traced by a thread of its own
BLOCK = r'.*?(block|expanded_conv)_?[0-9]+[a-z]?(?![0-9])'  # how the names of a block's layers begin: block2a_..., conv2_block1_...
DEFAULT_DROP_RATE = 0.2  # what keras.applications builds its residual branches with


@keras.saving.register_keras_serializable(package='warmstart')
class DropPath(keras.layers.Dropout):
    """Leaves out a residual branch for a share `rate` of the examples (stochastic depth, Huang et al. 2016).

    Keras' Dropout with a noise shape of one value for each example, but all layers of a model take their row of the same draw,
    which the compiler makes once. `derive_dropout_seeds` gives out the rows. `rate` is below 1.
    """

    row, num_rows = 0, 1

    def call(self, inputs, training=False):
        if not training or not self.rate:
            return inputs
        drawn = tf.random.stateless_uniform(
            [self.num_rows, tf.shape(inputs)[0]], self.seed_generator.next()
        )[self.row]
        kept = tf.reshape(drawn >= self.rate, [-1] + [1] * (inputs.shape.rank - 1))
        return tf.where(kept, inputs / (1 - self.rate), tf.zeros([], inputs.dtype))


def build_model(config, num_classes):
    """The network of `config.model` with random weights, ending in global average pooling, dropout and a linear head.

    What `model.freeze` names is not trained, and always computes as in evaluation.

    Args:
        config: the whole config: `model.*`, `image_size` and `progressive.stages` are used.
        num_classes: width of the head.

    Returns: a keras.Model, [batch, size, size, 3] in 0..255 -> logits [batch, num_classes], float32 (float64 under that
        policy). With `progressive.stages` it takes any size. `weights` ends with the kernel and the bias of the head.

    Raises: ConfigError: no such model or layer, or one that cannot be built so.
    """
    shape = input_shape(config)
    images = keras.Input(shape, name='images')
    if config.model.name == 'tiny':
        if config.model.drop_path:
            raise ConfigError(
                "config.model.name='tiny' has no drop-path: leave model.drop_path at 0"
            )
        backbone = _tiny(config.model.sync_batch_norm)
        features = backbone(images)
    else:
        backbone, preprocess = _application(config.model, shape)
        features = backbone(preprocess(images))
    if config.model.freeze:
        _freeze(backbone, config.model.freeze)
    dropped = keras.layers.Dropout(config.model.dropout, name='top_dropout')(features)
    logits = keras.layers.Dense(num_classes, dtype=wide_dtype(), name='predictions')(dropped)
    return keras.Model(images, logits, name=config.model.name)


def wide_dtype():
    """What pictures are normalised in, and the loss is computed from: 'float64' under that policy, else 'float32', never a half."""
    return 'float64' if keras.config.dtype_policy().compute_dtype == 'float64' else 'float32'


def input_shape(config):
    """[height, width, channels] of a model's input, None for any size."""
    size = config.image_size if config.progressive.stages == 1 else None
    return size, size, 3


def set_dropout(model, rate):
    """Changes the dropout before the head, for steps that are traced from now on."""
    model.get_layer('top_dropout').rate = rate


def derive_dropout_seeds(model, seed, updates):
    """Makes every mask a function of (seed, layer, update, micro-batch, replica) instead of a state that all replicas share.

    Layers of drop-path share a draw, in which each has a row.

    Keras' `SeedGenerator` holds the same state on each replica, so that masks would repeat across them, and it is not
    part of a `tf.train.Checkpoint`, so that a resumed run would draw other masks.

    Args:
        model: a keras.Model; changed in place.
        seed: int.
        updates: integer variable [] that counts updates.
    """
    layers = [
        layer
        for layer in model._flatten_layers()
        if isinstance(getattr(layer, 'seed_generator', None), keras.random.SeedGenerator)
    ]
    branches = [layer for layer in layers if isinstance(layer, DropPath)]
    for row, layer in enumerate(branches):
        layer.row, layer.num_rows = row, len(branches)
    for layer in layers:
        drawn_with = layers.index(branches[0] if layer in branches else layer)

        def next_seed(ordered=True, key=(seed * 1_000_003 + drawn_with) % 2**31):
            context = tf.distribute.get_replica_context()
            index, count = getattr(_traced, 'micro_batch', (0, 1))
            draw = tf.cast(updates, tf.int32) * count + index
            draw = draw * context.num_replicas_in_sync + tf.cast(
                context.replica_id_in_sync_group, tf.int32
            )
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


def float_variables(model):
    """The variables of a model without the states of its random generators, which nothing here reads."""
    return [
        variable
        for variable in model.variables
        if variable.dtype in ('float16', 'bfloat16', 'float32', 'float64')
    ]


def layer_lr_multipliers(model, decay):
    """What the rate of each trained variable is multiplied by: layer-wise decay (Clark et al., ELECTRA, 2020; Bao et al., BEiT, 2021).

    The head has 1, and each block `decay` times what the block after it has. Blocks are what the names of the layers say,
    as block2a_expand_conv does; what comes before the first of them is one more, and so is what comes after the last.

    Returns: floats, one for each of `model.trainable_variables`.
    """
    backbone = _backbone(model)
    block_of = {
        variable.path: block
        for layer, block in zip(backbone.layers, _blocks(backbone))
        for variable in layer.weights
    }
    blocks = list(dict.fromkeys(block_of.values()))
    return [
        decay ** (len(blocks) - blocks.index(block_of[variable.path]))
        if variable.path in block_of
        else 1.0
        for variable in model.trainable_variables
    ]


def _backbone(model):
    """What comes before dropout and head, a keras.Model."""
    return next(layer for layer in model.layers if isinstance(layer, keras.Model))


def _blocks(backbone):
    """The block of each layer: 'block2a', say; 'stem' before the first and 'top' after the last."""
    named = [re.match(BLOCK, layer.name, re.IGNORECASE) for layer in backbone.layers]
    last = max((index for index, match in enumerate(named) if match), default=-1)
    blocks = []
    for index, match in enumerate(named):
        blocks.append(
            match[0] if match else 'top' if index > last else blocks[-1] if blocks else 'stem'
        )
    return blocks


def _freeze(backbone, last):
    """Freezes the layers of `backbone` up to the last one that `last` names, or begins the name of; 'backbone' names all."""
    names, blocks = [layer.name for layer in backbone.layers], _blocks(backbone)
    named = [
        index
        for index, name in enumerate(names)
        if last in ('backbone', blocks[index]) or re.match(re.escape(last) + '(?![0-9])', name)
    ]
    if not named:
        raise ConfigError(
            f"config.model.freeze={last!r} is no layer of this model: write 'backbone', or up to where, one of {', '.join(dict.fromkeys(blocks))}"
            + did_you_mean(last, names)
        )
    for layer in backbone.layers[: named[-1] + 1]:
        layer.trainable = (
            False  # of batch normalisation Keras then uses the statistics, and leaves them
        )
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0


def _tiny(sync_batch_norm):
    layers = [keras.layers.Rescaling(1 / 127.5, offset=-1, dtype=wide_dtype())]
    for block, filters in enumerate((16, 32), 1):
        layers += [
            keras.layers.Conv2D(
                filters, 3, strides=2, padding='same', use_bias=False, name=f'block{block}_conv'
            ),
            BatchNormalization(
                momentum=0.9,
                activation='relu',
                synchronized=sync_batch_norm,
                name=f'block{block}_bn',
            ),
        ]
    return keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D()], name='features')


def application(name, key='config.model.name'):
    """(constructor, preprocessing of its family) of a model of keras.applications. Raises ConfigError, which says `key`, for an unknown one."""
    constructors = {name for name in dir(keras.applications) if name[0].isupper()}
    if name not in constructors:
        hint = (
            did_you_mean(name, sorted(constructors | {'tiny'}), cutoff=0.3)
            or '; take EfficientNetV2B0'
        )
        raise ConfigError(f'{key}={name!r} is no model of keras.applications{hint}')
    constructor = getattr(keras.applications, name)
    return constructor, sys.modules[
        constructor.__module__
    ].preprocess_input  # where preprocessing is part of the model it changes nothing


def _application(model_config, shape):
    """(backbone as the config asks for it, preprocessing)."""
    constructor, preprocess = application(model_config.name)
    try:
        plain = constructor(include_top=False, weights=None, input_shape=shape, pooling='avg')
    except Exception as error:
        raise ConfigError(
            f'{model_config.name} cannot be built for config.image_size={shape[0] or "any"}: {one_line(error)}'
        ) from error
    return keras.Model.from_config(_changed(plain.get_config(), model_config)), preprocess


def _changed(model, model_config):
    """The Keras config of a model with drop-path and batch normalisation as ours asks for."""
    has_drop_path = False
    for layer in model['layers']:
        settings = layer['config']
        if layer['class_name'] in ('Rescaling', 'Normalization'):
            settings['dtype'] = wide_dtype()
        elif layer['class_name'] == 'Dropout' and settings.get(
            'noise_shape'
        ):  # one draw per example: a residual branch
            settings['rate'] *= (
                model_config.drop_path / DEFAULT_DROP_RATE
            )  # keras.applications' rates grow linearly to 0.2
            layer.update(
                module=DropPath.__module__,
                class_name=DropPath.__name__,
                registered_name=keras.saving.get_registered_name(DropPath),
            )
            has_drop_path = True
    if model_config.drop_path and not has_drop_path:
        raise ConfigError(
            f'config.model.drop_path={model_config.drop_path:g}, but {model_config.name} has no residual branches that drop: set it to 0'
        )
    fuse(model, model_config.sync_batch_norm)
    return model
