"""What a step of the tiny model costs on TensorFlow's runtime and on JAX's: time and memory.

    python benchmarks/runtimes.py [--rounds 5] [--output=benchmarks/results/runtimes.json]

Each runtime trains in a process of its own, in turn. The model is so small that most of a step's
time is the host's: reading a batch, starting the step, keeping the results.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
STRATEGIES = ('one_device', 'pjrt')
STEPS, LOOPS = 200, 6  # a loop; the first is compiled too, and left out


def train(strategy):
    """Prints {'milliseconds': of a step, the median of loops; 'peak_mib'} of this process."""
    os.environ.update(
        KERAS_BACKEND='tensorflow', TF_CPP_MIN_LOG_LEVEL='3', CUDA_VISIBLE_DEVICES='-1'
    )
    import tensorflow as tf

    import train as training
    from configs import digits
    from experiment import session as sessions

    config = digits.get_config()
    config.model.name, config.image_size, config.batch_size = 'tiny', 16, 64
    config.train_for, config.steps_per_loop = f'{STEPS * LOOPS} steps', STEPS
    config.strategy = strategy
    with tempfile.TemporaryDirectory() as workdir:
        session = sessions.open_session(config, workdir)
        loop, batches = training.begin_stage(session, config, 0, STEPS * LOOPS)
        seconds = []
        for _ in range(LOOPS):
            begin = time.monotonic()
            {key: float(value) for key, value in loop(batches, tf.constant(STEPS)).items()}
            seconds.append(time.monotonic() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    milliseconds = 1000 * statistics.median(seconds[1:]) / STEPS
    print(json.dumps({'milliseconds': milliseconds, 'peak_mib': peak}))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--output')
    parser.add_argument('--train', choices=STRATEGIES, help='what a process of its own does')
    options = parser.parse_args()
    if options.train:
        train(options.train)
        return
    rounds = []
    for _ in range(options.rounds):
        found = {}
        for strategy in STRATEGIES:
            command = [sys.executable, os.path.abspath(__file__), f'--train={strategy}']
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[strategy] = json.loads(done.stdout.splitlines()[-1])
        rounds.append(found)
        print(found, flush=True)
    ratios = {
        what: [one['pjrt'][what] / one['one_device'][what] for one in rounds]
        for what in ('milliseconds', 'peak_mib')
    }
    result = {
        'steps': STEPS,
        'batch_size': 64,
        'cpu_cores': os.cpu_count(),
        'rounds': rounds,
        'ratio': {what: statistics.median(values) for what, values in ratios.items()},
        'ratio_from_to': {what: [min(values), max(values)] for what, values in ratios.items()},
    }
    print(json.dumps(result['ratio']))
    if options.output:
        with open(options.output, 'w') as file:
            json.dump(result, file, indent=1)


if __name__ == '__main__':
    main()
