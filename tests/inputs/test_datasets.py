"""Digits, TFDS names and folders of images go through one door, and what is not there is
named.
"""

import os

import numpy as np
import pytest
import requests
import tensorflow as tf
from sklearn.datasets import load_digits

from common.errors import ConfigError, RunError
from configs import default
from inputs import datasets
from inputs.digits import Digits
from tests.conftest import refused


def dataset_config(**values):
    config = default.get_config().dataset
    for key, value in values.items():
        config[key] = value
    return config


def write_picture(path, size=(20, 30), value=100):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    picture = tf.fill([*size, 3], tf.constant(value, tf.uint8))
    tf.io.write_file(
        path, tf.io.encode_png(picture) if path.endswith('.png') else tf.io.encode_jpeg(picture)
    )


def write_text(path):
    with open(path, 'w') as file:
        file.write('no image')


@pytest.fixture
def pictures(tmp_path):
    for split, count in (('train', 6), ('test', 3)):
        for index, name in enumerate(('cat', 'dog')):
            for number in range(count):
                write_picture(
                    str(tmp_path / split / name / f'{number}.{"png" if number % 2 else "jpg"}'),
                    value=50 + 100 * index,
                )
    return str(tmp_path)


def test_digits_are_all_of_scikit_learns_in_two_fixed_splits():
    source = datasets.load(dataset_config(name='digits'))
    assert (source.num_train, source.num_eval, source.class_names) == (
        1437,
        360,
        tuple('0123456789'),
    )
    digits, seen = load_digits(), []
    for split in ('train', 'test'):
        for example in datasets.tfds.builder('digits').as_dataset(split=split).as_numpy_iterator():
            row = example['id']
            seen.append(row)
            assert example['label'] == digits.target[row]
            np.testing.assert_array_equal(
                example['image'][..., 0], np.rint(digits.images[row] * 255 / 16)
            )
    assert sorted(seen) == list(range(1797))


def test_digits_are_read_in_the_same_order_each_time():
    source = datasets.load(dataset_config(name='digits'))
    first, second = (list(source.examples('train').as_numpy_iterator()) for _ in range(2))
    assert first == second and len(set(first)) > 1400


def test_a_part_of_a_split_has_its_own_size():
    source = datasets.load(
        dataset_config(name='digits', train_split='train[:100]', eval_split='train[100:]')
    )
    assert (source.num_train, source.num_eval) == (100, 1337)


def test_a_folder_of_pictures_is_found_with_classes_and_counts(pictures):
    source = datasets.load(dataset_config(name='folder', data_dir=pictures))
    assert (source.num_train, source.num_eval, source.class_names) == (12, 6, ('cat', 'dog'))
    for encoded, label in source.examples('train').as_numpy_iterator():
        picture = tf.io.decode_image(encoded, channels=3).numpy()
        assert picture.shape == (20, 30, 3)
        np.testing.assert_allclose(picture, 50 + 100 * label, atol=3)


@pytest.mark.parametrize(
    'values, error, data, fix',
    [
        ({'name': 'digit'}, ConfigError, 'digit', '--config.dataset.name=digits'),
        ({'name': 'imagenet2021'}, ConfigError, '2021', '--config.dataset.name=imagenet2012'),
        ({'name': 'digits', 'train_split': 'training'}, ConfigError, "'training'", 'it has'),
        ({'name': 'digits', 'train_split': 'train[:0]'}, ConfigError, 'no examples', ''),
        # Before it is downloaded.
        ({'name': 'coco/2017'}, ConfigError, 'coco/2017', ''),
        ({'name': 'folder'}, ConfigError, 'folder', '--config.dataset.data_dir=DIR'),
        ({'name': 'folder', 'data_dir': '/no/such/folder'}, RunError, '/no/such/folder', ''),
    ],
)
def test_what_is_not_there_is_one_line(values, error, data, fix):
    with refused(error, data, fix=fix):
        datasets.load(dataset_config(**values))


def test_a_memory_budget_too_large_is_refused_with_one_that_fits(monkeypatch):
    source = datasets.load(dataset_config(name='digits', memory_gib=1e-4))
    monkeypatch.setattr(datasets.machine, 'free_memory', lambda: (50_000, 'this machine'))
    fix = '--config.dataset.memory_gib=2.3e-05'
    with refused(RunError, 'memory_gib=0.0001', '4.66e-05 GiB', fix=fix):
        source.split('train')


