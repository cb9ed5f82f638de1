"""Ten updates of the tiny model: the same on 1, 2 and 4 virtual devices, on 2 workers, in
micro-batches, with and without XLA; and on JAX's runtime on 1, 2 and 4 devices, and in 2 processes
of 2 devices.

    python benchmarks/same_step.py [--optimizers adamw lion] [--features clip ema]
    [--places 1 2 4 workers jax] [--output=benchmarks/results/same_step.json [--missing]]

For each optimizer and each of clip, accumulate, ema and bfloat16, and all of them at once, the
table shows the largest difference of a loss and of a weight (averages and statistics of batch
normalisation included) from those of one device without XLA. All but bfloat16 and Muon, which Keras
has in float32 alone, are computed in float64, where what differs is the meaning and not the
rounding. One micro-batch and four are compared on a model without batch normalisation, which sees a
micro-batch at a time.
"""

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ['KERAS_BACKEND'] = 'tensorflow'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from configs import digits  # noqa: E402
from experiment import planning  # noqa: E402
from experiment import session as sessions  # noqa: E402
from inputs import augment  # noqa: E402
from modeling import loops, models, optimizers, steps  # noqa: E402

FEATURES = ('clip', 'accumulate', 'ema', 'bfloat16', 'all')
BATCH_SIZE, UPDATES = 32, 10
PLACES = ('1', '2', '4', 'workers', 'jax')
# Of losses, which begin at 2.3 and are reported in float32, and of weights.
TOLERANCE = {
    'float64': {'losses': 1e-6, 'weights': 1e-9},
    'float32': {'losses': 1e-4, 'weights': 1e-4},
    'mixed_bfloat16': {'losses': 5e-3, 'weights': 2e-2},
}


def config_for(optimizer, feature, accumulate_steps=None):
    """Digits with the tiny model, no augmentation and no dropout, with one feature of the step, or
    all.
    """
    config = digits.get_config()
    config.model.name = 'tiny'
    config.image_size = 16
    config.batch_size = BATCH_SIZE
    config.model.dropout = 0.0
    config.augment.translate = config.augment.rotate = config.augment.zoom = config.ema_decay = 0.0
    config.train_for, config.schedule.warmup = '100 steps', '3 steps'
    config.optimizer = {'name': optimizer}
    config.schedule.peak_lr = 1e-2 if optimizer == 'sgd' else 1e-3
    config.weight_decay = 0.01
    if feature in ('clip', 'all'):
        config.grad_clip_norm = 0.5
    if feature in ('accumulate', 'all'):
        config.accumulate_steps = 4
    if feature in ('ema', 'all'):
        config.ema_decay = 0.9
    if accumulate_steps:
        config.accumulate_steps = accumulate_steps
    return config


def ten_updates(config, strategy, jit_compile, dtype_policy):
    """(losses, float64 [10]; all variables of model and average as one array, float64) under
    `strategy`.
    """
    keras.config.set_dtype_policy(dtype_policy)
    replicas = strategy.num_replicas_in_sync
    plan = planning.make_plan(config, 1437, 360, 10, replicas)
    sessions.random.seed(0)
    with strategy.scope():
        state = sessions.build_state(models.build_model(config, 10), config, plan, dtype_policy)
    unchanged = augment.make_device_augment(config.augment, 10)
    loop = loops.make_train_loop(
        strategy,
        steps.make_train_step(
            state,
            config,
            unchanged,
            num_classes=10,
            num_replicas=replicas,
            jit_compile=jit_compile,
            on_cpu=isinstance(strategy, tf.distribute.OneDeviceStrategy),
        ),
    )
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (UPDATES * BATCH_SIZE, 16, 16, 3)).astype(np.uint8)
    labels = random.randint(0, 10, UPDATES * BATCH_SIZE)

    def share(context):
        rows = (
            np.arange(UPDATES * BATCH_SIZE)
            .reshape(UPDATES, context.num_input_pipelines, -1)[:, context.input_pipeline_id]
            .ravel()
        )
        examples = tf.data.Dataset.from_tensor_slices((images[rows], labels[rows]))
        return examples.map(lambda image, label: (image, label, {})).batch(
            BATCH_SIZE // replicas, drop_remainder=True
        )

    batches = iter(strategy.distribute_datasets_from_function(share))
    losses = [float(loop(batches, tf.constant(1))['loss']) for _ in range(UPDATES)]
    sessions.make_synchronize(strategy, state, sync_batch_norm=True)()
    variables = state.variables()
    return np.array(losses), np.concatenate(
        [
            value.numpy().astype(np.float64).ravel()
            for value in variables['model'] + variables['average']
        ]
    )


