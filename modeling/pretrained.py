"""Where knowledge comes from that is not in the data: weights that a model begins with, and a teacher that it learns from."""

import json
import os
import re

import tensorflow as tf

from common.errors import ConfigError, RunError, did_you_mean, one_line
from modeling import labels_file
from modeling.models import application, float_variables, input_shape

KERAS_FILES = ('.h5', '.keras')  # of the weights of a model of keras.applications without its head
IMAGENET_CLASSES = 1000
SAVED_VARIABLES = '/variables/variables'  # where a SavedModel has its checkpoint


def load_weights(model, config, class_names, find_checkpoint):
    """Gives a new model the weights that `config.model.weights` names, as far as they fit. Reads numbers, runs no code.

    Args:
        model: what `build_model` returned.
        config: `model.name` and `model.weights` are used. The latter is 'imagenet' or a file of Keras weights, which
            keras.applications reads into the backbone; or a run of one's own: its folder, one of its checkpoints, or its
            SavedModel. Of a run with averages these are taken. The head is taken too if its classes are known to be `class_names`.
        class_names: list of str, in the order of the head.
        find_checkpoint: `outputs.checkpoints.find`.

    Returns: a line that says what was loaded and what was not.

    Raises: RunError for weights that are not there or of another model.
    """
    source, wanted = config.model.weights, float_variables(model)
    if source == 'imagenet' or source.endswith(KERAS_FILES):
        path, loaded, reason = source, _of_keras(config), 'it comes without one'
    else:
        path = _checkpoint_in(source, find_checkpoint)
        loaded, classes = _numbered_weights(path, source), _class_names_beside(path)
        _require_same_network(wanted, loaded, path, config.model.name)
        reason = (
            ''
            if classes == list(class_names)
            else 'its classes are others'
            if classes
            else 'nothing says what its classes are'
        )
        loaded = loaded[:-2] if reason else loaded
    for variable, value in zip(wanted, loaded):
        variable.assign(value)
    features, classes = wanted[-2].shape
    head = (
        f'the head is new, {features:,} features to {classes:,} classes: {reason}'
        if reason
        else 'the head too'
    )
    return f'{len(loaded)} of {len(wanted)} variables ({sum(value.size for value in loaded):,} numbers) from {re.sub("(/variables)+$", "", path)}; {head}'


def save_backbone(model, config, path):
    """Writes all but the head of a model of keras.applications as a file of Keras weights that its constructor reads, with include_top=False."""
    plain = _plain(config, weights=None)
    for variable, of_ours in zip(float_variables(plain), float_variables(model)):
        variable.assign(of_ours)
    plain.save_weights(path)


def _plain(config, **arguments):
    constructor, _ = application(config.model.name)
    return constructor(
        include_top=False, input_shape=input_shape(config), pooling='avg', **arguments
    )


def _of_keras(config):
    """The weights of a backbone, as arrays, from keras.applications or from a file of Keras weights, of which Keras reads the numbers alone:
    no layer that is described in it is made, and no file that it refers to is opened."""
    if config.model.name == 'tiny':
        raise ConfigError(
            "config.model.name='tiny' has no pretrained weights: leave config.model.weights at '', or name a run of your own"
        )
    try:
        plain = _plain(config, weights=config.model.weights)
    except Exception as error:
        raise RunError(
            f'config.model.weights={config.model.weights!r} could not be loaded into {config.model.name}: {one_line(error)}'
        ) from error
    return [variable.numpy() for variable in float_variables(plain)]


def _checkpoint_in(source, find_checkpoint):
    """The file of variables that `source` names or holds: a SavedModel's, a checkpoint's of a run, any of TensorFlow's."""
    try:
        if tf.io.gfile.exists(os.path.join(source, 'saved_model.pb')):
            return source.rstrip('/') + SAVED_VARIABLES
        found = find_checkpoint(source)
        if found:
            return found
        if tf.io.gfile.exists(re.sub(r'(\.index)?$', '.index', source, count=1)):
            return re.sub(r'\.index$', '', source)
        what = 'holds no weights' if tf.io.gfile.exists(source) else 'is not there'
    except tf.errors.OpError as error:  # of a bucket
        what = f'cannot be reached ({one_line(error, 150)})'
    raise RunError(
        f"config.model.weights={source!r} {what}: write 'imagenet', a file that ends in .weights.h5, or the folder of a run, "
        'of one of its checkpoints, such as runs/NAME/checkpoints/best, or of its SavedModel'
        + did_you_mean(source, ['imagenet'])
    )


def _numbered_weights(path, source):
    """Arrays in the order of `float_variables(model)`. Checkpoints and SavedModels of ours both number them, so no names of Keras' matter."""
    try:
        reader = tf.train.load_checkpoint(path)
        kinds = reader.get_variable_to_dtype_map()
        for part in ('average', 'model', 'variables'):  # the last is Keras' word in a SavedModel
            numbered = {
                int(key.split('/')[1]): key
                for key, kind in kinds.items()
                if re.fullmatch(part + r'/[0-9]+(/\.ATTRIBUTES/VARIABLE_VALUE)?', key)
                and kind.is_floating
            }
            if numbered:
                return [reader.get_tensor(numbered[number]) for number in sorted(numbered)]
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        raise RunError(
            f'config.model.weights={source!r} is damaged ({one_line(error, 200)}): take another checkpoint'
        ) from error
    raise RunError(
        f'config.model.weights={source!r} was not written by this program: it has no numbered list of weights'
    )


def _require_same_network(wanted, loaded, path, name):
    """Raises RunError unless all but the head have the same shapes."""
    differing = [
        f'{variable.path} is {tuple(variable.shape)} here and {value.shape} there'
        for variable, value in zip(wanted[:-2], loaded)
        if variable.shape != value.shape
    ]
    if len(wanted) != len(loaded) or differing:
        raise RunError(
            f'{path} is of another network than config.model.name={name!r}: it has {len(loaded)} variables, and this one {len(wanted)}'
            + (f'; {differing[0]}' if differing else '')
            + ': take the model.name it was trained with'
        )


def _class_names_beside(path):
    """What the classes of a checkpoint are called, a list, or None: runs and SavedModels say it in a file above it."""
    folder = path
    for _ in range(3):  # of a run: checkpoints/step-500/variables
        folder = os.path.dirname(folder)
        if tf.io.gfile.exists(os.path.join(folder, labels_file.NAME)):
            return read_labels(os.path.join(folder, labels_file.NAME))
        if tf.io.gfile.exists(os.path.join(folder, 'environment.json')):
            return _read(os.path.join(folder, 'environment.json'), json.load).get('class_names')
    return None


def read_labels(path):
    return _read(path, lambda file: labels_file.from_text(file.read().decode()))


def _read(path, read):
    """What `read` makes of a file of bytes. Raises RunError for a damaged one."""
    try:
        with tf.io.gfile.GFile(path, 'rb') as file:
            return read(file)
    except (ValueError, tf.errors.OpError) as error:
        raise RunError(
            f'{path} is damaged ({one_line(error, 100)}): it says which classes these weights know'
        ) from error
