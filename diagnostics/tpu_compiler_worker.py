"""Compiles one program with libtpu.

diagnostics/tpu_compiler.py runs it in the compiler's environment, which has JAX and no TensorFlow.

python tpu_compiler_worker.py PROGRAM.hlo v5e:2x2 NUM_REPLICAS ANSWER.json
"""

import json
import re
import sys
import time
from typing import Any

import numpy as np
from jax._src.interpreters import mlir as jax_mlir
from jax._src.lib import _jax, xla_client
from jax._src.lib.mlir import ir
from jax.experimental import topologies

MEMORY = ('argument', 'output', 'alias', 'temp', 'generated_code')


def main(path: str, topology: str, num_replicas: int, answer_path: str) -> None:
    with open(path, 'rb') as file:
        stable_hlo = _jax.mlir.hlo_to_stablehlo(file.read())
    with jax_mlir.make_ir_context():
        # With the names of TensorFlow's operations.
        text = ir.Module.parse(stable_hlo).operation.get_asm(enable_debug_info=True)
        # TensorFlow's lowering marks returned variables with a copy that the TPU compiler does not
        # know.
        module = ir.Module.parse(
            re.sub(r'mhlo\.copy (%\w+) : (.*)', r'stablehlo.optimization_barrier \1 : \2', text)
        )
        devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices[
            :num_replicas
        ]
        options = xla_client.CompileOptions()
        options.num_replicas, options.num_partitions = num_replicas, 1
        options.device_assignment = xla_client.DeviceAssignment.create(
            np.array([[device.id] for device in devices])
        )
        begin = time.monotonic()
        answer: dict[str, Any]
        try:
            executable = devices[0].client.compile(
                module, xla_client.DeviceList(tuple(devices)), options
            )
        except Exception as error:  # JaxRuntimeError; the compiler's message is the answer
            answer = {'error': str(error)}
        else:
            memory = executable.get_compiled_memory_stats()
            answer = {
                'seconds': time.monotonic() - begin,
                'compiler': f'libtpu {libtpu_version()}',
                'flops': executable.cost_analysis()['flops'],
                'memory': {kind: getattr(memory, f'{kind}_size_in_bytes') for kind in MEMORY},
                'text': executable.hlo_modules()[0].to_string(),
            }
    with open(answer_path, 'w') as file:
        json.dump(answer, file)


def libtpu_version() -> str:
    import importlib.metadata

    return importlib.metadata.version('libtpu')


if __name__ == '__main__':
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
