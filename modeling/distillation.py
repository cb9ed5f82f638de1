"""Knowledge distillation (Hinton, Vinyals and Dean 2015).

The teacher is a model of keras.applications or a SavedModel.
"""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from common.errors import ConfigError, RunError, one_line
from modeling import labels_file, saved_model_safety
from modeling.models import find_application
from modeling.pretrained import KERAS_FILES, read_labels

IMAGENET_CLASSES = 1000


class Teacher(NamedTuple):
    """The model that another one learns from.

    Attributes:
        predict: maps images float32 [batch, size, size, 3] in 0..255 to logits float32 [batch,
            classes], inside a step.
        name: a description.
        is_pretrained: whether its weights come with keras.applications.
    """

    predict: Callable[[tf.Tensor], tf.Tensor]
    name: str
    is_pretrained: bool


class _Network(NamedTuple):
    """A `Teacher` whose outputs may be probabilities, and that may need its own image size.

    Attributes:
        size: (height, width) that it needs; None for any.
    """

    predict: Callable[[tf.Tensor], tf.Tensor]
    size: tuple[int | None, int | None]
    name: str
    is_pretrained: bool


def make_teacher(
    config: ConfigDict, class_names: Sequence[str], pretrained: bool = True
) -> Teacher | None:
    """Builds the teacher of `config.distill`, if it names one; call it in the strategy's scope.

    Args:
        class_names: of the data set, in the order of the labels.
        pretrained: False gives a teacher of keras.applications random weights.

    Raises:
        ConfigError: there is no such model, or it has another number of classes.
        RunError: its weights or its SavedModel are unavailable, unusable, or of other classes.
    """
    name = config.distill.teacher
    if not name:
        return None
    if os.sep in name or tf.io.gfile.isdir(name):
        network = _saved_teacher(name, class_names)
    else:
        network = _application_teacher(config.distill, len(class_names), pretrained)

    def predict(images: tf.Tensor) -> tf.Tensor:
        height, width = network.size
        if height and width and images.shape[1:3] != (height, width):
            images = resize(images, (height, width))
        outputs = tf.cast(network.predict(images), tf.float32)  # [batch, classes]
        # Their values show whether the outputs are probabilities, whose logarithms are logits up to
        # a constant that softmax ignores.
        sums_to_1 = tf.abs(tf.reduce_sum(outputs, -1) - 1) < 1e-2
        are_probabilities = tf.reduce_all(outputs >= 0) & tf.reduce_all(sums_to_1)
        logits = tf.where(are_probabilities, tf.math.log(tf.maximum(outputs, 1e-20)), outputs)
        return tf.stop_gradient(logits)

    return Teacher(predict, network.name, network.is_pretrained)


