"""Where knowledge comes from that is not in the data: weights that a model begins with, and a teacher that it learns from."""
import inspect
import json
import os
import re

import numpy as np
import tensorflow as tf

from errors import ConfigError, RunError, did_you_mean, one_line
from modeling import labels_file, saved_model
from modeling.models import application, input_shape, weights

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
    source, wanted = config.model.weights, weights(model)
    if source == 'imagenet' or source.endswith(KERAS_FILES):
        path, loaded, reason = source, _of_keras(config), 'it comes without one'
    else:
        path = _checkpoint_in(source, find_checkpoint)
        loaded, classes = _numbered_weights(path, source), _class_names_beside(path)
        _require_same_network(wanted, loaded, path, config.model.name)
        reason = '' if classes == list(class_names) else 'its classes are others' if classes else 'nothing says what its classes are'
        loaded = loaded[:-2] if reason else loaded
    for variable, value in zip(wanted, loaded):
        variable.assign(value)
    features, classes = wanted[-2].shape
    head = f'the head is new, {features:,} features to {classes:,} classes: {reason}' if reason else 'the head too'
    return f'{len(loaded)} of {len(wanted)} variables ({sum(value.size for value in loaded):,} numbers) from {re.sub("(/variables)+$", "", path)}; {head}'


def make_teacher(config, class_names, pretrained=True):
    """The teacher of `config.distill`. Call it in the strategy's scope. Not `pretrained`, one of keras.applications has random weights.

    Returns: (a function from images float32 [batch, size, size, 3] in 0..255 to logits float32 [batch, classes], for the inside
        of a step, and who that is in words); (None, '') when the config names none.

    Raises:
        ConfigError: no such model, or it knows another number of classes.
        RunError: its weights or its SavedModel cannot be had or used, or are of other classes.
    """
    name = config.distill.teacher
    if not name:
        return None, ''
    is_folder = os.sep in name or tf.io.gfile.isdir(name)
    predict, size, words = _saved_teacher(name, class_names) if is_folder else _application_teacher(config.distill, len(class_names), pretrained)

    def teacher(images):
        if None not in size and images.shape[1:3] != size:
            images = resize(images, size)
        answers = tf.cast(predict(images), tf.float32)  # [batch, classes]
        # Whether they are probabilities shows in the numbers. Their logarithms are logits, up to a constant that softmax ignores.
        are_probabilities = tf.reduce_all(answers >= 0) & tf.reduce_all(tf.abs(tf.reduce_sum(answers, -1) - 1) < 1e-2)
        return tf.stop_gradient(tf.where(are_probabilities, tf.math.log(tf.maximum(answers, 1e-20)), answers))

    return teacher, words