def strategy_at(place):
    if place == '1':
        return tf.distribute.OneDeviceStrategy('CPU:0')
    return tf.distribute.MirroredStrategy(
        [f'CPU:{index}' for index in range(int(place))], tf.distribute.ReductionToOneDevice()
    )


def jax_devices(count):
    """A strategy on some of JAX's four virtual devices."""
    from devices import jax_start

    jax_start.start_virtual(4)
    from devices import pjrt

    return pjrt.PjrtStrategy(pjrt.jax.devices()[:count])


def policy_of(name, feature):
    if feature in ('bfloat16', 'all'):
        return 'mixed_bfloat16'
    return (
        'float32' if name == 'muon' else 'float64'
    )  # Keras' Muon multiplies float32 with what it gets


def as_workers(cases, on_jax=False):
    """{case: (losses, weights)} of two worker processes on this machine, which must agree; a case
    is (optimizer, feature, jit_compile). On JAX's runtime each has two devices.
    """
    servers = [socket.create_server(('localhost', 0)) for _ in range(2)]
    addresses = [f'localhost:{server.getsockname()[1]}' for server in servers]
    for server in servers:
        server.close()
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for index in range(2):
            cluster = json.dumps(
                {'cluster': {'worker': addresses}, 'task': {'type': 'worker', 'index': index}}
            )
            command = [
                sys.executable,
                os.path.abspath(__file__),
                f'--worker={folder}/{index}.npz',
                f'--cases={json.dumps(cases)}',
                *([f'--coordinator={addresses[0]}', f'--index={index}'] if on_jax else []),
            ]
            processes.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, 'TF_CONFIG': cluster, 'TF_CPP_MIN_LOG_LEVEL': '3'},
                    cwd=ROOT,
                )
            )
        if any(process.wait() for process in processes):
            raise RuntimeError('a worker failed')
        first, second = (np.load(f'{folder}/{index}.npz') for index in range(2))
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])
        return {
            case: (first[f'{index} losses'], first[f'{index} weights'])
            for index, case in enumerate(cases)
        }


def join_jax(coordinator, index):
    """A strategy on two devices of each of two processes."""
    from devices import cluster, jax_start

    jax_start.set_cluster(cluster.Cluster(2, coordinator, index))
    jax_start.start_virtual(2)
    from devices import pjrt

    return pjrt.PjrtStrategy()


def work(path, cases, strategy):
    """One of the worker processes of `as_workers`."""
    found = {}
    for index, (optimizer, feature, jit_compile) in enumerate(cases):
        found[f'{index} losses'], found[f'{index} weights'] = ten_updates(
            config_for(optimizer, feature), strategy, jit_compile, policy_of(optimizer, feature)
        )
    np.savez(path, **found)


def compare(names, features, places=PLACES, jit=(False, True)):
    """{(optimizer, feature): {'losses', 'weights', 'micro_batches'}}: the largest differences from
    one device without XLA.
    """
    cases = list(itertools.product(names, features, jit))
    by_workers = as_workers(cases) if 'workers' in places else {}
    cases = list(itertools.product(names, features, (False,)))
    by_processes = as_workers(cases, on_jax=True) if 'jax' in places else {}
    report = {}
    for name, feature in itertools.product(names, features):
        config, policy = config_for(name, feature), policy_of(name, feature)
        losses, values = ten_updates(config, strategy_at('1'), False, policy)
        found = [
            ten_updates(config, strategy_at(place), with_xla, policy)
            for place in places
            if place not in ('workers', 'jax')
            for with_xla in jit
            if (place, with_xla) != ('1', False)
        ]
        found += [by_workers[name, feature, with_xla] for with_xla in jit if by_workers]
        report[name, feature] = {}
        if found:
            report[name, feature] = {
                'losses': max(np.abs(other - losses).max() for other, _ in found),
                'weights': max(np.abs(other - values).max() for _, other in found),
                'micro_batches': micro_batches(name, feature),
            }
        if 'jax' in places:
            on_jax = [ten_updates(config, jax_devices(count), False, policy) for count in (1, 2, 4)]
            on_jax.append(by_processes[name, feature, False])
            report[name, feature] |= {
                'losses on JAX': max(np.abs(other - losses).max() for other, _ in on_jax),
                'weights on JAX': max(np.abs(other - values).max() for _, other in on_jax),
            }
        print(
            f'{name:10} {feature:10} '
            + '  '.join(f'{key} {value:.1e}' for key, value in report[name, feature].items()),
            flush=True,
        )
    return report


