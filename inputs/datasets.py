"""Where examples come from: a TFDS data set, the embedded digits, or a folder of one's own images."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import psutil
import tensorflow as tf
import tensorflow_datasets as tfds

from common.errors import ConfigError, RunError, did_you_mean, one_line
from inputs import digits, image_folder, image_validation, record_index, tfds_checks, tfds_features

MOST_NAMED = 50  # broken files in the report


class Sampled(NamedTuple):
    """One example: the file that evaluation reads, what the user's file holds if it is one of a folder, and the label."""

    encoded: bytes
    original: bytes | None
    label: int


@dataclasses.dataclass(frozen=True)
class Source:
    """A prepared data set: its splits, its sizes and its class names."""

    name: str
    class_names: tuple[str, ...]
    train_split: str
    eval_split: str
    num_train: int  # 0 where there is nothing to train on, and nothing was to be
    num_eval: int
    memory_bytes: int  # of host memory for what is read ahead; from the config alone, as the order of examples follows from it
    find: Callable  # (split, share, longest) -> the examples of a host's share (index, number), as `record_index.Records` or `record_index.Singles`
    identity: str  # says which training examples these are: another text, other examples
    notes: tuple[str, ...] = ()  # what the user may not expect, for the report
    damage: Callable = (
        str  # () -> text that names the files that have changed for the worse since, or ''
    )
    original: Callable = lambda split, number: (
        None
    )  # (split, number of an example) -> the user's file as bytes, where it is one
    _kept: dict = dataclasses.field(default_factory=dict)

    def split(self, name, share=(0, 1), in_memory=True):
        """A host's share (index, number) of a split, to be read from any place on: see `record_index`.

        Where a quarter of the budget is enough for it, it is kept `in_memory`, encoded, or read in the order that it had there.

        Raises: RunError where the machine has not as much memory free as the budget says.
        """
        if (name, share, in_memory) not in self._kept:
            found = self.find(name, share)
            free = psutil.virtual_memory().available
            if min(self.memory_bytes, found.num_bytes) > free:
                raise RunError(
                    f'config.dataset.memory_gib={self.memory_bytes / 2**30:.3g}, but only {free / 2**30:.3g} GiB of memory are free: '
                    f'write --config.dataset.memory_gib={free / 2**31:.2g}'
                )
            if found.num_bytes <= self.memory_bytes // 4:
                # Once from end to end is fastest in whole files: each piece opens its file anew.
                found = (
                    record_index.in_memory(self.find(name, share, longest=sys.maxsize))
                    if in_memory
                    else self.find(name, share, longest=1)
                )
            self._kept[name, share, in_memory] = found
        return self._kept[name, share, in_memory]

    def sample(self, split: str, most: int) -> Iterator[Sampled]:
        """Yields at most `most` examples, taken evenly from a split: data sets are often stored class by class."""
        found = self.split(split)
        num_pieces = len(found.counts)
        chosen = np.linspace(0, num_pieces - 1, min(most, num_pieces)).round().astype(np.int64)
        if isinstance(found, record_index.Records):
            found = dataclasses.replace(
                found, counts=np.ones_like(found.counts)
            )  # the first of each piece
        for number, encoded, label in found.read(chosen).as_numpy_iterator():
            yield Sampled(encoded, self.original(split, number), int(label))

    def examples(self, split):
        """A tf.data.Dataset of (image, label): encoded bytes, string []; int64 []. The order is always the same."""
        found = self.split(split)
        return found.read(np.arange(len(found.counts))).map(
            lambda number, encoded, label: (encoded, label)
        )


def load(dataset_config, needs_training=True):
    """Finds the data set of `config.dataset`, and prepares it if that has not been done on this machine.

    Args:
        dataset_config: `config.dataset`.
        needs_training: False where `dataset.train_split` may be missing, because its examples are not needed.

    Raises:
        ConfigError: there is no such data set or split.
        RunError: the data are not there and cannot be got without the user, or preparing them failed.
    """
    return (_folder if dataset_config.name == 'folder' else _tfds)(dataset_config, needs_training)


def _tfds(dataset_config, needs_training):
    builder, columns = find_builder(dataset_config)
    if not builder.is_prepared():
        _prepare(builder, data_folder(dataset_config))
    class_names = tfds_checks.names_of_classes(builder, columns)
    num_train = split_size(
        builder.name, builder.info.splits, 'train_split', dataset_config, needed=needs_training
    )
    num_eval = split_size(
        builder.name, builder.info.splits, 'eval_split', dataset_config, needed=True
    )
    record_index.require_tfrecord(builder)
    keys = ('train_split', 'eval_split') if needs_training else ('eval_split',)
    notes = [tfds_checks.require_usable(builder, columns, key, dataset_config) for key in keys]
    notes.append(
        tfds_features.describe_choice(columns, builder.info.supervised_keys, dataset_config)
    )
    notes = tuple(filter(None, notes))
    for note in notes:
        print(f'note      {note}', flush=True)
    return Source(
        name=dataset_config.name,
        class_names=class_names,
        train_split=dataset_config.train_split,
        eval_split=dataset_config.eval_split,
        num_train=num_train,
        num_eval=num_eval,
        memory_bytes=int(dataset_config.memory_gib * 2**30),
        find=functools.partial(record_index.of_builder, builder, columns),
        identity=' '.join(
            [
                builder.info.full_name,
                dataset_config.train_split,
                *filter(None, (dataset_config.image_key, dataset_config.label_key)),
            ]
        ),
        notes=notes,
    )


