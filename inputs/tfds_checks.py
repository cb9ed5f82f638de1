"""Checks that a run can use a prepared TFDS data set: labels are known, images can be read.

The checks precede the run, and read only a sample of a large data set.
"""

import re
import sys

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from common.errors import RunError, counted, one_line
from inputs import image_validation, record_index
from inputs.image_ops import PNG_SIGNATURE, decode
from inputs.tfds_features import Columns, feature_at

# Bytes: all labels of a split up to this size are checked, in 4 s for images of 3 KB.
READ_WHOLE = 2**30
# Examples checked of a larger split: faults in 2 % of them are missed once in 170 (0.98 ** 256).
SAMPLE = 256
DECODED = 16  # images of a split that are decoded as a test
# Share of white: darker uint16 images have at most 16 shades of grey when read as uint8.
DARKEST_SHARE = 1 / 16


def names_of_classes(builder: tfds.core.DatasetBuilder, columns: Columns) -> tuple[str, ...]:
    """Returns the class names of a prepared data set. Raises RunError if there are too few."""
    label = feature_at(builder.info.features, columns.label)
    where = f'{builder.name} in {builder.data_dir}'
    num_classes = label.num_classes or 0  # None where TFDS was never told
    if num_classes < 2:
        number = counted(num_classes, 'class', 'classes')
        raise RunError(f'{where} has {number}; a classifier needs at least two')
    if len(label.names) != num_classes:  # TFDS leaves out empty lines, and says nothing
        raise RunError(
            f'{where} has {num_classes} classes, but names for {len(label.names)}',
            'write one name a line into its labels.txt, or prepare it again',
        )
    return tuple(label.names)


def require_usable(
    builder: tfds.core.DatasetBuilder,
    columns: Columns,
    key: str,
    dataset_config: ConfigDict,
) -> str:
    """Checks the labels and some images of the split that `dataset_config` names under `key`.

    Every label is checked in a split of up to `READ_WHOLE` bytes, and a sample in a larger one. The
    others are checked when they are read: see `record_index.RecordRanges.read`.

    Returns: what the user may not expect of its images, or ''.

    Raises: RunError: the split cannot be trained or evaluated on.
    """
    split = dataset_config[key]
    records = record_index.from_builder(builder, columns, split)
    if records.num_bytes <= READ_WHOLE:
        looked_at = record_index.from_builder(builder, columns, split, longest=sys.maxsize)
    else:
        looked_at = records.sample(SAMPLE)
    try:
        labels = looked_at.column(columns.label)
        images = records.sample(DECODED).column(columns.image)
    except tf.errors.InvalidArgumentError as error:
        raise RunError(
            f'{records.name}: its records do not match its features.json ({one_line(error, 150)})',
            'prepare it again',
        ) from error
    _require_labels(builder, records, labels, key, dataset_config)
    _require_readable(records, images, dataset_config.white_level)
    return _note_on_stored_images(records, images, dataset_config.white_level)


def _require_labels(
    builder: tfds.core.DatasetBuilder,
    records: record_index.RecordRanges,
    labels: np.ndarray,
    key: str,
    dataset_config: ConfigDict,
) -> None:
    """Raises RunError if a label is not a class; TFDS writes -1 for an unknown label."""
    num_classes = feature_at(records.features, records.columns.label).num_classes
    invalid = labels[(labels < 0) | (labels >= num_classes)]
    if not invalid.size:
        return
    num_examples = int(records.counts.sum())
    checked = '' if len(labels) == num_examples else f' of {len(labels):,} checked'
    values = ', '.join(map(str, np.unique(invalid)[:3]))
    is_unknown = (invalid == -1).any()
    meaning = ', which TFDS writes for unknown labels' if is_unknown else ''
    raise RunError(
        f'config.dataset.{key}={dataset_config[key]!r} of {builder.name} has '
        f'{num_examples:,} examples, and {len(invalid):,}{checked} have a label '
        f'outside the {num_classes:,} classes: {values}{meaning}. Choose a split without them',
        _labeled_instead(builder, key, dataset_config),
        f'dataset.{key}',
    )


