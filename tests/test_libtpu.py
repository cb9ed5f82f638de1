"""The libtpu beside a TPU build of TensorFlow has every function that it looks up. `make test-tpu` runs this with both builds."""
import importlib.util
import os
import shutil
import subprocess

import pytest

from devices import libtpu

TENSORFLOW = os.path.dirname(importlib.util.find_spec('tensorflow').origin)
LIBTPU = importlib.util.find_spec('libtpu')


@pytest.mark.skipif(LIBTPU is None, reason='no TPU build here: make test-tpu')
def test_nothing_is_missing():
    needed = libtpu.functions_needed(TENSORFLOW)
    assert len(needed) > 200 and 'TfTpu_Initialize' in needed
    assert not needed - libtpu.functions_exported(os.path.join(os.path.dirname(LIBTPU.origin), 'libtpu.so'))


@pytest.mark.skipif(LIBTPU is not None, reason='this is a TPU build')
def test_other_builds_need_no_libtpu():
    assert libtpu.functions_needed(TENSORFLOW) == set()


@pytest.mark.skipif(shutil.which('nm') is None, reason='nm of the binutils is what this is compared with')
def test_the_functions_of_a_library_are_those_that_nm_lists():
    library = os.path.join(TENSORFLOW, 'libtensorflow_framework.so.2')
    listed = subprocess.run(['nm', '-D', '--defined-only', library], capture_output=True, text=True, check=True).stdout.split('\n')
    assert libtpu.functions_exported(library) == {line.split()[-1].split('@')[0] for line in listed if line}


@pytest.mark.parametrize('text, names', [
    (b'\0TpuExecutor_Init\0HardwareLayout_ShapeSize\0', {'TpuExecutor_Init', 'HardwareLayout_ShapeSize'}),
    (b'\0ConfigureDistributedTpuOp_DoWork\0SetGlobalTPUArrayOp_DoWork\0', {'ConfigureDistributedTpuOp_DoWork', 'SetGlobalTPUArrayOp_DoWork'}),
    (b'\0TPU_SYSTEM\0_TpuExecutor_Init\0see TpuExecutor_Init\0TF_NewStatus\0', set()),
])
def test_names_of_functions_are_told_from_other_text(tmp_path, text, names):
    (tmp_path / 'libtensorflow_cc.so.2').write_bytes(text)
    assert libtpu.functions_needed(str(tmp_path)) == names
