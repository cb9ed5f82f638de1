"""Builds Keras models by name with preprocessing inside, from images in 0..255 to logits."""

import contextlib
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from ml_collections import ConfigDict

from common.errors import ConfigError, closest_match, did_you_mean, one_line
from modeling.fused_layers import BatchNormalization, fuse

# The micro-batch that this thread traces; each replica is traced by a thread of its own.
_traced = threading.local()
# How the names of a block's layers begin: block2a_..., conv2_block1_...
BLOCK = r'.*?(block|expanded_conv)_?[0-9]+[a-z]?(?![0-9])'
DEFAULT_DROP_RATE = 0.2  # what keras.applications builds its residual branches with


PHILOX = 1  # TensorFlow's number of the algorithm (Salmon et al. 2011)
# The key with which TensorFlow's kernels make a key and a counter of two seeds.
SEED_KEY = 0x02461E293EC8F720


def stateless_uniform(shape: Sequence[Any] | tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Returns what the CPU kernel of tf.random.stateless_uniform draws, in [0, 1), float32.

    XLA makes other numbers of the same seed, unless it is given key, counter and bits as here.

    Args:
        seed: int32 [2].
    """
    seeds = tf.cast(tf.cast(seed, tf.int64), tf.uint64)
    mixed = tf.cast(_philox([4], tf.constant([SEED_KEY], tf.uint64), seeds), tf.uint64)
    key, half = (
        low + tf.bitwise.left_shift(high, tf.constant(32, tf.uint64))
        for low, high in (tf.unstack(mixed[:2]), tf.unstack(mixed[2:]))
    )
    bits = _philox(shape, key[None], tf.stack([tf.zeros([], tf.uint64), half]))
    from_one_to_two = tf.bitwise.bitwise_or(
        tf.bitwise.bitwise_and(bits, tf.constant(0x7FFFFF, tf.uint32)),
        tf.constant(0x3F800000, tf.uint32),
    )
    return tf.bitcast(from_one_to_two, tf.float32) - 1.0


def _philox(shape: Sequence[Any] | tf.Tensor, key: tf.Tensor, counter: tf.Tensor) -> tf.Tensor:
    """Returns random bits, uint32 of a shape; key is uint64 [1], counter uint64 [2]."""
    return tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=shape, key=key, counter=counter, alg=PHILOX, dtype=tf.uint32
    )


@keras.saving.register_keras_serializable(package='warmstart')
class Dropout(keras.layers.Dropout):
    """Drops values at random: Keras' Dropout, with the same mask in TensorFlow and under XLA."""

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        if not training or not self.rate:
            return inputs
        drawn = stateless_uniform(tf.shape(inputs), self.seed_generator.next())
        scaled = inputs * (1 / (1 - self.rate))
        return tf.where(drawn >= self.rate, scaled, tf.zeros([], inputs.dtype))


@keras.saving.register_keras_serializable(package='warmstart')
class DropPath(keras.layers.Dropout):
    """Drops a residual branch for a random share `rate` of the examples.

    That is stochastic depth (Huang et al. 2016): Keras' Dropout with one value per example, except
    that all layers of a model share one draw, which the compiler makes once, and each takes a row.
    `derive_dropout_seeds` assigns the rows. `rate` is below 1.
    """

    row, num_rows = 0, 1

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        if not training or not self.rate:
            return inputs
        drawn = stateless_uniform([self.num_rows, tf.shape(inputs)[0]], self.seed_generator.next())[
            self.row
        ]
        kept = tf.reshape(drawn >= self.rate, [-1] + [1] * (inputs.shape.rank - 1))
        return tf.where(kept, inputs / (1 - self.rate), tf.zeros([], inputs.dtype))


def build_model(config: ConfigDict, num_classes: int) -> keras.Model:
    """Builds the network of `config.model` with random weights.

    It ends in global average pooling, dropout and a linear head. What `model.freeze` names is not
    trained, and always computes as in evaluation.

    Args:
        config: the whole config: `model.*`, `image_size` and `progressive.stages` are used.
        num_classes: width of the head.

    Returns: a keras.Model, [batch, size, size, 3] in 0..255 -> logits [batch, num_classes], float32
        (float64 under that policy). With `progressive.stages` it takes any size. `weights` ends
        with the kernel and the bias of the head.

    Raises: ConfigError: no such model or layer, or the model cannot be built like this.
    """
    shape = input_shape(config)
    images = keras.Input(shape, name='images')
    if config.model.name in NETWORKS:
        if config.model.drop_path:
            raise ConfigError(
                f'config.model.name={config.model.name!r} has no drop-path',
                '--config.model.drop_path=0',
                'model.drop_path',
            )
        backbone = NETWORKS[config.model.name](config.model)
        features = backbone(images)
    else:
        backbone, preprocess = _application(config.model, shape)
        features = backbone(preprocess(images))
    if config.model.freeze:
        _freeze(backbone, config.model.freeze)
    dropped = Dropout(config.model.dropout, name='top_dropout')(features)
    logits = keras.layers.Dense(num_classes, dtype=wide_dtype(), name='predictions')(dropped)
    return keras.Model(images, logits, name=config.model.name)


def wide_dtype() -> str:
    """Returns the dtype in which images are normalised and logits computed.

    It is 'float64' under that policy, else 'float32', never one of 16 bits.
    """
    return 'float64' if keras.config.dtype_policy().compute_dtype == 'float64' else 'float32'


def input_shape(config: ConfigDict) -> tuple[int | None, int | None, int]:
    """Returns (height, width, channels) of a model's input, None for any size."""
    size = config.image_size if config.progressive.stages == 1 else None
    return size, size, 3


def set_dropout(model: keras.Model, rate: float) -> None:
    """Changes the dropout before the head, for steps that are traced from now on."""
    model.get_layer('top_dropout').rate = rate


def derive_dropout_seeds(model: keras.Model, seed: int, updates: tf.Variable) -> None:
    """Makes every mask a function of (seed, layer, update, micro-batch, replica).

    Layers of drop-path share a draw, in which each has a row.

    Keras' `SeedGenerator` holds the same state on each replica, so masks would repeat across them,
    and it is not part of a `tf.train.Checkpoint`, so a resumed run would draw others.

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

        def next_seed(
            ordered: bool = True, key: int = (seed * 1_000_003 + drawn_with) % 2**31
        ) -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            index, count = getattr(_traced, 'micro_batch', (0, 1))
            draw = tf.cast(updates, tf.int32) * count + index
            scaled = draw * context.num_replicas_in_sync
            draw = scaled + tf.cast(context.replica_id_in_sync_group, tf.int32)
            return tf.stack([tf.constant(key, tf.int32), draw])

        layer.seed_generator.next = next_seed


@contextlib.contextmanager
def micro_batch(index: int, count: int) -> Iterator[None]:
    """Marks what is traced inside as micro-batch `index` of `count`, which draws its own masks."""
    _traced.micro_batch = index, count
    try:
        yield
    finally:
        _traced.micro_batch = 0, 1


def float_variables(model: keras.Model) -> list[keras.Variable]:
    """Returns the float variables, leaving out the states of random generators: they are unused."""
    kinds = ('float16', 'bfloat16', 'float32', 'float64')
    return [variable for variable in model.variables if variable.dtype in kinds]


def layer_lr_multipliers(model: keras.Model, decay: float) -> list[float]:
    """Returns the learning-rate multiplier of each trained variable, for layer-wise decay.

    The head has 1, and each block `decay` times the multiplier of the next. Blocks follow from
    layer names, such as block2a_expand_conv; the layers before the first form another block, and so
    do those after the last (Clark et al., ELECTRA, 2020; Bao et al., BEiT, 2021).

    Returns: floats, one for each of `model.trainable_variables`.
    """
    backbone = _backbone(model)
    block_of = {
        variable.path: block
        for layer, block in zip(backbone.layers, _blocks(backbone), strict=True)
        for variable in layer.weights
    }
    blocks = list(dict.fromkeys(block_of.values()))
    exponents = {block: len(blocks) - index for index, block in enumerate(blocks)}

    def multiplier(variable: keras.Variable) -> float:
        block = block_of.get(variable.path)
        return decay ** exponents[block] if block else 1.0

    return [multiplier(variable) for variable in model.trainable_variables]


def _backbone(model: keras.Model) -> keras.Model:
    """Returns the part of the model before dropout and head."""
    return next(layer for layer in model.layers if isinstance(layer, keras.Model))


def _blocks(backbone: keras.Model) -> list[str]:
    """Names each layer's block: 'block2a', say; 'stem' before the first, 'top' after the last."""
    matches = [re.match(BLOCK, layer.name, re.IGNORECASE) for layer in backbone.layers]
    last = max((index for index, match in enumerate(matches) if match), default=-1)
    blocks, block = [], 'stem'
    for index, match in enumerate(matches):
        if match:
            block = match[0]
        elif index > last:
            block = 'top'
        blocks.append(block)
    return blocks


def _freeze(backbone: keras.Model, last: str) -> None:
    """Freezes the layers up to the last one in block `last`, or whose name begins with it.

    'backbone' freezes all.
    """
    names, blocks = [layer.name for layer in backbone.layers], _blocks(backbone)
    named = [
        index
        for index, name in enumerate(names)
        if last in ('backbone', blocks[index]) or re.match(re.escape(last) + '(?![0-9])', name)
    ]
    if not named:
        choices = ', '.join(dict.fromkeys(blocks))
        raise ConfigError(
            f'config.model.freeze={last!r} is not a layer of this model',
            f"write 'backbone', or the last block to freeze, one of {choices}"
            f'{did_you_mean(last, names)}',
            'model.freeze',
        )
    for layer in backbone.layers[: named[-1] + 1]:
        # Keras then uses the statistics of batch normalisation without updating them.
        layer.trainable = False
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0


def _tiny(settings: ConfigDict) -> keras.Sequential:
    layers = [keras.layers.Rescaling(1 / 127.5, offset=-1, dtype=wide_dtype())]
    for block, filters in enumerate((16, 32), 1):
        layers += [
            keras.layers.Conv2D(
                filters, 3, strides=2, padding='same', use_bias=False, name=f'block{block}_conv'
            ),
            BatchNormalization(
                momentum=0.9,
                activation='relu',
                synchronized=settings.sync_batch_norm,
                name=f'block{block}_bn',
            ),
        ]
    return keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D()], name='features')


