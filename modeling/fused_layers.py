"""Batch normalisation together with what follows it, in as few passes over the data as it takes.

The layers of this file compute what Keras' layers compute, and have their variables. Passes over
large tensors are what the time of a TPU goes into, so mean and variance come from one, and
gradients are written out: what is kept for them is the input alone. docs/tpu.md has the figure of
each step.
"""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

# The layers of a squeeze-and-excitation block after its mean, each with the settings that
# `SqueezeExcite` takes for granted.
GATE: tuple[tuple[str, dict[str, Any]], ...] = (
    ('Reshape', {}),
    ('Conv2D', {'kernel_size': (1, 1), 'activation': 'silu', 'use_bias': True}),
    ('Conv2D', {'kernel_size': (1, 1), 'activation': 'sigmoid', 'use_bias': True}),
    ('Multiply', {}),
)


def _silu(z: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    gate = tf.sigmoid(z)
    return z * gate, gate * (1 + z * (1 - gate))


ACTIVATIONS: dict[
    str, Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
] = {  # of a name: z -> (value, derivative)
    'linear': lambda z: (z, tf.ones([], z.dtype)),
    'relu': lambda z: (tf.nn.relu(z), tf.cast(z > 0, z.dtype)),
    'silu': _silu,
}


@keras.saving.register_keras_serializable(package='warmstart')
class BatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` and the activation after it.

    Where Keras computes the mean first, mean and variance come from one pass, E[(x - s)^2] -
    E[x - s]^2; s is the moving mean. Rounding takes from the variance what (mean - s)^2 is above
    it: much where inputs are hundreds of deviations from zero and the moving mean has not followed
    yet, in the first updates, and as little as with Keras from then on.

    With `synchronized` the statistics are those of the global batch, with one all-reduce each way;
    replicas have equal shares. Keras' own takes three, each of which searches the graph of all
    replicas for variables while it is traced.

    Args:
        activation: one of ACTIVATIONS.

    Inputs: [batch, ..., channels]; the output has the layer's compute dtype. All that is summed is
    float32 or float64.
    """

    def __init__(self, *, activation: str = 'linear', **arguments: Any):
        super().__init__(**arguments)
        self.activation = activation

    def call(
        self, inputs: tf.Tensor, training: bool | None = None, mask: tf.Tensor | None = None
    ) -> tf.Tensor:
        activate = ACTIVATIONS[self.activation]
        if not (training and self.trainable):
            gamma, beta, mean, variance = self.parameters(inputs.dtype)
            scale = gamma * tf.math.rsqrt(variance + self.epsilon)
            z = tf.cast(inputs, scale.dtype) * scale + (beta - mean * scale)
            return tf.cast(activate(z)[0], self.compute_dtype)

        @tf.custom_gradient
        def normalize(inputs: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple:
            moments = Moments(self, inputs, gamma, beta, shift)

            def gradient(grad_output: tf.Tensor, *_: tf.Tensor) -> tuple:
                # Named as where TensorFlow's own gradients are.
                with tf.name_scope(f'gradient_tape/{self.name}'):
                    wide = tf.cast(grad_output, gamma.dtype)
                    grad_z = wide * activate(moments.normalized(inputs))[1]
                    # It is kept between two passes, no wider than the input.
                    grad_z = tf.cast(tf.cast(grad_z, inputs.dtype), gamma.dtype)
                    grad_beta = tf.reduce_sum(grad_z, self._reduction_axes)
                    products = grad_z * moments.centered(inputs)
                    grad_gamma = tf.reduce_sum(products, self._reduction_axes) * moments.inverse
                    grad_inputs = moments.gradient(inputs, grad_z, grad_gamma, grad_beta)
                    return grad_inputs, grad_gamma, grad_beta

            output = tf.cast(activate(moments.normalized(inputs))[0], self.compute_dtype)
            return (output, moments.mean, moments.variance), gradient

        gamma, beta, shift, _ = self.parameters(inputs.dtype)
        output, mean, variance = normalize(inputs, gamma, beta)
        self.update(mean, variance)
        return output

    def parameters(self, dtype: tf.DType) -> list[tf.Tensor]:
        """Returns gamma, beta, moving mean and moving variance in the dtype that all is summed in.

        Each is [channels].
        """
        wide = keras.backend.result_type(dtype, 'float32')

        def value(variable: keras.Variable | None, otherwise: int) -> tf.Tensor:
            if variable is None:
                return tf.fill(self.moving_mean.shape, tf.cast(otherwise, wide))
            return tf.cast(variable, wide)

        return [
            value(self.gamma, 1),
            value(self.beta, 0),
            value(self.moving_mean, 0),
            value(self.moving_variance, 1),
        ]

    def update(self, mean: tf.Tensor, variance: tf.Tensor) -> None:
        for moving, new in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(tf.cast(moving, new.dtype) * self.momentum + new * (1 - self.momentum))

    def mean_over_replicas(self, *values: tf.Tensor) -> list[tf.Tensor] | tuple[tf.Tensor, ...]:
        context = tf.distribute.get_replica_context()
        if not self.synchronized or context is None or context.num_replicas_in_sync == 1:
            return values
        mean = tf.distribute.get_strategy().extended._replica_ctx_all_reduce(
            tf.distribute.ReduceOp.MEAN, tf.stack(values)
        )
        return tf.unstack(mean)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {'activation': self.activation}


class Moments:
    """Mean and variance of a batch, and what follows from them.

    All are [channels], in the dtype of gamma.
    """

    def __init__(
        self,
        layer: BatchNormalization,
        inputs: tf.Tensor,
        gamma: tf.Tensor,
        beta: tf.Tensor,
        shift: tf.Tensor,
    ):
        self.layer = layer
        shifted = tf.cast(inputs, gamma.dtype) - shift
        first, second = layer.mean_over_replicas(
            tf.reduce_mean(shifted, layer._reduction_axes),
            tf.reduce_mean(tf.square(shifted), layer._reduction_axes),
        )
        self.mean, self.variance = shift + first, tf.maximum(second - tf.square(first), 0)
        self.inverse = tf.math.rsqrt(self.variance + layer.epsilon)  # 1 / standard deviation
        self.scale = gamma * self.inverse
        self.offset = beta - self.mean * self.scale

    def centered(self, inputs: tf.Tensor) -> tf.Tensor:
        return tf.cast(inputs, self.mean.dtype) - self.mean

    def normalized(self, inputs: tf.Tensor) -> tf.Tensor:
        """Returns gamma (x - mean) / sqrt(variance + epsilon) + beta."""
        return tf.cast(inputs, self.mean.dtype) * self.scale + self.offset

    def gradient(
        self, inputs: tf.Tensor, grad_z: tf.Tensor, grad_gamma: tf.Tensor, grad_beta: tf.Tensor
    ) -> tf.Tensor:
        """Returns scale (dz - mean(dz) - x^ mean(dz x^)) (Ioffe and Szegedy, 2015).

        dz is `grad_z`, the gradient of the normalised inputs; x^ has mean 0 and variance 1.
        `grad_gamma` and `grad_beta` are the sums of dz x^ and of dz over this replica's share.
        """
        share = 1 / tf.cast(tf.size(inputs[..., 0]), grad_z.dtype)
        mean_zx, mean_z = self.layer.mean_over_replicas(grad_gamma * share, grad_beta * share)
        # As a line in x it takes the fewest operations for each element.
        slope = -self.scale * self.inverse * mean_zx
        grad_inputs = (
            grad_z * self.scale
            + tf.cast(inputs, grad_z.dtype) * slope
            - (self.scale * mean_z + self.mean * slope)
        )
        return tf.cast(grad_inputs, inputs.dtype)


@keras.saving.register_keras_serializable(package='warmstart')
class SqueezeExcite(keras.layers.Layer):
    """Batch normalisation, SiLU, and squeeze-and-excitation (Hu et al., 2018).

    EfficientNets have them after a depthwise convolution: h = silu(bn(x)); output = h *
    sigmoid(expand(silu(reduce(mean(h))))), the mean being over height and width.

    `reduce` is applied to each pixel and its result averaged: the mean of products is the product
    of the mean, and a TPU reads h faster into its matrix unit than it adds it up. The gradient
    takes all its sums over pixels in one pass over x and the gradient of the output, apart for what
    comes through h and through the gate, so that the first need not wait for the second.

    Args:
        normalization: BatchNormalization with SiLU.
        reduce, expand: keras.layers.Conv2D, 1 x 1, with bias, SiLU and sigmoid.
    """

    def __init__(
        self,
        normalization: BatchNormalization,
        reduce: keras.layers.Conv2D,
        expand: keras.layers.Conv2D,
        **arguments: Any,
    ):
        # Its kernels and biases are read as they are, not rounded to a half.
        super().__init__(autocast=False, **arguments)
        self.normalization, self.reduce, self.expand = normalization, reduce, expand

    def build(self, shape: tuple[int | None, ...]) -> None:
        shapes = {
            self.normalization: shape,
            self.reduce: (shape[0], 1, 1, shape[-1]),
            self.expand: (shape[0], 1, 1, self.reduce.filters),
        }
        for layer, input_shape in shapes.items():
            if not layer.built:  # it is where the layer was made of the config of one that was
                layer.build(input_shape)

    def call(
        self, inputs: tf.Tensor, training: bool | None = None, mask: tf.Tensor | None = None
    ) -> tf.Tensor:
        inputs = tf.cast(inputs, self.compute_dtype)
        if not (training and self.normalization.trainable):
            features = self.normalization(inputs)
            squeezed = tf.reduce_mean(features, (1, 2), keepdims=True)
            return features * self.expand(self.reduce(squeezed))
        gamma, beta, shift, _ = self.normalization.parameters(inputs.dtype)
        kernels = [
            tf.cast(variable, gamma.dtype)
            for layer in (self.reduce, self.expand)
            for variable in (layer.kernel[0, 0], layer.bias)
        ]
        output, mean, variance = self._train(shift, inputs, gamma, beta, *kernels)
        self.normalization.update(mean, variance)
        return output

    def _train(self, shift: tf.Tensor, *arguments: tf.Tensor) -> tuple[tf.Tensor, ...]:
        @tf.custom_gradient
        def train(
            inputs: tf.Tensor,
            gamma: tf.Tensor,
            beta: tf.Tensor,
            reduce: tf.Tensor,
            reduce_bias: tf.Tensor,
            expand: tf.Tensor,
            expand_bias: tf.Tensor,
        ) -> tuple:
            moments = Moments(self.normalization, inputs, gamma, beta, shift)
            pixels = tf.cast(tf.size(inputs[0, ..., 0]), gamma.dtype)
            features = _silu(moments.normalized(inputs))[0]
            narrow, kernel = tf.cast(features, inputs.dtype), tf.cast(reduce, inputs.dtype)
            # [batch, height, width, reduced]
            reduced = tf.nn.conv2d(narrow, kernel[None, None], 1, 'VALID')
            squeezed = tf.reduce_sum(tf.cast(reduced, gamma.dtype), (1, 2)) / pixels + reduce_bias
            hidden, hidden_slope = _silu(squeezed)
            gate = tf.sigmoid(hidden @ expand + expand_bias)  # [batch, channels]

            def gradient(grad_output: tf.Tensor, *_: tf.Tensor) -> tuple:
                # Named as where TensorFlow's own gradients are.
                with tf.name_scope(f'gradient_tape/{self.name}'):
                    return wide_gradient(tf.cast(grad_output, gamma.dtype))

            def wide_gradient(grad_output: tf.Tensor) -> tuple:
                features, derivative = _silu(moments.normalized(inputs))
                centered = moments.centered(inputs)

                def over_pixels(tensor: tf.Tensor) -> tf.Tensor:
                    return tf.reduce_sum(tensor, (1, 2))  # [batch, channels]

                grad_gate = over_pixels(grad_output * features) * gate * (1 - gate)
                grad_hidden = (grad_gate @ tf.transpose(expand)) * hidden_slope
                # Of the gradient of h, the part that is the same for each pixel.
                grad_mean = grad_hidden @ tf.transpose(reduce) / pixels
                through_h = gate * over_pixels(grad_output * derivative)
                through_gate = grad_mean * over_pixels(derivative)
                grad_beta = tf.reduce_sum(through_h + through_gate, 0)
                through_h = gate * over_pixels(grad_output * derivative * centered)
                through_gate = grad_mean * over_pixels(derivative * centered)
                grad_gamma = tf.reduce_sum(through_h + through_gate, 0) * moments.inverse
                grad_z = (grad_output * gate[:, None, None] + grad_mean[:, None, None]) * derivative
                grad_reduce = tf.transpose(over_pixels(features)) @ grad_hidden / pixels
                return (
                    moments.gradient(inputs, grad_z, grad_gamma, grad_beta),
                    grad_gamma,
                    grad_beta,
                    grad_reduce,
                    tf.reduce_sum(grad_hidden, 0),
                    tf.transpose(hidden) @ grad_gate,
                    tf.reduce_sum(grad_gate, 0),
                )

            output = tf.cast(features * gate[:, None, None], inputs.dtype)
            return (output, moments.mean, moments.variance), gradient

        return train(*arguments)

    def get_config(self) -> dict[str, Any]:
        layers = {
            'normalization': self.normalization,
            'reduce': self.reduce,
            'expand': self.expand,
        }
        serialize = keras.saving.serialize_keras_object
        return super().get_config() | {name: serialize(layer) for name, layer in layers.items()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> 'SqueezeExcite':
        arguments = dict(config)
        for name in ('normalization', 'reduce', 'expand'):
            arguments[name] = keras.saving.deserialize_keras_object(config[name])
        return cls(**arguments)


def fuse(model: dict[str, Any], synchronized: bool) -> None:
    """Puts the layers of this file into the place of Keras'.

    Args:
        model: the Keras config of a functional model, as `get_config` gives it; changed in place.
        synchronized: whether statistics are those of the global batch.
    """
    readers: dict[str, list[dict]] = {layer['name']: [] for layer in model['layers']}
    for layer in model['layers']:
        for history in _histories(layer['inbound_nodes']):
            readers[history[0]].append(layer)
    instead: dict[str, str] = {}  # of a layer that is now part of another: whose output to read
    for layer in list(model['layers']):
        if layer['class_name'] == 'BatchNormalization':
            _fuse_normalization(layer, model, readers, instead, synchronized)
    model['layers'] = [layer for layer in model['layers'] if layer['name'] not in instead]
    read_by_layers = [layer['inbound_nodes'] for layer in model['layers']]
    outputs = {'keras_history': model['output_layers']}
    for history in _histories([read_by_layers, outputs]):
        history[0] = instead.get(history[0], history[0])


def _fuse_normalization(
    layer: dict[str, Any],
    model: dict[str, Any],
    readers: dict[str, list[dict]],
    instead: dict[str, str],
    synchronized: bool,
) -> None:
    """Puts a layer of this file into the place of a batch normalisation and what follows it.

    Changes `layer` and `model`, and writes into `instead` whose outputs to read.
    """
    settings, name = layer['config'] | {'synchronized': synchronized}, layer['name']
    activation = next(iter(_follow(readers, layer, ('Activation', {}))), None)
    if activation and activation['config']['activation'] in ACTIVATIONS:
        settings['activation'] = activation['config']['activation']
        instead[activation['name']] = name
    fused = BatchNormalization.from_config(settings)
    if activation and fused.activation == 'silu' and len(readers[activation['name']]) == 2:
        after = readers[activation['name']]
        squeezes = [reader for reader in after if reader['class_name'] == 'GlobalAveragePooling2D']
        gate = _follow(readers, squeezes[0], *GATE) if squeezes else []
        if gate:
            reshape, reduce, expand, multiply = gate
            convolutions = [
                keras.layers.Conv2D.from_config(part['config']) for part in (reduce, expand)
            ]
            fused = SqueezeExcite(fused, *convolutions, name=multiply['name'])
            parts = [activation, squeezes[0], reshape, reduce, expand]
            for part_name in [name, *(part['name'] for part in parts)]:
                instead[part_name] = fused.name
            model['layers'].remove(multiply)
    layer.update(keras.saving.serialize_keras_object(fused), name=fused.name)


def _follow(
    readers: dict[str, list[dict]], layer: dict[str, Any], *kinds: tuple[str, dict]
) -> list[dict]:
    """Returns the layers after `layer`, each of the kind that is asked for.

    Each is the only reader of the one before; [] unless all are there.
    """
    found = []
    for kind, settings in kinds:
        following = readers[layer['name']]
        if len(following) != 1 or following[0]['class_name'] != kind:
            return []
        layer = following[0]
        if any(layer['config'][key] != value for key, value in settings.items()):
            return []
        found.append(layer)
    return found


def _histories(node: Any) -> Iterator[list]:
    """Yields every [layer, node, tensor] that is read in a part of a Keras config."""
    if isinstance(node, dict):
        if 'keras_history' in node:
            yield node['keras_history']
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for part in node:
            yield from _histories(part)
