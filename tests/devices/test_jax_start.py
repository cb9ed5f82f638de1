"""How JAX's runtime is started: alone, among others, and what is said where it cannot be."""

import os
import sys
import types

import pytest

from common.commands import ROOT
from common.errors import ConfigError, RunError
from configs import default
from devices import jax_start
from devices.jax_start import Cluster
from tests.conftest import refused, slow

NEEDS_JAX = pytest.mark.skipif(
    sys.version_info < jax_start.OLDEST_PYTHON, reason='JAX 0.10 is for Python 3.11 and later'
)


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
    monkeypatch.setattr(jax_start.tpu_environment, 'is_tpu_expected', lambda *_: True)
    assert not jax_start.is_wanted(config)


def test_the_version_is_pinned_wherever_jax_is_installed():
    for name in ('cpu', 'gpu', 'preflight'):
        with open(os.path.join(ROOT, 'requirements', f'{name}.txt')) as file:
            lines = file.read().splitlines()
        pins = [line.split(' ')[0] for line in lines if '3.11' in line or ';' not in line]
        assert f'jax=={jax_start.VERSION}' in pins and f'jaxlib=={jax_start.VERSION}' in pins


def test_another_or_no_jax_is_one_line(monkeypatch):
    version = jax_start.VERSION
    monkeypatch.setitem(sys.modules, 'jax', types.SimpleNamespace(__version__='0.4.0'))
    with refused(RunError, '0.4.0', version, key='strategy', fix=f'jax=={version}'):
        jax_start._import_jax()
    monkeypatch.setitem(sys.modules, 'jax', None)
    with refused(RunError, 'cannot be imported', key='strategy', fix=f'jax=={version}'):
        jax_start._import_jax()


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
        pytest.param('auto', True, None, True, marks=NEEDS_JAX),
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
    monkeypatch.setattr(jax_start.tpu_environment, 'is_tpu_expected', lambda: is_expected)
    monkeypatch.setattr(jax_start.tpu_environment, 'build_version', lambda: build)
    assert jax_start.is_wanted(config) == wanted