def without_batch(name, activation, **_):
    """What stands in for batch normalisation where statistics must not depend on what else is in a
    batch.
    """
    return keras.Sequential(
        [
            keras.layers.LayerNormalization(name='normalization'),
            keras.layers.Activation(activation),
        ],
        name=name,
    )


def micro_batches(name, feature):
    """The largest difference of a weight between one micro-batch and four, without batch
    normalisation and without bfloat16.
    """
    usual, models.BatchNormalization = models.BatchNormalization, without_batch
    try:
        (_, one), (_, four) = (
            ten_updates(
                config_for(name, feature, count), strategy_at('1'), False, policy_of(name, 'clip')
            )
            for count in (1, 4)
        )
    finally:
        models.BatchNormalization = usual
    return np.abs(one - four).max()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--optimizers', nargs='+', default=sorted(optimizers.OPTIMIZERS))
    parser.add_argument('--features', nargs='+', default=FEATURES)
    parser.add_argument('--places', nargs='+', choices=PLACES, default=PLACES)
    parser.add_argument('--output')
    parser.add_argument('--missing', action='store_true', help='only what is not in the output')
    parser.add_argument('--worker', help='where one of the worker processes writes')
    parser.add_argument('--cases', type=json.loads)
    parser.add_argument('--coordinator', help='of two processes on JAX')
    parser.add_argument('--index', type=int, help='which of them this is')
    options = parser.parse_args()
    if options.worker:
        strategy = (
            join_jax(options.coordinator, options.index)
            if options.coordinator
            else tf.distribute.MultiWorkerMirroredStrategy()
        )
        return work(options.worker, options.cases, strategy)
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices('CPU')[0], [tf.config.LogicalDeviceConfiguration()] * 4
    )
    differences = {}  # of this table
    if options.output and os.path.exists(options.output):
        with open(options.output) as file:
            differences = json.load(file)['differences']
    failed = []
    for name in options.optimizers:
        rows = [differences.get(f'{name} {feature}', {}) for feature in options.features]
        if options.missing and all('losses on JAX' in row for row in rows):
            continue
        report = compare([name], options.features, options.places)
        failed += beyond_tolerance(report)
        for (_, feature), row in report.items():
            differences[f'{name} {feature}'] = differences.get(f'{name} {feature}', {}) | row
        if options.output:
            table = {'updates': UPDATES, 'places': PLACES}
            with open(options.output, 'w') as file:
                json.dump(
                    table | {'differences': dict(sorted(differences.items()))}, file, indent=1
                )
    sys.exit(f'beyond the tolerance: {failed}' if failed else 0)


def beyond_tolerance(report):
    """The (optimizer, feature) of a report of `compare` that differ too much."""

    def agrees(name, feature, row):
        allowed, exact = TOLERANCE[policy_of(name, feature)], TOLERANCE[policy_of(name, 'clip')]
        return (
            max(row.get('losses', 0), row.get('losses on JAX', 0)) <= allowed['losses']
            and max(row.get('weights', 0), row.get('weights on JAX', 0)) <= allowed['weights']
            and row.get('micro_batches', 0) <= exact['weights']
        )

    return [
        (name, feature) for (name, feature), row in report.items() if not agrees(name, feature, row)
    ]


if __name__ == '__main__':
    main()
