"""TFDS's own ImageNet builder, fed two small archives of made-up images, goes through the
ImageNet config.
"""

import io
import os
import tarfile

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

import evaluate
import train
from common.errors import ConfigError, RunError
from common.storage import read_json
from configs import imagenet
from inputs import datasets
from tests.conftest import refused

SYNSETS = ('n01440764', 'n01443537', 'n01484850', 'n01491361')
PICTURES_PER_CLASS, VALIDATION_PICTURES = 12, 10


def add(archive, name, content):
    information = tarfile.TarInfo(name)
    information.size = len(content)
    archive.addfile(information, io.BytesIO(content))


def picture(seed):
    height, width = 90 + seed % 40, 120 - seed % 30
    noise = np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)
    return tf.io.encode_jpeg(noise).numpy()


def write_archives(folder):
    """ILSVRC2012_img_train.tar, a tar of one tar for each class, and ILSVRC2012_img_val.tar."""
    os.makedirs(folder)
    with tarfile.open(os.path.join(folder, 'ILSVRC2012_img_train.tar'), 'w') as archive:
        for index, synset in enumerate(SYNSETS):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode='w') as pictures:
                for number in range(PICTURES_PER_CLASS):
                    add(pictures, f'{synset}_{number}.JPEG', picture(100 * index + number))
            add(archive, f'{synset}.tar', inner.getvalue())
    with tarfile.open(os.path.join(folder, 'ILSVRC2012_img_val.tar'), 'w') as archive:
        for number in range(1, VALIDATION_PICTURES + 1):
            add(archive, f'ILSVRC2012_val_{number:08d}.JPEG', picture(1000 + number))


def small_config(tmp_path):
    config = imagenet.get_config()
    config.dataset.data_dir = str(tmp_path / 'data')
    config.model.name, config.model.drop_path, config.image_size = 'tiny', 0.0, 64
    config.batch_size, config.eval_batch_size, config.train_for = 16, 8, '6 steps'
    config.schedule.warmup, config.log_every, config.eval_every = '2 steps', '2 steps', '6 steps'
    return config


@pytest.mark.slow
@pytest.mark.usefixtures('read_here')
def test_a_small_imagenet_is_prepared_trained_and_evaluated(tmp_path, monkeypatch):
    write_archives(str(tmp_path / 'data' / 'downloads' / 'manual'))
    config = small_config(tmp_path)
    source = datasets.load(config.dataset)
    assert (source.num_train, source.num_eval) == (
        len(SYNSETS) * PICTURES_PER_CLASS,
        VALIDATION_PICTURES,
    )
    assert len(source.class_names) == 1000 and source.class_names[:4] == SYNSETS
    assert train.run(config, str(tmp_path / 'run')) == 0
    summary = read_json(str(tmp_path / 'run' / 'summary.json'))
    assert summary['eval/examples'] == VALIDATION_PICTURES and summary['examples_seen'] == 96

    config.dataset.name, config.dataset.eval_split = 'imagenet_v2', 'test'
    for class_index in ('0', '2', '999'):
        for name in ('a.jpeg', 'b.jpeg'):
            path = (
                tmp_path
                / 'downloaded'
                / 'imagenetv2-matched-frequency-format-val'
                / class_index
                / name
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(len(name) + int(class_index)))
    monkeypatch.setattr(
        tfds.download.DownloadManager,
        'download_and_extract',
        lambda self, url: str(tmp_path / 'downloaded'),
    )
    metrics = evaluate.run(config, str(tmp_path / 'run'))
    assert metrics['eval/examples'] == 6 and np.isfinite(metrics['eval/loss'])
    with refused(ConfigError, "'train'", 'imagenet_v2'):
        train.run(config, str(tmp_path / 'other'))

    config.dataset.name, config.dataset.eval_split = 'digits', 'test'
    with refused(RunError, '1000 classes', "'n01440764'"):
        evaluate.run(config, str(tmp_path / 'run'))
