"""How fast one device trains in float32 and in bfloat16: steps of one config, alternating, as a
ratio.

    python benchmarks/precision.py [--config digits] [--cases 32x64 224x16]
    [--output=benchmarks/results/precision.json]

A case is image size x batch size.
"""

import argparse
import importlib
import json
import os
import statistics
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ['KERAS_BACKEND'] = 'tensorflow'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402

from devices import strategy as devices  # noqa: E402
from experiment import planning  # noqa: E402
from experiment import session as sessions  # noqa: E402
from inputs import augment  # noqa: E402
from modeling import loops, models, steps  # noqa: E402

POLICIES, ROUNDS, UPDATES = ('float32', 'mixed_bfloat16'), 7, 5


def make_run(config, strategy, dtype_policy, jit_compile):
    """A function that runs so many updates on one batch and returns when they are done."""
    keras.config.set_dtype_policy(dtype_policy)
    plan = planning.make_plan(config, 1437, 360, 10, 1)
    with strategy.scope():
        state = sessions.build_state(models.build_model(config, 10), config, plan, dtype_policy)
    loop = loops.make_train_loop(
        strategy,
        steps.make_train_step(
            state,
            config,
            augment.make_device_augment(config.augment, 10),
            num_classes=10,
            num_replicas=1,
            jit_compile=jit_compile,
        ),
    )
    images = tf.cast(
        tf.random.stateless_uniform(
            [config.batch_size, config.image_size, config.image_size, 3], [0, 0], 0, 256, tf.int32
        ),
        tf.uint8,
    )
    labels = tf.range(config.batch_size, dtype=tf.int64) % 10
    draws = {
        name: tf.repeat(value[None], config.batch_size, 0)
        for name, value in augment.draw_numbers(
            config.augment, tf.constant([0, 8], tf.int64)
        ).items()
    }
    batches = iter(
        strategy.distribute_datasets_from_function(
            lambda context: tf.data.Dataset.from_tensors((images, labels, draws)).repeat()
        )
    )
    return lambda updates=UPDATES: float(loop(batches, tf.constant(updates))['loss'])


def compare(config, image_size, batch_size):
    """A row of the report: examples per second in each precision, medians of alternating rounds."""
    config.image_size, config.batch_size, config.train_for = image_size, batch_size, '1000 steps'
    strategy, _ = devices.make_strategy(config)
    runs = {
        policy: make_run(config, strategy, policy, devices.device_kind(strategy) == 'GPU')
        for policy in POLICIES
    }
    for run in runs.values():
        run()  # traces and compiles
    seconds = {policy: [] for policy in POLICIES}
    for _ in range(ROUNDS):
        for policy, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[policy].append(time.perf_counter() - began)
    medians = {policy: statistics.median(values) for policy, values in seconds.items()}
    return {
        'image_size': image_size,
        'batch_size': batch_size,
        'examples_per_second': {
            policy: round(UPDATES * batch_size / median, 1) for policy, median in medians.items()
        },
        'bfloat16_over_float32': round(medians['float32'] / medians['mixed_bfloat16'], 2),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--config', default='digits')
    parser.add_argument('--cases', nargs='+', default=['32x64', '224x16'])
    parser.add_argument('--output')
    options = parser.parse_args()
    rows = [
        compare(
            importlib.import_module(f'configs.{options.config}').get_config(),
            *map(int, case.split('x')),
        )
        for case in options.cases
    ]
    report = {
        'config': options.config,
        'model': importlib.import_module(f'configs.{options.config}').get_config().model.name,
        'instructions': processor_instructions(),
        'cases': rows,
    }
    print(json.dumps(report, indent=1))
    if options.output:
        with open(options.output, 'w') as file:
            json.dump(report, file, indent=1)


def processor_instructions():
    """Which instructions for bfloat16 the processor has, on Linux."""
    if not os.path.exists('/proc/cpuinfo'):
        return []
    with open('/proc/cpuinfo') as file:
        return sorted({'avx512_bf16', 'amx_bf16'} & set(file.read().split()))


if __name__ == '__main__':
    main()
