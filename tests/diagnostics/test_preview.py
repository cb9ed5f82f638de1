"""The preview shows what training gets, to the pixel, and trains nothing."""

import os

import numpy as np
import pytest
import tensorflow as tf

from common.errors import ConfigError
from common.storage import write_json
from diagnostics import preview
from experiment import planning
from inputs import augment, datasets, pipeline
from outputs import plots
from tests.conftest import refused, slow


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn instead of files: [(path, images, captions, title)]."""
    calls = []
    monkeypatch.setattr(plots, 'plot_batch', lambda *arguments: calls.append(arguments))
    return calls


@pytest.mark.parametrize('virtual_devices', [slow(0), 2])
def test_a_batch_is_drawn_as_the_model_gets_it(tiny, tmp_path, drawn, virtual_devices):
    tiny.augment.flip = True
    tiny.augment.mixup = 0.5
    tiny.augment.random_erasing = 0.5
    tiny.virtual_devices = virtual_devices
    preview.run(tiny, str(tmp_path), step=3)
    ((path, images, captions, _),) = drawn
    source = datasets.load(tiny.dataset)
    plan = planning.make_plan(tiny, source.num_train, source.num_eval, 10, 1)
    (batch,) = pipeline.training_batches(
        source, tiny, plan, 3, 4, tf.distribute.OneDeviceStrategy('CPU:0')
    )
    expected, labels = augment.make_device_augment(tiny.augment, 10)(*batch)
    np.testing.assert_allclose(images, expected, atol=1e-3)
    assert os.path.basename(path) == 'batch_3.png'
    for text, label in zip(captions, labels.numpy(), strict=True):
        assert text.split()[0] == str(label.argmax()) and text.count('%') == (
            0 if label.max() > 0.995 else 2
        )


def test_a_skipped_batch_is_found_after_a_batch_size_change(tiny, tmp_path, drawn):
    ahead = planning.ScheduleOffset(
        updates=0, examples=192 - 4 * 32, distinct=192 - 4 * 32
    )  # after 4 updates of 48
    write_json(
        str(tmp_path / 'skipped.json'), {'first_update': 4, 'last_update': 5, 'ahead': ahead}
    )
    preview.run(tiny, str(tmp_path))
    preview.run(
        tiny, str(tmp_path), step=6
    )  # of a run of 32 from its start: the same 192 examples are behind it
    (path, images, captions, _), (_, expected, same, _) = drawn
    assert os.path.basename(path) == 'batch_4.png' and captions == same
    np.testing.assert_array_equal(images, expected)


def test_the_files_are_there_and_nothing_else(tiny, tmp_path):
    preview.run(tiny, str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ['preview'] and sorted(
        os.listdir(tmp_path / 'preview')
    ) == ['batch_0.png', 'learning_rate.png']
    assert all(
        (tmp_path / 'preview' / name).stat().st_size > 10_000
        for name in os.listdir(tmp_path / 'preview')
    )


@pytest.mark.slow
def test_each_stage_of_a_progressive_run_has_its_picture(tiny, tmp_path, drawn):
    tiny.image_size, tiny.progressive.stages, tiny.progressive.image_size = 96, 3, 32
    preview.run(tiny, str(tmp_path))
    assert [(os.path.basename(path), images.shape[1]) for path, images, *_ in drawn] == [
        ('batch_0.png', 32),
        ('batch_10.png', 64),
        ('batch_20.png', 96),
    ]


def test_an_update_that_the_run_has_not_is_one_line(tiny, tmp_path):
    with refused(ConfigError, '--step=30', fix='0 to 29'):
        preview.run(tiny, str(tmp_path), step=30)


def test_a_class_may_have_any_name(tmp_path):
    for name in ('x' * 200, 'a $ b $ c_{', '\\$'):
        plots.plot_batch(str(tmp_path / 'batch.png'), np.zeros((1, 8, 8, 3)), [name], 'title')
