"""Which features of a TFDS data set are the image and its label, and whether both can be trained on."""
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from errors import ConfigError, RunError, did_you_mean

DTYPES = ('uint8', 'uint16')  # of images; float32 is stored as the four bytes of a colour with alpha
MOST_FILES, MOST_LABELS = 64, 1000  # that are looked at before a run begins


class Columns(NamedTuple):
    """Names of the image and of the label among the features; 'a/b' is the feature b of a."""

    image: str
    label: str


def find_columns(features: tfds.features.FeaturesDict, supervised_keys: object, dataset_config) -> Columns:
    """Finds the image and the label: as the config names them, as TFDS does, or as the only ones of their kind.

    Args:
        features: of the data set.
        supervised_keys: of the data set: None, a pair of names, or any nesting of them.
        dataset_config: `config.dataset`.

    Raises: ConfigError: there is none, there are several, or it cannot be read.
    """
    name, leaves = dataset_config.name, dict(_leaves(features))
    named = set(tf.nest.flatten(supervised_keys)) if supervised_keys else set()
    images = {path for path, feature in leaves.items() if _is_image(feature)}
    labels = {path for path, feature in leaves.items() if isinstance(feature, tfds.features.ClassLabel)}
    columns = Columns(
        image=_choose('image', images, named, leaves, dataset_config.image_key, name),
        label=_choose('class label', labels, named, leaves, dataset_config.label_key, name),
    )
    dtype = np.dtype(leaves[columns.image].np_dtype).name
    if dtype not in DTYPES:
        raise ConfigError(f'config.dataset.name={name!r}: its image {columns.image!r} is of {dtype}, which TFDS stores in a way that only '
                          f'TFDS can read: make the data set with images of {" or ".join(DTYPES)}')
    return columns


def feature_at(features: tfds.features.FeaturesDict, path: str) -> tfds.features.FeatureConnector:
    """Returns the feature at 'a/b'."""
    for name in path.split('/'):
        features = features[name]
    return features


def selected(features: tfds.features.FeaturesDict, paths: tuple[str, ...]) -> tfds.features.FeaturesDict:
    """Returns features with nothing but these, so that nothing else of a record is decoded."""
    return tfds.decode.PartialDecoding(nested(dict.fromkeys(paths, True))).extract_features(features)


def nested(values: dict[str, object]) -> dict:
    """{'a/b': 1} -> {'a': {'b': 1}}."""
    tree = {}
    for path, value in values.items():
        *folders, name = path.split('/')
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    return tree


def check_labels(builder: tfds.core.DatasetBuilder, key: str, split: str, columns: Columns) -> None:
    """Looks at labels of a split: at all of a small one, at some of each of several files of a large one.

    Args:
        builder: prepared as TFRecord files.
        key: of `config.dataset` that names the split.
        split: as TFDS writes it.
        columns: of the image and the label.

    Raises: RunError: some are no classes. TFDS writes -1 where a label is not known, as in the test split of a contest.
    """
    num_classes = feature_at(builder.info.features, columns.label).num_classes
    labels = _some_labels(builder, split, columns.label)
    strange = labels[(labels < 0) | (labels >= num_classes)]
    if not strange.size:
        return
    num_examples = builder.info.splits[split].num_examples
    looked_at = '' if len(labels) == num_examples else f' of {len(labels):,} that were looked at'
    values = ', '.join(map(str, np.unique(strange)[:3]))
    meaning = ', which TFDS writes where a label is not known' if (strange == -1).any() else ''
    others = ', '.join(name for name in builder.info.splits if name != split) or 'none'
    raise RunError(f'config.dataset.{key}={split!r} of {builder.name} has {num_examples:,} examples, and {len(strange):,}{looked_at} have a label '
                   f'that is none of the {num_classes:,} classes: {values}{meaning}. Name a split without them; there are also: {others}')


def require_class(label: tf.Tensor, num_classes: int) -> tf.Tensor:
    """Returns a label, int64 [], where a graph computes it only if it is one of the classes."""
    is_class = (label >= 0) & (label < num_classes)
    says = f'an example has a label that is none of the {num_classes:,} classes, as TFDS writes where it is not known; name another split'
    with tf.control_dependencies([tf.debugging.Assert(is_class, [says, label])]):
        return tf.identity(label)


def _leaves(features: tfds.features.FeaturesDict, prefix: str = '') -> Iterator[tuple[str, tfds.features.FeatureConnector]]:
    for name, feature in features.items():
        if isinstance(feature, tfds.features.FeaturesDict):
            yield from _leaves(feature, f'{prefix}{name}/')
        else:
            yield prefix + name, feature


def _is_image(feature: tfds.features.FeatureConnector) -> bool:
    """Whether a feature is an image; a map of classes is none, although TFDS derives it from one."""
    return isinstance(feature, tfds.features.Image) and not isinstance(feature, tfds.features.LabeledImage)


def _choose(what: str, candidates: set[str], named: set[str], leaves: dict, key: str, name: str) -> str:
    """The one of `candidates` that the config names, that TFDS names, or that there is."""
    config_key = {'image': 'image_key', 'class label': 'label_key'}[what]
    if key:
        if key in candidates:
            return key
        problem = f'is no {what}' if key in leaves else 'does not exist'
        raise ConfigError(f'config.dataset.{config_key}={key!r} {problem}: {name} has {_listed(candidates)}{did_you_mean(key, sorted(candidates))}')
    for found in (candidates & named, candidates):
        if len(found) == 1:
            return next(iter(found))
    if not candidates:
        raise ConfigError(f'config.dataset.name={name!r} is no image classification data set: it has no {what} for each example')
    first, plural = sorted(candidates)[0], f'{what}s'
    raise ConfigError(f'config.dataset.name={name!r} has several features that are {plural}, {_listed(candidates)}: '
                      f'write --config.dataset.{config_key}={first}')


def _listed(names: set[str]) -> str:
    return ', '.join(sorted(names)) or 'none'


def _some_labels(builder: tfds.core.DatasetBuilder, split: str, label: str) -> np.ndarray:
    """The labels of up to `MOST_LABELS` examples, int64 [n]: the first ones of evenly chosen files."""
    files = builder.info.splits[split].file_instructions
    chosen = [files[index] for index in np.unique(np.linspace(0, len(files) - 1, min(MOST_FILES, len(files))).round().astype(int))]
    each = math.ceil(MOST_LABELS / len(chosen))
    features = selected(builder.info.features, (label,))

    def labels_of(record: tf.Tensor) -> tf.Tensor:
        return feature_at(features.deserialize_example(record), label)

    parts = [tf.data.TFRecordDataset(file.filename).skip(file.skip).take(min(each, file.take)).map(labels_of) for file in chosen]
    return np.array([label for part in parts for label in part.as_numpy_iterator()], np.int64)
