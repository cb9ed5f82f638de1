"""A data set of TFDS whose labels or images a run could not use is refused before the run
begins.
"""

import os
import re

import numpy as np
import pytest
import tensorflow as tf

import main
import train
from common.errors import ConfigError, RunError, counted
from configs import default
from experiment import config_schema
from inputs import dataset_status, datasets, image_ops, tfds_checks
from tests import image_kinds
from tests.conftest import refused, slow
from tests.inputs.test_tfds_features import FLAT, LABEL, F, config_of, make, rows

KNOWN, UNKNOWN, SOME = (0, 1), (-1,), (0, -1)


def labeled(folder, count=8, **labels):
    examples = {split: rows(count, labels=values) for split, values in labels.items()}
    return make(folder, FLAT, examples, ('image', 'label'))


def restate(folder, before, after):
    """Changes what features.json says of a data set that is written already."""
    path = folder / 'mine' / '1.0.0' / 'features.json'
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))


def refusal_of(config):
    """Returns the error with which `load` and `--mode=check` refuse a data set."""
    with refused(RunError) as at_load:
        datasets.load(config)
    with refused(RunError, at_load.value.problem) as at_check:
        dataset_status.find_status(config)
    assert str(at_check.value) == str(at_load.value)
    return at_load.value


# Labels.


@pytest.mark.parametrize(
    'labels, key, instead',
    [
        (
            {'train': KNOWN, 'test': SOME},
            'eval_split',
            "--config.dataset.train_split='train[:90%]' --config.dataset.eval_split='train[90%:]'",
        ),
        (
            {'train': KNOWN, 'test': UNKNOWN, 'val': KNOWN},
            'eval_split',
            '--config.dataset.eval_split=val',
        ),
        (
            {'train': SOME, 'test': KNOWN},
            'train_split',
            'use a part that has none, such as train[:50%], or prepare the data set without them',
        ),
        (
            {'train': SOME, 'test': KNOWN, 'a': KNOWN, 'b': KNOWN},
            'train_split',
            '--config.dataset.train_split=a or b',
        ),
    ],
)
def test_another_split_is_named_for_one_without_labels(tmp_path, labels, key, instead):
    config = labeled(tmp_path, **labels)
    error = refusal_of(config)
    assert error.key == f'dataset.{key}'
    assert error.fix == instead
    changes = re.findall(r'--config\.dataset\.(\w+)=(\S+?)(?: or b)?(?: |$)', instead)
    config.update({name: value.strip("'") for name, value in changes})
    if changes:
        assert datasets.load(config).num_eval > 0


def test_a_part_of_a_split_that_has_labels_is_taken(tmp_path):
    config = make(tmp_path, FLAT, {'train': rows(8) + rows(8, labels=UNKNOWN)}, ('image', 'label'))
    config.train_split, config.eval_split = 'train[:4]', 'train[4:8]'
    assert datasets.load(config).num_eval == 4
    config.eval_split = 'train[4:9]'
    assert "eval_split='train[4:9]' of mine has 5 examples, and 1 have" in str(refusal_of(config))


def test_one_label_among_all_of_a_small_split_is_found(tmp_path):
    labels = [0] * 3000
    labels[1234] = -1
    error = refusal_of(labeled(tmp_path, 3000, train=labels, test=KNOWN))
    assert 'has 3,000 examples, and 1 have a label' in error.problem


