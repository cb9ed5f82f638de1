"""Every example once per epoch, the same batches again after a resume, and every evaluation example
exactly once.
"""

import collections
import hashlib
import io

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.linear_model import LogisticRegression

from common.errors import RunError
from configs import folder
from experiment import planning
from inputs import datasets, pipeline, record_index, service
from inputs.image_ops import center_crop_and_resize, decode
from tests.conftest import refused, slow

ONE_DEVICE = tf.distribute.OneDeviceStrategy('CPU:0')


@pytest.fixture(scope='module')
def source():
    from configs import default

    return datasets.load(default.get_config().dataset)


@pytest.fixture(params=['memory', 'records', 'long records'])
def split(request, source, monkeypatch):
    """The training split of the digits: each example a piece in memory or in a file, or runs of 7
    in a file.
    """
    monkeypatch.setattr(
        record_index, 'PIECES_PER_EPOCH', 1437 // 7 if request.param == 'long records' else 2000
    )
    records = source.open_split('train')
    return record_index.in_memory(records) if request.param == 'memory' else records


def plan_for(config, source, num_replicas=1):
    return planning.make_plan(config, source.num_train, source.num_eval, 10, num_replicas)


def training_batches(config, source, strategy=ONE_DEVICE, begin=0):
    plan = plan_for(config, source, strategy.num_replicas_in_sync)
    return pipeline.training_batches(source, config, plan, begin, plan.total_steps, strategy)


def digest(*tensors):
    return hashlib.sha256(
        b''.join(np.ascontiguousarray(tensor).tobytes() for tensor in tensors)
    ).hexdigest()


def batch_digest(batch):
    return digest(*tf.nest.flatten(batch))


def mirrored(devices):
    return tf.distribute.MirroredStrategy(
        [f'CPU:{index}' for index in range(devices)], tf.distribute.ReductionToOneDevice()
    )


def global_batches(dataset, strategy):
    """The parts of each replica put together again, as numpy."""
    for parts in dataset:
        yield tuple(
            np.concatenate([part.numpy() for part in strategy.experimental_local_results(value)])
            for value in tf.nest.flatten(parts)
        )


def ids(split, seed, begin, end):
    """(epoch, id) of examples `begin` to `end`."""
    return [
        (int(epoch), int(number))
        for epoch, (number, *_) in pipeline.ordered_entries(split, seed, 10**9, begin)
        .take(end - begin)
        .as_numpy_iterator()
    ]


@pytest.mark.slow
def test_every_example_is_seen_exactly_once_in_each_epoch(split):
    seen = ids(split, 0, 0, 2 * 1437 + 500)
    assert [epoch for epoch, _ in seen] == [0] * 1437 + [1] * 1437 + [2] * 500
    epochs = [[number for epoch, number in seen if epoch == which] for which in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(1437))
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0]) and len(set(epochs[2])) == 500
    assert ids(split, 1, 0, 1437) != seen[:1437]


def test_an_epoch_is_well_mixed(split):
    """Neighbours in an epoch come from all over the split: on average nearly a third of it lies
    between them.
    """
    order = np.array([number for _, number in ids(split, 0, 0, 1437)])
    assert np.abs(np.diff(order)).mean() > 0.75 * 1437 / 3


@pytest.mark.slow
def test_a_resumed_stream_goes_on_at_any_position(split):
    whole = ids(split, 3, 0, 3 * 1437)
    for begin in [0, 1, 1436, 1437, 1438, *np.random.RandomState(0).randint(0, 3 * 1437 - 50, 8)]:
        assert ids(split, 3, int(begin), int(begin) + 50) == whole[begin : begin + 50]


