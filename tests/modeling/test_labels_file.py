"""labels.txt gives every class name back, whatever is in it; an exported model and what reads it
agree on each.
"""

import copy
import os

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from hypothesis import example, given
from hypothesis import strategies as st

import evaluate
import predict
import train
from common.errors import RunError
from modeling import distillation, labels_file, models, pretrained
from outputs.checkpoints import find_checkpoint
from tests.conftest import reading_here, refused, tiny_config

LINE_BREAKS = '\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029'  # of str.splitlines
USUAL = [
    'cat',
    'Great White Shark',
    'k\u00e4tzchen',
    '\u732b',
    '\U0001f408\u200d\u2b1b',
    "it's",
    'a "quoted" word',
    '"cat"',
    'C:\\new\\table',
    'tab\there',
    ' cat',
    'cat ',
    '#1',
    '0',
    '[]',
    'null',
    '"',
    '"\\q"',
    '\ufeffcat',
    'nul\0',
    '$x$',
    '%s',
    '\\',
    '\\n',
    '\\\\u2028',
]
ODD = [
    '',
    '""',
    '\n',
    '\r\n',
    'two\nlines',
    'two\r\nlines',
    '\nfirst',
    'last\n',
    '"two\nlines"',
    '"two\\nlines"',
    *(f'a{mark}b' for mark in LINE_BREAKS),
    *(f'{mark}b' for mark in LINE_BREAKS),
    *(f'a{mark}' for mark in LINE_BREAKS),
]


@pytest.mark.parametrize('name', USUAL)
def test_a_usual_name_is_its_line(name):
    assert labels_file.to_text([name, 'dog']) == f'{name}\ndog\n'
    assert labels_file.from_text(f'{name}\ndog\n') == [name, 'dog']


@pytest.mark.parametrize('name', ODD)
def test_an_odd_name_is_one_line_of_ascii_and_comes_back(name):
    text = labels_file.to_text(['cat', name, 'dog'])
    first, line, last = text.splitlines()
    assert (first, last) == ('cat', 'dog') and line.startswith('"') and line.isascii()
    assert labels_file.from_text(text) == ['cat', name, 'dog']


TEXTS = st.text(
    st.sampled_from([*LINE_BREAKS, '"', '\\', 'n', 'u', '0', '2', '8', ' ', 'a', '\t', '\0']),
    max_size=8,
) | st.text(max_size=8)


@given(st.lists(TEXTS, max_size=6))
@example([])
@example([''])
@example(['', ''])
@example(['a', ''])
@example(['"\\"\\\\n\\""', '"\\n"', '\n'])
def test_any_names_come_back_and_no_reader_sees_more_lines(names):
    text = labels_file.to_text(names)
    assert labels_file.from_text(text) == names
    assert len(text.splitlines()) == len(text.split('\n')) - 1 == len(names)


@pytest.mark.parametrize(
    'text, names',
    [
        ('cat\ndog', ['cat', 'dog']),
        ('cat\r\ndog\r\n', ['cat', 'dog']),
        ('cat\n\ndog\n', ['cat', '', 'dog']),
        ('a\u2028b\ndog\n', ['a\u2028b', 'dog']),
        ('"cat"\n"dog\n', ['"cat"', '"dog']),
        ('"\\u0063at"\ndog\n', ['"\\u0063at"', 'dog']),
    ],
)
def test_files_of_other_writers_are_read_as_they_stand(text, names):
    assert labels_file.from_text(text) == names


# One run on a data set of TFDS that has such classes, and all that reads its export.

ODD_NAMES = [
    'one\u2028line',
    'vertical\vtab',
    'next\x85line',
    'file\x1cseparator',
    'paragraph\u2029separator',
]
NAMES = [*ODD_NAMES, '"quoted"', 'back\\slash', 'a b', 'k\u00e4tzchen', 'plain']


class OddlyNamed(tfds.core.GeneratorBasedBuilder):
    """Grey images of the usual names, which come after the odd ones: a reader that sees more
    lines gives them others.
    """

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        features = {
            'image': tfds.features.Image(shape=(8, 8, 3)),
            'label': tfds.features.ClassLabel(names=NAMES),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), supervised_keys=('image', 'label')
        )

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples(), 'test': self._generate_examples()}

    def _generate_examples(self):
        for label in range(len(ODD_NAMES), len(NAMES)):
            for number in range(8):
                yield (
                    f'{label} {number}',
                    {'image': np.full((8, 8, 3), 25 * label + number, np.uint8), 'label': label},
                )


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """(the config, the folder) of a run that has learned at least that no image is of the first
    classes.
    """
    config = tiny_config()
    config.dataset.name, config.ema_decay = 'oddly_named', 0.0
    config.train_for = config.eval_every = config.checkpoint_every = '40 steps'
    workdir = str(tmp_path_factory.mktemp('labels') / 'run')
    with reading_here():
        assert train.run(config, workdir) == 0
    return config, workdir


@pytest.mark.slow
def test_the_export_and_what_is_beside_it_have_the_same_names(run):
    _, workdir = run
    model, labels = predict.load(workdir)
    assert [name.decode() for name in model.label_names().numpy()] == labels == NAMES
    with open(os.path.join(workdir, 'export', 'labels.txt')) as file:
        assert len(file.read().splitlines()) == len(NAMES)


@pytest.mark.slow
def test_the_label_that_is_printed_is_the_models(run, tmp_path, capsys, monkeypatch):
    for name in (
        'TPU_LOAD_LIBRARY',
        'TPU_SKIP_MDS_QUERY',
        'CUDA_VISIBLE_DEVICES',
        'TF_CPP_MIN_LOG_LEVEL',
    ):  # which `predict` sets
        monkeypatch.setenv(name, os.environ.get(name, '0'))
    _, workdir = run
    picture = tf.io.encode_png(tf.fill([8, 8, 3], tf.constant(150, tf.uint8))).numpy()
    (tmp_path / 'x.png').write_bytes(picture)
    (label,) = (
        tf.saved_model.load(os.path.join(workdir, 'export'))
        .signatures['classify_encoded'](encoded=tf.constant([picture]))['label']
        .numpy()
    )
    assert label.decode() in NAMES[len(ODD_NAMES) :]
    assert predict.main([workdir, str(tmp_path / 'x.png'), f'--output={tmp_path}/x.png']) == 0
    assert f'x.png: {label.decode()} ' in capsys.readouterr().out


@pytest.mark.slow
def test_weights_and_teachers_with_odd_classes_are_recognized(run):
    config, workdir = run
    config = copy.deepcopy(config)
    config.model.weights = os.path.join(workdir, 'export')
    model = models.build_model(config, len(NAMES))
    assert pretrained.load_weights(model, config, NAMES, find_checkpoint).endswith('; the head too')
    assert pretrained.load_weights(model, config, NAMES[::-1], find_checkpoint).endswith(
        'has other classes'
    )
    config.distill.teacher = workdir
    assert distillation.make_teacher(config, NAMES)
    with refused(RunError, workdir):
        distillation.make_teacher(config, NAMES[::-1])


@pytest.mark.slow
def test_a_run_with_such_classes_goes_on(run, capsys):
    config, workdir = run
    assert train.run(config, workdir) == 0
    assert 'is finished' in capsys.readouterr().out
    assert evaluate.run(config, workdir)['eval/examples'] == 40
