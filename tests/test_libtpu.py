"""The libtpu beside a TPU build of TensorFlow has every function that it looks up. `make test-tpu` runs this with both builds."""
import ctypes
import importlib.util
import os

import pytest

from devices import libtpu

TENSORFLOW = os.path.dirname(importlib.util.find_spec('tensorflow').origin)
LIBTPU = importlib.util.find_spec('libtpu')


def test_nothing_is_missing_beside_a_tpu_build_and_other_builds_need_nothing():
    needed = libtpu.functions_needed(TENSORFLOW)
    exported = libtpu.functions_exported(os.path.join(os.path.dirname(LIBTPU.origin), 'libtpu.so')) if LIBTPU else set()
    assert len(needed) > 200 and 'TfTpu_Initialize' in needed if LIBTPU else not needed
    assert not needed - exported


def test_the_functions_of_a_library_are_those_that_the_loader_finds_in_it():
    library = os.path.join(TENSORFLOW, 'libtensorflow_framework.so.2')
    exported = libtpu.functions_exported(library)
    functions = sorted(name for name in exported if name.startswith('TF_'))
    loaded = ctypes.CDLL(library)
    assert len(functions) > 50 and all(hasattr(loaded, name) for name in functions)
    assert 'malloc' not in exported  # which it uses and does not have


@pytest.mark.parametrize('text, names', [
    (b'\0TpuExecutor_Init\0HardwareLayout_ShapeSize\0', {'TpuExecutor_Init', 'HardwareLayout_ShapeSize'}),
    (b'\0ConfigureDistributedTpuOp_DoWork\0SetGlobalTPUArrayOp_DoWork\0', {'ConfigureDistributedTpuOp_DoWork', 'SetGlobalTPUArrayOp_DoWork'}),
    (b'\0TPU_SYSTEM\0_TpuExecutor_Init\0see TpuExecutor_Init\0TF_NewStatus\0', set()),
])
def test_names_of_functions_are_told_from_other_text(tmp_path, text, names):
    (tmp_path / 'libtensorflow_cc.so.2').write_bytes(text)
    assert libtpu.functions_needed(str(tmp_path)) == names
