"""The libtpu beside TensorFlow's TPU build has every function that it looks up: `make test-tpu`."""

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile

import pytest

from common.commands import ROOT
from diagnostics import installation, libtpu

TENSORFLOW = os.path.dirname(importlib.util.find_spec('tensorflow').origin)
LIBTPU = importlib.util.find_spec('libtpu')


def test_a_tpu_build_lacks_nothing_and_others_need_nothing():
    needed = libtpu.functions_needed(TENSORFLOW)
    exported = (
        libtpu.functions_exported(os.path.join(os.path.dirname(LIBTPU.origin), 'libtpu.so'))
        if LIBTPU
        else set()
    )
    assert len(needed) > 200 and 'TfTpu_Initialize' in needed if LIBTPU else not needed
    assert not needed - exported


def test_library_functions_are_those_the_loader_finds():
    library = os.path.join(TENSORFLOW, 'libtensorflow_framework.so.2')
    exported = libtpu.functions_exported(library)
    functions = sorted(name for name in exported if name.startswith('TF_'))
    loaded = ctypes.CDLL(library)
    assert len(functions) > 50 and all(hasattr(loaded, name) for name in functions)
    assert 'malloc' not in exported  # which it uses and does not have


@pytest.mark.parametrize(
    'text, names',
    [
        (
            b'\0TpuExecutor_Init\0HardwareLayout_ShapeSize\0',
            {'TpuExecutor_Init', 'HardwareLayout_ShapeSize'},
        ),
        (
            b'\0ConfigureDistributedTpuOp_DoWork\0SetGlobalTPUArrayOp_DoWork\0',
            {'ConfigureDistributedTpuOp_DoWork', 'SetGlobalTPUArrayOp_DoWork'},
        ),
        (b'\0TPU_SYSTEM\0_TpuExecutor_Init\0see TpuExecutor_Init\0TF_NewStatus\0', set()),
    ],
)
def test_names_of_functions_are_told_from_other_text(tmp_path, text, names):
    (tmp_path / 'libtensorflow_cc.so.2').write_bytes(text)
    assert libtpu.functions_needed(str(tmp_path)) == names


if (
    os.environ.get('TRACE') == 'all' and LIBTPU
):  # `make test-tpu`: asks the package index, and downloads libtpu

    def test_the_pins_resolve_to_a_libtpu_that_has_every_function():
        versions = resolve('tpu-tf')
        assert versions['tensorflow-tpu'] == importlib.metadata.version('tensorflow-tpu')
        assert missing_functions(versions['libtpu']) == set()

    def test_the_tpu_extra_resolves_to_the_pinned_jax_and_libtpu():
        found, pins = resolve('tpu'), installation.compiler_pins()
        assert {name: found[name] for name in ('jax', 'jaxlib', 'libtpu')} == {
            name: pins[name] for name in ('jax', 'jaxlib', 'libtpu')
        }


def resolve(extra):
    """{name: version} of what an extra resolves to today in a clean environment."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ('README.md', 'LICENSE', 'pyproject.toml'):
            shutil.copy(os.path.join(ROOT, name), folder)
        report = os.path.join(folder, 'report.json')
        pip('install', '--dry-run', '--ignore-installed', '--report', report, f'{folder}[{extra}]')
        with open(report) as file:
            return {
                package['metadata']['name'].replace('_', '-'): package['metadata']['version']
                for package in json.load(file)['install']
            }


def missing_functions(version):
    """What the installed TPU build needs and a version of libtpu lacks."""
    with tempfile.TemporaryDirectory() as folder:
        pip('download', '--no-deps', '--dest', folder, f'libtpu=={version}')
        (wheel,) = (name for name in os.listdir(folder) if name.startswith('libtpu-'))
        with zipfile.ZipFile(os.path.join(folder, wheel)) as content:
            library = content.extract('libtpu/libtpu.so', folder)
        return libtpu.functions_needed(TENSORFLOW) - libtpu.functions_exported(library)


def pip(*arguments):
    command = [sys.executable, '-m', 'pip', *arguments]
    subprocess.run([*command, '--quiet', '--disable-pip-version-check'], check=True)
