"""Reads encoded examples of a split from any position, which makes an exact resume cheap.

A split is a list of pieces. A piece is a run of neighbouring records of a TFRecord file, one file
of a folder, or one example that is kept in memory. An epoch is an order of pieces; records are
shuffled only within a window of pieces, so a resumed run rereads at most the window it stopped in.
"""

import concurrent.futures
import dataclasses
import itertools
import os
import re
import struct
from collections.abc import Callable

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from common.errors import RunError
from inputs import tfds_features
from inputs.tfds_features import Columns

PIECES_PER_EPOCH = 1000  # about, if it has that many examples
EXAMPLES_PER_SAMPLED_PIECE = 4  # that a sample takes from a piece
PARSED_TOGETHER = 1024  # records, where one feature is wanted: ten times as fast as one by one
RECORD_OVERHEAD = 16  # bytes around each record of a TFRecord file: length, two checksums


@dataclasses.dataclass(frozen=True)
class RecordRanges:
    """Pieces of TFRecord files that TFDS prepared.

    Attributes:
        counts: int64 [pieces], examples in each.
        first_ids: int64 [pieces], the number in the split of the first example of each.
        filenames: string [pieces].
        offsets: int64 [pieces], where in its file each begins, in bytes.
        features: of the data set, to parse a record.
        columns: which of them are the image and the label.
        name: of the data set and the split.
        num_bytes: approximate size of all encoded examples.
    """

    counts: np.ndarray
    first_ids: np.ndarray
    filenames: np.ndarray
    offsets: np.ndarray
    features: tfds.features.FeaturesDict
    columns: tfds_features.Columns
    name: str
    num_bytes: int

    @tf.autograph.experimental.do_not_convert
    def read(self, pieces: tf.Tensor) -> tf.data.Dataset:
        """Returns (id int64 [], encoded string [], label int64 []) of `pieces`, int64 [n].

        The order is fixed, but not that of `pieces`. A label that is none of the classes is an
        error: see `tfds_features.require_class`.
        """
        num_classes = tfds_features.feature_at(self.features, self.columns.label).num_classes
        specs = self._specs(*self.columns)

        def parse(number: tf.Tensor, record: tf.Tensor) -> tuple:
            example = tf.io.parse_single_example(record, specs)
            label = example[self.columns.label]
            checked = tfds_features.require_class(label, num_classes, self.name, number)
            return number, example[self.columns.image], checked

        return self._serialized(pieces).map(parse)

    def entries(self, pieces: tf.Tensor) -> tf.data.Dataset:
        """Returns (id int64 [], ...) of `pieces`, int64 [n]: `fetch` takes what follows the id."""
        return self.read(pieces)

    def fetch(self, encoded: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns (encoded string [], label int64 []) of an entry."""
        return encoded, label

    @tf.autograph.experimental.do_not_convert
    def column(self, path: str) -> np.ndarray:
        """Reads one feature of all examples, unchecked and in no particular order."""
        specs = self._specs(path)
        batches = self._serialized(np.arange(len(self.counts))).batch(PARSED_TOGETHER)
        values = batches.map(lambda numbers, records: tf.io.parse_example(records, specs)[path])
        return np.concatenate(list(values.as_numpy_iterator()))

    def sample(self, num_examples: int) -> 'RecordRanges':
        """Returns up to `num_examples` examples, of pieces evenly spread from first to last."""
        per_piece = min(EXAMPLES_PER_SAMPLED_PIECE, int(self.counts.max()))
        last = len(self.counts) - 1
        chosen = np.unique(np.linspace(0, last, num_examples // per_piece).astype(np.int64))
        return dataclasses.replace(
            self,
            counts=np.minimum(self.counts[chosen], per_piece),
            first_ids=self.first_ids[chosen],
            filenames=self.filenames[chosen],
            offsets=self.offsets[chosen],
        )

    def _specs(self, *paths: str) -> dict[str, tf.io.FixedLenFeature]:
        """Returns the specs that parse these features of a record; images stay encoded."""
        return {path: self.features.tf_example_spec[path] for path in paths}

    def _serialized(self, pieces: tf.Tensor) -> tf.data.Dataset:
        """Returns (id int64 [], record string []) of `pieces`."""
        filenames, offsets, counts, first_ids = map(
            tf.constant, (self.filenames, self.offsets, self.counts, self.first_ids)
        )

        def piece(index: tf.Tensor) -> tf.data.Dataset:
            # The operation can begin inside a file; tf.data.TFRecordDataset does not expose that.
            variant = tf.raw_ops.TFRecordDatasetV2(
                filenames=filenames[index][None],
                compression_type='',
                buffer_size=256 * 1024,
                byte_offsets=offsets[index][None],
            )
            records = tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string))
            return records.take(counts[index]).enumerate(first_ids[index])

        dataset = tf.data.Dataset.from_tensor_slices(pieces)
        return dataset.interleave(piece, cycle_length=4, num_parallel_calls=4, deterministic=True)


@dataclasses.dataclass(frozen=True)
class ExampleList:
    """Examples that are read one by one, from memory or from image files: each is a piece.

    Attributes:
        stored: string [examples], what `load` turns into encoded images: the images, or file paths.
        labels, ids: int64 [examples].
        num_bytes: of all encoded examples.
        load: `tf.identity` or `tf.io.read_file`.
    """

    stored: tf.Tensor
    labels: tf.Tensor
    ids: tf.Tensor
    num_bytes: int
    load: Callable

    @property
    def counts(self) -> np.ndarray:
        return np.ones(len(self.labels), np.int64)

    @tf.autograph.experimental.do_not_convert
    def read(self, pieces: tf.Tensor) -> tf.data.Dataset:
        """See `RecordRanges.read`; in the order of `pieces`."""
        return self.entries(pieces).map(
            lambda number, index: (number, *self.fetch(index)), tf.data.AUTOTUNE
        )

    def entries(self, pieces: tf.Tensor) -> tf.data.Dataset:
        """See `RecordRanges.entries`: an entry is an index; `fetch` reads the file."""
        return tf.data.Dataset.from_tensor_slices((tf.gather(self.ids, pieces), pieces))

    def fetch(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See `RecordRanges.fetch`."""
        return self.load(self.stored[index]), self.labels[index]


def require_tfrecord(builder: tfds.core.DatasetBuilder) -> None:
    """Raises RunError if a data set is prepared in another format."""
    if builder.info.file_format != tfds.core.FileFormat.TFRECORD:
        raise RunError(
            f'{builder.name} in {builder.data_dir} is prepared as {builder.info.file_format.value}',
            'prepare it as tfrecord, or point --config.dataset.data_dir at a folder that has it in '
            'this format',
        )


def from_builder(
    builder: tfds.core.DatasetBuilder,
    columns: Columns,
    split: str,
    share: tuple[int, int] = (0, 1),
    longest: int | None = None,
) -> RecordRanges:
    """Returns the `RecordRanges` of a prepared TFDS split.

    Args:
        builder: prepared as TFRecord files.
        columns: which features are the image and the label.
        split: a TFDS split, such as 'train[:90%]'.
        share: (index, count) of a host: share `index` of `count` even ones, cut as
            `tfds.even_splits` does.
        longest: the most examples of a piece (a whole file may have twice as many); by default,
            chosen for about `PIECES_PER_EPOCH`. With 1 the order is the same as for examples kept
            in memory.
    """
    info = builder.info.splits[split]
    begin, end = host_range(info.num_examples, share)
    whole = builder.info.splits[re.split(r'[\[+]', split)[0].strip()]
    whole_bytes = whole.num_bytes
    if not whole_bytes:  # some data sets do not say
        whole_bytes = sum(tf.io.gfile.stat(path).length for path in whole.filepaths)
    most = longest or max(1, info.num_examples // PIECES_PER_EPOCH)
    # (filename, records to skip, records to take, id of the first) of each.
    runs: list[tuple[str, int, int, int]] = []
    first_id = 0
    for file in info.file_instructions:
        low, high = max(begin, first_id), min(end, first_id + file.take)
        if low < high:
            runs.append((file.filename, file.skip + low - first_id, high - low, low))
        first_id += file.take
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda run: _pieces_of_run(*run, longest=most), runs)
        pieces = list(itertools.chain.from_iterable(found))
    filenames, offsets, counts, first_ids = map(np.array, zip(*pieces, strict=True))
    return RecordRanges(
        counts=counts.astype(np.int64),
        first_ids=first_ids.astype(np.int64),
        filenames=filenames,
        offsets=offsets.astype(np.int64),
        features=builder.info.features,
        columns=columns,
        name=f'{builder.name}, split {split}',
        num_bytes=int(whole_bytes / whole.num_examples * (end - begin)),
    )


def in_memory(split: RecordRanges) -> ExampleList:
    """Returns all examples of a split, kept in memory."""
    columns = next(iter(split.read(np.arange(len(split.counts))).batch(int(split.counts.sum()))))
    ids, encoded, labels = (tf.gather(column, tf.argsort(columns[0])) for column in columns)
    return ExampleList(
        stored=encoded, labels=labels, ids=ids, num_bytes=split.num_bytes, load=tf.identity
    )


def host_range(num_examples: int, share: tuple[int, int]) -> tuple[int, int]:
    """Returns (begin, end) of share (index, number): shares differ by one example at most.

    Raises: RunError if there are more hosts than examples.
    """
    index, number = share
    if num_examples < number:  # all hosts see it, so none waits for another
        raise RunError(
            f'a split has {num_examples} examples for {number} hosts, and each needs one',
            'name a larger one in config.dataset.train_split or eval_split',
        )
    return num_examples * index // number, num_examples * (index + 1) // number


def _pieces_of_run(
    filename: str, skip: int, take: int, first_id: int, *, longest: int
) -> list[tuple]:
    """Returns (filename, offset, count, first id) of the pieces of one run of records.

    Record offsets are read only if the run is cut.
    """
    if skip == 0 and take <= (2 * longest if longest > 1 else 1):
        return [(filename, 0, take, first_id)]
    starts = record_offsets(filename, skip + take)
    return [
        (filename, starts[skip + done], min(longest, take - done), first_id + done)
        for done in range(0, take, longest)
    ]


def record_offsets(filename: str, count: int) -> list[int]:
    """Returns where each of the first `count` records of a TFRecord file begins, in bytes.

    It reads their lengths only.
    """
    offsets, offset = [], 0
    with tf.io.gfile.GFile(filename, 'rb') as file:
        for _ in range(count):
            offsets.append(offset)
            try:
                file.seek(offset)
                (length,) = struct.unpack('<Q', file.read(8))
            except (tf.errors.OutOfRangeError, struct.error) as error:
                raise RunError(
                    f'{filename} was cut short', f'rm -r {os.path.dirname(filename)}'
                ) from error
            offset += length + RECORD_OVERHEAD
    return offsets
