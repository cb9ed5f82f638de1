"""Checks whether a TPU build of TensorFlow and a libtpu fit together.

libtpu must have every function that TensorFlow looks up.

TensorFlow asks libtpu for some 210 C functions by name when it is imported on a TPU host, and
aborts if one is missing.
"""

import mmap
import os
import re

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

# TpuExecutor_Init, TfTpu_Initialize, ConfigureDistributedTpuOp_DoWork, HardwareLayout_ShapeSize,
# ... as a string of its own.
FUNCTION = re.compile(
    rb'(?<=\0)((?:[A-Za-z]*T(?:pu|PU)[A-Za-z]*|SparseCore|HardwareLayout)'
    rb'_[A-Z][a-z][A-Za-z0-9]*)(?=\0)'
)


def functions_needed(tensorflow_folder: str) -> set[str]:
    """Returns the names that the TensorFlow in this folder looks up in libtpu, if any."""
    path = os.path.join(tensorflow_folder, 'libtensorflow_cc.so.2')
    if not os.path.exists(path):
        return set()
    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
        try:
            # Only a tenth of the file, to be fast.
            constants = ELFFile(file).get_section_by_name('.rodata')
            begin, end = constants['sh_offset'], constants['sh_offset'] + constants['sh_size']
        except ELFError:
            begin, end = 0, len(content)
        return {name.decode() for name in FUNCTION.findall(content, begin, end)}


def functions_exported(library: str) -> set[str]:
    """Returns the names that a shared library exports."""
    with open(library, 'rb') as file:
        symbols = ELFFile(file).get_section_by_name('.dynsym').iter_symbols()
        return {symbol.name for symbol in symbols if symbol['st_shndx'] != 'SHN_UNDEF'}
