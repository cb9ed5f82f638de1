"""The kernel's gradient of a depthwise convolution for small pictures: Eigen's, oneDNN's, and that
of modeling/fused_layers.py.

    python benchmarks/depthwise.py [--output=benchmarks/results/depthwise.json]

Shapes are those of EfficientNetV2B0's blocks 4 to 6 for pictures of 32 to 224 pixels. Each runs in
a process with oneDNN's kernels and in one without. Figures are medians of calls, in milliseconds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

SHAPES = ((64, 1, 1152), (64, 2, 672), (64, 3, 1152), (64, 4, 672), (64, 7, 1152), (16, 14, 672))
CALLS = 30


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--output')
    parser.add_argument('--measure', action='store_true', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps([milliseconds(*shape) for shape in SHAPES]))
        return
    eigen, onednn = (measured(value) for value in '01')
    rows = []
    for shape, without, with_it in zip(SHAPES, eigen, onednn, strict=True):
        times = {'eigen': without['theirs'], 'onednn': with_it['theirs'], 'ours': with_it['ours']}
        rows.append({'batch': shape[0], 'size': shape[1], 'channels': shape[2], **times})
        print('  '.join(f'{key} {value:g}' for key, value in rows[-1].items()))
    if options.output:
        with open(options.output, 'w') as file:
            json.dump({'cpu_cores': os.cpu_count(), 'milliseconds': rows}, file, indent=1)


def measured(onednn: str) -> list[dict[str, float]]:
    environment = os.environ | {
        'TF_ENABLE_ONEDNN_OPTS': onednn,
        'TF_CPP_MIN_LOG_LEVEL': '3',
        'CUDA_VISIBLE_DEVICES': '-1',
        'KERAS_BACKEND': 'tensorflow',
    }
    command = [sys.executable, os.path.abspath(__file__), '--measure']
    return json.loads(subprocess.check_output(command, env=environment, stderr=subprocess.DEVNULL))


def milliseconds(batch: int, size: int, channels: int) -> dict[str, float]:
    import numpy as np
    import tensorflow as tf

    from modeling.fused_layers import DepthwiseConv2D

    layer = DepthwiseConv2D(3, padding='same', use_bias=False)
    layer.build((batch, size, size, channels))
    random = np.random.RandomState(0)
    tensors = random.randn(2, batch, size, size, channels).astype('float32')

    @tf.function(autograph=False)
    def theirs(inputs: tf.Tensor, grad_output: tf.Tensor) -> tf.Tensor:
        return tf.nn.depthwise_conv2d_backprop_filter(
            inputs, layer.kernel.shape, grad_output, [1, 1, 1, 1], 'SAME'
        )

    ours = tf.function(layer._kernel_gradient, autograph=False)
    arguments = [tf.constant(tensor) for tensor in tensors]
    np.testing.assert_allclose(ours(*arguments), theirs(*arguments), rtol=1e-3, atol=1e-3)
    return {'theirs': median_of(theirs, arguments), 'ours': median_of(ours, arguments)}


def median_of(function: Callable, arguments: list) -> float:
    times = []
    for _ in range(CALLS):
        began = time.perf_counter()
        function(*arguments)
        times.append(1000 * (time.perf_counter() - began))
    return round(statistics.median(times), 2)


if __name__ == '__main__':
    main()
