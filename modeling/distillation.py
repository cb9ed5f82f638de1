"""A teacher that a model learns from (Hinton, Vinyals and Dean 2015): one of keras.applications, or a SavedModel."""

import inspect
import os
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from common.errors import ConfigError, RunError, one_line
from modeling import labels_file, saved_model_safety
from modeling.models import application
from modeling.pretrained import KERAS_FILES, read_labels

IMAGENET_CLASSES = 1000


class TeacherSource(NamedTuple):
    """Where a teacher comes from: its name for the user, and whether keras.applications downloads it."""

    name: str
    is_pretrained: bool


def make_teacher(config, class_names, pretrained=True):
    """The teacher of `config.distill`. Call it in the strategy's scope. Not `pretrained`, one of keras.applications has random weights.

    Returns: (a function from images float32 [batch, size, size, 3] in 0..255 to logits float32 [batch, classes], for the inside
        of a step, and its TeacherSource); the former is None when the config names none.

    Raises:
        ConfigError: no such model, or it knows another number of classes.
        RunError: its weights or its SavedModel cannot be had or used, or are of other classes.
    """
    name = config.distill.teacher
    if not name:
        return None, TeacherSource('', is_pretrained=False)
    is_folder = os.sep in name or tf.io.gfile.isdir(name)
    predict, size, origin = (
        _saved_teacher(name, class_names)
        if is_folder
        else _application_teacher(config.distill, len(class_names), pretrained)
    )

    def teacher(images):
        if None not in size and images.shape[1:3] != size:
            images = resize(images, size)
        answers = tf.cast(predict(images), tf.float32)  # [batch, classes]
        # Whether they are probabilities shows in the numbers. Their logarithms are logits, up to a constant that softmax ignores.
        are_probabilities = tf.reduce_all(answers >= 0) & tf.reduce_all(
            tf.abs(tf.reduce_sum(answers, -1) - 1) < 1e-2
        )
        return tf.stop_gradient(
            tf.where(are_probabilities, tf.math.log(tf.maximum(answers, 1e-20)), answers)
        )

    return teacher, origin


