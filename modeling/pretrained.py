"""Loads the weights that a model starts with: from keras.applications, a file, or another run."""

import json
import os
import re
from collections.abc import Callable, Sequence
from typing import IO, Any

import keras
import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from common.errors import ConfigError, RunError, did_you_mean, one_line
from modeling import labels_file
from modeling.models import NETWORKS, find_application, float_variables, input_shape

# Weights of a keras.applications model: without its head here, with it for a teacher.
KERAS_FILES = ('.h5', '.keras')
SAVED_VARIABLES = '/variables/variables'  # where a SavedModel has its checkpoint


def load_weights(
    model: keras.Model,
    config: ConfigDict,
    class_names: Sequence[str],
    find_checkpoint: Callable[[str], str | None],
) -> str:
    """Gives a new model the weights that `config.model.weights` names, as far as they fit.

    It reads numbers and runs no code.

    Args:
        model: what `build_model` returned.
        config: `model.name` and `model.weights` are used. The latter is 'imagenet' or a file of
            Keras weights, which keras.applications reads into the backbone; or a run of your own:
            its folder, one of its checkpoints, or its SavedModel. If the run has averages, they are
            loaded. The head is loaded too if its classes are known to be `class_names`.
        class_names: in the order of the head.
        find_checkpoint: `outputs.checkpoints.find_checkpoint`.

    Returns: a line that says what was loaded and what was not.

    Raises: RunError for weights that are missing or belong to another model.
    """
    source, wanted = config.model.weights, float_variables(model)
    if source == 'imagenet' or source.endswith(KERAS_FILES):
        path, loaded, reason = source, _keras_weights(config), 'these weights have none'
    else:
        path = _checkpoint_in(source, find_checkpoint)
        loaded = _numbered_weights(path, source)
        _require_same_network(wanted, loaded, path, config.model.name)
        reason = _why_head_differs(_class_names_beside(path), list(class_names))
        if reason:
            loaded = loaded[:-2]
    # The loaded weights may lack the head.
    for variable, value in zip(wanted, loaded, strict=False):
        variable.assign(value)
    features, classes = wanted[-2].shape
    head = 'the head too'
    if reason:
        head = f'the head is new, {features:,} features to {classes:,} classes: {reason}'
    numbers = sum(value.size for value in loaded)
    shown_path = re.sub('(/variables)+$', '', path)
    loaded_part = f'{len(loaded)} of {len(wanted)} variables ({numbers:,} parameters)'
    return f'{loaded_part} from {shown_path}; {head}'


def save_backbone(model: keras.Model, config: ConfigDict, path: str) -> None:
    """Writes all but the head of a model of keras.applications as a file of Keras weights.

    Its constructor reads that file, with include_top=False.
    """
    backbone = _build_backbone(config, weights=None)
    # The model also has a head.
    for theirs, ours in zip(float_variables(backbone), float_variables(model), strict=False):
        theirs.assign(ours)
    backbone.save_weights(path)


def _why_head_differs(classes: list[str] | None, wanted: list[str]) -> str:
    if classes == wanted:
        return ''
    return (
        'the loaded one has other classes'
        if classes
        else 'the classes of the loaded one are unknown'
    )


def _build_backbone(config: ConfigDict, **arguments: Any) -> keras.Model:
    constructor, _ = find_application(config.model.name)
    return constructor(
        include_top=False, input_shape=input_shape(config), pooling='avg', **arguments
    )


def _keras_weights(config: ConfigDict) -> list[np.ndarray]:
    """Returns the weights of a backbone from keras.applications or a file of Keras weights.

    Keras reads only the numbers of such a file: it creates no layer described in it, and opens no
    file it refers to.
    """
    if config.model.name in NETWORKS:
        raise ConfigError(
            f'config.model.name={config.model.name!r} has no pretrained weights',
            "leave config.model.weights at '', or name a run of your own",
            'model.weights',
        )
    try:
        backbone = _build_backbone(config, weights=config.model.weights)
    except Exception as error:
        raise RunError(
            f'config.model.weights={config.model.weights!r} could not be loaded into '
            f'{config.model.name}: {one_line(error)}',
            key='model.weights',
        ) from error
    return [variable.numpy() for variable in float_variables(backbone)]


