"""Where examples come from: a TFDS data set, the embedded digits, or a folder of one's own images."""
import contextlib
import dataclasses
import io
import os

import psutil

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from errors import ConfigError, RunError, did_you_mean, one_line
from inputs import reading


@dataclasses.dataclass(frozen=True)
class Source:
    """A prepared data set: its splits, its sizes and its class names."""

    builder: tfds.core.DatasetBuilder
    train_split: str
    eval_split: str
    num_train: int
    num_eval: int
    class_names: tuple[str, ...]
    memory_bytes: int  # of host memory for what is read ahead; from the config alone, as the order of examples follows from it
    _kept: dict = dataclasses.field(default_factory=dict)

    def split(self, name, share=(0, 1)):
        """A host's share (index, number) of a split, to be read from any place on: see `reading`.

        It is kept in memory, encoded, where a quarter of the budget is enough for it.

        Raises: RunError where the machine has not as much memory free as the budget says.
        """
        if (name, share) not in self._kept:
            if isinstance(self.builder, tfds.folder_dataset.ImageFolder):
                found = _files(self.builder, name, share)
            else:
                found = reading.of_builder(self.builder, name, share)
            free = psutil.virtual_memory().available
            if min(self.memory_bytes, found.num_bytes) > free:
                raise RunError(f'config.dataset.memory_gib={self.memory_bytes / 2**30:.3g}, but only {free / 2**30:.3g} GiB of memory are free: '
                               f'write --config.dataset.memory_gib={free / 2**31:.2g}')
            self._kept[name, share] = reading.in_memory(found) if found.num_bytes <= self.memory_bytes // 4 else found
        return self._kept[name, share]

    def examples(self, split):
        """A tf.data.Dataset of (image, label): encoded bytes, string []; int64 []. The order is always the same."""
        found = self.split(split)
        return found.read(np.arange(len(found.counts))).map(lambda number, encoded, label: (encoded, label))


def load(dataset_config):
    """Finds the data set of `config.dataset`, and prepares it if that has not been done on this machine.

    Raises:
        ConfigError: there is no such data set or split.
        RunError: the data are not there and cannot be got without the user, or preparing them failed.
    """
    builder = _folder(dataset_config) if dataset_config.name == 'folder' else _tfds(dataset_config)
    supervised = builder.info.supervised_keys
    image_feature = builder.info.features[supervised[0]] if supervised and len(supervised) == 2 else None
    label_feature = builder.info.features[supervised[1]] if image_feature else None
    if not isinstance(image_feature, tfds.features.Image) or not isinstance(label_feature, tfds.features.ClassLabel):
        raise ConfigError(f'config.dataset.name={dataset_config.name!r} is no image classification data set: it needs one image and one class label')
    if dataset_config.name != 'folder' and not builder.is_prepared():
        _prepare(builder, os.path.expanduser(dataset_config.data_dir) or str(tfds.core.constants.DATA_DIR))
    if label_feature.num_classes < 2:
        raise RunError(f'{dataset_config.name} in {builder.data_dir} has {label_feature.num_classes} class; a classifier needs at least two')
    return Source(
        builder=builder,
        train_split=dataset_config.train_split,
        eval_split=dataset_config.eval_split,
        num_train=_size(builder, 'train_split', dataset_config),
        num_eval=_size(builder, 'eval_split', dataset_config),
        class_names=tuple(label_feature.names),
        memory_bytes=int(dataset_config.memory_gib * 2**30),
    )


