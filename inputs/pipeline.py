"""Turns encoded examples into batches on the devices, for training and for evaluation.

Training examples form one endless stream: epoch 0 in an order of its own, then epoch 1, and so on,
cut into batches without regard to the ends of epochs, so every example is seen exactly once per
epoch. The order is a function of (seed, epoch), and an image's augmentation of (seed, epoch,
example), so a resumed run needs only its step.
"""

import math
from typing import Any

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from inputs import augment, service
from inputs.datasets import Source
from inputs.image_ops import center_crop_and_resize, decode

AUTOTUNE = tf.data.AUTOTUNE
SHUFFLE_WINDOW = 0.02  # share of an epoch that is shuffled together, and reread after a resume


@tf.autograph.experimental.do_not_convert
def training_batches(
    source: Source,
    config: ConfigDict,
    plan: Any,
    begin_step: int,
    end_step: int,
    strategy: tf.distribute.Strategy,
) -> tf.distribute.DistributedDataset:
    """Returns the batches of updates `begin_step` to `end_step`.

    Args:
        source: datasets.Source.
        config: of these updates: `image_size` and `augment` differ between the stages of a
            progressive run.
        plan: planning.Plan.
        begin_step, end_step: 0-based; `end_step` is excluded.
        strategy: tf.distribute.Strategy.

    Returns: a distributed dataset of (images, labels, draws) per replica: uint8 [batch, size, size,
        3], int64 [batch], and the dict of random numbers that `augment.make_device_augment` takes,
        float32 [batch, ...].
    """
    change = augment.make_host_augment(
        config.augment, config.image_size, config.dataset.white_level
    )
    repeats = config.augment.repeats
    per_replica = plan.batch_size // plan.num_replicas

    def make_dataset(context: tf.distribute.InputContext) -> tf.data.Dataset:
        in_memory = not config.dataset.service
        split = source.split(source.train_split, _share(context), in_memory=in_memory)
        begin = plan.stream_position(begin_step, repeats) // context.num_input_pipelines

        def prepare_image(repeat: tf.Tensor, example: tuple) -> tuple:
            epoch, (number, *entry) = example
            encoded, label = split.fetch(*entry)
            own_seed = (number * repeats + repeat) * augment.SEEDS_PER_EXAMPLE
            seed = tf.stack([config.seed * 2**31 + epoch, own_seed])
            image = change(encoded, seed, config.eval_crop)
            return image, label, augment.draw_numbers(config.augment, seed)

        entries = ordered_entries(split, config.seed, source.memory_bytes // 4, begin)
        entries = repeated(entries, per_replica, repeats)
        batches = service.prepare(
            entries, prepare_image, per_replica, config.dataset.service, AUTOTUNE
        )
        replicas = plan.num_replicas // context.num_input_pipelines
        wanted = batches.take((end_step - begin_step) * replicas)
        return wanted.prefetch(AUTOTUNE).with_options(_options(source.memory_bytes))

    return strategy.distribute_datasets_from_function(make_dataset)


@tf.autograph.experimental.do_not_convert
def evaluation_batches(
    source: Source, config: ConfigDict, plan: Any, strategy: tf.distribute.Strategy
) -> tuple[tf.distribute.DistributedDataset, int]:
    """Returns every example of the evaluation split exactly once, then padding to whole batches.

    Returns: a distributed dataset of (images, labels, mask) per replica: uint8 [batch, size, size,
        3], int64 [batch], float32 [batch] with 1 for an example and 0 for padding; and the number
        of steps.
    """
    size, white_level = config.image_size, config.dataset.white_level
    steps: list[int] = []  # of each host: all equal

    def prepare_image(number: tf.Tensor, encoded: tf.Tensor, label: tf.Tensor) -> tuple:
        image = center_crop_and_resize(decode(encoded, white_level), size, config.eval_crop)
        return image, label, tf.constant(1.0)

    def make_dataset(context: tf.distribute.InputContext) -> tf.data.Dataset:
        split = source.split(source.eval_split, _share(context))
        batch_size = plan.eval_batch_size // context.num_input_pipelines
        largest_share = math.ceil(plan.eval_examples / context.num_input_pipelines)
        steps.append(math.ceil(largest_share / batch_size))
        padding = tf.data.Dataset.from_tensors(
            (tf.zeros([size, size, 3], tf.uint8), tf.zeros([], tf.int64), tf.zeros([]))
        )
        padding = padding.repeat(steps[0] * batch_size - int(split.counts.sum()))
        examples = split.read(np.arange(len(split.counts))).map(prepare_image, AUTOTUNE)
        batches = examples.concatenate(padding).batch(
            plan.eval_batch_size // plan.num_replicas, drop_remainder=True
        )
        return batches.prefetch(AUTOTUNE).with_options(_options(source.memory_bytes))

    return strategy.distribute_datasets_from_function(make_dataset), steps[0]


def ordered_entries(split: Any, seed: int, window_bytes: int, begin: int) -> tf.data.Dataset:
    """Returns the endless stream of training entries from `begin` on.

    An entry is an encoded example, or says where to read it.

    An epoch is a random order of the split's pieces. Where a piece has several examples, as many
    pieces as fit into `window_bytes`, but no more than 2 % of the epoch, are shuffled together.

    Returns: a tf.data.Dataset of (epoch int64 [], (id int64 [], ...)); `split.fetch` takes the
        rest.
    """
    num_pieces, num_examples = len(split.counts), int(split.counts.sum())
    longest = int(split.counts.max())
    window_examples = min(
        SHUFFLE_WINDOW * num_examples, window_bytes * num_examples / max(1, split.num_bytes)
    )
    pieces_per_window = num_pieces if longest == 1 else max(1, int(window_examples // longest))
    num_windows = math.ceil(num_pieces / pieces_per_window)

    def pieces_of(epoch: tf.Tensor, window: tf.Tensor | int) -> tf.Tensor:
        order = tf.random.experimental.stateless_shuffle(
            tf.range(num_pieces, dtype=tf.int64), _mixed_seed(seed, epoch)
        )
        return order[window * pieces_per_window : (window + 1) * pieces_per_window]

    first_epoch, done = divmod(begin, num_examples)
    epoch = tf.constant(first_epoch, tf.int64)
    sizes = [split.counts[pieces_of(epoch, window)].sum() for window in range(num_windows)]
    ends = np.cumsum(sizes)
    first_window = int(np.searchsorted(ends, done, side='right'))
    in_window = done - (int(ends[first_window - 1]) if first_window else 0)
    first = first_epoch * num_windows + first_window

    def examples(number: tf.Tensor) -> tf.data.Dataset:
        epoch, window = number // num_windows, number % num_windows
        pieces = pieces_of(epoch, window)
        if longest == 1:
            chosen = split.entries(pieces[tf.where(number == first, in_window, 0) :])
        else:
            chosen = split.entries(pieces).shuffle(
                pieces_per_window * longest,
                seed=_mixed_seed(seed, number)[1],
                reshuffle_each_iteration=False,
            )
        return _preceded_by(epoch, chosen)

    numbers = tf.data.Dataset.range(first, 2**62)
    if longest == 1:
        return numbers.flat_map(examples)
    # The next window is read while this one is consumed.
    return numbers.interleave(examples, cycle_length=1, num_parallel_calls=1).skip(in_window)


def repeated(examples: tf.data.Dataset, batch_size: int, repeats: int) -> tf.data.Dataset:
    """Repeats each example in its batch (Hoffer et al. 2020).

    A batch holds its distinct examples once, then all of them again, so neighbours differ.

    Returns: a tf.data.Dataset of (number of the repetition int64 [], example).
    """
    if repeats == 1:
        return _preceded_by(tf.constant(0, tf.int64), examples)

    def tile(*example: tf.Tensor) -> tuple:
        number = tf.repeat(tf.range(repeats, dtype=tf.int64), batch_size // repeats)
        return number, tf.nest.map_structure(lambda column: tf.tile(column, [repeats]), example)

    return examples.batch(batch_size // repeats, drop_remainder=True).map(tile).unbatch()


def _preceded_by(number: tf.Tensor, examples: tf.data.Dataset) -> tf.data.Dataset:
    """Returns a dataset of (number, example); a map would cost more."""
    return tf.data.Dataset.zip(tf.data.Dataset.from_tensors(number).repeat(), examples)


def _share(context: tf.distribute.InputContext) -> tuple[int, int]:
    return context.input_pipeline_id, context.num_input_pipelines


def _mixed_seed(seed: int, number: tf.Tensor) -> tf.Tensor:
    """Mixes both into int64 [2], so that neighbouring seeds and numbers have nothing in common."""
    pair = tf.stack([tf.cast(seed, tf.int64), tf.cast(number, tf.int64)])
    return tf.random.stateless_uniform([2], pair, minval=None, maxval=None, dtype=tf.int64)


def _options(memory_bytes: int) -> tf.data.Options:
    options = tf.data.Options()
    options.deterministic = True  # the same batches whatever the parallelism
    options.autotune.ram_budget = memory_bytes // 4  # bytes for prefetched batches
    sharding = tf.data.experimental.AutoShardPolicy.OFF  # `Source.split` shards
    options.experimental_distribute.auto_shard_policy = sharding
    return options
