"""What all tests share: four virtual CPU devices, a data folder of their own, and a tiny digits
run.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
import types

DATA = tempfile.TemporaryDirectory(prefix='warmstart-test-data-')
os.environ.update(
    KERAS_BACKEND='tensorflow',
    TF_CPP_MIN_LOG_LEVEL='2',
    TF_ENABLE_ONEDNN_OPTS='1',  # as in main.py
    TFDS_DATA_DIR=DATA.name,
    CUDA_VISIBLE_DEVICES='-1',
    JAX_NUM_CPU_DEVICES='4',
)

import pytest  # noqa: E402
import tensorflow as tf  # noqa: E402

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices('CPU')[0], [tf.config.LogicalDeviceConfiguration()] * 4
)

import keras  # noqa: E402

import export  # noqa: E402
from configs import digits  # noqa: E402
from outputs import read_saved_model  # noqa: E402


def slow(*values):
    """Returns a parameter set that only `make test-slow` runs: it repeats much of another."""
    return pytest.param(*values, marks=pytest.mark.slow)


@contextlib.contextmanager
def refused(kind, *data, key=None, fix=''):
    """Expects a `kind` of UserError, in one line.

    Args:
        data: what its problem names, such as a path, a value or a step.
        key: of the config, if one is to blame.
        fix: what its fix tells the user to write or do.
    """
    with pytest.raises(kind) as caught:
        yield caught
    error = caught.value
    assert '\n' not in str(error)
    assert key is None or error.key == key, error.key
    for datum in data:
        assert str(datum) in error.problem, error.problem
    assert fix in error.fix, error.fix


@pytest.fixture(autouse=True)
def no_traces_left():
    """Each test begins without Keras' global policy of the test before, and hears Ctrl-C, which a
    shell's background jobs ignore.
    """
    keras.config.set_dtype_policy('float32')
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def tiny_config():
    """The digits config with the tiny model, 30 updates of 32 examples."""
    config = digits.get_config()
    config.model.name, config.image_size = 'tiny', 16
    config.batch_size, config.eval_batch_size = 32, 128
    config.train_for, config.steps_per_loop = '30 steps', 4
    config.schedule.peak_lr, config.schedule.start_lr = 1e-2, 1e-4
    config.log_every, config.eval_every, config.checkpoint_every = '5 steps', '10 steps', '10 steps'
    config.ema_decay = 0.9
    return config


@contextlib.contextmanager
def reading_here():
    """The exported model is read in this process: one of its own takes longer than a small run.
    tests/test_train.py does it in either direction.
    """

    def run(command, **_):
        read_saved_model.main(*command[2:])
        return subprocess.CompletedProcess(command, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, 'subprocess', types.SimpleNamespace(run=run))
        yield


@pytest.fixture
def read_here():
    with reading_here():
        yield


@pytest.fixture
def tiny():
    return tiny_config()


@pytest.fixture
def still(tiny):
    """`tiny` without augmentation and dropout: nothing depends on the number of replicas."""
    tiny.augment.translate = tiny.augment.rotate = tiny.augment.zoom = tiny.model.dropout = 0.0
    return tiny
