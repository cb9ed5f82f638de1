"""This project beside what people would use instead, in one run.

    python benchmarks/bench.py [--only 'step, 32 px' ...] [--rounds 5] [--seconds 10]
        [--torch_python=PYTHON] [--output=benchmarks/results/bench.json]

Each program has a process of its own and all take turns; the figures are medians over the rounds,
and those of a ratio are of ratios within a round, because a machine's speed drifts. Above 1 ours is
the faster one. Without --torch_python timm and torchvision are left out, and bfloat16 on processors
that do not have it, where a step takes minutes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from benchmarks import inputs, turns  # noqa: E402

TRAINING = (
    'ours',
    'fit',
    'fit, jit_compile',
    'fit, oneDNN',
    'timm, eager',
    'timm, compiled',
    'timm, eager, bfloat16',
    'timm, compiled, bfloat16',
)
EVALUATION = ('ours, evaluation', 'evaluate', 'evaluate, oneDNN')
# Ours has it on by itself.
WITH_ONEDNN = ['env', 'TF_ENABLE_ONEDNN_OPTS=1']
SMALL = {'size': 32, 'batch_size': 64, 'classes': 10}
LARGE = {'size': 224, 'batch_size': 16, 'classes': 1000}
STEPS = {  # {case: (its programs, ours first, and their arguments)}
    'step, 32 px': (TRAINING, SMALL),
    'step, 224 px': (TRAINING, LARGE),
    'evaluation, 32 px': (EVALUATION, SMALL),
    'evaluation, 224 px': (EVALUATION, LARGE),
    'step of a tiny model': (('ours, tiny', 'fit, tiny'), {**SMALL, 'size': 16, 'batch_size': 8}),
}
STARTS = {
    'ours': ['main.py', '--config=configs/digits.py', '--config.train_for=1 steps'],
    "the article's program": ['benchmarks/article.py'],
}
FIRST_STEP = ('step 1/', 'first step')  # how the line begins that tells of it
CASES = (*STEPS, 'start', 'input')


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--only', nargs='+', choices=CASES, default=CASES)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--seconds', type=float, default=10.0, help='of a turn')
    parser.add_argument('--torch_python', help='an interpreter with timm and torchvision')
    parser.add_argument('--output')
    options = parser.parse_args()
    report: dict[str, Any] = {}
    if options.output and os.path.exists(options.output):
        with open(options.output) as file:
            report = json.load(file)
    for case in options.only:
        print(case, flush=True)
        report[case] = run(case, options.rounds, options.seconds, options.torch_python)
        if options.output:
            with open(options.output, 'w') as file:
                json.dump(report | {'cpu_cores': os.cpu_count()}, file, indent=1)


def run(case: str, rounds: int, seconds: float, torch_python: str | None) -> dict[str, Any]:
    """Returns what the report says of a case, and prints it."""
    if case == 'input':
        with tempfile.TemporaryDirectory() as folder:
            pythons = inputs.interpreters(torch_python)
            return inputs.measure(inputs.PIXELS, pythons, rounds, seconds, folder)
    if case == 'start':
        starts: dict[str, list[float]] = {name: [] for name in STARTS}
        for _ in range(rounds):
            for name in STARTS:
                starts[name].append(1 / seconds_to_first_step(STARTS[name]))
        return compared(starts, 'starts a second')
    names, arguments = STEPS[case]
    commands = {}
    for name in names:
        if name.endswith('bfloat16') and not has_bfloat16():
            continue
        python = torch_python if name.startswith('timm') else sys.executable
        if python:
            flags = [f'--{key}={value}' for key, value in arguments.items()]
            program = [python, os.path.join(ROOT, 'benchmarks/peers.py'), name, *flags]
            commands[name] = [*WITH_ONEDNN, *program] if name.endswith('oneDNN') else program
    measured = turns.measure(commands, rounds, seconds)
    speeds = {name: program.speeds for name, program in measured.items()}
    found = compared(speeds, 'examples a second')
    for name, program in measured.items():
        found[name]['peak_mib'] = round(program.peak_bytes / 2**20)
    print('  peak memory in MiB: ' + ', '.join(f'{n} {found[n]["peak_mib"]}' for n in found))
    return {**arguments, **found}


def has_bfloat16() -> bool:
    """Returns whether Linux says that the processor computes in bfloat16."""
    if not os.path.exists('/proc/cpuinfo'):
        return False
    with open('/proc/cpuinfo') as file:
        words = file.read().split()
    return not {'avx512_bf16', 'amx_bf16', 'bf16'}.isdisjoint(words)


def seconds_to_first_step(command: list[str]) -> float:
    """Returns the time from the start of a program to the end of its first step; ends it then."""
    with tempfile.TemporaryDirectory() as workdir:
        flags = [f'--workdir={workdir}/run'] if command[0] == 'main.py' else []
        began = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, *command, *flags],
            cwd=ROOT,
            env=os.environ | turns.ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(FIRST_STEP):
                    seconds = time.perf_counter() - began
                    process.kill()
                    return seconds
    sys.exit(f'error: {command} ended without a step')


def compared(speeds: dict[str, list[float]], unit: str) -> dict[str, Any]:
    """Returns and prints the speeds of several programs, of which the first is ours."""
    ours = next(iter(speeds.values()))
    found = {}
    for name, measured in speeds.items():
        median, least, most = turns.ratio(ours, measured)
        speed = statistics.median(measured)
        found[name] = {
            unit.replace(' ', '_'): round(speed, 3),
            'ours_divided_by_it': round(median, 3),
            'from': round(least, 3),
            'to': round(most, 3),
        }
        print(
            f'  {name:26} {speed:8.3g} {unit}   ours / it {median:.2f} ({least:.2f} to {most:.2f})',
            flush=True,
        )
    return found


if __name__ == '__main__':
    main()
