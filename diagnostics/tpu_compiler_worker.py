"""Compiles one program with libtpu.

diagnostics/tpu_compiler.py runs it in the compiler's environment, which has JAX and no TensorFlow.

python tpu_compiler_worker.py PROGRAM.hlo v5e:2x2 NUM_REPLICAS ANSWER.json
"""

import importlib.metadata
import json
import os
import sys
import time
from typing import Any

from jax._src.interpreters import mlir
from jax._src.lib import xla_client
from jax.experimental import topologies

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from devices import stable_hlo  # noqa: E402

MEMORY = ('argument', 'output', 'alias', 'temp', 'generated_code')


def main(path: str, topology: str, num_replicas: int, answer_path: str) -> None:
    devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
    devices = devices[:num_replicas]
    with open(path, 'rb') as file, mlir.make_ir_context():
        module = stable_hlo.read_module(file.read(), with_names=True)
        begin = time.monotonic()
        answer: dict[str, Any]
        try:
            executable = devices[0].client.compile(
                module,
                xla_client.DeviceList(tuple(devices)),
                stable_hlo.replicated_on(devices),
            )
        except Exception as error:  # JaxRuntimeError; the compiler's message is the answer
            answer = {'error': str(error)}
        else:
            memory = executable.get_compiled_memory_stats()
            answer = {
                'seconds': time.monotonic() - begin,
                'compiler': f'libtpu {importlib.metadata.version("libtpu")}',
                'flops': executable.cost_analysis()['flops'],
                'memory': {kind: getattr(memory, f'{kind}_size_in_bytes') for kind in MEMORY},
                'text': executable.hlo_modules()[0].to_string(),
            }
    with open(answer_path, 'w') as file:
        json.dump(answer, file)


if __name__ == '__main__':
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
