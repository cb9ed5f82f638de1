"""One config with several seeds, each as a whole run from the command line: accuracy and time.

python benchmarks/seeds.py [--config=configs/digits.py] [--seeds 0 1 2]
[--output=benchmarks/results/digits.json]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KEPT = (
    'eval/accuracy',
    'eval/examples',
    'export/accuracy',
    'steps',
    'train_seconds',
    'examples_per_second',
    'input_wait_fraction',
)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--config', default='configs/digits.py')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--output')
    options = parser.parse_args()
    results = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as workdir:
            began = time.monotonic()
            command = [
                sys.executable,
                os.path.join(ROOT, 'main.py'),
                f'--config={options.config}',
                f'--config.seed={seed}',
                f'--workdir={workdir}/run',
            ]
            subprocess.run(command, check=True, cwd=ROOT)
            wall_seconds = round(time.monotonic() - began)
            with open(os.path.join(workdir, 'run', 'summary.json')) as file:
                summary = json.load(file)
        results.append(
            {'seed': seed, 'wall_seconds': wall_seconds, **{key: summary[key] for key in KEPT}}
        )
        print(
            f'seed {seed}: {summary["eval/accuracy"]:.2%} of {summary["eval/examples"]} in '
            f'{wall_seconds} s',
            flush=True,
        )
    if options.output:
        with open(options.output, 'w') as file:
            json.dump(
                {'config': options.config, 'cpu_cores': os.cpu_count(), 'runs': results},
                file,
                indent=1,
            )


if __name__ == '__main__':
    main()
