"""Reads the HLO that TensorFlow lowers, for JAX's compilers. It needs JAX alone, not TensorFlow."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax._src import compiler
from jax._src.lib import _jax
from jax._src.lib.mlir import ir

ALIASES = 'mhlo.input_output_alias'


def read_module(hlo: bytes, with_names: bool = False) -> Any:
    """Returns an HLO module as StableHLO; call it in an MLIR context.

    Args:
        hlo: serialized, as `lowering.lower` returns it.
        with_names: whether operations keep the names that TensorFlow gave them.
    """
    module = ir.Module.parse(_jax.mlir.hlo_to_stablehlo(hlo))
    text = module.operation.get_asm(enable_debug_info=with_names)
    # TensorFlow's lowering marks returned variables with a copy that not all compilers know.
    text = re.sub(r'mhlo\.copy (%\w+) : (.*)', r'stablehlo.optimization_barrier \1 : \2', text)
    module = ir.Module.parse(text)
    # TensorFlow numbers its functions; a name of our own finds the compiled program again.
    module.operation.attributes['sym_name'] = ir.StringAttr.get('step')
    return module


def updated_parameters(module: Any) -> dict[int, int]:
    """Returns {number of a result: number of the parameter whose new value it is}."""
    attributes = module.operation.attributes
    if ALIASES not in attributes:
        return {}
    updated = {}
    for entry in attributes[ALIASES]:
        alias, output = ir.DictAttr(entry['alias']), entry['output_index']
        updated[int(output[0])] = int(ir.IntegerAttr(alias['parameter_number']).value)
    return updated


def replicated_on(devices: Sequence[Any]) -> Any:
    """Returns compile options for a program of one replica, run on each of `devices`."""
    return compiler.get_compile_options(
        num_replicas=len(devices),
        num_partitions=1,
        device_assignment=np.array([[device.id] for device in devices]),
    )
