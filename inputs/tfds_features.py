"""Finds the image and the label among the features of a TFDS data set, and checks them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from common.errors import ConfigError, did_you_mean

# Of images that can be read; TFDS stores float32 as the four bytes of an RGBA pixel.
DTYPES = (
    'uint8',
    'uint16',
)
MAX_CHANNELS = 4  # grey, grey with alpha, RGB, RGB with alpha


class Columns(NamedTuple):
    """Names of the image and of the label among the features; 'a/b' is the feature b of a."""

    image: str
    label: str


def find_columns(
    features: tfds.features.FeaturesDict, supervised_keys: Any, dataset_config: ConfigDict
) -> Columns:
    """Finds image and label: named by the config or TFDS, or the only ones of their kind.

    Args:
        features: of the data set.
        supervised_keys: of the data set: None, a pair of names, or any nesting of them.
        dataset_config: `config.dataset`.

    Raises: ConfigError: there is none, there are several, or it cannot be read.
    """
    name, leaves = dataset_config.name, dict(_leaves(features))
    inputs, targets = supervised_keys[:2] if supervised_keys else ((), ())
    named_inputs, named_targets = set(tf.nest.flatten(inputs)), set(tf.nest.flatten(targets))
    images = {path for path, feature in leaves.items() if _is_image(feature)}
    labels = {
        path for path, feature in leaves.items() if isinstance(feature, tfds.features.ClassLabel)
    }
    columns = Columns(
        image=_choose('image', images, named_inputs, leaves, dataset_config.image_key, name),
        label=_choose('class label', labels, named_targets, leaves, dataset_config.label_key, name),
    )
    problem, wanted = _pixel_problem(leaves[columns.image])
    if problem:
        raise ConfigError(
            f'config.dataset.name={name!r} cannot be used: its image {columns.image!r} {problem}',
            f'build the data set with images of {wanted}',
            'dataset.name',
        )
    return columns


def describe_choice(
    columns: Columns,
    supervised_keys: tuple | None,
    dataset_config: ConfigDict,
) -> str:
    """Returns a note if neither the data set nor the config states the choice, else ''."""
    stated = supervised_keys or (None, None)
    image_is_stated = dataset_config.image_key or stated[0] == columns.image
    label_is_stated = dataset_config.label_key or stated[1] == columns.label
    weights = ', '.join(tf.nest.flatten(stated[2])) if len(stated) == 3 else ''
    if image_is_stated and label_is_stated and not weights:
        return ''
    name = dataset_config.name
    note = f'{name}: the image is {columns.image!r}, the class label {columns.label!r}'
    return f'{note}; its example weights, {weights}, are not used' if weights else note


def feature_at(features: tfds.features.FeaturesDict, path: str) -> tfds.features.FeatureConnector:
    """Returns the feature at 'a/b'."""
    for name in path.split('/'):
        features = features[name]
    return features


def require_class(label: tf.Tensor, num_classes: int, name: str, number: tf.Tensor) -> tf.Tensor:
    """Returns a label, int64 []; the graph fails if it is not one of the classes.

    `name` (of data set and split) and `number` (of the example) are for the error message.
    """
    is_class = (label >= 0) & (label < num_classes)
    message = (
        f'an example of {name}, has a label outside the {num_classes:,} classes (TFDS writes -1 '
        'for unknown labels); choose another split: example'
    )
    check = tf.debugging.Assert(is_class, [message, number, 'has', label])
    with tf.control_dependencies([check]):
        return tf.identity(label)


def _leaves(
    features: tfds.features.FeaturesDict, prefix: str = ''
) -> Iterator[tuple[str, tfds.features.FeatureConnector]]:
    for name, feature in features.items():
        if isinstance(feature, tfds.features.FeaturesDict):
            yield from _leaves(feature, f'{prefix}{name}/')
        else:
            yield prefix + name, feature


def _is_image(feature: tfds.features.FeatureConnector) -> bool:
    """Returns whether a feature is an image; a segmentation map is not."""
    return isinstance(feature, tfds.features.Image) and not isinstance(
        feature, tfds.features.LabeledImage
    )


def _pixel_problem(feature: tfds.features.Image) -> tuple[str, str]:
    """Returns (why an image would be misread, what to have instead), or ('', '')."""
    dtype, shape = np.dtype(feature.np_dtype).name, feature.shape
    if dtype not in DTYPES:
        problem = f'has dtype {dtype}, which TFDS stores in a way that only TFDS can read'
        return problem, ' or '.join(DTYPES)
    if len(shape) != 3:
        return f'has the shape {shape}, so it is several frames', 'shape (height, width, channels)'
    if shape[-1] is not None and not 1 <= shape[-1] <= MAX_CHANNELS:
        return f'has {shape[-1]} channels', f'1 to {MAX_CHANNELS} channels'
    return '', ''


def _choose(
    what: str, candidates: set[str], named: set[str], leaves: dict, key: str, name: str
) -> str:
    """Returns the candidate that the config names, else the one TFDS names, else the only one."""
    config_key = {'image': 'image_key', 'class label': 'label_key'}[what]
    if key:
        if key in candidates:
            return key
        article = 'an' if what == 'image' else 'a'
        problem = f'is not {article} {what}' if key in leaves else 'does not exist'
        if _is_in_sequence(key, leaves):
            problem = f'is in a sequence of any length, but a classifier needs a single {what}'
        raise ConfigError(
            f'config.dataset.{config_key}={key!r} {problem}',
            f'{name} has {_listed(candidates)}{did_you_mean(key, sorted(candidates))}',
            f'dataset.{config_key}',
        )
    readable = {
        path for path in candidates if what != 'image' or not _pixel_problem(leaves[path])[0]
    }
    found = (candidates & named) or readable or candidates
    if len(found) == 1:
        return next(iter(found))
    if not found:
        raise ConfigError(
            f'config.dataset.name={name!r} is not an image classification data set: it has no '
            f'{what} for each example',
            key='dataset.name',
        )
    first, plural = sorted(found)[0], f'{what}s'
    raise ConfigError(
        f'config.dataset.name={name!r} has several features that are {plural}, {_listed(found)}',
        f'--config.dataset.{config_key}={first}',
        'dataset.name',
    )


def _is_in_sequence(key: str, leaves: dict) -> bool:
    """Returns whether a name is that of a sequence, such as a Video, or of something inside one."""
    for path, feature in leaves.items():
        is_inside = f'{key}/'.startswith(f'{path}/')
        if is_inside and isinstance(feature, tfds.features.Sequence):
            return True
    return False


def _listed(names: set[str]) -> str:
    return ', '.join(sorted(names)) or 'none'