def test_a_folder_without_the_split_holds_out_a_part_and_says_so(pictures, capsys):
    source = datasets.load(
        dataset_config(name='folder', data_dir=os.path.join(pictures, 'train'), eval_share=0.5)
    )
    assert source.num_train + source.num_eval == 12 and source.num_eval in (
        2,
        4,
        6,
    )  # the same image twice stays on one side
    assert (
        'held out as test' in source.notes[0]
        and f'note      {source.notes[0]}\n' in capsys.readouterr().out
    )


def test_a_broken_file_is_named_for_the_report(pictures):
    write_text(os.path.join(pictures, 'train', 'cat', 'page.jpg'))
    source = datasets.load(dataset_config(name='folder', data_dir=pictures))
    assert (source.num_train, source.num_eval) == (12, 6)
    assert any(
        note.startswith('1 of 19 files are broken') for note in source.notes
    ) and source.notes[-1].startswith('  train/cat/page.jpg: not a readable image')
    for number in range(60):
        write_text(os.path.join(pictures, 'train', 'cat', f'page{number}.jpg'))
    notes = datasets.load(dataset_config(name='folder', data_dir=pictures, max_broken=0.9)).notes
    assert (
        sum(': not a readable image' in note for note in notes) == 50
        and notes[-1] == '  and 11 more'
    )


def test_a_data_set_without_training_examples_can_be_evaluated():
    for train_split in ('training', 'train[:0]'):
        config = dataset_config(name='digits', train_split=train_split)
        source = datasets.load(config, needs_training=False)
        assert (source.num_train, source.num_eval) == (0, 360) and len(
            list(source.examples('test'))
        ) == 360
        with pytest.raises(ConfigError):
            datasets.load(config)
    with refused(ConfigError, "'nothing'", 'digits'):
        datasets.load(dataset_config(name='digits', eval_split='nothing'), needs_training=False)


@pytest.mark.parametrize('hosts', [1, 2, 5])
def test_hosts_read_even_shares_of_a_folder_that_are_all_of_it(pictures, hosts):
    source = datasets.load(dataset_config(name='folder', data_dir=pictures))
    parts = [source.split('train', (host, hosts)) for host in range(hosts)]
    assert [number for part in parts for number in part.ids.numpy()] == list(range(12))
    assert max(len(part.ids) for part in parts) - min(len(part.ids) for part in parts) <= 1
    read = [
        (encoded, label)
        for part in parts
        for _, encoded, label in part.read(np.arange(len(part.counts))).as_numpy_iterator()
    ]
    assert read == list(source.examples('train').as_numpy_iterator())


def test_missing_imagenet_says_where_and_how_to_get_it(tmp_path):
    with refused(RunError, tmp_path / 'downloads' / 'manual') as raised:
        datasets.load(
            dataset_config(name='imagenet2012', data_dir=str(tmp_path), eval_split='validation')
        )
    assert 'ILSVRC2012_img_train.tar' in str(raised.value)
    assert 'image-net.org' in str(raised.value)


@pytest.mark.parametrize(
    'error, fix',
    [
        (
            requests.ConnectionError(
                "HTTPSConnectionPool(host='somewhere', port=443): Max retries exceeded (Failed "
                "to resolve 'somewhere')"
            ),
            '--config.dataset.data_dir',
        ),
        (OSError(28, 'No space left on device'), ''),
    ],
)
def test_data_that_cannot_be_prepared_is_one_line_with_cause(tmp_path, monkeypatch, error, fix):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(Digits, 'download_and_prepare', fail)
    with refused(RunError, 'digits', tmp_path, str(error)[:20], fix=fix) as raised:
        datasets.load(dataset_config(name='digits', data_dir=str(tmp_path)))
    assert bool(raised.value.fix) == isinstance(error, requests.ConnectionError)


def test_two_runs_may_prepare_a_data_set_at_the_same_time(tmp_path, monkeypatch):
    prepare, began = Digits.download_and_prepare, []

    def meanwhile_another(self, **options):
        began.append(self)
        if len(began) == 1:
            datasets.load(dataset_config(name='digits', data_dir=str(tmp_path)))
            raise FileExistsError('Destination already exists')
        prepare(self, **options)

    monkeypatch.setattr(Digits, 'download_and_prepare', meanwhile_another)
    source = datasets.load(dataset_config(name='digits', data_dir=str(tmp_path)))
    assert len(began) == 2 and (source.num_train, source.num_eval) == (1437, 360)