def resize(images: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """Resizes a batch, float32 [batch, height, width, channels], as `inputs.image_ops.resize` does.

    That uses an operation that only CPUs have. Here a side that shrinks is multiplied by a matrix
    of weights, which XLA compiles for any device (a TPU rounds the weights to eight significant
    bits).
    """
    for side, equation in ((0, 'oh,bhwc->bowc'), (1, 'ow,bhwc->bhoc')):
        pixels, wanted = images.shape[1 + side], size[side]
        if pixels > wanted:
            shares = tf.constant(_box_filter(pixels, wanted), images.dtype)
            images = tf.einsum(equation, shares, images)
    return tf.image.resize(images, size)


def _box_filter(pixels: int, wanted: int) -> np.ndarray:
    """Returns the weight of each pixel in each pixel of the result: float64 [wanted, pixels]."""
    ends = np.arange(wanted + 1)[:, None] * pixels / wanted
    first, last = np.arange(pixels), np.arange(1, pixels + 1)
    covered = np.clip(ends[1:], first, last) - np.clip(ends[:-1], first, last)
    return covered * wanted / pixels


def _application_teacher(distill: ConfigDict, num_classes: int, pretrained: bool) -> _Network:
    """Builds a teacher of keras.applications with its head."""
    constructor, preprocess = find_application(distill.teacher, 'distill.teacher')
    if distill.weights != 'imagenet' and not distill.weights.endswith(KERAS_FILES):
        raise ConfigError(
            f'config.distill.weights={distill.weights!r} is not a source of weights',
            "write 'imagenet', or a file that ends in .h5 or .keras",
            'distill.weights',
        )
    classes = IMAGENET_CLASSES if distill.weights == 'imagenet' else num_classes
    if classes != num_classes:
        raise ConfigError(
            f"config.distill.teacher={distill.teacher!r} knows ImageNet's {classes:,} classes, "
            f'but this data set has {num_classes:,}',
            'train a teacher on it first, with config.model.name, and give its run here',
            'distill.teacher',
        )
    arguments = {'weights': distill.weights if pretrained else None, 'classes': classes}
    if 'classifier_activation' in inspect.signature(constructor).parameters:
        arguments['classifier_activation'] = None
    try:
        model = constructor(**arguments)
    except Exception as error:
        raise RunError(
            f'config.distill.weights={distill.weights!r} could not be loaded into '
            f'{distill.teacher}: {one_line(error)}',
            key='distill.weights',
        ) from error
    model.trainable = False

    def predict(images: tf.Tensor) -> tf.Tensor:
        return model(preprocess(images), training=False)

    name = f'{distill.teacher} ({distill.weights})'
    return _Network(predict, model.input_shape[1:3], name, distill.weights == 'imagenet')


def _saved_teacher(source: str, class_names: Sequence[str]) -> _Network:
    """Loads a teacher from a SavedModel, or from a run's."""
    path = _saved_model_in(source)
    labels = os.path.join(path, labels_file.NAME)
    has_labels = tf.io.gfile.exists(labels)
    if has_labels and read_labels(labels) != list(class_names):
        raise RunError(
            f'{path} has other classes than this data set, or has them in another order',
            'train the teacher on the same data',
            'distill.teacher',
        )
    try:
        loaded = saved_model_safety.load(path)
        name = 'logits' if 'logits' in loaded.signatures else 'serving_default'
        signature = loaded.signatures[name]
    except RunError:
        raise
    except Exception as error:
        # KeyError, ValueError, IndexError or OpError, depending on what is damaged.
        raise RunError(
            f'{path} cannot be a teacher: it has no signature serving_default, or is damaged '
            f'({type(error).__name__}: {one_line(error, 200)})',
            key='distill.teacher',
        ) from error
    inputs, outputs = signature.structured_input_signature[1], signature.structured_outputs
    _require_classifier_signature(path, name, inputs, outputs, len(class_names))
    ((argument, wanted),) = inputs.items()
    output = 'logits' if 'logits' in outputs else next(iter(outputs))

    # The default argument keeps the SavedModel alive.
    def predict(images: tf.Tensor, _loaded: Any = loaded) -> tf.Tensor:
        if wanted.dtype.is_integer:
            images = tf.round(images)
        return signature(**{argument: tf.cast(images, wanted.dtype)})[output]

    name = path if has_labels else f'{path}, assumed to have the same classes in the same order'
    return _Network(predict, tuple(wanted.shape[1:3]), name, is_pretrained=False)


def _saved_model_in(source: str) -> str:
    """Returns the SavedModel's folder: `source`, or the export of the run `source`."""
    for path in (os.path.join(source, 'export'), source):
        if tf.io.gfile.exists(os.path.join(path, 'saved_model.pb')):
            return path
    raise RunError(
        f'config.distill.teacher={source!r} is neither a SavedModel nor a run that has exported '
        'one',
        'train the teacher first',
        'distill.teacher',
    )


def _require_classifier_signature(
    path: str,
    name: str,
    inputs: Mapping[str, tf.TensorSpec],
    outputs: Mapping[str, tf.TensorSpec],
    num_classes: int,
) -> None:
    """Raises RunError unless a signature maps any number of images to an output for each class."""

    def fits(spec: tf.TensorSpec, wanted: tuple[int | None, ...]) -> bool:
        return (
            spec.shape.rank == len(wanted)
            and spec.shape[0] is None
            and all(
                None in (size, other) or size == other
                for size, other in zip(spec.shape, wanted, strict=True)
            )
        )

    takes_images = len(inputs) == 1 and all(
        fits(spec, (None, None, None, 3)) and spec.dtype in (tf.float32, tf.uint8)
        for spec in inputs.values()
    )
    answers = [outputs['logits']] if 'logits' in outputs else list(outputs.values())
    if not takes_images or len(answers) != 1 or not fits(answers[0], (None, num_classes)):
        shown = [
            ', '.join(f'{key} {spec.dtype.name} {spec.shape}' for key, spec in specs.items())
            for specs in (inputs, outputs)
        ]
        raise RunError(
            f'{path} cannot be a teacher: its signature {name} must take float32 or uint8 (None, '
            f'height, width, 3) and give (None, {num_classes}), but it takes {shown[0]} and gives '
            f'{shown[1]}',
            key='distill.teacher',
        )