def resize(images: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """Resizes a batch, float32 [batch, height, width, channels], as `inputs.pictures.resize` does.

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


def save_backbone(model, config, path):
    """Writes all but the head of a model of keras.applications as a file of Keras weights that its constructor reads, with include_top=False."""
    plain = _plain(config, weights=None)
    for variable, of_ours in zip(weights(plain), weights(model)):
        variable.assign(of_ours)
    plain.save_weights(path)


def _plain(config, **arguments):
    constructor, _ = application(config.model.name)
    return constructor(include_top=False, input_shape=input_shape(config), pooling='avg', **arguments)


def _of_keras(config):
    """The weights of a backbone, as arrays, from keras.applications or from a file of Keras weights, of which Keras reads the numbers alone:
    no layer that is described in it is made, and no file that it refers to is opened."""
    if config.model.name == 'tiny':
        raise ConfigError("config.model.name='tiny' has no pretrained weights: leave config.model.weights at '', or name a run of your own")
    try:
        plain = _plain(config, weights=config.model.weights)
    except Exception as error:
        raise RunError(f'config.model.weights={config.model.weights!r} could not be loaded into {config.model.name}: {one_line(error)}') from error
    return [variable.numpy() for variable in weights(plain)]


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
    raise RunError(f"config.model.weights={source!r} {what}: write 'imagenet', a file that ends in .weights.h5, or the folder of a run, "
                   'of one of its checkpoints, such as runs/NAME/checkpoints/best, or of its SavedModel' + did_you_mean(source, ['imagenet']))


def _numbered_weights(path, source):
    """Arrays in the order of `weights(model)`. Checkpoints and SavedModels of ours both number them, so no names of Keras' matter."""
    try:
        reader = tf.train.load_checkpoint(path)
        kinds = reader.get_variable_to_dtype_map()
        for part in ('average', 'model', 'variables'):  # the last is Keras' word in a SavedModel
            numbered = {int(key.split('/')[1]): key for key, kind in kinds.items()
                        if re.fullmatch(part + r'/[0-9]+(/\.ATTRIBUTES/VARIABLE_VALUE)?', key) and kind.is_floating}
            if numbered:
                return [reader.get_tensor(numbered[number]) for number in sorted(numbered)]
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        raise RunError(f'config.model.weights={source!r} is damaged ({one_line(error, 200)}): take another checkpoint') from error
    raise RunError(f'config.model.weights={source!r} was not written by this program: it has no numbered list of weights')


def _require_same_network(wanted, loaded, path, name):
    """Raises RunError unless all but the head have the same shapes."""
    differing = [f'{variable.path} is {tuple(variable.shape)} here and {value.shape} there'
                 for variable, value in zip(wanted[:-2], loaded) if variable.shape != value.shape]
    if len(wanted) != len(loaded) or differing:
        raise RunError(f'{path} is of another network than config.model.name={name!r}: it has {len(loaded)} variables, and this one {len(wanted)}'
                       + (f'; {differing[0]}' if differing else '') + ': take the model.name it was trained with')


def _class_names_beside(path):
    """What the classes of a checkpoint are called, a list, or None: runs and SavedModels say it in a file above it."""
    folder = path
    for _ in range(3):  # of a run: checkpoints/step-500/variables
        folder = os.path.dirname(folder)
        if tf.io.gfile.exists(os.path.join(folder, labels_file.NAME)):
            return _read_labels(os.path.join(folder, labels_file.NAME))
        if tf.io.gfile.exists(os.path.join(folder, 'environment.json')):
            return _read(os.path.join(folder, 'environment.json'), json.load).get('class_names')
    return None


def _read_labels(path):
    return _read(path, lambda file: labels_file.from_text(file.read().decode()))


def _read(path, read):
    """What `read` makes of a file of bytes. Raises RunError for a damaged one."""
    try:
        with tf.io.gfile.GFile(path, 'rb') as file:
            return read(file)
    except (ValueError, tf.errors.OpError) as error:
        raise RunError(f'{path} is damaged ({one_line(error, 100)}): it says which classes these weights know') from error


def _application_teacher(distill, num_classes, pretrained):
    """(function from images to answers, (height, width) it wants or (None, None), who it is) of a model of keras.applications with its head."""
    constructor, preprocess = application(distill.teacher, 'config.distill.teacher')
    if distill.weights != 'imagenet' and not distill.weights.endswith(KERAS_FILES):
        raise ConfigError(f"config.distill.weights={distill.weights!r} is no source of weights: write 'imagenet', or a file that ends in .weights.h5")
    classes = IMAGENET_CLASSES if distill.weights == 'imagenet' else num_classes
    if classes != num_classes:
        raise ConfigError(f"config.distill.teacher={distill.teacher!r} knows ImageNet's {classes:,} classes, and this data set has {num_classes:,}: "
                          'train a teacher on it first, with config.model.name, and give its run here')
    linear = {'classifier_activation': None} if 'classifier_activation' in inspect.signature(constructor).parameters else {}
    try:
        model = constructor(weights=distill.weights if pretrained else None, classes=classes, **linear)
    except Exception as error:
        raise RunError(f'config.distill.weights={distill.weights!r} could not be loaded into {distill.teacher}: {one_line(error)}') from error
    model.trainable = False
    return lambda images: model(preprocess(images), training=False), model.input_shape[1:3], f'{distill.teacher} ({distill.weights})'


def _saved_teacher(source, class_names):
    """The same of a SavedModel, or of the one of a run."""
    path = next((path for path in (os.path.join(source, 'export'), source) if tf.io.gfile.exists(os.path.join(path, 'saved_model.pb'))), None)
    if path is None:
        raise RunError(f'config.distill.teacher={source!r} is neither a SavedModel nor a run that has exported one: train the teacher first')
    has_labels = tf.io.gfile.exists(os.path.join(path, labels_file.NAME))
    if has_labels and _read_labels(os.path.join(path, labels_file.NAME)) != list(class_names):
        raise RunError(f'{path} knows other classes than this data set, or in another order: train the teacher on the same data')
    try:
        loaded = saved_model.load(path)
        name = 'logits' if 'logits' in loaded.signatures else 'serving_default'
        signature = loaded.signatures[name]
    except RunError:
        raise
    except Exception as error:  # KeyError, ValueError, IndexError, an OpError, ... by where it is damaged
        raise RunError(f'{path} cannot teach: it has no signature serving_default, or is damaged ({type(error).__name__}: {one_line(error, 200)})') from error
    inputs, outputs = signature.structured_input_signature[1], signature.structured_outputs
    _require_pictures_to_answers(path, name, inputs, outputs, len(class_names))
    (argument, wanted), = inputs.items()
    answer = 'logits' if 'logits' in outputs else next(iter(outputs))

    def predict(images, keep=loaded):  # a signature does not keep its variables alive
        return signature(**{argument: tf.cast(tf.round(images) if wanted.dtype.is_integer else images, wanted.dtype)})[answer]

    return predict, tuple(wanted.shape[1:3]), path if has_labels else f'{path}, whose classes are taken to be these, in this order'


def _require_pictures_to_answers(path, name, inputs, outputs, num_classes):
    """Raises RunError unless a signature takes any number of pictures and gives an answer for each class."""
    def fits(spec, wanted):
        return spec.shape.rank == len(wanted) and spec.shape[0] is None and all(None in pair or len(set(pair)) == 1 for pair in zip(spec.shape, wanted))

    takes_pictures = len(inputs) == 1 and all(fits(spec, (None, None, None, 3)) and spec.dtype in (tf.float32, tf.uint8) for spec in inputs.values())
    answers = [outputs['logits']] if 'logits' in outputs else list(outputs.values())
    if not takes_pictures or len(answers) != 1 or not fits(answers[0], (None, num_classes)):
        has = [', '.join(f'{key} {spec.dtype.name} {spec.shape}' for key, spec in specs.items()) for specs in (inputs, outputs)]
        raise RunError(f'{path} cannot teach: its signature {name} must take float32 or uint8 (None, height, width, 3) and give (None, {num_classes}), '
                       f'but it takes {has[0]} and gives {has[1]}')
