"""How JAX's runtime is started: alone, among others, and what is said where it cannot be."""

import sys

import pytest

from common.errors import ConfigError, RunError
from configs import default
from devices import jax_packages, jax_start
from devices.jax_start import Cluster
from diagnostics import installation
from tests.conftest import refused, slow


@pytest.mark.parametrize(
    'flags, about',
    [
        (('host:1', 2, None), '--process_id'),
        ((None, 2, 0), '--coordinator'),
        (('host', 2, 0), "--coordinator='host'"),
        (('host:port', 2, 0), "--coordinator='host:port'"),
        (('host:1', 2, 2), '--process_id=2'),
        (('host:1', 2, -1), '--process_id=-1'),
    ],
)
def test_flags_that_name_no_process_are_refused(flags, about):
    with refused(ConfigError, about):
        Cluster.from_flags(*flags)


def test_flags_name_a_process_or_none():
    assert Cluster.from_flags(None, None, None) is None
    assert Cluster.from_flags('host:1', 2, 0) == Cluster('host:1', 2, 0)
    assert Cluster.from_flags('[::1]:80', 2, 1).process_id == 1


def test_a_tpu_with_a_name_is_tensorflows(monkeypatch):
    config = default.get_config()
    config.tpu = 'mine'
    monkeypatch.setattr(jax_start.tpu_environment, 'is_tpu_expected', lambda **_: True)
    assert not jax_start.is_wanted(config)


def test_the_version_is_pinned_wherever_jax_is_installed():
    for name in ('cpu', 'gpu', 'tpu', 'gpu-jax'):
        pins = installation.all_pins(name, '3.12.0')
        assert pins['jax'] == pins['jaxlib'] == jax_packages.VERSION, name


def test_a_damaged_jax_is_one_line(monkeypatch):
    monkeypatch.setattr(jax_packages, 'check', lambda platform: 'JAX 0.10.2')
    monkeypatch.setitem(sys.modules, 'jax', None)
    install = f'jax=={jax_packages.VERSION}'
    with refused(RunError, 'JAX 0.10.2 cannot be imported', key='strategy', fix=install):
        jax_start.import_jax('cpu')


@pytest.mark.parametrize(
    'environ, expected',
    [
        ({}, False),
        ({'SLURM_NTASKS': '1'}, False),
        ({'SLURM_NTASKS': '4'}, True),
        ({'JOB_COMPLETION_INDEX': '0'}, True),
        ({'KUBERNETES_SERVICE_HOST': '10.0.0.1'}, False),
        ({'TPU_ACCELERATOR_TYPE': 'v5litepod-32'}, True),
    ],
)
def test_a_launcher_is_known_by_its_variables(environ, expected):
    assert jax_start.may_have_peers(environ) == expected


@pytest.mark.parametrize(
    'strategy, is_expected, build, wanted',
    [
        ('pjrt', False, None, True),
        ('auto', True, None, True),
        ('auto', True, '2.19.1', False),
        ('auto', False, None, False),
        slow('tpu', True, None, False),
    ],
)
def test_a_tpu_is_jaxs_unless_tensorflow_has_a_build_for_it(
    monkeypatch, strategy, is_expected, build, wanted
):
    config = default.get_config()
    config.strategy = strategy
    monkeypatch.setattr(jax_start.tpu_environment, 'is_tpu_expected', lambda **_: is_expected)
    monkeypatch.setattr(jax_start.tpu_environment, 'build_version', lambda: build)
    assert jax_start.is_wanted(config) == wanted


@pytest.mark.parametrize(
    'changes, environ, gpus, platform',
    [
        ({}, {}, [], 'cpu'),
        ({}, {'TPU_ACCELERATOR_TYPE': 'v5litepod-4'}, [], 'tpu'),
        ({'virtual_devices': 2}, {'TPU_ACCELERATOR_TYPE': 'v5litepod-4'}, ['a GPU'], 'cpu'),
        ({}, {}, ['a GPU'], 'cuda'),
        ({}, {'CUDA_VISIBLE_DEVICES': '-1'}, ['a GPU'], 'cpu'),
    ],
)
def test_the_platform_is_that_of_the_machine(
    tmp_path, monkeypatch, changes, environ, gpus, platform
):
    config = default.get_config()
    config.update(changes)
    monkeypatch.setattr(jax_start.machine, 'nvidia_smi', lambda: (gpus, ''))
    assert jax_start.expected_platform(config, environ, str(tmp_path)) == platform