# Networks of this repository: functions from `config.model` to a model from images, float32 in
# 0..255, to features [batch, n].
NETWORKS: dict[str, Callable[[ConfigDict], keras.Model]] = {
    'tiny': _tiny,
}


def find_application(
    name: str, key: str = 'model.name'
) -> tuple[Callable[..., keras.Model], Callable]:
    """Returns (constructor, preprocessing function) of a model of keras.applications.

    The function does nothing where preprocessing is part of the model.

    Raises: ConfigError, about `key` of the config, for an unknown one.
    """
    constructors = {member for member in dir(keras.applications) if member[0].isupper()}
    if name not in constructors:
        known = sorted(constructors | NETWORKS.keys())
        other = closest_match(name, known, cutoff=0.3) or 'EfficientNetV2B0'
        problem = f'config.{key}={name!r} is not a model of keras.applications'
        raise ConfigError(problem, f'--config.{key}={other}', key)
    constructor = getattr(keras.applications, name)
    return constructor, sys.modules[constructor.__module__].preprocess_input


def _application(settings: ConfigDict, shape: tuple) -> tuple[keras.Model, Callable]:
    """Returns (backbone as `config.model` asks for it, preprocessing)."""
    constructor, preprocess = find_application(settings.name)
    try:
        plain = constructor(include_top=False, weights=None, input_shape=shape, pooling='avg')
    except Exception as error:
        size = shape[0] or 'any'
        raise ConfigError(
            f'{settings.name} cannot be built for config.image_size={size}: {one_line(error)}',
            key='image_size',
        ) from error
    return keras.Model.from_config(_with_our_layers(plain.get_config(), settings)), preprocess


