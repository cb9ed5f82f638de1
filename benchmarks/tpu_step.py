"""Estimated cycles of the EfficientNetV2B0 training step on one v5e chip, ours beside Keras' own:
128 pictures of 224 pixels, one compiler.

    python benchmarks/tpu_step.py [CASE ...] [--output=benchmarks/results/tpu_step.json]

Ours is the step of configs/imagenet.py, whole: flips, drop-path, L2, RMSProp, averaged weights.
Keras' are a bare model with a bare optimizer. The cases that begin with 'without' undo one thing
each, 'with' is what was tried and left out; the pieces are single operations, written in two ways.
A step takes two to four minutes to compile.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.update(KERAS_BACKEND='tensorflow', CUDA_VISIBLE_DEVICES='-1')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402

from configs import imagenet  # noqa: E402
from devices.lowering import OneOfMany, lower  # noqa: E402
from diagnostics import installation, preflight, tpu_compiler  # noqa: E402
from experiment import planning  # noqa: E402
from inputs import augment  # noqa: E402
from modeling import fused_layers, models, steps  # noqa: E402

BATCH, SIZE, CLASSES, TOPOLOGY = 128, 224, 1000, tpu_compiler.Topology.parse('v5e')
# Of a depthwise convolution of block 5, the most expensive kind.
EXCITED = (BATCH, 14, 14, 672)
KERNEL = (3, 3, 672, 1)


def ours(change=None, batch_size=BATCH, **values):
    """The step of configs/imagenet.py, with something changed while it is built."""
    config = imagenet.get_config()
    config.batch_size = batch_size
    config.update(values)
    plan = planning.make_plan(config, 1_281_167, 50_000, CLASSES, 1)
    with change or contextlib.nullcontext():
        return preflight.lower_training(config, plan, TOPOLOGY)


def without_gates_in_one_layer():
    return mock.patch.object(fused_layers, 'GATE', (('None', {}),))


def with_choices_apart():
    return mock.patch.object(steps, 'MIN_SHARED', 10_000)


def with_a_sum_for_each_vector():
    return mock.patch.object(steps, '_global_norm', tf.linalg.global_norm)


def with_a_draw_for_each_branch():
    def call(self, inputs, training=False):
        seed = self.seed_generator.next() + (self.row, 0)
        return (
            tf.nn.experimental.stateless_dropout(
                inputs, self.rate, seed, noise_shape=(inputs.shape[0], 1, 1, 1)
            )
            if training
            else inputs
        )

    return mock.patch.object(models.DropPath, 'call', call)


def flips_after_the_cast():
    """The flip of floating-point pictures, as any layer for pictures does it."""
    usual = augment.make_device_augment

    def on_device(settings, num_classes):
        change = usual(settings, num_classes)
        return lambda images, labels, drawn: change(tf.cast(images, tf.float32), labels, drawn)

    return mock.patch.object(augment, 'make_device_augment', on_device)


def keras_on_tensorflow(policy, optimizer):
    """keras.applications' model with a Keras optimizer, as it is."""
    keras.backend.clear_session()
    keras.config.set_dtype_policy(policy)
    strategy = OneOfMany(1)
    with strategy.scope():
        model = keras.applications.EfficientNetV2B0(
            weights=None, classes=CLASSES, input_shape=(SIZE, SIZE, 3), classifier_activation=None
        )
        optimizer = optimizer()
        optimizer.build(model.trainable_variables)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def step(images, labels):
        with tf.GradientTape() as tape:
            value = loss(labels, model(images, training=True))
        optimizer.apply(
            tape.gradient(value, [variable.value for variable in model.trainable_variables]),
            model.trainable_variables,
        )
        return value

    return lower(
        strategy, step, (tf.TensorSpec((BATCH, SIZE, SIZE, 3)), tf.TensorSpec((BATCH,), tf.int32))
    ).hlo


ON_JAX = f"""
import jax, keras, sys
keras.config.set_dtype_policy('mixed_bfloat16')
model = keras.applications.EfficientNetV2B0(weights=None, classes={CLASSES},
    input_shape=({SIZE}, {SIZE}, 3), classifier_activation=None)
optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
optimizer.build(model.trainable_variables)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

def step(trained, others, slots, images, labels):
    def of(trained, others):
        logits, others = model.stateless_call(trained, others, images, training=True)
        return loss(labels, logits), others
    (value, others), gradients = jax.value_and_grad(of, has_aux=True)(trained, others)
    return value, *optimizer.stateless_apply(slots, gradients, trained), others

state = model.trainable_variables, model.non_trainable_variables, optimizer.variables
values = [[variable.value for variable in variables] for variables in state]
images = jax.ShapeDtypeStruct(({BATCH}, {SIZE}, {SIZE}, 3), 'float32')
labels = jax.ShapeDtypeStruct(({BATCH},), 'int32')
lowered = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*values, images, labels)
open(sys.argv[1], 'wb').write(lowered.compiler_ir('hlo').as_serialized_hlo_module_proto())
"""


def keras_on_jax():
    """The same model and SGD with Keras on JAX, in an environment of its own."""
    folder = os.path.join(tpu_compiler.cache_folder(), 'keras-on-jax')
    python = os.path.join(folder, 'bin', 'python')
    if not os.path.exists(os.path.join(folder, 'installed')):
        subprocess.run([sys.executable, '-m', 'venv', '--clear', folder], check=True)
        pins = [f'{name}=={version}' for name, version in installation.compiler_pins().items()]
        install = [python, '-m', 'pip', 'install', '--quiet', *pins, f'keras=={keras.__version__}']
        subprocess.run(install, check=True)
        with open(os.path.join(folder, 'installed'), 'w'):
            pass
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, 'step.hlo')
        subprocess.run(
            [python, '-c', ON_JAX, path],
            check=True,
            env={**os.environ, 'KERAS_BACKEND': 'jax', 'JAX_PLATFORMS': 'cpu'},
        )
        with open(path, 'rb') as file:
            return file.read()