def test_of_a_large_split_a_sample_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_checks, 'READ_WHOLE', 0)
    labels = [number // 2 % 2 - 1 for number in range(3000)]  # half of them are -1
    error = refusal_of(labeled(tmp_path, 3000, train=KNOWN, test=labels))
    found = re.search(r'has 3,000 examples, and (\d+) of (\d+) checked have', error.problem)
    unknown, looked_at = map(int, found.groups())
    assert 200 <= looked_at <= 256 and looked_at / 4 < unknown < looked_at * 3 / 4


@pytest.mark.parametrize(
    'bad, gib',
    [slow('train', 1e-6), slow('train', 4.0), slow('test', 1e-6), slow('test', 4.0)],
)
def test_a_label_that_the_sample_missed_is_one_line(tmp_path, monkeypatch, tiny, bad, gib):
    labels = {'train': [0] * 600, 'test': [1] * 600}
    labels[bad][236] = -1
    tiny.dataset = labeled(tmp_path, 600, **labels)
    tiny.dataset.memory_gib = gib
    monkeypatch.setattr(tfds_checks, 'READ_WHOLE', 0)
    with pytest.raises(tf.errors.InvalidArgumentError) as raised:
        train.run(tiny, str(tmp_path / 'run'))
    assert main.as_user_error(raised.value).problem == (
        f'an example of mine, split {bad}, has a label outside the 2 classes (TFDS writes -1 for '
        'unknown labels); choose another split: example 236 has -1'
    )


def test_classes_without_a_name_are_refused(tmp_path):
    config = labeled(tmp_path, train=KNOWN, test=KNOWN)
    assert datasets.load(config).class_names == ('cat', 'dog')
    restate(tmp_path, '"numClasses": "2"', '"numClasses": "3"')
    (tmp_path / 'mine' / '1.0.0' / 'label.labels.txt').write_text('cat\n\nowl\n')
    assert 'has 3 classes, but names for 2: write one name a line into its labels.txt' in str(
        refusal_of(config)
    )


@pytest.mark.parametrize('num_classes', [None, 1])
def test_fewer_than_two_classes_are_refused(tmp_path, num_classes):
    stored = {'image': F.Image(), 'label': F.ClassLabel(num_classes=num_classes)}
    examples = (
        {'train': [], 'test': []}
        if num_classes is None
        else {'train': rows(2, labels=(0,)), 'test': rows(2, labels=(0,))}
    )
    config = make(tmp_path, stored, examples, ('image', 'label'))
    assert f'has {counted(num_classes or 0, "class", "classes")};' in refusal_of(config).problem


def test_records_that_are_not_what_is_stated_are_refused(tmp_path):
    config = labeled(tmp_path, train=KNOWN, test=KNOWN)
    restate(tmp_path, '"label": {', '"kind": {')
    assert str(refusal_of(config)).startswith(
        'mine, split train: its records do not match its features.json ('
    )


# Images.


def of_images(folder, feature, images):
    examples = [{'image': image, 'label': 0} for image in images]
    return make(
        folder,
        {'image': feature, 'label': LABEL},
        {'train': examples, 'test': examples},
        ('image', 'label'),
    )


@pytest.mark.parametrize('file_format', ['WEBP', 'TIFF'])
def test_files_that_tensorflow_cannot_decode_are_refused(tmp_path, file_format):
    file = image_kinds.encoded(image_kinds.pixels_of(1), file_format)
    text = str(refusal_of(of_images(tmp_path, F.Image(), [file] * 2)))
    assert text == (
        'mine, split train: an image cannot be decoded: it is neither a JPEG nor a PNG file; '
        'prepare the data set with such files'
    )


def test_a_damaged_image_is_said_to_be_damaged(tmp_path, capfd):
    whole = image_kinds.encoded(image_kinds.pixels_of(1), 'JPEG')
    text = str(refusal_of(of_images(tmp_path, F.Image(), [whole, whole[:-100]])))
    assert text.startswith('mine, split train: an image cannot be decoded: the file ends too early')
    assert capfd.readouterr().err == ''  # of libjpeg


def turned_jpeg(number):
    content, _ = image_kinds.turned('JPEG', 3)(image_kinds.pixels_of(number))
    return content


def clear_gif(number):
    content, _ = image_kinds.KINDS['GIF with a transparent colour'].make(
        image_kinds.pixels_of(number)
    )
    return content


@pytest.mark.parametrize('odd', [turned_jpeg, clear_gif])
def test_images_that_predict_shows_otherwise_are_noted(tmp_path, capsys, odd):
    plain = image_kinds.encoded(image_kinds.pixels_of(1), 'JPEG')
    config = of_images(tmp_path, F.Image(), [plain, odd(1), odd(2)])
    notes = datasets.load(config).notes
    assert len(notes) == 2  # of two splits
    assert notes[0].startswith('mine, split train: 2 of 3 images checked ')
    assert capsys.readouterr().out.count('note      mine, split') == 2


def test_images_that_are_seen_alike_are_not_noted(tmp_path):
    files = [
        image_kinds.encoded(image_kinds.pixels_of(1), file_format)
        for file_format in ('JPEG', 'PNG', 'GIF')
    ]
    files.append(
        image_kinds.put_before_markers(files[0], bytes(1), {0xD9})
    )  # of which libjpeg complains
    assert datasets.load(of_images(tmp_path, F.Image(), files)).notes == ()


def test_transparency_that_would_be_left_out_is_refused(tmp_path):
    rgba = np.dstack([image_kinds.pixels_of(1), image_kinds.pixels_of(2)[..., 0]])
    files = [image_kinds.encoded(rgba, file_format) for file_format in ('PNG', 'BMP')]
    error = refusal_of(of_images(tmp_path, F.Image(shape=(24, 32, 4)), files))
    assert 'an image of 4 channels is not a PNG file' in error.problem


@pytest.mark.parametrize('largest', [4095, 1023])
def test_uint16_images_of_12_bits_or_less_are_refused(tmp_path, largest):
    values = np.linspace(0, largest, 24 * 32).reshape(24, 32, 1).astype(np.uint16)
    config = of_images(tmp_path, F.Image(shape=(24, 32, 1), dtype=np.uint16), [values // 2, values])
    error = refusal_of(config)
    assert f'no value above {largest:,} of 65,535' in error.problem
    assert error.fix == f'--config.dataset.white_level={largest}'
    config.white_level = largest
    source = datasets.load(config)
    encoded = [encoded for *_, encoded, _ in source.examples('train').as_numpy_iterator()]
    assert max(image_ops.decode(file, largest).numpy().max() for file in encoded) == 255


# The choice of image and label.


@pytest.mark.parametrize(
    'supervised_keys, values, weights',
    [
        (None, {}, ''),
        ((('image', 'weight'), 'label'), {}, ''),
        (('weight', 'label'), {}, ''),
        (('image', 'label', 'weight'), {}, 'weight'),
        (
            ('image', 'label', {'a': 'weight'}),
            {'image_key': 'image', 'label_key': 'label'},
            'weight',
        ),
        (None, {'image_key': 'image'}, ''),
    ],
)
def test_a_choice_that_is_not_plain_is_a_note(tmp_path, capsys, supervised_keys, values, weights):
    make(
        tmp_path,
        FLAT | {'weight': np.float32},
        {'train': rows(8, weight=1.0), 'test': rows(4, weight=1.0)},
        supervised_keys,
    )
    source = datasets.load(config_of(tmp_path, **values))
    note = "mine: the image is 'image', the class label 'label'"
    note += f'; its example weights, {weights}, are not used' if weights else ''
    assert source.notes == (note,) and capsys.readouterr().out == f'note      {note}\n'


@pytest.mark.parametrize(
    'supervised_keys, values',
    [
        (('image', 'label'), {}),
        (('image', 'label'), {'label_key': 'label'}),
        (None, {'image_key': 'image', 'label_key': 'label'}),
    ],
)
def test_a_plain_choice_is_no_note(tmp_path, capsys, supervised_keys, values):
    make(tmp_path, FLAT, {'train': rows(8), 'test': rows(4)}, supervised_keys)
    assert datasets.load(config_of(tmp_path, **values)).notes == ()
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('key', ['image_key', 'label_key'])
def test_a_folder_has_no_features_to_name(key):
    config = default.get_config()
    config.dataset.name, config.dataset[key] = 'folder', 'image'
    with refused(ConfigError, "'image'", key=f'dataset.{key}', fix='leave it empty'):
        config_schema.check_config(config)


# Damage.


def test_records_that_are_damaged_are_named_by_the_doctor(tmp_path):
    config = labeled(tmp_path, train=KNOWN, test=KNOWN)
    directory = tmp_path / 'mine' / '1.0.0'
    path = directory / 'mine-test.tfrecord-00001-of-00002'
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with refused(RunError, 'mine', fix=f'rm -r {directory}'):
        dataset_status.find_status(config)


def test_a_file_that_was_cut_short_is_named(tmp_path):
    config = labeled(tmp_path, train=KNOWN, test=KNOWN)
    path = tmp_path / 'mine' / '1.0.0' / 'mine-test.tfrecord-00001-of-00002'
    for size in (20, 5, 0):  # within a record, within its length, everything
        os.truncate(path, size)
        with refused(RunError, path, fix=f'rm -r {path.parent}'):
            datasets.load(config)
        with refused(RunError, 'test', 'mine', fix=f'rm -r {path.parent}'):
            dataset_status.find_status(config)
