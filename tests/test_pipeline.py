"""Every example once per epoch, the same batches again after a resume, and every evaluation example exactly once."""
import collections
import hashlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict

import plan as planning
from inputs import augment, datasets, pipeline

ONE_DEVICE = tf.distribute.OneDeviceStrategy('CPU:0')


@pytest.fixture(scope='module')
def source():
    from configs import default

    return datasets.load(default.get_config().dataset)


def plan_for(config, source, num_replicas=1):
    return planning.make_plan(config, source.num_train, source.num_eval, 10, num_replicas)


def digest(*tensors):
    return hashlib.sha256(b''.join(np.ascontiguousarray(tensor).tobytes() for tensor in tensors)).hexdigest()


def mirrored(devices):
    return tf.distribute.MirroredStrategy([f'CPU:{index}' for index in range(devices)], tf.distribute.ReductionToOneDevice())


def global_batches(dataset, strategy):
    """The parts of each replica put together again, as numpy."""
    for parts in dataset:
        yield tuple(np.concatenate([part.numpy() for part in strategy.experimental_local_results(value)]) for value in parts)


def test_every_example_is_seen_exactly_once_in_each_epoch(tiny, source):
    tiny.train_for, tiny.batch_size = '3 epochs', 100  # 100 does not divide 1,437
    plan = plan_for(tiny, source)
    seen = [(int(position), encoded) for position, encoded, _ in pipeline._stream(source, tiny, plan, 0).as_numpy_iterator()]
    assert [position for position, _ in seen] == list(range(plan.total_steps * 100))
    once = collections.Counter(encoded for encoded, _ in source.examples('train').as_numpy_iterator())
    epochs = [[encoded for position, encoded in seen if position // 1437 == epoch] for epoch in range(3)]
    assert collections.Counter(epochs[0]) == collections.Counter(epochs[1]) == once
    assert epochs[0] != epochs[1]
    assert not collections.Counter(epochs[2]) - once  # the last one ends with the last whole batch


def test_a_resumed_run_gets_the_batch_that_would_have_come(tiny, source):
    tiny.train_for, tiny.augment.flip, tiny.augment.random_erasing = '2 epochs', True, 0.5
    plan = plan_for(tiny, source)
    batches = [digest(*batch) for batch in pipeline.training_batches(source, tiny, plan, 0, ONE_DEVICE)]
    assert len(batches) == plan.total_steps == len(set(batches))
    for step in (1, 43, 44, 45, 46, plan.total_steps - 1):  # 44.9 steps are an epoch
        assert digest(*next(iter(pipeline.training_batches(source, tiny, plan, step, ONE_DEVICE)))) == batches[step]


def test_another_seed_is_another_order(still, source):
    plan = plan_for(still, source)
    first = [label.numpy() for _, label in pipeline.training_batches(source, still, plan, 0, ONE_DEVICE)]
    still.seed = 1
    second = [label.numpy() for _, label in pipeline.training_batches(source, still, plan, 0, ONE_DEVICE)]
    assert not np.array_equal(first, second)


@pytest.mark.parametrize('devices', [2, 4])
def test_replicas_share_the_global_batch_of_one_device(still, source, devices):
    still.train_for = '4 steps'
    alone = list(global_batches(pipeline.training_batches(source, still, plan_for(still, source), 0, ONE_DEVICE), ONE_DEVICE))
    strategy = mirrored(devices)
    shared = list(global_batches(pipeline.training_batches(source, still, plan_for(still, source, devices), 0, strategy), strategy))
    assert len(alone) == len(shared) == 4
    for (images, labels), (images_shared, labels_shared) in zip(alone, shared):
        np.testing.assert_array_equal(images, images_shared)
        np.testing.assert_array_equal(labels, labels_shared)


def test_hosts_share_the_global_batch_of_one_host(still, source):
    plan = plan_for(still, source)
    stream = pipeline._stream(source, still, plan, 0)
    shares = [list(pipeline._share_of_host(stream, 32, tf.distribute.InputContext(num_input_pipelines=2, input_pipeline_id=host))
                   .batch(16).as_numpy_iterator()) for host in range(2)]
    for whole, *parts in zip(stream.batch(32).as_numpy_iterator(), *shares):
        for index, values in enumerate(whole):
            np.testing.assert_array_equal(values, np.concatenate([part[index] for part in parts]))


@pytest.mark.parametrize('devices', [1, 2, 4])
@pytest.mark.parametrize('eval_batch_size', [7, 360, 1000])
def test_evaluation_reads_every_example_exactly_once(still, source, devices, eval_batch_size):
    still.eval_batch_size = eval_batch_size
    plan = plan_for(still, source, devices)
    strategy = mirrored(devices) if devices > 1 else ONE_DEVICE
    dataset, num_steps = pipeline.evaluation_batches(source, still, plan, strategy)
    batches = list(global_batches(dataset, strategy))
    assert len(batches) == num_steps
    images, labels, mask = (np.concatenate(parts) for parts in zip(*batches))
    expected = [(digest(pipeline.resize_picture(pipeline.decode(encoded), 16)), label) for encoded, label in source.examples('test')]
    assert [(digest(image), label) for image, label, is_example in zip(images, labels, mask) if is_example] == expected
    assert set(mask) <= {0.0, 1.0} and mask.sum() == 360


def test_evaluation_takes_the_central_square():
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, 30:70] = 200
    np.testing.assert_array_equal(pipeline.resize_picture(picture, 8), np.full((8, 8, 3), 200))
    np.testing.assert_array_equal(pipeline.resize_picture(picture[None].astype(np.float32), 8, 0.5), np.full((1, 8, 8, 3), 200))


def test_resizing_down_averages_instead_of_skipping():
    stripes = np.tile(np.array([[0], [240]], np.uint8), (64, 128))[..., None].repeat(3, -1)
    np.testing.assert_allclose(pipeline.resize_picture(stripes, 16).numpy()[1:-1], 120, atol=2)


@pytest.mark.parametrize('encode', [tf.io.encode_jpeg, tf.io.encode_png])
def test_a_random_crop_is_a_window_of_the_picture(encode):
    rows, columns = np.mgrid[:80, :120].astype(np.uint8)
    encoded = encode(np.stack([rows * 2, columns * 2, rows * 0], -1))
    areas = []
    for seed in range(30):
        window = augment.random_crop(encoded, tf.constant([0, seed], tf.int64), (0.2, 0.6)).numpy().astype(int)
        height, width = window.shape[:2]
        np.testing.assert_allclose(np.diff(window[2:-2, width // 2, 0]).mean(), 2, atol=0.5)  # neither turned nor scaled
        areas.append(height * width / (80 * 120))
    assert 0.18 < min(areas) and max(areas) < 0.62 and np.std(areas) > 0.05


def test_the_flip_has_nothing_to_do_with_the_crop(tiny):
    columns = np.tile(np.arange(240, dtype=np.uint8), (160, 1))[..., None].repeat(3, -1)  # brighter to the right
    encoded = tf.io.encode_png(columns)
    tiny.augment.crop, tiny.augment.flip = 'random', True
    picture = tf.function(pipeline._training_picture(tiny))
    seeds = [pipeline._seed(0, position) for position in range(400)]
    rows = np.stack([picture(encoded, seed)[8, :, 0] for seed in seeds]).astype(int)  # [400, 16]
    flipped = rows[:, 0] > rows[:, -1]
    widths = np.abs(rows[:, -1] - rows[:, 0])
    assert 0.42 < flipped.mean() < 0.58
    assert abs(np.corrcoef(flipped, widths)[0, 1]) < 0.15  # 3 standard deviations of 400 draws


def test_mixing_gives_soft_labels_that_sum_to_one(tiny, source):
    tiny.augment.mixup, tiny.augment.cutmix, tiny.train_for = 0.4, 1.0, '4 steps'
    for images, labels in pipeline.training_batches(source, tiny, plan_for(tiny, source), 0, ONE_DEVICE):
        assert images.dtype == tf.uint8 and labels.shape == (32, 10)
        np.testing.assert_allclose(labels.numpy().sum(-1), 1, atol=1e-5)
        assert (labels.numpy().max(-1) < 0.999).any()


def test_rand_augment_changes_the_chosen_share_of_pictures():
    picture = tf.image.resize(tf.random.stateless_uniform([6, 6, 3], [1, 2]), (24, 24)) * 255
    for rate, low, high in ((0.0, 0, 0), (0.5, 4, 16), (1.0, 16, 20)):
        apply = tf.function(augment.rand_augment(ConfigDict({'num_ops': 2, 'factor': 0.8, 'rate': rate})))
        changed = sum(bool(np.abs(apply(picture, tf.constant([3, seed], tf.int64)) - picture).max() > 1) for seed in range(20))
        assert low <= changed <= high


def test_without_augmentation_the_training_picture_is_the_evaluation_picture(still, source):
    still.train_for = '2 steps'
    plan = plan_for(still, source)
    images, labels = next(iter(pipeline.training_batches(source, still, plan, 0, ONE_DEVICE)))
    encoded = [example for _, example, _ in pipeline._stream(source, still, plan, 0).take(32).as_numpy_iterator()]
    np.testing.assert_array_equal(images, tf.stack([pipeline.resize_picture(pipeline.decode(file), 16) for file in encoded]))


@pytest.mark.parametrize('policy', ['mixed_bfloat16', 'mixed_float16'])
def test_augmentation_does_not_depend_on_the_type_the_model_computes_in(tiny, source, policy):
    tiny.augment.rand_augment.num_ops, tiny.augment.mixup, tiny.augment.cutmix, tiny.augment.random_erasing = 1, 0.2, 1.0, 0.5
    tiny.train_for = '2 steps'
    expected = [digest(*batch) for batch in pipeline.training_batches(source, tiny, plan_for(tiny, source), 0, ONE_DEVICE)]
    keras.config.set_dtype_policy(policy)
    assert [digest(*batch) for batch in pipeline.training_batches(source, tiny, plan_for(tiny, source), 0, ONE_DEVICE)] == expected
