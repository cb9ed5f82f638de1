"""Data sets: from TFDS, the embedded digits, or a folder of your own images."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from common import console, machine
from common.errors import ConfigError, RunError, closest_match, one_line
from inputs import digits, image_folder, image_validation, record_index, tfds_checks, tfds_features

MAX_BROKEN_LISTED = 50  # in the report


class SampledExample(NamedTuple):
    """One example.

    Attributes:
        encoded: the file that evaluation reads.
        original: the content of the user's file if the example comes from a folder, else None.
    """

    encoded: bytes
    original: bytes | None
    label: int


def _nothing_missing() -> str:
    return ''


def _no_original(split: str, number: int) -> bytes | None:
    return None


@dataclasses.dataclass(frozen=True)
class Source:
    """A prepared data set: its splits, its sizes and its class names.

    Attributes:
        num_train: 0 if there is no training split and none was needed.
        memory_bytes: host memory for reading ahead; from the config alone, because the order of
            examples depends on it.
        open_split: maps (split, share, longest) to the examples of a host's `share` (index, count);
            `longest` is the most examples read as one piece.
        identity: text that changes when the training examples do.
        notes: what may surprise the user, a line each, also for the report.
        find_missing_files: names files lost or damaged since loading, or returns ''.
        original: maps (split, number of an example) to the content of the user's file, or None.
    """

    name: str
    class_names: tuple[str, ...]
    train_split: str
    eval_split: str
    num_train: int
    num_eval: int
    memory_bytes: int
    open_split: Callable[..., Any]  # RecordRanges or ExampleList of record_index
    identity: str
    notes: tuple[str, ...] = ()
    find_missing_files: Callable[[], str] = _nothing_missing
    original: Callable[[str, int], bytes | None] = _no_original
    _kept: dict = dataclasses.field(default_factory=dict)

    def split(self, name: str, share: tuple[int, int] = (0, 1), in_memory: bool = True) -> Any:
        """Returns a host's share (index, count) of a split, readable from any position.

        If it fits into a quarter of `memory_bytes`, it is kept in memory, encoded; with
        `in_memory=False` it is read from disk in the same order. See `record_index`.

        Raises: RunError if free memory is below the budget and below the size of the split.
        """
        if (name, share, in_memory) not in self._kept:
            found = self.open_split(name, share)
            free, _ = machine.free_memory()
            if min(self.memory_bytes, found.num_bytes) > free:
                raise RunError(
                    f'config.dataset.memory_gib={self.memory_bytes / 2**30:.3g}, but only '
                    f'{free / 2**30:.3g} GiB of memory are free',
                    f'--config.dataset.memory_gib={free / 2**31:.2g}',
                    'dataset.memory_gib',
                )
            if found.num_bytes <= self.memory_bytes // 4:
                # Read whole files, which is fastest: every piece would reopen its file.
                if in_memory:
                    whole = self.open_split(name, share, longest=sys.maxsize)
                    found = record_index.in_memory(whole)
                else:
                    found = self.open_split(name, share, longest=1)
            self._kept[name, share, in_memory] = found
        return self._kept[name, share, in_memory]

    def sample(self, split: str, most: int) -> Iterator[SampledExample]:
        """Yields at most `most` examples, spread evenly: many data sets are sorted by class."""
        found = self.split(split)
        num_pieces = len(found.counts)
        chosen = np.linspace(0, num_pieces - 1, min(most, num_pieces)).round().astype(np.int64)
        if isinstance(found, record_index.RecordRanges):
            # The first of each piece.
            found = dataclasses.replace(found, counts=np.ones_like(found.counts))
        for number, encoded, label in found.read(chosen).as_numpy_iterator():
            yield SampledExample(encoded, self.original(split, number), int(label))

    @tf.autograph.experimental.do_not_convert
    def examples(self, split: str) -> tf.data.Dataset:
        """Returns (encoded image string [], label int64 []) pairs, always in the same order."""
        found = self.split(split)
        return found.read(np.arange(len(found.counts))).map(
            lambda number, encoded, label: (encoded, label)
        )


def load(dataset_config: ConfigDict, needs_training: bool = True) -> Source:
    """Finds the data set of `config.dataset`, and prepares it on its first use on this machine.

    Args:
        dataset_config: `config.dataset`.
        needs_training: False if `dataset.train_split` may be missing.

    Raises:
        ConfigError: there is no such data set or split.
        RunError: the data are missing and the user has to get them, or preparing them failed.
    """
    load_source = _load_folder if dataset_config.name == 'folder' else _load_tfds
    return load_source(dataset_config, needs_training)


def _load_tfds(dataset_config: ConfigDict, needs_training: bool) -> Source:
    builder, columns = find_builder(dataset_config)
    if not builder.is_prepared():
        _prepare(builder, data_folder(dataset_config))
        builder, columns = find_builder(dataset_config)
    class_names = tfds_checks.names_of_classes(builder, columns)
    num_train = split_size(
        builder.name, builder.info.splits, 'train_split', dataset_config, needed=needs_training
    )
    num_eval = split_size(
        builder.name, builder.info.splits, 'eval_split', dataset_config, needed=True
    )
    record_index.require_tfrecord(builder)
    keys = ('train_split', 'eval_split') if needs_training else ('eval_split',)
    found = [tfds_checks.require_usable(builder, columns, key, dataset_config) for key in keys]
    supervised_keys = builder.info.supervised_keys
    found.append(tfds_features.describe_choice(columns, supervised_keys, dataset_config))
    notes = tuple(filter(None, found))
    for note in notes:
        console.note(note)
    return Source(
        name=dataset_config.name,
        class_names=class_names,
        train_split=dataset_config.train_split,
        eval_split=dataset_config.eval_split,
        num_train=num_train,
        num_eval=num_eval,
        memory_bytes=int(dataset_config.memory_gib * 2**30),
        open_split=functools.partial(record_index.from_builder, builder, columns),
        identity=' '.join(
            [
                builder.info.full_name,
                dataset_config.train_split,
                *filter(None, (dataset_config.image_key, dataset_config.label_key)),
            ]
        ),
        notes=notes,
    )


def find_builder(
    dataset_config: ConfigDict,
) -> tuple[tfds.core.DatasetBuilder, tfds_features.Columns]:
    """Returns the TFDS builder, prepared or not, and the `Columns` of the image and its label.

    Raises: ConfigError if there is no such data set of images.
    """
    name = dataset_config.name
    try:
        builder = tfds.builder(name, data_dir=os.path.expanduser(dataset_config.data_dir) or None)
    except tfds.core.DatasetNotFoundError:
        fix = "see tensorflow.org/datasets/catalog, or use 'digits' or 'folder'"
        if other := closest_match(name, tfds.list_builders(), cutoff=0.5):
            fix = f'--config.dataset.name={other}'
        problem = f'config.dataset.name={name!r} is not a TFDS data set'
        raise ConfigError(problem, fix, 'dataset.name') from None
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f'config.dataset.name={name!r} is not a TFDS data set ({one_line(error, 100)})',
            "write its name, 'digits' or 'folder'",
            'dataset.name',
        ) from error
    return builder, tfds_features.find_columns(
        builder.info.features, builder.info.supervised_keys, dataset_config
    )


def data_folder(dataset_config: ConfigDict) -> str:
    """Returns where TFDS keeps its data sets."""
    return os.path.expanduser(dataset_config.data_dir) or str(tfds.core.constants.DATA_DIR)


def _prepare(builder: tfds.core.DatasetBuilder, data_dir: str) -> None:
    download = tfds.download.DownloadConfig()
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        manual_dir = os.path.join(data_dir, 'downloads', 'manual')
        if not tf.io.gfile.exists(manual_dir) or not tf.io.gfile.listdir(manual_dir):
            raise RunError(
                f'{builder.name} is not prepared: looked in {builder.data_dir} and for its '
                f'archives in {manual_dir}',
                f'{how_to_get(builder)} Then run the same command again, or point '
                '--config.dataset.data_dir at a folder that has it',
            )
        download = tfds.download.DownloadConfig(manual_dir=manual_dir)
    if isinstance(builder, digits.Digits):
        tfds.disable_progress_bar()  # preparing the digits takes only a second
    logging.getLogger('urllib3').setLevel(logging.ERROR)  # it tries ten times, and warns each time
    console.line(f'preparing {builder.name} in {builder.data_dir} (first use only)')
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=download)
    except Exception as error:  # of any kind: no network, a damaged archive, no space
        if builder.is_prepared():  # another run, begun at the same time, was quicker
            return
        offline = isinstance(error, OSError) and re.search(
            'HTTPS?Connection|resolve|unreachable', str(error)
        )
        fix = (
            'connect this machine to the internet, or point --config.dataset.data_dir at a folder '
            f'that has {builder.name} prepared'
        )
        raise RunError(
            f'{builder.name} could not be prepared in {builder.data_dir} ({one_line(error, 200)})',
            fix if offline else '',
        ) from error


def how_to_get(builder: tfds.core.DatasetBuilder) -> str:
    """Returns how the user can get a data set that TFDS cannot download."""
    if builder.name == 'imagenet2012':
        return (
            'Register at https://image-net.org/download-images, and put ILSVRC2012_img_train.tar '
            'and ILSVRC2012_img_val.tar into that folder (145 GB; preparing them takes as much '
            'again).'
        )
    return f'TFDS says: {one_line(builder.MANUAL_DOWNLOAD_INSTRUCTIONS)}'


def _load_folder(dataset_config: ConfigDict, needs_training: bool) -> Source:
    found = image_folder.find(dataset_config, needs_training)
    for note in found.notes:
        console.note(note)
    named = [
        f'  {console.printable(path)}: {reason}'
        for path, reason in found.broken[:MAX_BROKEN_LISTED]
    ]
    if named:
        console.row('', named[0].strip())
    num_more = len(found.broken) - MAX_BROKEN_LISTED
    more = [f'  and {num_more:,} more'] if num_more > 0 else []
    training = [
        (example.digest, example.label)
        for example in found.splits.get(dataset_config.train_split, ())
    ]
    return Source(
        name=dataset_config.name,
        class_names=found.class_names,
        train_split=dataset_config.train_split,
        eval_split=dataset_config.eval_split,
        num_train=len(found.splits.get(dataset_config.train_split, ())),
        num_eval=len(found.splits[dataset_config.eval_split]),
        memory_bytes=int(dataset_config.memory_gib * 2**30),
        open_split=lambda split, share, longest=None: _example_list(found.splits[split], share),
        identity=hashlib.sha256(repr(training).encode()).hexdigest(),
        notes=(*found.notes, *named, *more),
        find_missing_files=functools.partial(
            _find_missing_files, found, dataset_config, needs_training
        ),
        original=lambda split, number: image_validation.read(found.splits[split][number].original),
    )


def _find_missing_files(before: Any, dataset_config: ConfigDict, needs_training: bool) -> str:
    gone = [
        example.path
        for examples in before.splits.values()
        for example in examples
        if not tf.io.gfile.exists(os.fsencode(example.path))
    ]
    known = set(before.broken)
    try:
        broken = [
            f'{console.printable(path)} ({reason})'
            for path, reason in image_folder.find(dataset_config, needs_training).broken
            if (path, reason) not in known
        ]
    except (ConfigError, RunError) as error:
        return str(error)
    named = [f'{console.printable(path)} (no longer there)' for path in gone] + broken
    return ', '.join(named[: image_folder.MAX_NAMES]) + (
        f' and {len(named) - image_folder.MAX_NAMES:,} more'
        if len(named) > image_folder.MAX_NAMES
        else ''
    )


def _example_list(examples: Sequence[Any], share: tuple[int, int]) -> record_index.ExampleList:
    begin, end = record_index.host_range(len(examples), share)
    chosen = examples[begin:end]
    return record_index.ExampleList(
        stored=tf.constant([os.fsencode(example.path) for example in chosen]),
        labels=tf.constant([example.label for example in chosen], tf.int64),
        ids=tf.range(begin, end, dtype=tf.int64),
        load=tf.io.read_file,
        num_bytes=sum(example.num_bytes for example in chosen),
    )


def split_size(
    name: str, splits: Mapping[str, Any], key: str, dataset_config: ConfigDict, needed: bool
) -> int:
    """Returns the number of examples in the split that `config.dataset` names under `key`.

    Returns 0 if there is no such split and none is needed.
    """
    split = dataset_config[key]
    try:
        size = splits[split].num_examples
    except (KeyError, ValueError) as error:
        if not needed:
            return 0
        raise ConfigError(
            f'config.dataset.{key}={split!r} is not a split of {name}',
            f'it has {", ".join(splits) or "none"} ({one_line(error, 120)})',
            f'dataset.{key}',
        ) from error
    if not size and needed:
        raise ConfigError(
            f'config.dataset.{key}={split!r} of {name} has no examples', key=f'dataset.{key}'
        )
    return size
