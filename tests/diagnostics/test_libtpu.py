"""The libtpu beside a TPU build of TensorFlow has every function that it looks up. `make test-tpu`
runs this with both builds.
"""

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile

import pytest

from common.commands import ROOT
from diagnostics import libtpu

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
    BUILD = importlib.metadata.version('tensorflow-tpu')
    EXTRA = 'tpu' if BUILD.startswith('2.19.') else 'tpu220'

    def test_the_pins_resolve_to_a_libtpu_that_has_every_function():
        assert missing_functions(lambda text: text) == set()

    def test_without_its_pin_libtpu_lacks_functions():
        missing = missing_functions(lambda text: re.sub(r'\n +"libtpu==.*', '', text))
        if BUILD.startswith('2.20.'):
            assert len(missing) > 0
        else:  # 2.19.1 pins libtpu itself
            assert missing == set()


def missing_functions(change):
    """What the installed TPU build needs and the libtpu lacks to which its extra resolves today in
    a clean environment, when pyproject.toml is changed so.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in ('README.md', 'LICENSE'):
            shutil.copy(os.path.join(ROOT, name), folder)
        with (
            open(os.path.join(ROOT, 'pyproject.toml')) as before,
            open(os.path.join(folder, 'pyproject.toml'), 'w') as after,
        ):
            after.write(change(before.read()))

        def pip(*arguments):
            command = [
                os.path.join(folder, 'clean', 'bin', 'python'),
                '-m',
                'pip',
                *arguments,
                '--quiet',
                '--disable-pip-version-check',
            ]
            subprocess.run(command, cwd=folder, check=True)

        subprocess.run([sys.executable, '-m', 'venv', os.path.join(folder, 'clean')], check=True)
        pip('install', '--dry-run', '--report', 'report.json', f'.[{EXTRA}]')
        with open(os.path.join(folder, 'report.json')) as file:
            versions = {
                package['metadata']['name'].replace('_', '-'): package['metadata']['version']
                for package in json.load(file)['install']
            }
        assert versions['tensorflow-tpu'] == BUILD
        pip('download', '--no-deps', f'libtpu=={versions["libtpu"]}')
        (wheel,) = (name for name in os.listdir(folder) if name.startswith('libtpu-'))
        with zipfile.ZipFile(os.path.join(folder, wheel)) as content:
            library = content.extract('libtpu/libtpu.so', folder)
        return libtpu.functions_needed(TENSORFLOW) - libtpu.functions_exported(library)