def resize(images: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """Resizes a batch, float32 [batch, height, width, channels], as `inputs.image_ops.resize` does.

    That takes an operation which processors alone have. Here a side that shrinks is multiplied by a
    matrix of shares, which XLA compiles for any device (and of which a TPU keeps eight bits).
    """
    for side, equation in ((0, 'oh,bhwc->bowc'), (1, 'ow,bhwc->bhoc')):
        pixels, wanted = images.shape[1 + side], size[side]
        if pixels > wanted:
            shares = tf.constant(_box_filter(pixels, wanted), images.dtype)
            images = tf.einsum(equation, shares, images)
    return tf.image.resize(images, size)


def _box_filter(pixels: int, wanted: int) -> np.ndarray:
    """Returns the share that each pixel has in each of the result: float64 [wanted, pixels]."""
    ends = np.arange(wanted + 1)[:, None] * pixels / wanted
    first, last = np.arange(pixels), np.arange(1, pixels + 1)
    covered = np.clip(ends[1:], first, last) - np.clip(ends[:-1], first, last)
    return covered * wanted / pixels


def _application_teacher(distill, num_classes, pretrained):
    """(function from images to answers, (height, width) it wants or (None, None), who it is) of a model of keras.applications with its head."""
    constructor, preprocess = application(distill.teacher, 'config.distill.teacher')
    if distill.weights != 'imagenet' and not distill.weights.endswith(KERAS_FILES):
        raise ConfigError(
            f"config.distill.weights={distill.weights!r} is no source of weights: write 'imagenet', or a file that ends in .weights.h5"
        )
    classes = IMAGENET_CLASSES if distill.weights == 'imagenet' else num_classes
    if classes != num_classes:
        raise ConfigError(
            f"config.distill.teacher={distill.teacher!r} knows ImageNet's {classes:,} classes, and this data set has {num_classes:,}: "
            'train a teacher on it first, with config.model.name, and give its run here'
        )
    linear = (
        {'classifier_activation': None}
        if 'classifier_activation' in inspect.signature(constructor).parameters
        else {}
    )
    try:
        model = constructor(
            weights=distill.weights if pretrained else None, classes=classes, **linear
        )
    except Exception as error:
        raise RunError(
            f'config.distill.weights={distill.weights!r} could not be loaded into {distill.teacher}: {one_line(error)}'
        ) from error
    model.trainable = False
    return (
        lambda images: model(preprocess(images), training=False),
        model.input_shape[1:3],
        TeacherSource(f'{distill.teacher} ({distill.weights})', distill.weights == 'imagenet'),
    )


def _saved_teacher(source, class_names):
    """The same of a SavedModel, or of the one of a run."""
    path = next(
        (
            path
            for path in (os.path.join(source, 'export'), source)
            if tf.io.gfile.exists(os.path.join(path, 'saved_model.pb'))
        ),
        None,
    )
    if path is None:
        raise RunError(
            f'config.distill.teacher={source!r} is neither a SavedModel nor a run that has exported one: train the teacher first'
        )
    has_labels = tf.io.gfile.exists(os.path.join(path, labels_file.NAME))
    if has_labels and read_labels(os.path.join(path, labels_file.NAME)) != list(class_names):
        raise RunError(
            f'{path} knows other classes than this data set, or in another order: train the teacher on the same data'
        )
    try:
        loaded = saved_model_safety.load(path)
        name = 'logits' if 'logits' in loaded.signatures else 'serving_default'
        signature = loaded.signatures[name]
    except RunError:
        raise
    except (
        Exception
    ) as error:  # KeyError, ValueError, IndexError, an OpError, ... by where it is damaged
        raise RunError(
            f'{path} cannot teach: it has no signature serving_default, or is damaged ({type(error).__name__}: {one_line(error, 200)})'
        ) from error
    inputs, outputs = signature.structured_input_signature[1], signature.structured_outputs
    _require_pictures_to_answers(path, name, inputs, outputs, len(class_names))
    ((argument, wanted),) = inputs.items()
    answer = 'logits' if 'logits' in outputs else next(iter(outputs))

    def predict(images, keep=loaded):  # a signature does not keep its variables alive
        return signature(
            **{
                argument: tf.cast(
                    tf.round(images) if wanted.dtype.is_integer else images, wanted.dtype
                )
            }
        )[answer]

    name = path if has_labels else f'{path}, whose classes are taken to be these, in this order'
    return (
        predict,
        tuple(wanted.shape[1:3]),
        TeacherSource(name, is_pretrained=False),
    )


def _require_pictures_to_answers(path, name, inputs, outputs, num_classes):
    """Raises RunError unless a signature takes any number of pictures and gives an answer for each class."""

    def fits(spec, wanted):
        return (
            spec.shape.rank == len(wanted)
            and spec.shape[0] is None
            and all(None in pair or len(set(pair)) == 1 for pair in zip(spec.shape, wanted))
        )

    takes_pictures = len(inputs) == 1 and all(
        fits(spec, (None, None, None, 3)) and spec.dtype in (tf.float32, tf.uint8)
        for spec in inputs.values()
    )
    answers = [outputs['logits']] if 'logits' in outputs else list(outputs.values())
    if not takes_pictures or len(answers) != 1 or not fits(answers[0], (None, num_classes)):
        has = [
            ', '.join(f'{key} {spec.dtype.name} {spec.shape}' for key, spec in specs.items())
            for specs in (inputs, outputs)
        ]
        raise RunError(
            f'{path} cannot teach: its signature {name} must take float32 or uint8 (None, height, width, 3) and give (None, {num_classes}), '
            f'but it takes {has[0]} and gives {has[1]}'
        )