def find_builder(dataset_config):
    """(the TFDS builder, `Columns` of the image and its label), whether it is prepared or not. Raises ConfigError where there is none of images."""
    name = dataset_config.name
    try:
        builder = tfds.builder(name, data_dir=os.path.expanduser(dataset_config.data_dir) or None)
    except tfds.core.DatasetNotFoundError:
        hint = (
            did_you_mean(name, tfds.list_builders(), cutoff=0.5)
            or ": see tensorflow.org/datasets/catalog, or use 'digits' or 'folder'"
        )
        raise ConfigError(f'config.dataset.name={name!r} is no TFDS data set{hint}') from None
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"config.dataset.name={name!r} is no TFDS data set ({one_line(error, 100)}): write its name, 'digits' or 'folder'"
        ) from error
    return builder, tfds_features.find_columns(
        builder.info.features, builder.info.supervised_keys, dataset_config
    )


def data_folder(dataset_config):
    """Where TFDS keeps its data sets."""
    return os.path.expanduser(dataset_config.data_dir) or str(tfds.core.constants.DATA_DIR)


def _prepare(builder, data_dir):
    download = tfds.download.DownloadConfig()
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        manual_dir = os.path.join(data_dir, 'downloads', 'manual')
        if not tf.io.gfile.exists(manual_dir) or not tf.io.gfile.listdir(manual_dir):
            raise RunError(
                f'{builder.name} is not prepared: looked in {builder.data_dir} and for its archives in {manual_dir}. '
                f'{how_to_get(builder)} Then run the same command again, or point --config.dataset.data_dir at a folder that has it'
            )
        download = tfds.download.DownloadConfig(manual_dir=manual_dir)
    if isinstance(builder, digits.Digits):
        tfds.disable_progress_bar()  # it takes a second
    logging.getLogger('urllib3').setLevel(logging.ERROR)  # it tries ten times, and warns each time
    print(f'preparing {builder.name} in {builder.data_dir}, once', flush=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=download)
    except Exception as error:  # of any kind: no network, a damaged archive, no space
        offline = isinstance(error, OSError) and re.search(
            'HTTPS?Connection|resolve|unreachable', str(error)
        )
        mend = (
            f': this machine has to be online for it, or --config.dataset.data_dir=DIR a folder that has {builder.name} prepared'
            if offline
            else ''
        )
        raise RunError(
            f'{builder.name} could not be prepared in {builder.data_dir} ({one_line(error, 200)}){mend}'
        ) from error


def how_to_get(builder):
    """What the user has to do for a data set that cannot be downloaded."""
    if builder.name == 'imagenet2012':
        return (
            'Register at https://image-net.org/download-images, put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar '
            'there (145 GB; preparing them takes as much again).'
        )
    return f'TFDS says: {one_line(builder.MANUAL_DOWNLOAD_INSTRUCTIONS)}'


def _folder(dataset_config, needs_training):
    found = image_folder.find(dataset_config, needs_training)
    for note in found.notes:
        print(f'note      {note}', flush=True)
    named = [
        f'  {image_folder.shown(path)}: {reason}' for path, reason in found.broken[:MOST_NAMED]
    ]
    for line in named[:1]:
        print(f'        {line}', flush=True)
    more = (
        [f'  and {len(found.broken) - MOST_NAMED:,} more'] if len(found.broken) > MOST_NAMED else []
    )
    return Source(
        name=dataset_config.name,
        class_names=found.class_names,
        train_split=dataset_config.train_split,
        eval_split=dataset_config.eval_split,
        num_train=len(found.splits.get(dataset_config.train_split, ())),
        num_eval=len(found.splits[dataset_config.eval_split]),
        memory_bytes=int(dataset_config.memory_gib * 2**30),
        find=lambda split, share, longest=None: _singles(found.splits[split], share),
        identity=hashlib.sha256(
            repr(
                [
                    (picture.digest, picture.label)
                    for picture in found.splits.get(dataset_config.train_split, ())
                ]
            ).encode()
        ).hexdigest(),
        notes=(*found.notes, *named, *more),
        damage=functools.partial(_damage, found, dataset_config, needs_training),
        original=lambda split, number: image_validation.read(found.splits[split][number].original),
    )


def _damage(before, dataset_config, needs_training):
    gone = [
        picture.path
        for pictures in before.splits.values()
        for picture in pictures
        if not tf.io.gfile.exists(os.fsencode(picture.path))
    ]
    known = set(before.broken)
    try:
        broken = [
            f'{image_folder.shown(path)} ({reason})'
            for path, reason in image_folder.find(dataset_config, needs_training).broken
            if (path, reason) not in known
        ]
    except (ConfigError, RunError) as error:
        return str(error)
    named = [f'{image_folder.shown(path)} (it has gone)' for path in gone] + broken
    return ', '.join(named[: image_folder.NAMED]) + (
        f' and {len(named) - image_folder.NAMED:,} more' if len(named) > image_folder.NAMED else ''
    )


def _singles(pictures, share):
    begin, end = record_index.share_of(len(pictures), share)
    chosen = pictures[begin:end]
    return record_index.Singles(
        stored=tf.constant([os.fsencode(picture.path) for picture in chosen]),
        labels=tf.constant([picture.label for picture in chosen], tf.int64),
        ids=tf.range(begin, end, dtype=tf.int64),
        load=tf.io.read_file,
        num_bytes=sum(picture.num_bytes for picture in chosen),
    )


def split_size(name, splits, key, dataset_config, needed):
    """Examples in the split that `config.dataset` names under `key`; 0 where it has none and needs none."""
    split = dataset_config[key]
    try:
        size = splits[split].num_examples
    except (KeyError, ValueError) as error:
        if not needed:
            return 0
        raise ConfigError(
            f'config.dataset.{key}={split!r} is no split of {name}: it has '
            f'{", ".join(splits) or "none"} ({one_line(error, 120)})'
        ) from error
    if not size and needed:
        raise ConfigError(f'config.dataset.{key}={split!r} of {name} has no examples')
    return size