def _labeled_instead(
    builder: tfds.core.DatasetBuilder,
    key: str,
    dataset_config: ConfigDict,
) -> str:
    """Returns what to write for a split without labels: another, or part of the training split."""
    train_split = dataset_config.train_split
    in_use = re.findall(r'[\w-]+', f'{train_split} {dataset_config.eval_split}')
    others = [name for name in builder.info.splits if name not in in_use]
    if others:
        return f'--config.dataset.{key}={" or ".join(others)}'
    if key == 'eval_split' and train_split in builder.info.splits:
        return (
            f"--config.dataset.train_split='{train_split}[:90%]' "
            f"--config.dataset.eval_split='{train_split}[90%:]'"
        )
    return (
        f'use a part that has none, such as {train_split}[:50%], or prepare the data set without '
        'them'
    )


def _why_unreadable(encoded: bytes) -> str:
    """Returns why the graph of a run cannot decode an image, and what to do."""
    try:
        image_validation.decodable(encoded)
    except image_validation.Broken as broken:
        return f'{broken}; replace it and prepare the data set again'
    return 'it is neither a JPEG nor a PNG file; prepare the data set with such files'


def _note_on_stored_images(
    records: record_index.RecordRanges, images: np.ndarray, white_level: int
) -> str:
    """Returns a note if `predict.py` would show the model other pixels than training does; else ''.

    The graph of a run reads what TFDS has stored. It knows nothing of EXIF.
    """
    differing = sum(_is_seen_otherwise(encoded, white_level) for encoded in images)
    if not differing:
        return ''
    return (
        f'{records.name}: {differing} of {len(images)} images checked are rotated by their EXIF '
        'data, or have transparency that TensorFlow does not read: training and evaluation use '
        'them as stored, predict.py as a viewer shows them. Prepare the data set with images '
        'already rotated, and laid over white'
    )


def _is_seen_otherwise(encoded: bytes, white_level: int) -> bool:
    try:
        seen = image_validation.as_decodable(encoded)
    except image_validation.Broken:  # damaged, though TensorFlow reads it
        return False
    if seen == encoded:
        return False
    stored, seen = decode(encoded, white_level), decode(seen, white_level)
    return stored.shape != seen.shape or bool(tf.reduce_any(stored != seen))


def _require_readable(
    records: record_index.RecordRanges, images: np.ndarray, white_level: int
) -> None:
    """Raises RunError if any of these encoded images cannot be read as intended."""
    feature = feature_at(records.features, records.columns.image)
    has_alpha = feature.shape[-1] in (2, 4)
    brightest = 0
    for encoded in images:
        try:
            with image_validation.captured_stderr():  # hides libjpeg's warnings
                decode(encoded)
        except tf.errors.OpError as error:
            reason = _why_unreadable(encoded)
            raise RunError(f'{records.name}: an image cannot be decoded: {reason}') from error
        if has_alpha and not encoded.startswith(PNG_SIGNATURE):
            raise RunError(
                f'{records.name}: an image of {feature.shape[-1]} channels is not a '
                'PNG file, and transparency is read from PNG files only',
                'prepare it as PNG files',
            )
        if feature.np_dtype == np.uint16:
            pixels = tf.io.decode_image(encoded, dtype=tf.uint16, expand_animations=False)
            brightest = max(brightest, int(tf.reduce_max(pixels)))
    white = max(255, 2 ** brightest.bit_length() - 1)
    if 0 < brightest < white_level * DARKEST_SHARE:
        raise RunError(
            f'{records.name}: its uint16 images have no value above {brightest:,} of '
            f'{white_level:,}: they are nearly black',
            f'--config.dataset.white_level={white}',
        )
