"""How JAX's runtime is started: alone, among others, and what is said where it cannot be."""

import sys
import types

import pytest

from common.errors import RunError
from configs import default
from devices import jax_packages, jax_start
from diagnostics import installation
from tests.conftest import refused, slow


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
    with refused(RunError, 'JAX 0.10.2 cannot be imported', key='strategy', fix='--force-reinst'):
        jax_start.import_jax('cpu')


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


class FakeJax:
    """What `start_devices` asks of JAX: devices of a platform, or an error."""

    def __init__(self, found):
        self.found = found

    def devices(self):
        if isinstance(self.found, Exception):
            raise self.found
        return [types.SimpleNamespace(platform=self.found)]


@pytest.mark.parametrize('platform, found', [('tpu', 'tpu'), ('cuda', 'gpu'), ('cpu', 'cpu')])
def test_devices_are_of_the_platform(platform, found):
    assert jax_start.start_devices(FakeJax(found), platform)[0].platform == found


@pytest.mark.parametrize('platform, name', [('tpu', 'TPU'), ('cuda', 'GPU')])
def test_there_is_no_silent_fallback_to_the_cpu(platform, name):
    with refused(RunError, f'JAX finds no {name}', key='strategy'):
        jax_start.start_devices(FakeJax('cpu'), platform)
    error = RuntimeError('No device found. (set JAX_PLATFORMS=)')
    with refused(RunError, f'JAX does not start the {name} (No device found.)') as caught:
        jax_start.start_devices(FakeJax(error), platform)
    assert 'JAX_PLATFORMS' not in str(caught.value)


@pytest.mark.parametrize(
    'packages, wanted',
    [
        ({'jax-cuda13-plugin': '1', 'tensorflow-cpu': '1'}, True),
        ({'jax-cuda13-plugin': '1', 'tensorflow': '1'}, False),
        ({'tensorflow': '1'}, False),
    ],
)
def test_a_gpu_is_jaxs_if_only_jax_can_use_it(tmp_path, monkeypatch, packages, wanted):
    monkeypatch.setattr(jax_start.machine, 'nvidia_smi', lambda: (['a GPU'], ''))
    monkeypatch.setattr(
        jax_start.machine,
        'installed',
        lambda names: {name: packages[name] for name in names if name in packages},
    )
    assert jax_start.is_wanted(default.get_config(), {}, str(tmp_path)) == wanted
