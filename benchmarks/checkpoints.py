"""What checkpoints cost: training with one every 50 steps beside training with none, and what a
checkpoint that training waits for would cost.

    python benchmarks/checkpoints.py [--config=digits] [--rounds=5]
    [--output=benchmarks/results/checkpoints.json]

One process trains pieces of 50 steps, with and without a checkpoint at their end in turn, so that
both see the same machine. The time of a piece with one includes what its background thread takes
away, since a piece is timed until the next one begins and at the end is waited for.
"""

import argparse
import dataclasses
import importlib
import json
import os
import statistics
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.update(KERAS_BACKEND='tensorflow')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import tensorflow as tf  # noqa: E402

import train  # noqa: E402
from experiment.session import open_session  # noqa: E402
from outputs.train_progress import Progress  # noqa: E402

STEPS = 50  # between two checkpoints
WAYS = ('without', 'in the background', 'waited for')


def measure(config, rounds):
    """{way: seconds of each piece of 50 steps}, and the size of a checkpoint in bytes."""
    with tempfile.TemporaryDirectory() as workdir:
        config.train_for = f'{STEPS * (1 + len(WAYS) * rounds)} steps'
        session = open_session(config, workdir)
        train_loop, iterator = train.begin_stage(session, config, 0, session.plan.total_steps)
        seconds, step = {way: [] for way in WAYS}, 0

        def piece():
            for _ in range(STEPS // config.steps_per_loop):
                float(train_loop(iterator, tf.constant(config.steps_per_loop))['loss'])
            return step + STEPS

        step = piece()  # traces
        for number in range(rounds):
            for way in (*WAYS[number % 3 :], *WAYS[: number % 3]):
                began = time.monotonic()
                if way != 'without':
                    session.checkpoints.save(step, dataclasses.asdict(Progress(step=step)))
                if way == 'waited for':
                    session.checkpoints.wait()
                step = piece()
                session.checkpoints.wait()  # so that nothing of it falls into the next piece
                seconds[way].append(time.monotonic() - began)
        newest = session.checkpoints.latest_step()
        folder = os.path.join(session.checkpoints.directory, f'step-{newest}')
        return seconds, sum(
            os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder)
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--config', default='digits')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--output')
    arguments = parser.parse_args()
    config = importlib.import_module(f'configs.{arguments.config}').get_config()
    config.steps_per_loop = 10
    seconds, size = measure(config, arguments.rounds)
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    result = {
        'config': arguments.config,
        'steps': STEPS,
        'rounds': arguments.rounds,
        'checkpoint_mb': size / 1e6,
        'seconds': medians,
        'slower': {
            way: statistics.median(
                value / base - 1
                for value, base in zip(seconds[way], seconds['without'], strict=True)
            )
            for way in WAYS[1:]
        },
    }
    for way, share in result['slower'].items():
        print(
            f'{way:20} {share:+.2%} of {medians["without"]:.3g} s for {STEPS} steps; a '
            f'checkpoint is {size / 1e6:.3g} MB'
        )
    if arguments.output:
        with open(arguments.output, 'w') as file:
            json.dump(result, file, indent=1)


if __name__ == '__main__':
    main()
