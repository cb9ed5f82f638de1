"""Batch normalisation together with what follows it, in as few passes over the data as it takes.

The layers of this file compute what Keras' layers compute, and have their variables. Passes over large tensors are what the
time of a TPU goes into, so mean and variance come from one, and gradients are written out: what is kept for them is the
input alone. docs/tpu.md has the figure of each step.
"""

import keras
import tensorflow as tf

# The layers of a squeeze-and-excitation block after its mean, each with the settings that `SqueezeExcite` takes for granted.
GATE = (
    ('Reshape', {}),
    ('Conv2D', {'kernel_size': (1, 1), 'activation': 'silu', 'use_bias': True}),
    ('Conv2D', {'kernel_size': (1, 1), 'activation': 'sigmoid', 'use_bias': True}),
    ('Multiply', {}),
)


def _silu(z):
    gate = tf.sigmoid(z)
    return z * gate, gate * (1 + z * (1 - gate))


ACTIVATIONS = {  # of a name: z -> (value, derivative)
    'linear': lambda z: (z, tf.ones([], z.dtype)),
    'relu': lambda z: (tf.nn.relu(z), tf.cast(z > 0, z.dtype)),
    'silu': _silu,
}


@keras.saving.register_keras_serializable(package='warmstart')
class BatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` and the activation after it.

    Where Keras computes the mean first, mean and variance come from one pass, E[(x - s)^2] - E[x - s]^2; s is the moving mean.
    Rounding takes from the variance what (mean - s)^2 is above it: much where inputs are hundreds of deviations from zero and the moving
    mean has not followed yet, in the first updates, and as little as with Keras from then on.

    With `synchronized` the statistics are those of the global batch, with one all-reduce each way; replicas have equal shares.
    Keras' own takes three, each of which searches the graph of all replicas for variables while it is traced.

    Args:
        activation: one of ACTIVATIONS.

    Inputs: [batch, ..., channels]; the output has the layer's compute dtype. All that is summed is float32 or float64.
    """

    def __init__(self, *, activation='linear', **arguments):
        super().__init__(**arguments)
        self.activation = activation

    def call(self, inputs, training=None, mask=None):
        if not (training and self.trainable):
            gamma, beta, mean, variance = self.parameters(inputs.dtype)
            scale = gamma * tf.math.rsqrt(variance + self.epsilon)
            return tf.cast(
                ACTIVATIONS[self.activation](
                    tf.cast(inputs, scale.dtype) * scale + (beta - mean * scale)
                )[0],
                self.compute_dtype,
            )

        @tf.custom_gradient
        def normalize(inputs, gamma, beta):
            moments = Moments(self, inputs, gamma, beta, shift)

            def gradient(grad_output, *_):
                with tf.name_scope(
                    f'gradient_tape/{self.name}'
                ):  # where TensorFlow's own gradients are
                    grad_z = (
                        tf.cast(grad_output, gamma.dtype)
                        * ACTIVATIONS[self.activation](moments.normalized(inputs))[1]
                    )
                    grad_z = tf.cast(
                        tf.cast(grad_z, inputs.dtype), gamma.dtype
                    )  # it is kept between two passes, no wider than the input
                    grad_beta = tf.reduce_sum(grad_z, self._reduction_axes)
                    grad_gamma = (
                        tf.reduce_sum(grad_z * moments.centered(inputs), self._reduction_axes)
                        * moments.inverse
                    )
                    return (
                        moments.gradient(inputs, grad_z, grad_gamma, grad_beta),
                        grad_gamma,
                        grad_beta,
                    )

            return (
                tf.cast(
                    ACTIVATIONS[self.activation](moments.normalized(inputs))[0], self.compute_dtype
                ),
                moments.mean,
                moments.variance,
            ), gradient

        gamma, beta, shift, _ = self.parameters(inputs.dtype)
        output, mean, variance = normalize(inputs, gamma, beta)
        self.update(mean, variance)
        return output

    def parameters(self, dtype):
        """gamma, beta, moving mean and moving variance, [channels], in the dtype that all is summed in."""
        wide = keras.backend.result_type(dtype, 'float32')
        variables = (
            (self.gamma, 1),
            (self.beta, 0),
            (self.moving_mean, 0),
            (self.moving_variance, 1),
        )
        return [
            tf.fill(self.moving_mean.shape, tf.cast(otherwise, wide))
            if variable is None
            else tf.cast(variable, wide)
            for variable, otherwise in variables
        ]

    def update(self, mean, variance):
        for moving, new in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(tf.cast(moving, new.dtype) * self.momentum + new * (1 - self.momentum))

    def mean_over_replicas(self, *values):
        context = tf.distribute.get_replica_context()
        if not self.synchronized or context is None or context.num_replicas_in_sync == 1:
            return values
        return tf.unstack(
            tf.distribute.get_strategy().extended._replica_ctx_all_reduce(
                tf.distribute.ReduceOp.MEAN, tf.stack(values)
            )
        )

    def get_config(self):
        return super().get_config() | {'activation': self.activation}


class Moments:
    """Mean and variance of a batch, and what follows from them. All are [channels], in the dtype of gamma."""

    def __init__(self, layer, inputs, gamma, beta, shift):
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

    def centered(self, inputs):
        return tf.cast(inputs, self.mean.dtype) - self.mean

    def normalized(self, inputs):
        """gamma (x - mean) / sqrt(variance + epsilon) + beta."""
        return tf.cast(inputs, self.mean.dtype) * self.scale + self.offset

    def gradient(self, inputs, grad_z, grad_gamma, grad_beta):
        """scale (dz - mean(dz) - x^ mean(dz x^)) for the gradient dz of the normalised inputs (Ioffe and Szegedy, 2015); x^ has mean 0 and variance 1.

        `grad_gamma` and `grad_beta` are the sums of dz x^ and of dz over this replica's share.
        """
        share = 1 / tf.cast(tf.size(inputs[..., 0]), grad_z.dtype)
        mean_zx, mean_z = self.layer.mean_over_replicas(grad_gamma * share, grad_beta * share)
        slope = (
            -self.scale * self.inverse * mean_zx
        )  # as a line in x it takes the fewest operations for each element
        of_inputs = (
            grad_z * self.scale
            + tf.cast(inputs, grad_z.dtype) * slope
            - (self.scale * mean_z + self.mean * slope)
        )
        return tf.cast(of_inputs, inputs.dtype)


@keras.saving.register_keras_serializable(package='warmstart')
class SqueezeExcite(keras.layers.Layer):
    """Batch normalisation, SiLU, and squeeze-and-excitation (Hu et al., 2018), as EfficientNets have them after a depthwise convolution.

    h = silu(bn(x)); output = h * sigmoid(expand(silu(reduce(mean(h))))), the mean being over height and width.

    `reduce` is applied to each pixel and its result averaged: the mean of products is the product of the mean, and a TPU reads h
    faster into its matrix unit than it adds it up. The gradient takes all its sums over pixels in one pass over x and the gradient of
    the output, apart for what comes through h and through the gate, so that the first need not wait for the second.

    Args:
        normalization: BatchNormalization with SiLU.
        reduce, expand: keras.layers.Conv2D, 1 x 1, with bias, SiLU and sigmoid.
    """

    def __init__(self, normalization, reduce, expand, **arguments):
        super().__init__(
            autocast=False, **arguments
        )  # its kernels and biases are read as they are, not rounded to a half
        self.normalization, self.reduce, self.expand = normalization, reduce, expand

    def build(self, shape):
        channels, reduced = (shape[0], 1, 1, shape[-1]), (shape[0], 1, 1, self.reduce.filters)
        for layer, of in (
            (self.normalization, shape),
            (self.reduce, channels),
            (self.expand, reduced),
        ):
            if not layer.built:  # it is where the layer was made of the config of one that was
                layer.build(of)

    def call(self, inputs, training=None, mask=None):
        inputs = tf.cast(inputs, self.compute_dtype)
        if not (training and self.normalization.trainable):
            features = self.normalization(inputs)
            return features * self.expand(
                self.reduce(tf.reduce_mean(features, (1, 2), keepdims=True))
            )
        gamma, beta, shift, _ = self.normalization.parameters(inputs.dtype)
        kernels = [
            tf.cast(variable, gamma.dtype)
            for layer in (self.reduce, self.expand)
            for variable in (layer.kernel[0, 0], layer.bias)
        ]
        output, mean, variance = self._train(shift, inputs, gamma, beta, *kernels)
        self.normalization.update(mean, variance)
        return output

    def _train(self, shift, *arguments):
        @tf.custom_gradient
        def train(inputs, gamma, beta, reduce, reduce_bias, expand, expand_bias):
            moments, pixels = (
                Moments(self.normalization, inputs, gamma, beta, shift),
                tf.cast(tf.size(inputs[0, ..., 0]), gamma.dtype),
            )
            features = _silu(moments.normalized(inputs))[0]
            reduced = tf.nn.conv2d(
                tf.cast(features, inputs.dtype),
                tf.cast(reduce, inputs.dtype)[None, None],
                1,
                'VALID',
            )  # [batch, height, width, reduced]
            squeezed = tf.reduce_sum(tf.cast(reduced, gamma.dtype), (1, 2)) / pixels + reduce_bias
            hidden, of_squeezed = _silu(squeezed)
            gate = tf.sigmoid(hidden @ expand + expand_bias)  # [batch, channels]

            def gradient(grad_output, *_):
                with tf.name_scope(
                    f'gradient_tape/{self.name}'
                ):  # where TensorFlow's own gradients are
                    return of_all(tf.cast(grad_output, gamma.dtype))

            def of_all(grad_output):
                features, derivative = _silu(moments.normalized(inputs))
                centered = moments.centered(inputs)

                def over_pixels(tensor):
                    return tf.reduce_sum(tensor, (1, 2))  # [batch, channels]

                grad_gate = over_pixels(grad_output * features) * gate * (1 - gate)
                grad_hidden = (grad_gate @ tf.transpose(expand)) * of_squeezed
                grad_mean = (
                    grad_hidden @ tf.transpose(reduce) / pixels
                )  # of the gradient of h, the part that is the same for each pixel
                grad_beta = tf.reduce_sum(
                    gate * over_pixels(grad_output * derivative)
                    + grad_mean * over_pixels(derivative),
                    0,
                )
                grad_gamma = (
                    tf.reduce_sum(
                        gate * over_pixels(grad_output * derivative * centered)
                        + grad_mean * over_pixels(derivative * centered),
                        0,
                    )
                    * moments.inverse
                )
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

            return (
                tf.cast(features * gate[:, None, None], inputs.dtype),
                moments.mean,
                moments.variance,
            ), gradient

        return train(*arguments)

    def get_config(self):
        return super().get_config() | {
            name: keras.saving.serialize_keras_object(getattr(self, name))
            for name in ('normalization', 'reduce', 'expand')
        }

    @classmethod
    def from_config(cls, config):
        return cls(
            **{
                key: keras.saving.deserialize_keras_object(value)
                if isinstance(value, dict) and key != 'dtype'
                else value
                for key, value in config.items()
            }
        )


def fuse(model, synchronized):
    """Puts the layers of this file into the place of Keras'.

    Args:
        model: the Keras config of a functional model, as `get_config` gives it; changed in place.
        synchronized: whether statistics are those of the global batch.
    """
    readers = {layer['name']: [] for layer in model['layers']}
    for layer in model['layers']:
        for history in _histories(layer['inbound_nodes']):
            readers[history[0]].append(layer)

    def follow(layer, *kinds):
        """The layers after `layer`, each of the kind that is asked for and the only reader of the one before; [] unless all are there."""
        found = []
        for kind, settings in kinds:
            following = readers[layer['name']]
            if (
                len(following) != 1
                or following[0]['class_name'] != kind
                or any(following[0]['config'][key] != value for key, value in settings.items())
            ):
                return []
            layer = following[0]
            found.append(layer)
        return found

    instead = {}  # of a layer that is now part of another: whose output to read
    for layer in [
        layer for layer in model['layers'] if layer['class_name'] == 'BatchNormalization'
    ]:
        settings, name = layer['config'] | {'synchronized': synchronized}, layer['name']
        activation = next(iter(follow(layer, ('Activation', {}))), None)
        if activation and activation['config']['activation'] in ACTIVATIONS:
            settings['activation'] = activation['config']['activation']
            instead[activation['name']] = name
        fused = BatchNormalization.from_config(settings)
        if fused.activation == 'silu' and len(readers[activation['name']]) == 2:
            gates = [
                follow(squeeze, *GATE)
                for squeeze in readers[activation['name']]
                if squeeze['class_name'] == 'GlobalAveragePooling2D'
            ]
            if any(gates):
                reshape, reduce, expand, multiply = gates[0]
                fused = SqueezeExcite(
                    fused,
                    *(keras.layers.Conv2D.from_config(part['config']) for part in (reduce, expand)),
                    name=multiply['name'],
                )
                squeeze = next(_histories(reshape['inbound_nodes']))[0]
                instead |= dict.fromkeys(
                    (
                        name,
                        activation['name'],
                        squeeze,
                        reshape['name'],
                        reduce['name'],
                        expand['name'],
                    ),
                    fused.name,
                )
                model['layers'].remove(multiply)
        layer.update(keras.saving.serialize_keras_object(fused), name=fused.name)
    model['layers'] = [layer for layer in model['layers'] if layer['name'] not in instead]
    for history in _histories(
        [
            [layer['inbound_nodes'] for layer in model['layers']],
            {'keras_history': model['output_layers']},
        ]
    ):
        history[0] = instead.get(history[0], history[0])


def _histories(node):
    """Every [layer, node, tensor] that is read in a part of a Keras config."""
    if isinstance(node, dict):
        if 'keras_history' in node:
            yield node['keras_history']
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for part in node:
            yield from _histories(part)