class Digits(tfds.core.GeneratorBasedBuilder):
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, as TFDS data set: no download.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998). A fixed permutation
    puts 360 examples into `test` and 1,437 into `train`.
    """

    VERSION = tfds.core.Version('1.0.0')
    NUM_TEST = 360

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({
                'image': tfds.features.Image(shape=(8, 8, 1)),
                'label': tfds.features.ClassLabel(num_classes=10),
                'id': np.int64,  # row in scikit-learn's array
            }),
            supervised_keys=('image', 'label'),
            description=self.__doc__,
        )

    def _split_generators(self, dl_manager):
        order = np.random.RandomState(0).permutation(1797)  # RandomState's stream is frozen, default_rng's is not
        return {'train': self._generate_examples(order[self.NUM_TEST:]), 'test': self._generate_examples(order[:self.NUM_TEST])}

    def _generate_examples(self, rows):
        from sklearn.datasets import load_digits

        digits = load_digits()
        for row in rows:
            pixels = np.rint(digits.images[row] * (255 / 16)).astype(np.uint8)  # scikit-learn's values are 0 to 16
            yield int(row), {'image': pixels[..., None], 'label': int(digits.target[row]), 'id': int(row)}


def _tfds(dataset_config):
    name, data_dir = dataset_config.name, os.path.expanduser(dataset_config.data_dir) or None
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        hint = did_you_mean(name, tfds.list_builders(), cutoff=0.5) or ": see tensorflow.org/datasets/catalog, or use 'digits' or 'folder'"
        raise ConfigError(f'config.dataset.name={name!r} is no TFDS data set{hint}') from None
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"config.dataset.name={name!r} is no TFDS data set ({one_line(error, 100)}): write its name, 'digits' or 'folder'") from error


def _prepare(builder, data_dir):
    download = tfds.download.DownloadConfig()
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        manual_dir = os.path.join(data_dir, 'downloads', 'manual')
        if not tf.io.gfile.exists(manual_dir) or not tf.io.gfile.listdir(manual_dir):
            raise RunError(
                f'{builder.name} is not prepared: looked in {builder.data_dir} and for its archives in {manual_dir}. '
                f'{_how_to_get(builder)} Then run the same command again, or point --config.dataset.data_dir at a folder that has it')
        download = tfds.download.DownloadConfig(manual_dir=manual_dir)
    if builder.name == 'digits':
        tfds.disable_progress_bar()  # it takes a second
    print(f'preparing {builder.name} in {builder.data_dir}, once', flush=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=download)
    except Exception as error:  # of any kind: no network, a damaged archive, no space
        raise RunError(f'{builder.name} could not be prepared in {builder.data_dir}: {one_line(error)}') from error


def _how_to_get(builder):
    if builder.name == 'imagenet2012':
        return ('Register at https://image-net.org/download-images, put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar '
                'there (145 GB; preparing them takes as much again).')
    return f'TFDS says: {one_line(builder.MANUAL_DOWNLOAD_INSTRUCTIONS)}'


def _folder(dataset_config):
    root = os.path.expanduser(dataset_config.data_dir)
    layout = f'{root or "DIR"}/{dataset_config.train_split}/CLASS/*.jpg and {root or "DIR"}/{dataset_config.eval_split}/CLASS/*.jpg'
    if not root:
        raise ConfigError(f"config.dataset.name='folder' needs --config.dataset.data_dir=DIR with {layout}")
    if not tf.io.gfile.isdir(root):
        raise RunError(f'config.dataset.data_dir={root} is no folder: it should hold {layout}')
    builder = tfds.folder_dataset.ImageFolder(root)
    for split in (dataset_config.train_split, dataset_config.eval_split):
        if split not in builder.info.splits or not builder.info.splits[split].num_examples:
            raise RunError(f'{os.path.join(root, split)} has no class folders with images (.jpg, .jpeg, .png): expected {layout}')
    classes = [set(tf.io.gfile.listdir(os.path.join(root, split))) for split in (dataset_config.train_split, dataset_config.eval_split)]
    unknown = sorted(name.rstrip('/') for name in classes[1] - classes[0] if tf.io.gfile.isdir(os.path.join(root, dataset_config.eval_split, name)))
    seen = {example.label for example in builder._split_examples[dataset_config.train_split]}
    unseen = sorted(name for name in builder.info.features['label'].names if name not in seen or name.startswith('.'))
    if unknown:
        raise RunError(f'{os.path.join(root, dataset_config.eval_split)} has classes that {dataset_config.train_split} has not: {", ".join(unknown[:10])}')
    if unseen:
        raise RunError(f'{root} has folders that are no classes with training pictures: {", ".join(unseen[:10])}: fill them, or take them away')
    return builder


def _files(builder, split, share):
    examples = builder._split_examples[split]
    begin, end = reading.share_of(len(examples), share)
    paths = [example.image_path for example in examples[begin:end]]
    labels = [builder.info.features['label'].str2int(example.label) for example in examples[begin:end]]
    return reading.Singles(stored=tf.constant(paths), labels=tf.constant(labels, tf.int64), ids=tf.range(begin, end, dtype=tf.int64),
                           load=tf.io.read_file, num_bytes=sum(tf.io.gfile.stat(path).length for path in paths))


def _size(builder, key, dataset_config):
    split = dataset_config[key]
    try:
        size = builder.info.splits[split].num_examples
    except (KeyError, ValueError) as error:
        raise ConfigError(f'config.dataset.{key}={split!r} is no split of {builder.name}: it has '
                          f'{", ".join(builder.info.splits) or "none"} ({one_line(error, 120)})') from error
    if not size:
        raise ConfigError(f'config.dataset.{key}={split!r} of {builder.name} has no examples')
    return size