def piece(function, *shapes):
    """A function of bfloat16 tensors."""
    return lower(
        OneOfMany(1), function, tuple(tf.TensorSpec(shape, tf.bfloat16) for shape in shapes)
    ).hlo


def as_nine_products(images, kernel):
    """A depthwise convolution as nine shifted products."""
    padded, total = tf.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))), 0
    for row in range(3):
        for column in range(3):
            total += tf.cast(padded[:, row : row + 14, column : column + 14], tf.float32) * tf.cast(
                kernel[row, column, :, 0], tf.float32
            )
    return tf.cast(total, tf.bfloat16)


CASES = {
    "Keras on TensorFlow, float32, Adam (the article's)": lambda: keras_on_tensorflow(
        'float32', lambda: keras.optimizers.Adam(1e-3)
    ),
    'Keras on TensorFlow, mixed_bfloat16, SGD': lambda: keras_on_tensorflow(
        'mixed_bfloat16', lambda: keras.optimizers.SGD(0.1, momentum=0.9)
    ),
    'Keras on JAX, mixed_bfloat16, SGD': keras_on_jax,
    'ours': ours,
    'without skipping updates that are not finite': lambda: ours(max_skipped_updates=0),
    "without any of it: Keras' layers in our step": lambda: ours(
        mock.patch.object(models, 'fuse', lambda model, synchronized: None)
    ),
    'without squeeze-and-excitation in one layer': lambda: ours(without_gates_in_one_layer()),
    'without choosing vectors of one length together': lambda: ours(with_choices_apart()),
    'without joining vectors for their norm': lambda: ours(with_a_sum_for_each_vector()),
    'without one draw for all branches': lambda: ours(with_a_draw_for_each_branch()),
    'with sigmoid by tanh': lambda: ours(
        mock.patch.object(fused_layers.tf, 'sigmoid', lambda z: 0.5 + 0.5 * tf.tanh(0.5 * z))
    ),
    'without flipping bytes': lambda: ours(flips_after_the_cast()),
    'without pictures normalised in float32': lambda: ours(
        mock.patch.object(models, 'wide_dtype', lambda: 'mixed_bfloat16')
    ),
    'ours, 64 pictures': lambda: ours(batch_size=64),
    'ours, 256 pictures': lambda: ours(batch_size=256),
    'ours, 512 pictures': lambda: ours(batch_size=512),
    'piece: depthwise convolution': lambda: piece(
        lambda images, kernel: tf.nn.depthwise_conv2d(images, kernel, (1, 1, 1, 1), 'SAME'),
        EXCITED,
        KERNEL,
    ),
    'piece: the same as nine shifted products': lambda: piece(as_nine_products, EXCITED, KERNEL),
    'piece: mean over pixels': lambda: piece(
        lambda images: tf.reduce_mean(tf.cast(images, tf.float32), (1, 2)), EXCITED
    ),
    'piece: 28 channels of each pixel, then their mean': lambda: piece(
        lambda images, kernel: tf.reduce_mean(
            tf.cast(tf.nn.conv2d(images, kernel, 1, 'VALID'), tf.float32), (1, 2)
        ),
        EXCITED,
        (1, 1, 672, 28),
    ),
    'piece: first convolution': lambda: piece(
        lambda images, kernel: tf.nn.conv2d(images, kernel, 2, 'SAME'),
        (BATCH, SIZE, SIZE, 3),
        (3, 3, 3, 32),
    ),
    'piece: the same after space-to-depth, without its cost': lambda: piece(
        lambda images, kernel: tf.nn.conv2d(images, kernel, 1, 'SAME'),
        (BATCH, SIZE // 2, SIZE // 2, 12),
        (2, 2, 12, 32),
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('cases', nargs='*', help=f'some of: {"; ".join(CASES)}')
    parser.add_argument('--output')
    arguments = parser.parse_args()
    if set(arguments.cases) - set(CASES):
        parser.error(f'no such case: {", ".join(set(arguments.cases) - set(CASES))}')
    results = {}
    if arguments.output and os.path.exists(arguments.output):
        with open(arguments.output) as file:
            results = json.load(file)
    for name in arguments.cases or CASES:
        program = tpu_compiler.compile_program(
            CASES[name],
            TOPOLOGY,
            'benchmark',
            name,
            *preflight.description(imagenet.get_config(), None),
        )
        pictures = int(name.split(', ')[1].split()[0]) if name.endswith('pictures') else BATCH
        results[name] = {
            'cycles': program.cycles,
            'images_per_second': round(pictures * TOPOLOGY.chip.clock / program.cycles),
            'hbm_gb': round(program.hbm_traffic / 1e9, 2),
            'memory_gb': round(program.memory_bytes / 1e9, 2),
            'compiler': program.compiler,
        }
        print(
            f'{name:52} {program.cycles / 1e6:8.3f} M cycles '
            f'{results[name]["images_per_second"]:8,} pictures/s {results[name]["hbm_gb"]:6} GB '
            'of HBM traffic',
            flush=True,
        )
        if arguments.output:
            with open(arguments.output, 'w') as file:
                json.dump(
                    {case: results[case] for case in CASES if case in results}, file, indent=1
                )


if __name__ == '__main__':
    main()
