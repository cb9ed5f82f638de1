"""The strategy fits the hardware, and one that was asked for and is not there is an error that says
what was found.
"""

import json

import pytest
import tensorflow as tf

from common.errors import ConfigError, RunError
from configs import default
from devices import strategy as devices
from tests.conftest import refused


@pytest.fixture
def config(monkeypatch):
    for name in ('TF_CONFIG', 'TPU_NAME', 'COLAB_TPU_ADDR', 'TPU_ACCELERATOR_TYPE'):
        monkeypatch.delenv(name, raising=False)
    return default.get_config()


def test_one_cpu_is_one_device(config):
    strategy, reason = devices.make_strategy(config)
    assert (
        isinstance(strategy, tf.distribute.OneDeviceStrategy) and strategy.num_replicas_in_sync == 1
    )
    assert reason.startswith('OneDeviceStrategy on one CPU: found')
    assert devices.device_kind(strategy) == 'CPU'


def test_virtual_devices_are_mirrored(config):
    config.virtual_devices = 2
    strategy, reason = devices.make_strategy(config)
    assert (
        isinstance(strategy, tf.distribute.MirroredStrategy) and strategy.num_replicas_in_sync == 2
    )
    assert reason.startswith('MirroredStrategy on 2 virtual CPUs')


def test_a_strategy_can_be_forced(config):
    config.virtual_devices, config.strategy = 2, 'one_device'
    strategy, reason = devices.make_strategy(config)
    assert strategy.num_replicas_in_sync == 1 and 'config.strategy asks for it' in reason


@pytest.mark.slow
@pytest.mark.parametrize(
    'forced, says',
    [
        ('mirrored', 'needs several devices, but found 4 CPUs'),
        ('multi_worker', 'needs the environment variable TF_CONFIG'),
        ('tpu', "the TPU 'local' does not start"),
    ],
)
def test_a_forced_strategy_that_is_not_there_says_what_was_found(config, forced, says):
    config.strategy = forced
    with refused(RunError, says, 'CPU'):
        devices.make_strategy(config)


def test_a_named_tpu_never_falls_back_to_the_cpu(config, monkeypatch):
    monkeypatch.setenv('TPU_NAME', 'local')
    with refused(RunError):  # of what JAX or TensorFlow lack here
        devices.make_strategy(config)
    config.strategy = 'tpu'
    with refused(RunError, 'does not start', fix='--config.strategy=auto'):
        devices.make_strategy(config)


def test_a_broken_tf_config_is_one_line(config, monkeypatch):
    monkeypatch.setenv('TF_CONFIG', '{"cluster": ')
    with refused(RunError, 'TF_CONFIG', fix='unset it'):
        devices.make_strategy(config)


@pytest.mark.parametrize(
    'cluster, task',
    [
        ({'chief': ['localhost:1'], 'worker': ['localhost:2']}, {}),
        ({'worker': ['localhost:1', 'localhost:2']}, {'type': 'worker', 'index': 7}),
    ],
)
def test_a_cluster_in_which_this_worker_has_no_place_is_one_line(
    config, monkeypatch, cluster, task
):
    monkeypatch.setenv('TF_CONFIG', json.dumps({'cluster': cluster, 'task': task}))
    with refused(RunError, 'TF_CONFIG', fix='unset it'):
        devices.make_strategy(config)


def test_a_tpu_named_by_the_config_is_always_expected(config, monkeypatch):
    config.tpu = 'mine'
    monkeypatch.setenv('TPU_NAME', 'other')
    with refused(RunError, "'mine'"):
        devices.make_strategy(config)


def test_one_worker_alone_needs_no_cluster(config, monkeypatch):
    monkeypatch.setenv(
        'TF_CONFIG',
        json.dumps(
            {'cluster': {'worker': ['localhost:1']}, 'task': {'type': 'worker', 'index': 0}}
        ),
    )
    assert devices.make_strategy(config)[0].num_replicas_in_sync == 1


@pytest.mark.parametrize(
    'precision, kind, policy',
    [
        ('auto', 'CPU', 'float32'),
        ('auto', 'TPU', 'mixed_bfloat16'),
        ('bfloat16', 'CPU', 'mixed_bfloat16'),
        ('float16', 'GPU', 'mixed_float16'),
        ('float32', 'TPU', 'float32'),
    ],
)
def test_precision_follows_the_hardware(precision, kind, policy):
    assert devices.resolve_precision(precision, kind) == policy


@pytest.mark.parametrize(
    'jit_compile, kind, compiles',
    [
        ('auto', 'CPU', False),
        ('auto', 'GPU', True),
        ('auto', 'TPU', False),
        ('true', 'CPU', True),
        ('false', 'GPU', False),
    ],
)
def test_xla_is_used_where_it_serves(jit_compile, kind, compiles):
    assert devices.resolve_jit_compile(jit_compile, kind) == compiles


def test_xla_on_a_tpu_host_is_refused():
    with refused(ConfigError, key='jit_compile', fix='--config.jit_compile=auto'):
        devices.resolve_jit_compile('true', 'TPU')
