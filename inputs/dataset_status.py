"""Finds out whether a data set is present and usable, and how large it is; downloads nothing."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from common.errors import RunError, one_line
from inputs import datasets, image_folder, record_index, tfds_checks, tfds_features
from inputs.digits import Digits

# Archives that users download by hand. For other data sets TFDS knows only the web page.
ARCHIVES = {'imagenet2012': ('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar')}
# Split sizes of the data sets in configs/, for use before they are prepared. Source: the TFDS
# catalog.
SIZES = {
    'cifar10': {'train': 50_000, 'test': 10_000},
    'digits': {'train': Digits.NUM_EXAMPLES - Digits.NUM_TEST, 'test': Digits.NUM_TEST},
    'imagenet2012': {'train': 1_281_167, 'validation': 50_000},
    'imagenette': {'train': 9_469, 'validation': 3_925},
    'oxford_flowers102': {'train': 1_020, 'test': 6_149, 'validation': 1_020},
}


@dataclasses.dataclass(frozen=True)
class DatasetStatus:
    """The state of a data set.

    Attributes:
        state: 'ready', 'to_generate' (from an installed package), 'to_download' (at the first
            start), 'to_unpack' (its archives are present), or 'missing'.
        place: the folder where it is, or is looked for.
        class_names: in the order of the labels; numbers if TFDS learns the names only while
            preparing the data.
        num_train, num_eval: numbers of examples, or None if unknown until it is prepared.
        num_bytes: size of the stored images, or None; before preparation the download size, as
            images stay compressed.
        room_bytes: the most disk space that preparing it takes up at once: archives, their
            contents, prepared files.
        how: instructions for the user on how to get it.
    """

    state: str
    place: str
    class_names: tuple[str, ...]
    num_train: int | None
    num_eval: int | None
    num_bytes: int | None
    room_bytes: int = 0
    how: str = ''

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def find_status(dataset_config: ConfigDict) -> DatasetStatus:
    """Returns the state of `config.dataset`.

    Raises: ConfigError, RunError: as `datasets.load` does, for what can be known without decoding
        the files of a folder, or preparing a data set.
    """
    if dataset_config.name == 'folder':
        class_names, sizes, num_bytes = image_folder.count(dataset_config)
        return DatasetStatus(
            'ready',
            os.path.expanduser(dataset_config.data_dir),
            class_names,
            sizes[dataset_config.train_split],
            sizes[dataset_config.eval_split],
            num_bytes,
        )
    builder, columns = datasets.find_builder(dataset_config)
    if builder.is_prepared():
        return _status_if_prepared(builder, columns, dataset_config)
    label = tfds_features.feature_at(builder.info.features, columns.label)
    return _status_if_not_prepared(builder, label, dataset_config)


def _status_if_prepared(
    builder: tfds.core.DatasetBuilder, columns: tfds_features.Columns, dataset_config: ConfigDict
) -> DatasetStatus:
    record_index.require_tfrecord(builder)
    here = set(tf.io.gfile.listdir(str(builder.data_dir)))
    lost = [
        path
        for split in builder.info.splits.values()
        for path in map(str, split.filepaths)
        if os.path.basename(path) not in here
    ]
    if lost:
        raise RunError(
            f'{len(lost)} files of {builder.name} are missing, such as {lost[0]}',
            f'rm -r {builder.data_dir}',
        )
    is_local = '://' not in str(builder.data_dir)
    for name, split in builder.info.splits.items():
        if is_local and _size_on_disk(split) < split.num_bytes:
            raise RunError(
                f'files of split {name} of {builder.name} are truncated',
                f'rm -r {builder.data_dir}',
            )
    class_names = tfds_checks.names_of_classes(builder, columns)
    num_train, num_eval = _split_sizes(builder.name, builder.info.splits, dataset_config)
    try:
        for key in ('train_split', 'eval_split'):
            tfds_checks.require_usable(builder, columns, key, dataset_config)
    except tf.errors.OpError as error:
        raise RunError(
            f'files of {builder.name} are damaged ({one_line(error, 100)})',
            f'rm -r {builder.data_dir}',
        ) from error
    num_bytes = int(builder.info.dataset_size or 0) or None
    place = str(builder.data_dir)
    return DatasetStatus('ready', place, class_names, num_train, num_eval, num_bytes)


def _size_on_disk(split: tfds.core.SplitInfo) -> int:
    return sum(os.path.getsize(path) for path in split.filepaths)


def _status_if_not_prepared(
    builder: tfds.core.DatasetBuilder,
    label: tfds.features.FeatureConnector,
    dataset_config: ConfigDict,
) -> DatasetStatus:
    download = int(builder.info.download_size or 0)
    if not download:  # unknown: take the sum over all its variants
        download = sum(int(info.size or 0) for info in (builder.url_infos or {}).values())
    stored = int(builder.info.dataset_size or 0) or download
    sizes: Sequence[int | None] = (None, None)
    if builder.name in SIZES:
        sizes = _split_sizes(builder.name, _catalog_splits(builder), dataset_config)
    if label.num_classes is None:
        raise RunError(
            f'the number of classes of {builder.name} is known only once it is prepared',
            'run the same command once without --mode=check',
        )
    known: dict[str, Any] = {
        'place': str(builder.data_dir),
        'class_names': tuple(label.names),
        'num_train': sizes[0],
        'num_eval': sizes[1],
        'num_bytes': stored or None,
    }
    if builder.name == 'digits':
        known['num_bytes'] = 2**20  # rounded up: 0.4 MiB of PNG files
        return DatasetStatus('to_generate', room_bytes=2**20, **known)
    if not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        return DatasetStatus('to_download', room_bytes=2 * download + stored, **known)
    manual = os.path.join(datasets.data_folder(dataset_config), 'downloads', 'manual')
    here = set(tf.io.gfile.listdir(manual)) if tf.io.gfile.isdir(manual) else set()
    if here and here.issuperset(ARCHIVES.get(builder.name, ())):
        return DatasetStatus('to_unpack', room_bytes=stored, **known)
    return DatasetStatus(
        'missing',
        room_bytes=download + stored,
        how=f'mkdir -p {manual}   # {datasets.how_to_get(builder)}',
        **known,
    )


def _catalog_splits(builder: tfds.core.DatasetBuilder) -> tfds.core.SplitDict:
    template = tfds.core.ShardedFileTemplate(
        data_dir=builder.data_dir, dataset_name=builder.name, filetype_suffix='tfrecord'
    )
    return tfds.core.SplitDict(
        [
            tfds.core.SplitInfo(
                name=name,
                shard_lengths=[size],
                num_bytes=0,
                filename_template=template.replace(split=name),
            )
            for name, size in SIZES[builder.name].items()
        ]
    )


def _split_sizes(name: str, splits: Mapping[str, Any], dataset_config: ConfigDict) -> list[int]:
    return [
        datasets.split_size(name, splits, key, dataset_config, needed=True)
        for key in ('train_split', 'eval_split')
    ]
