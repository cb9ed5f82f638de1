"""Data sets of TFDS as people make them: other names, other types, labels that are not known."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from common.errors import ConfigError, RunError
from configs import default
from inputs import dataset_status, datasets, image_ops, tfds_checks, tfds_features
from tests import image_kinds
from tests.conftest import refused
from tests.test_layout import ROOT

F = tfds.features
LABEL = F.ClassLabel(names=['cat', 'dog'])


def make(folder, features, examples, supervised_keys=None):
    """The data set `mine`, {split: examples}, each split in two files; returns `config.dataset` for
    it.
    """
    directory, splits = folder / 'mine' / '1.0.0', []
    directory.mkdir(parents=True)
    features = F.FeaturesDict(features)
    for split, rows in examples.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=directory, dataset_name='mine', split=split, filetype_suffix='tfrecord'
        )
        halves = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
        for index, half in enumerate(halves):
            with tf.io.TFRecordWriter(
                str(directory / f'mine-{split}.tfrecord-{index:05}-of-00002')
            ) as writer:
                for row in half:
                    writer.write(features.serialize_example(row))
        num_bytes = sum(path.stat().st_size for path in directory.glob(f'mine-{split}.*'))
        splits.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=list(map(len, halves)),
                num_bytes=num_bytes,
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=str(directory),
        features=features,
        split_infos=splits,
        supervised_keys=supervised_keys,
        check_data=False,
    )  # TFDS would decode images
    return config_of(folder)


def config_of(folder, **values):
    config = default.get_config().dataset
    config.update({'name': 'mine', 'data_dir': str(folder), **values})
    return config


def image(number):
    return image_kinds.pixels_of(number)


def rows(count, image_key='image', label_key='label', labels=(0, 1), image_of=image, **more):
    return [
        {image_key: image_of(number), label_key: labels[number % len(labels)], **more}
        for number in range(count)
    ]


def both(examples):
    return {'train': examples, 'test': examples[:4]}


# Which features are the image and the label.

FLAT = {'image': F.Image(), 'label': LABEL}
DEEP = {
    'views': {'front': F.Image(), 'back': F.Image()},
    'about': {'species': LABEL, 'sex': F.ClassLabel(num_classes=3)},
    'id': np.int64,
}
DEEP_ROWS = [
    {
        'views': {'front': image(number), 'back': image(number + 50)},
        'about': {'species': number % 2, 'sex': 2},
        'id': number,
    }
    for number in range(8)
]

# {kind: (features, rows, supervised keys, values of the config)}
FOUND = {
    'a pair': (FLAT, rows(8), ('image', 'label'), {}),
    'no supervised keys': (FLAT, rows(8), None, {}),
    "names of one's own": ({'photo': F.Image(), 'kind': LABEL}, rows(8, 'photo', 'kind'), None, {}),
    'a nested pair': (FLAT | {'x': np.int64}, rows(8, x=1), (('image', 'x'), 'label'), {}),
    'with weights': (FLAT | {'w': np.float32}, rows(8, w=1.0), ('image', 'label', 'w'), {}),
    'named by dicts': (
        FLAT | {'x': np.int64},
        rows(8, x=1),
        ({'a': 'image', 'b': 'x'}, 'label'),
        {},
    ),
    'a pair among several': (
        FLAT | {'mask': F.Image(), 'other': LABEL},
        rows(8, mask=image(1), other=0),
        ('image', 'label'),
        {},
    ),
    'a pair of something else': (
        FLAT | {'text': F.Text()},
        rows(8, text='a'),
        ('text', 'label'),
        {},
    ),
    'an image that is the target too': (
        FLAT | {'mask': F.Image()},
        rows(8, mask=image(1)),
        ('image', 'mask'),
        {},
    ),
    'a pair with the label inside': (
        {'image': F.Image(), 'about': {'kind': LABEL}, 'other': LABEL},
        [
            {'image': image(number), 'about': {'kind': number % 2}, 'other': 0}
            for number in range(8)
        ],
        ('image', 'about/kind'),
        {},
    ),
    'a depth beside it': (
        FLAT | {'depth': F.Image(shape=(24, 32, 1), dtype=np.float32)},
        rows(8, depth=np.ones([24, 32, 1], np.float32)),
        None,
        {},
    ),
    'a map of classes beside it': (
        FLAT | {'map': F.LabeledImage(labels=3, shape=(24, 32, 1))},
        rows(8, map=np.zeros([24, 32, 1], np.uint8)),
        None,
        {},
    ),
    'chosen of several': (
        FLAT | {'mask': F.Image(), 'other': LABEL},
        rows(8, mask=image(1), other=0),
        None,
        {'image_key': 'image', 'label_key': 'label'},
    ),
    'chosen inside': (
        DEEP,
        DEEP_ROWS,
        None,
        {'image_key': 'views/front', 'label_key': 'about/species'},
    ),
}


@pytest.mark.parametrize('kind', FOUND)
def test_image_and_label_are_found(tmp_path, kind):
    features, examples, supervised_keys, values = FOUND[kind]
    make(tmp_path, features, both(examples), supervised_keys)
    source = datasets.load(config_of(tmp_path, **values))
    assert (source.num_train, source.num_eval, source.class_names) == (8, 4, ('cat', 'dog'))
    read = {
        bytes(image_ops.decode(encoded).numpy()): label
        for encoded, label in source.examples('train').as_numpy_iterator()
    }
    assert read == {bytes(image(number)): number % 2 for number in range(8)}


# {kind: (features, supervised keys, values of the config, what is said)}
NOT_FOUND = {
    'several images': (
        FLAT | {'mask': F.Image()},
        None,
        {},
        'image, mask',
        '--config.dataset.image_key=image',
    ),
    'several labels': (
        FLAT | {'other': LABEL},
        None,
        {},
        'label, other',
        '--config.dataset.label_key=label',
    ),
    'no label': (
        {'image': F.Image(), 'text': F.Text()},
        None,
        {},
        'no class label',
        '',
    ),
    'no image': (
        {'text': F.Text(), 'label': LABEL},
        ('text', 'label'),
        {},
        'no image',
        '',
    ),
    'images in a sequence': (
        {'images': F.Sequence(F.Image()), 'label': LABEL},
        None,
        {},
        'no image',
        '',
    ),
    'a video': (
        {'video': F.Video(shape=(None, 24, 32, 3)), 'label': LABEL},
        ('video', 'label'),
        {},
        'no image',
        '',
    ),
    'labels of objects': (
        {'image': F.Image(), 'objects': F.Sequence({'label': LABEL})},
        ('image', 'objects'),
        {},
        'no class label',
        '',
    ),
    'an unknown image': (
        FLAT,
        None,
        {'image_key': 'imag'},
        "image_key='imag'",
        'did you mean image?',
    ),
    'an unknown label inside': (
        DEEP,
        None,
        {'image_key': 'views/front', 'label_key': 'about/spezies'},
        "'about/spezies'",
        'did you mean about/species?',
    ),
    'a label that is an image': (
        FLAT,
        None,
        {'label_key': 'image'},
        "label_key='image'",
        'mine has label',
    ),
    'several images of a pair': (
        FLAT | {'mask': F.Image(), 'thumb': F.Image()},
        (('image', 'thumb'), 'label'),
        {},
        'image, thumb',
        '--config.dataset.image_key=image',
    ),
    'several labels of a pair': (
        FLAT | {'b': LABEL, 'c': LABEL},
        ('image', {'x': 'b', 'y': 'c'}),
        {},
        'b, c',
        '--config.dataset.label_key=b',
    ),
    'only a map of classes': (
        {'image': F.LabeledImage(labels=3), 'label': LABEL},
        ('image', 'label'),
        {},
        'no image',
        '',
    ),
    'a map of classes by name': (
        FLAT | {'map': F.LabeledImage(labels=3)},
        None,
        {'image_key': 'map'},
        "image_key='map'",
        'mine has image',
    ),
    'numbers in the shape of an image': (
        {'image': F.Tensor(shape=(24, 32, 3), dtype=np.uint8), 'label': LABEL},
        ('image', 'label'),
        {},
        'no image',
        '',
    ),
    'a label in a sequence': (
        FLAT | {'objects': F.Sequence({'label': LABEL})},
        None,
        {'label_key': 'objects/label'},
        "'objects/label' is in a sequence",
        'mine has label',
    ),
    'a video by name': (
        FLAT | {'video': F.Video(shape=(None, 24, 32, 3))},
        None,
        {'image_key': 'video'},
        "'video' is in a sequence",
        'mine has image',
    ),
    'floats by name': (
        FLAT | {'depth': F.Image(shape=(24, 32, 1), dtype=np.float32)},
        None,
        {'image_key': 'depth'},
        "'depth' has dtype float32",
        'uint8 or uint16',
    ),
    'floats by supervised keys': (
        FLAT | {'depth': F.Image(shape=(24, 32, 1), dtype=np.float32)},
        ('depth', 'label'),
        {},
        "'depth' has dtype float32",
        'uint8 or uint16',
    ),
    'several frames': (
        {'image': F.Image(shape=(None, 24, 32, 3)), 'label': LABEL},
        ('image', 'label'),
        {},
        '(None, 24, 32, 3)',
        '(height, width, channels)',
    ),
    'many channels': (
        {'image': F.Image(shape=(24, 32, 5)), 'label': LABEL},
        ('image', 'label'),
        {},
        '5 channels',
        '1 to 4 channels',
    ),
    'an image of floats': (
        {'image': F.Image(shape=(24, 32, 1), dtype=np.float32), 'label': LABEL},
        ('image', 'label'),
        {},
        'float32',
        'uint8 or uint16',
    ),
}


@pytest.mark.parametrize('kind', NOT_FOUND)
def test_what_is_not_found_is_one_line_with_what_to_write(kind):
    features, supervised_keys, values, data, fix = NOT_FOUND[kind]
    with refused(ConfigError, data, fix=fix):
        tfds_features.find_columns(
            F.FeaturesDict(features), supervised_keys, config_of('', **values)
        )


def test_other_columns_are_other_training_data(tmp_path):
    make(tmp_path, DEEP, both(DEEP_ROWS))
    front, back = (
        datasets.load(config_of(tmp_path, image_key=f'views/{side}', label_key='about/species'))
        for side in ('front', 'back')
    )
    assert front.identity != back.identity


def test_the_identity_of_a_usual_data_set_stays():
    assert datasets.load(config_of('', name='digits', data_dir='')).identity == 'digits/1.0.0 train'


# Types and channels of images.

ALPHA = np.dstack([image(1), image(2)[..., 0]])
READ = {  # {kind: (feature, what is put in, what is read)}
    'grey': (F.Image(shape=(None, None, 1)), image(1)[..., :1], image_kinds.grey(image(1)[..., 0])),
    'with alpha': (
        F.Image(shape=(None, None, 4)),
        ALPHA,
        image_kinds.over_white(ALPHA[..., :3], ALPHA[..., 3]),
    ),
    'grey with alpha': (
        F.Image(shape=(None, None, 2)),
        ALPHA[..., 2:],
        image_kinds.over_white(ALPHA[..., [2, 2, 2]], ALPHA[..., 3]),
    ),
    'with alpha, of 16 bits': (
        F.Image(dtype=np.uint16, shape=(None, None, 4)),
        ALPHA.astype(np.uint16) * 257,
        image_kinds.over_white(ALPHA[..., :3], ALPHA[..., 3]),
    ),
    'of a colormap': (
        F.Image(shape=(None, None, 1), use_colormap=True),
        image(1)[..., :1],
        image_kinds.grey(image(1)[..., 0]),
    ),
    'a GIF that is called JPEG': (
        F.Image(encoding_format='jpeg'),
        image_kinds.encoded(np.full((24, 32, 3), 90, np.uint8), 'GIF'),
        np.full((24, 32, 3), 90),
    ),
    'of 16 bits': (
        F.Image(dtype=np.uint16, shape=(None, None, 3)),
        image(1).astype(np.uint16) * 257,
        image(1),
    ),
    'grey of 16 bits': (
        F.Image(dtype=np.uint16, shape=(None, None, 1)),
        image(1)[..., :1].astype(np.uint16) * 257,
        image_kinds.grey(image(1)[..., 0]),
    ),
    'JPEG': (
        F.Image(encoding_format='jpeg'),
        np.full((24, 32, 3), 90, np.uint8),
        np.full((24, 32, 3), 90),
    ),
}


@pytest.mark.parametrize('kind', READ)
def test_an_image_is_read_as_it_was_put_in(tmp_path, kind):
    feature, stored, shown = READ[kind]
    make(
        tmp_path, {'image': feature, 'label': LABEL}, both(rows(8, image_of=lambda number: stored))
    )
    source = datasets.load(config_of(tmp_path))
    for encoded, _ in source.examples('test').as_numpy_iterator():
        assert np.abs(image_ops.decode(encoded).numpy() - shown.astype(float)).max() <= 1


# Labels that are not known.


def unlabeled(tmp_path, test=(0, 1), train=(0, 1), count=8):
    return make(
        tmp_path,
        FLAT,
        {'train': rows(count, labels=train), 'test': rows(count, labels=test)},
        ('image', 'label'),
    )


@pytest.mark.parametrize(
    'split, labels, says',
    [
        (
            'test',
            (-1,),
            "eval_split='test' of mine has 8 examples, and 8 have a label outside the 2 classes: "
            '-1, which TFDS writes',
        ),
        ('train', (-1,), "train_split='train' of mine has 8 examples, and 8 have"),
        ('test', (0, 1, 1, -1), 'has 8 examples, and 2 have'),
    ],
)
def test_unknown_labels_are_refused_first(tmp_path, split, labels, says):
    config = unlabeled(tmp_path, **{split: labels})
    for find in (lambda: datasets.load(config), lambda: dataset_status.find_status(config)):
        with refused(RunError, says, key=f'dataset.{"eval" if split == "test" else split}_split'):
            find()


def test_a_label_above_the_classes_is_refused(tmp_path):
    features = {'image': F.Image(), 'label': F.ClassLabel(num_classes=5)}
    make(tmp_path, features, both(rows(8, labels=(0, 4))), ('image', 'label'))
    path = tmp_path / 'mine' / '1.0.0' / 'features.json'
    text = path.read_text()
    assert '"numClasses": "5"' in text
    path.write_text(text.replace('"numClasses": "5"', '"numClasses": "3"'))
    with refused(RunError, '3 classes: 4'):
        datasets.load(config_of(tmp_path))


def test_a_split_that_is_not_used_may_have_them(tmp_path):
    config = unlabeled(tmp_path, train=(-1,))
    assert datasets.load(config, needs_training=False).num_eval == 8
    config.eval_split, config.train_split = 'test[:50%]', 'test[50%:]'
    assert datasets.load(config).num_train == 4


def test_a_large_split_is_sampled_and_checked_fully_when_read(tmp_path, monkeypatch):
    labels = [0] * 38 + [-1, 0]  # the sample has the first and the last
    config = unlabeled(tmp_path, test=labels, count=40)
    monkeypatch.setattr(tfds_checks, 'READ_WHOLE', 0)
    monkeypatch.setattr(tfds_checks, 'SAMPLE', 8)
    source = datasets.load(config)
    with pytest.raises(
        tf.errors.InvalidArgumentError,
        match='outside the 2 classes',
    ):
        list(source.examples('test'))
    monkeypatch.setattr(tfds_checks, 'SAMPLE', 40)
    with refused(RunError, '40 examples', '1 have a label'):
        datasets.load(config)


@pytest.mark.slow
def test_the_command_line_says_so_in_one_line(tmp_path):
    unlabeled(tmp_path, test=(-1,))
    done = subprocess.run(
        [
            sys.executable,
            'main.py',
            '--config=configs/digits.py',
            '--config.model.name=tiny',
            '--config.dataset.name=mine',
            f'--config.dataset.data_dir={tmp_path}',
            f'--workdir={tmp_path}/run',
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert (
        "config.dataset.eval_split='test' of mine has 8 examples, and 8 have a label" in done.stderr
    )
    assert not os.path.exists(tmp_path / 'run' / 'metrics.jsonl')