def _with_our_layers(model: dict[str, Any], settings: ConfigDict) -> dict[str, Any]:
    """Replaces dropout, drop-path and batch normalisation in a model's Keras config with ours."""
    has_drop_path = False
    for layer in model['layers']:
        layer_config = layer['config']
        if layer['class_name'] in ('Rescaling', 'Normalization'):
            layer_config['dtype'] = wide_dtype()
        elif layer['class_name'] == 'Dropout':
            # With a noise shape it draws once per example: it drops a residual branch.
            is_drop_path = bool(layer_config.get('noise_shape'))
            has_drop_path = has_drop_path or is_drop_path
            own = DropPath if is_drop_path else Dropout
            layer.update(
                module=own.__module__,
                class_name=own.__name__,
                registered_name=keras.saving.get_registered_name(own),
            )
            if is_drop_path:  # keras.applications' rates grow linearly to 0.2
                layer_config['rate'] *= settings.drop_path / DEFAULT_DROP_RATE
    if settings.drop_path and not has_drop_path:
        raise ConfigError(
            f'config.model.drop_path={settings.drop_path:g}, but {settings.name} has no residual '
            'branches that can be dropped',
            'set it to 0',
            'model.drop_path',
        )
    fuse(model, settings.sync_batch_norm)
    return model