@pytest.mark.slow
def test_a_resumed_stream_rereads_at_most_two_percent(split):
    whole = ids(split, 0, 0, 3 * 1437)
    read = []

    def note(number):
        read.append(int(number))
        return number

    class Watched:
        counts, num_bytes = split.counts, split.num_bytes

        def entries(self, pieces):
            return split.entries(pieces).map(
                lambda number, *example: (
                    tf.ensure_shape(tf.py_function(note, [number], tf.int64), []),
                    *example,
                )
            )

    for begin in np.random.RandomState(1).randint(0, 3 * 1437 - 1, 8):
        read.clear()
        next(iter(pipeline.ordered_entries(Watched(), 0, 10**9, int(begin))))
        done = {
            number for _, number in whole[begin // 1437 * 1437 : begin]
        }  # in this epoch, before the stop
        assert whole[begin][1] in read and len(done & set(read)) <= 0.02 * 1437


def test_a_resumed_run_gets_the_batch_that_would_have_come(tiny, source):
    tiny.train_for = '2 epochs'
    tiny.augment.flip = True
    tiny.augment.random_erasing = 0.5
    tiny.augment.mixup = 0.2
    plan = plan_for(tiny, source)
    batches = [batch_digest(batch) for batch in training_batches(tiny, source)]
    assert len(batches) == plan.total_steps == len(set(batches))
    for step in (
        44,
        45,
        plan.total_steps - 1,
        *np.random.RandomState(0).permutation(plan.total_steps)[:3],
    ):  # 44.9 steps are an epoch
        assert (
            batch_digest(next(iter(training_batches(tiny, source, begin=int(step)))))
            == batches[step]
        )


@pytest.mark.slow
def test_repeated_examples_differ_and_come_equally_often(tiny, source):
    tiny.augment.repeats = 3
    tiny.batch_size = 48
    tiny.train_for = '60 steps'  # 2 epochs and 6 examples
    split = source.split('train')
    seen = [
        (int(repeat), int(epoch), int(number))
        for repeat, (epoch, (number, *_)) in pipeline.repeated(
            pipeline.ordered_entries(split, 0, 10**9, 0), 48, 3
        )
        .take(3 * 1437 // 48 * 48)
        .as_numpy_iterator()
    ]
    for begin in range(0, len(seen), 48):
        batch = seen[begin : begin + 48]
        assert len({number for *_, number in batch}) == 16 and len(set(batch)) == 48
        assert all(
            batch[place][2] != batch[place + 1][2] for place in range(47)
        )  # neighbours are mixed
    assert len(set(seen)) == len(seen)
    batches = [batch_digest(batch) for batch in training_batches(tiny, source)]
    assert batch_digest(next(iter(training_batches(tiny, source, begin=41)))) == batches[41]
    images = next(iter(training_batches(tiny, source)))[0].numpy()
    assert len({digest(image) for image in images}) == 48


@pytest.mark.parametrize('batch_size', [31, slow(30), slow(32)])
def test_batches_do_not_depend_on_group_size(tiny, source, batch_size, monkeypatch):
    tiny.train_for = '6 steps'
    tiny.batch_size = batch_size
    tiny.augment.flip = True
    tiny.augment.random_erasing = 0.5
    batches = [batch_digest(batch) for batch in training_batches(tiny, source)]
    monkeypatch.setattr(service, 'MAX_IN_GROUP', 1)
    assert batches == [batch_digest(batch) for batch in training_batches(tiny, source)]


@pytest.mark.slow
def test_batches_do_not_depend_on_the_parallelism(tiny, source, monkeypatch):
    tiny.train_for, tiny.augment.policy.name = '6 steps', 'rand_augment'
    expected = [batch_digest(batch) for batch in training_batches(tiny, source)]
    for parallel_calls in (1, 8):
        monkeypatch.setattr(pipeline, 'AUTOTUNE', parallel_calls)
        assert [batch_digest(batch) for batch in training_batches(tiny, source)] == expected


@pytest.mark.parametrize('devices', [2, slow(4)])
def test_replicas_share_the_global_batch_of_one_device(tiny, source, devices):
    tiny.train_for, tiny.augment.cutmix = '4 steps', 1.0
    alone = list(global_batches(training_batches(tiny, source), ONE_DEVICE))
    strategy = mirrored(devices)
    shared = list(global_batches(training_batches(tiny, source, strategy), strategy))
    assert len(alone) == len(shared) == 4
    for values, values_shared in zip(alone, shared, strict=True):
        for value, value_shared in zip(values, values_shared, strict=True):
            np.testing.assert_array_equal(value, value_shared)


@pytest.mark.parametrize('hosts', [3, slow(2), slow(8)])
def test_hosts_read_shares_that_together_are_the_split(source, hosts):
    """One file, more hosts than files."""
    parts = [source.open_split('train', (host, hosts)) for host in range(hosts)]
    sizes = [int(part.counts.sum()) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    read = [
        number
        for part in parts
        for number in sorted(
            int(number) for number, *_ in part.read(np.arange(len(part.counts))).as_numpy_iterator()
        )
    ]
    assert read == list(range(1437))


def test_more_hosts_than_examples_are_refused_by_all_of_them(source):
    for host in range(3):
        with refused(RunError, '2 examples', '3 hosts'):
            source.open_split('train[:2]', (host, 3))


def test_a_piece_is_what_tfds_reads(split, source):
    expected = collections.Counter(
        (example['label'], example['image'])
        for example in tfds.builder('digits')
        .as_dataset(split='train', decoders={'image': tfds.decode.SkipDecoding()})
        .as_numpy_iterator()
    )
    assert (
        collections.Counter(
            (label, encoded)
            for _, encoded, label in split.read(np.arange(len(split.counts))).as_numpy_iterator()
        )
        == expected
    )


def test_a_part_of_a_split_is_read_from_inside_its_file(source):
    part = source.open_split('train[100:200] + train[700:705]')
    expected = sorted(
        example['id']
        for example in tfds.builder('digits')
        .as_dataset(split='train[100:200]+train[700:705]')
        .as_numpy_iterator()
    )
    by_encoded = {
        example['image']: example['id']
        for example in tfds.builder('digits')
        .as_dataset(split='train', decoders={'image': tfds.decode.SkipDecoding()})
        .as_numpy_iterator()
    }
    read = list(part.read(np.arange(len(part.counts))).as_numpy_iterator())
    assert sorted(number for number, *_ in read) == list(range(105))
    assert sorted(by_encoded[encoded] for _, encoded, _ in read) == expected


@pytest.mark.parametrize(
    'devices, eval_batch_size',
    [(2, 7), slow(1, 360), slow(4, 1000)],
)
def test_evaluation_reads_every_example_exactly_once(still, source, devices, eval_batch_size):
    still.eval_batch_size = eval_batch_size
    plan = plan_for(still, source, devices)
    strategy = mirrored(devices) if devices > 1 else ONE_DEVICE
    dataset, num_steps = pipeline.evaluation_batches(source, still, plan, strategy)
    batches = list(global_batches(dataset, strategy))
    assert len(batches) == num_steps
    images, labels, mask = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    expected = collections.Counter(
        (digest(center_crop_and_resize(decode(encoded), 16)), int(label))
        for encoded, label in source.examples('test')
    )
    assert (
        collections.Counter(
            (digest(image), int(label))
            for image, label, is_example in zip(images, labels, mask, strict=True)
            if is_example
        )
        == expected
    )
    assert set(mask) <= {0.0, 1.0} and mask.sum() == 360


def test_without_augmentation_training_and_evaluation_match(still, source):
    still.train_for = '2 steps'
    images, labels, draws = next(iter(training_batches(still, source)))
    split = source.split('train')
    entries = pipeline.ordered_entries(split, still.seed, 10**9, 0).take(32)
    examples = [split.fetch(*entry) for _, (_, *entry) in entries]
    np.testing.assert_array_equal(
        images, tf.stack([center_crop_and_resize(decode(encoded), 16) for encoded, _ in examples])
    )
    assert draws == {} and images.dtype == tf.uint8


@pytest.mark.slow
@pytest.mark.parametrize('policy', ['mixed_bfloat16'])
def test_batches_do_not_depend_on_the_type_the_model_computes_in(tiny, source, policy):
    tiny.augment.policy.name, tiny.augment.mixup, tiny.train_for = 'rand_augment', 0.2, '2 steps'
    expected = [batch_digest(batch) for batch in training_batches(tiny, source)]
    keras.config.set_dtype_policy(policy)
    assert [batch_digest(batch) for batch in training_batches(tiny, source)] == expected


def texture(kind, random):
    """Draws a JPEG of 400 pixels: fine stripes, in class 0 stronger and a little darker."""
    y, x = np.mgrid[:400, :400]

    def wave(period):
        angle, phase = random.uniform(0, np.pi), random.uniform(0, 2 * np.pi)
        return np.sin(2 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) / period + phase)

    ground, strength = ((118, 80), (132, 15))[kind]
    grey = ground + strength * wave(random.uniform(2.2, 3.2))
    grey += sum(10 * wave(random.uniform(60, 300)) for _ in range(3))
    buffer = io.BytesIO()
    Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(buffer, 'JPEG', quality=90)
    return buffer.getvalue()


@pytest.fixture(scope='module')
def textures(tmp_path_factory):
    """A config of random crops at 32 pixels, and its source: 100 textures, and 40 others."""
    root, random = tmp_path_factory.mktemp('textures'), np.random.RandomState(0)
    for split, count in (('train', 50), ('test', 20)):
        for kind in (0, 1):
            (root / split / f'class{kind}').mkdir(parents=True)
            for index in range(count):
                (root / split / f'class{kind}' / f'{index}.jpg').write_bytes(texture(kind, random))
    config = folder.get_config()
    config.dataset.data_dir, config.image_size = str(root), 32
    config.batch_size, config.train_for = 20, '3 epochs'
    return config, datasets.load(config.dataset)


def test_what_training_can_see_evaluation_sees_too(textures):
    """Stripes too fine for a pixel must not tell the classes apart: evaluation is without them."""
    config, source = textures
    plan = planning.make_plan(config, source.num_train, source.num_eval, 2, 1)
    training = pipeline.training_batches(source, config, plan, 0, plan.total_steps, ONE_DEVICE)
    evaluation, _ = pipeline.evaluation_batches(source, config, plan, ONE_DEVICE)

    def seen(dataset):
        """(brightness and contrast of each image, its class), without padding."""
        images, labels, *more = map(
            np.concatenate, zip(*global_batches(dataset, ONE_DEVICE), strict=True)
        )
        if dataset is evaluation:
            images, labels = images[more[0] > 0], labels[more[0] > 0]
        grey = images.astype(float).mean(-1)
        neighbours = np.abs(np.diff(grey, axis=1)).mean((1, 2))
        return np.stack([grey.mean((1, 2)), neighbours], axis=-1), labels

    features, labels = seen(training)
    shown, right = seen(evaluation)
    assert len(labels) == 300 and len(right) == 40
    for kind in (0, 1):
        trained, evaluated = features[labels == kind], shown[right == kind]
        np.testing.assert_allclose(trained.mean(0), evaluated.mean(0), atol=2.5)
    model = LogisticRegression(max_iter=1000).fit(features, labels)
    assert model.score(features, labels) > 0.9
    assert model.score(shown, right) > 0.9


def test_random_crops_match_after_resume_and_on_any_devices(textures):
    config, source = textures

    def batches(strategy, begin=0):
        replicas = strategy.num_replicas_in_sync
        plan = planning.make_plan(config, source.num_train, source.num_eval, 2, replicas)
        dataset = pipeline.training_batches(source, config, plan, begin, 12, strategy)
        return [batch_digest(batch) for batch in global_batches(dataset, strategy)]

    expected = batches(ONE_DEVICE)
    assert len(set(expected)) == 12
    assert batches(mirrored(2)) == expected
    assert batches(mirrored(4)) == expected
    assert batches(ONE_DEVICE, begin=7) == expected[7:]
