"""Fuses batch normalisation with what follows it, for as few passes over the data as possible.

These layers compute what Keras' layers compute, with the same variables. A TPU spends its time on
passes over large tensors, so mean and variance come from one pass, and gradients are written by
hand, so that only the input is kept for them. docs/tpu.md has figures for each step.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from modeling import optimizers

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


# What `DepthwiseConv2D` takes for granted, and the most pixels that are few for it.
PLAIN = {
    'depth_multiplier': 1,
    'dilation_rate': (1, 1),
    'data_format': 'channels_last',
    'use_bias': False,
    'activation': 'linear',
}
FEW_PIXELS = 4
ACTIVATIONS: dict[
    str, Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
] = {  # name: function of z that returns (value, derivative)
    'linear': lambda z: (z, tf.ones([], z.dtype)),
    'relu': lambda z: (tf.nn.relu(z), tf.cast(z > 0, z.dtype)),
    'silu': _silu,
}
KERNELS: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {  # the same, with TensorFlow's gradient
    'linear': lambda z: z,
    'relu': tf.nn.relu,
    'silu': lambda z: z * tf.sigmoid(z),
}


def use_kernels(model: keras.Model, use: bool) -> None:
    """Makes the layers of this file train with one of TensorFlow's operations for each thing.

    That is faster where nobody fuses the passes over the data that they are written as: on a CPU
    without XLA. Statistics are those of this replica then.
    """
    for layer in model._flatten_layers():
        if isinstance(layer, (BatchNormalization, DepthwiseConv2D, SqueezeExcite)):
            layer.uses_kernels = use


@keras.saving.register_keras_serializable(package='warmstart')
class BatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` and the activation after it.

    Keras computes the mean first; here mean and variance come from one pass, the variance as E[(x -
    s)^2] - E[x - s]^2, where s is the moving mean. The variance loses precision where (mean - s)^2
    is far above it: in the first updates, if inputs are hundreds of deviations from zero and the
    moving mean has not caught up. Later it loses as little as with Keras.

    With `synchronized` the statistics are those of the global batch, with one all-reduce forward
    and one backward; replicas must have equal shares. Keras' layer takes three, and each searches
    the graph of all replicas for variables during tracing.

    Args:
        activation: one of ACTIVATIONS.

    Inputs: [batch, ..., channels]; the output has the layer's compute dtype. All sums are in
    float32 or float64.
    """

    uses_kernels = False

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
        are_images = inputs.shape.rank == 4 and self.axis in (-1, 3)
        if self.uses_kernels and are_images and inputs.dtype != tf.float64:
            return KERNELS[self.activation](self._normalized_by_kernel(inputs))

        @tf.custom_gradient
        def normalize(inputs: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple:
            moments = Moments(self, inputs, gamma, beta, shift)

            def gradient(grad_output: tf.Tensor, *_: tf.Tensor) -> tuple:
                # The name scope of TensorFlow's own gradients.
                with tf.name_scope(f'gradient_tape/{self.name}'):
                    wide_grad_output = tf.cast(grad_output, gamma.dtype)
                    grad_z = wide_grad_output * activate(moments.normalized(inputs))[1]
                    # Rounded to the input's dtype, as it is stored between two passes.
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
        self.update_moving_statistics(mean, variance)
        return output

    def _normalized_by_kernel(self, inputs: tf.Tensor) -> tf.Tensor:
        settings = {'epsilon': self.epsilon, 'is_training': True}

        # With its own gradient TensorFlow makes zeros for each statistic, and adds them up.
        @tf.custom_gradient
        def normalize(inputs: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tuple:
            empty = tf.zeros([0])
            output, mean, variance, *kept = tf.raw_ops.FusedBatchNormV3(
                x=inputs, scale=gamma, offset=beta, mean=empty, variance=empty, **settings
            )
            size = inputs.shape.num_elements() or tf.cast(tf.size(inputs), tf.float32)
            # The kernel divides by one less than the number of values.
            self._follow(mean, variance * (1 - inputs.shape[-1] / size))

            def gradient(grad_output: tf.Tensor) -> Sequence[tf.Tensor]:
                reserve = {f'reserve_space_{index}': value for index, value in enumerate(kept, 1)}
                return tf.raw_ops.FusedBatchNormGradV3(
                    y_backprop=grad_output, x=inputs, scale=gamma, **reserve, **settings
                )[:3]

            return output, gradient

        return normalize(inputs, *self._scale_and_offset(tf.float32))

    def _follow(self, mean: tf.Tensor, variance: tf.Tensor) -> None:
        """Does what `update_moving_statistics` does, in few operations."""
        for moving, new in ((self.moving_mean, mean), (self.moving_variance, variance)):
            optimizers.subtract(moving, tf.constant(1 - self.momentum), moving - new)

    def parameters(self, dtype: tf.DType) -> list[tf.Tensor]:
        """Returns gamma, beta, moving mean and moving variance in the dtype of all sums.

        Each is [channels].
        """
        sum_dtype = keras.backend.result_type(dtype, 'float32')
        moving = [tf.cast(self.moving_mean, sum_dtype), tf.cast(self.moving_variance, sum_dtype)]
        return [*self._scale_and_offset(sum_dtype), *moving]

    def _scale_and_offset(self, dtype: tf.DType | str) -> list[tf.Tensor]:
        def value(variable: keras.Variable | None, default: int) -> tf.Tensor:
            if variable is None:
                return tf.fill(self.moving_mean.shape, tf.cast(default, dtype))
            return tf.cast(variable, dtype)

        return [value(self.gamma, 1), value(self.beta, 0)]

    def update_moving_statistics(self, mean: tf.Tensor, variance: tf.Tensor) -> None:
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

        dz is `grad_z`, the gradient of the normalised inputs; x^ is x, normalised to mean 0 and
        variance 1. `grad_gamma` and `grad_beta` are the sums of dz x^ and of dz over this replica's
        share.
        """
        share = 1 / tf.cast(tf.size(inputs[..., 0]), grad_z.dtype)
        mean_zx, mean_z = self.layer.mean_over_replicas(grad_gamma * share, grad_beta * share)
        # Written as a linear function of x, which takes the fewest operations per element.
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

    The kernel of `reduce` is applied to each pixel and the results are averaged, which gives the
    same, as a kernel is linear, and is faster: a TPU reads h into its matrix unit faster than it
    sums h. The gradient computes all sums over pixels in one pass over x and the output's gradient,
    separately for what comes through h and through the gate, so that the former need not wait for
    the latter.

    Args:
        normalization: BatchNormalization with SiLU.
        reduce, expand: keras.layers.Conv2D, 1 x 1, with bias; `reduce` has SiLU, `expand` sigmoid.
    """

    uses_kernels = False

    def __init__(
        self,
        normalization: BatchNormalization,
        reduce: keras.layers.Conv2D,
        expand: keras.layers.Conv2D,
        **arguments: Any,
    ):
        # Kernels and biases are read in full precision, not rounded to 16 bits.
        super().__init__(autocast=False, **arguments)
        self.normalization, self.reduce, self.expand = normalization, reduce, expand

    def build(self, shape: tuple[int | None, ...]) -> None:
        shapes = {
            self.normalization: shape,
            self.reduce: (shape[0], 1, 1, shape[-1]),
            self.expand: (shape[0], 1, 1, self.reduce.filters),
        }
        for layer, input_shape in shapes.items():
            if not layer.built:  # it is if it was made from the config of a built layer
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
            for variable in (tf.squeeze(layer.kernel, (0, 1)), layer.bias)
        ]
        if self.uses_kernels:
            features = self.normalization(inputs, training=True)
            squeezed = tf.reduce_mean(tf.cast(features, gamma.dtype), (1, 2))  # [batch, channels]
            gate = _gate(squeezed, *kernels)
            return features * tf.cast(gate, features.dtype)[:, None, None]
        output, mean, variance = self._train(shift, inputs, gamma, beta, *kernels)
        self.normalization.update_moving_statistics(mean, variance)
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
                # In the name scope of TensorFlow's own gradients.
                with tf.name_scope(f'gradient_tape/{self.name}'):
                    return wide_gradient(tf.cast(grad_output, gamma.dtype))

            def wide_gradient(grad_output: tf.Tensor) -> tuple:
                features, derivative = _silu(moments.normalized(inputs))
                centered = moments.centered(inputs)

                def over_pixels(tensor: tf.Tensor) -> tf.Tensor:
                    return tf.reduce_sum(tensor, (1, 2))  # [batch, channels]

                grad_gate = over_pixels(grad_output * features) * gate * (1 - gate)
                grad_hidden = (grad_gate @ tf.transpose(expand)) * hidden_slope
                # The part of h's gradient that is the same for each pixel.
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


def _gate(
    squeezed: tf.Tensor,
    reduce: tf.Tensor,
    reduce_bias: tf.Tensor,
    expand: tf.Tensor,
    expand_bias: tf.Tensor,
) -> tf.Tensor:
    hidden = KERNELS['silu'](squeezed @ reduce + reduce_bias)
    return tf.sigmoid(hidden @ expand + expand_bias)  # [batch, channels]


@keras.saving.register_keras_serializable(package='warmstart')
class DepthwiseConv2D(keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D`, whose gradient is also quick for pictures of few pixels.

    For pictures of one pixel oneDNN's gradient of the kernel takes many times as long as for those
    of nine (`python benchmarks/depthwise.py`).
    """

    uses_kernels = False

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        pixels = inputs.shape[1:3].num_elements()
        if not self.uses_kernels or pixels is None or pixels > FEW_PIXELS:
            return super().call(inputs)

        @tf.custom_gradient
        def convolve(inputs: tf.Tensor, kernel: tf.Tensor) -> tuple:
            output = tf.nn.depthwise_conv2d(inputs, kernel, strides, padding)

            def gradient(grad_output: tf.Tensor) -> tuple:
                grad_inputs = tf.nn.depthwise_conv2d_backprop_input(
                    tf.shape(inputs), kernel, grad_output, strides, padding
                )
                return grad_inputs, self._kernel_gradient(inputs, grad_output)

            return output, gradient

        strides, padding = [1, *self.strides, 1], self.padding.upper()
        return convolve(inputs, tf.cast(self.kernel, inputs.dtype))

    def _kernel_gradient(self, inputs: tf.Tensor, grad_output: tf.Tensor) -> tf.Tensor:
        """Sums products of pixels, first over the batch, then over those that share a weight."""
        height, width, channels = inputs.shape[1:]
        before, after = height * width, math.prod(grad_output.shape[1:3])
        dtype = keras.backend.result_type(inputs.dtype, 'float32')
        rows = tf.reshape(tf.cast(inputs, dtype), [-1, before, 1, channels])
        columns = tf.reshape(tf.cast(grad_output, dtype), [-1, 1, after, channels])
        sums = tf.reshape(tf.reduce_sum(rows * columns, 0), [before * after, channels])
        # A picture for each pixel, convolved with a kernel for each weight, is 1 where it is used.
        num_weights = math.prod(self.kernel_size)
        pictures = np.eye(before, dtype=dtype).reshape(before, height, width, 1)
        kernels = np.eye(num_weights, dtype=dtype).reshape(*self.kernel_size, 1, num_weights)
        used = tf.nn.conv2d(pictures, kernels, self.strides, self.padding.upper())
        used = tf.reshape(used, [before * after, num_weights])
        gradient = tf.reshape(tf.matmul(used, sums, transpose_a=True), self.kernel.shape)
        return tf.cast(gradient, inputs.dtype)


def fuse(model: dict[str, Any], synchronized: bool) -> None:
    """Replaces Keras' layers with those of this file.

    Args:
        model: the Keras config of a functional model, as `get_config` gives it; changed in place.
        synchronized: whether statistics are those of the global batch.
    """
    readers: dict[str, list[dict]] = {layer['name']: [] for layer in model['layers']}
    for layer in model['layers']:
        for history in _histories(layer['inbound_nodes']):
            readers[history[0]].append(layer)
    replaced_by: dict[str, str] = {}  # name of a removed layer -> name of the layer to read instead
    for layer in list(model['layers']):
        if layer['class_name'] == 'BatchNormalization':
            _fuse_normalization(layer, model, readers, replaced_by, synchronized)
        elif layer['class_name'] == 'DepthwiseConv2D' and _has(layer, PLAIN):
            own = DepthwiseConv2D.from_config(layer['config'])
            layer.update(keras.saving.serialize_keras_object(own), name=own.name)
    model['layers'] = [layer for layer in model['layers'] if layer['name'] not in replaced_by]
    read_by_layers = [layer['inbound_nodes'] for layer in model['layers']]
    outputs = {'keras_history': model['output_layers']}
    for history in _histories([read_by_layers, outputs]):
        history[0] = replaced_by.get(history[0], history[0])


def _fuse_normalization(
    layer: dict[str, Any],
    model: dict[str, Any],
    readers: dict[str, list[dict]],
    replaced_by: dict[str, str],
    synchronized: bool,
) -> None:
    """Replaces a batch normalisation and what follows it with a layer of this file.

    Changes `layer` and `model`, and records in `replaced_by` which layer replaces each one that
    goes.
    """
    settings, name = layer['config'] | {'synchronized': synchronized}, layer['name']
    activation = next(iter(_follow(readers, layer, ('Activation', {}))), None)
    if activation and activation['config']['activation'] in ACTIVATIONS:
        settings['activation'] = activation['config']['activation']
        replaced_by[activation['name']] = name
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
                replaced_by[part_name] = fused.name
            model['layers'].remove(multiply)
    layer.update(keras.saving.serialize_keras_object(fused), name=fused.name)


def _follow(
    readers: dict[str, list[dict]], layer: dict[str, Any], *kinds: tuple[str, dict]
) -> list[dict]:
    """Returns the chain of layers of these kinds after `layer`, or [] if there is none.

    Each must be the only reader of the one before.
    """
    found = []
    for kind, settings in kinds:
        following = readers[layer['name']]
        if len(following) != 1 or following[0]['class_name'] != kind:
            return []
        layer = following[0]
        if not _has(layer, settings):
            return []
        found.append(layer)
    return found


def _has(layer: dict[str, Any], settings: dict[str, Any]) -> bool:
    return all(layer['config'][key] == value for key, value in settings.items())


def _histories(node: Any) -> Iterator[list]:
    """Yields every [layer, node, tensor] that is read in a part of a Keras config."""
    if isinstance(node, dict):
        if 'keras_history' in node:
            yield node['keras_history']
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for part in node:
            yield from _histories(part)