def _checkpoint_in(source: str, find_checkpoint: Callable[[str], str | None]) -> str:
    """Returns the checkpoint that `source` names or contains.

    It is that of a SavedModel or of a run, or any TensorFlow checkpoint.
    """
    try:
        if tf.io.gfile.exists(os.path.join(source, 'saved_model.pb')):
            return source.rstrip('/') + SAVED_VARIABLES
        found = find_checkpoint(source)
        if found:
            return found
        if tf.io.gfile.exists(re.sub(r'(\.index)?$', '.index', source, count=1)):
            return re.sub(r'\.index$', '', source)
        what = 'holds no weights' if tf.io.gfile.exists(source) else 'is not there'
    except tf.errors.OpError as error:  # in a bucket
        what = f'cannot be reached ({one_line(error, 150)})'
    raise RunError(
        f'config.model.weights={source!r} {what}',
        "write 'imagenet', a file that ends in .h5 or .keras, or the folder of a run, of one of "
        'its checkpoints, such as runs/NAME/checkpoints/best, or of its SavedModel'
        + did_you_mean(source, ['imagenet']),
        'model.weights',
    )


def _numbered_weights(path: str, source: str) -> list[np.ndarray]:
    """Returns arrays in the order of `float_variables(model)`.

    Our checkpoints and SavedModels both number them, so Keras' names do not matter.
    """
    try:
        reader = tf.train.load_checkpoint(path)
        kinds = reader.get_variable_to_dtype_map()
        for part in ('average', 'model', 'variables'):  # the last is Keras' word in a SavedModel
            pattern = part + r'/[0-9]+(/\.ATTRIBUTES/VARIABLE_VALUE)?'
            numbered = {
                int(key.split('/')[1]): key
                for key, kind in kinds.items()
                if re.fullmatch(pattern, key) and kind.is_floating
            }
            if numbered:
                return [reader.get_tensor(numbered[number]) for number in sorted(numbered)]
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        raise RunError(
            f'config.model.weights={source!r} is damaged ({one_line(error, 200)})',
            'take another checkpoint',
            'model.weights',
        ) from error
    raise RunError(
        f'config.model.weights={source!r} was not written by this program: it has no numbered list '
        'of weights',
        key='model.weights',
    )


def _require_same_network(
    wanted: list[keras.Variable], loaded: list[np.ndarray], path: str, name: str
) -> None:
    """Raises RunError unless all but the head have the same shapes."""
    differing = [
        f'; {variable.path} is {tuple(variable.shape)} here and {value.shape} there'
        for variable, value in zip(wanted[:-2], loaded, strict=False)
        if variable.shape != value.shape
    ]
    if len(wanted) != len(loaded) or differing:
        raise RunError(
            f'{path} is from a different network than config.model.name={name!r}: it has '
            f'{len(loaded)} variables, and this one {len(wanted)}{"".join(differing[:1])}',
            'use the model.name it was trained with',
            'model.name',
        )


def _class_names_beside(path: str) -> list[str] | None:
    """Returns the classes of a checkpoint: runs and SavedModels list them in a file above it."""
    folder = path
    for _ in range(3):  # as deep as checkpoints/step-500/variables in a run
        folder = os.path.dirname(folder)
        if tf.io.gfile.exists(os.path.join(folder, labels_file.NAME)):
            return read_labels(os.path.join(folder, labels_file.NAME))
        if tf.io.gfile.exists(os.path.join(folder, 'environment.json')):
            return _read(os.path.join(folder, 'environment.json'), json.load).get('class_names')
    return None


def read_labels(path: str) -> list[str]:
    """Returns the names in a labels.txt. Raises RunError for a damaged one."""
    return _read(path, lambda file: labels_file.from_text(file.read().decode()))


def _read(path: str, read: Callable[[IO[bytes]], Any]) -> Any:
    """Returns what `read` makes of a binary file. Raises RunError for a damaged one."""
    try:
        with tf.io.gfile.GFile(path, 'rb') as file:
            return read(file)
    except (ValueError, tf.errors.OpError) as error:
        raise RunError(
            f'{path}, which lists the classes of these weights, is damaged ({one_line(error, 100)})'
        ) from error
