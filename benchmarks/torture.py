"""Kills a run again and again, and compares what it leaves with what a run leaves that nobody
stopped: nothing may differ but times.

    python benchmarks/torture.py [--kills 25] [--seed N] [--steps 600]
    [--output=benchmarks/results/torture.json]
    [precision=float16 ...] [--strategies one_device pjrt]

Both are the tiny model on digits, with dropout, augmentation and averages, on the processor;
KEY=VALUE changes their config. The kill is SIGKILL, at random moments: while the run starts, takes
up what was left, trains, evaluates, writes a checkpoint, and ends.

With several strategies, each start takes the next one. TensorFlow and JAX round differently, so
then the steps and the files have to be the same, and the accuracy nearly so.
"""

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LOG, EVALUATE, SAVE = 7, 40, 10  # steps; 7, so that what was added up for the log is cut by kills
CHANGES = (
    'model.name=tiny',
    'image_size=16',
    'batch_size=32',
    'eval_batch_size=2',
    f'log_every={LOG} steps',
    f'eval_every={EVALUATE} steps',
    f'checkpoint_every={SAVE} steps',
    'steps_per_loop=5',
    'ema_decay=0.99',
    'model.dropout=0.2',
    'augment.translate=0.1',
    'augment.mixup=0.2',
    'augment.random_erasing=0.3',
)
AIMS = (
    'checkpoint',
    'evaluation',
    'training',
    'start',
    'checkpoint',
    'resume',
    'evaluation',
    'training',
)
TIMES = re.compile(
    'seconds|per_second|wait_fraction|wall_time|resumed_from'
)  # what differs between any two runs
ACCURACY = 0.03  # by which runs that round differently may differ
# So long after the last row before an evaluation, the few steps up to it are done.
EVALUATION_SECONDS = 0.1


class Difference(Exception):
    """The run that was killed is not the run that was not; or it did not go on."""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--kills', type=int, default=25)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--steps', type=int, default=600)
    parser.add_argument('--strategies', nargs='+', default=['auto'])
    parser.add_argument('--output')
    parser.add_argument('changes', nargs='*', metavar='KEY=VALUE')
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = torture(
                folder,
                options.kills,
                options.seed,
                options.steps,
                options.changes,
                options.strategies,
            )
        except Difference as difference:
            sys.exit(f'error: {difference}')
    print(
        f'{len(result["kills"])} kills: {result["fell"]}; weights '
        f'{result["weights_sha256"][:16]}, {result["outcome"]}'
    )
    if options.output:
        with open(options.output, 'w') as file:
            json.dump(result, file, indent=1)


def torture(folder, kills, seed, steps, changes=(), strategies=('auto',)):
    """What was seen of a run in `folder` that was killed so many times. Raises Difference if it is
    not the run without kills.
    """
    began, draw = time.monotonic(), random.Random(seed)
    starts = itertools.cycle([(*changes, f'strategy={strategy}') for strategy in strategies])
    left_alone = start(
        os.path.join(folder, 'alone'), steps, (*changes, f'strategy={strategies[0]}')
    )  # meanwhile: what other processes do must not matter
    workdir = os.path.join(folder, 'killed')
    try:
        ends = kills // 12
        aims = [AIMS[index % len(AIMS)] for index in range(kills - ends)]
        draw.shuffle(aims)
        seen = []
        for index, aim in enumerate([*aims, *['end'] * ends]):
            reach = draw.uniform(0, 2 * (steps - newest(workdir)) / (kills - index))
            after = min(
                newest(workdir) + reach, steps - EVALUATE - 1
            )  # the step after which it is to fall
            seen.append(
                kill(start(workdir, steps, next(starts)), workdir, aim, after, draw, steps, seen)
            )
            print(
                '{0:3} aimed at {aim:10} fell into {fell:10} after {seconds:5.1f} s, checkpoint '
                '{checkpoint}, row {row}'.format(index + 1, **seen[-1]),
                flush=True,
            )
        finish(start(workdir, steps, next(starts)), workdir)
        finish(left_alone, os.path.join(folder, 'alone'))
    finally:
        stop(left_alone)
    is_exact = len(strategies) == 1
    differences = (compare if is_exact else compare_roughly)(os.path.join(folder, 'alone'), workdir)
    if differences:
        raise Difference(
            f'{len(differences)} differences after {kills} kills (seed {seed}): '
            + '; '.join(differences[:5])
        )
    summary = read(workdir, 'summary.json')
    return {
        'kills': seen,
        'fell': dict(collections.Counter(one['fell'] for one in seen)),
        'seed': seed,
        'steps': steps,
        'changes': list(changes),
        'strategies': list(strategies),
        'outcome': 'all the same as without'
        if is_exact
        else f'{summary["eval/accuracy"]:.2%} right after {summary["steps"]} steps',
        'resumed_from': summary['resumed_from'],
        'weights_sha256': summary['weights_sha256'],
        'checkpoints': sorted(checkpoints(workdir)[0]),
        'rows': len(rows(workdir)),
        'cpu_cores': os.cpu_count(),
        'seconds': round(time.monotonic() - began),
    }


def start(workdir, steps, changes=()):
    """The run as a process, which leads a group of its own."""
    os.makedirs(os.path.dirname(workdir), exist_ok=True)
    command = [
        sys.executable,
        os.path.join(ROOT, 'main.py'),
        '--config=configs/digits.py',
        f'--workdir={workdir}',
        *(f'--config.{change}' for change in (*CHANGES, f'train_for={steps} steps', *changes)),
    ]
    environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': '-1', 'TF_CPP_MIN_LOG_LEVEL': '2'}
    with open(f'{workdir}.txt', 'a') as said:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def stop(process):
    """SIGKILL to the process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(process, workdir, seconds=900):
    """Waits until the run is over. Raises Difference with its last line if it failed."""
    try:
        if process.wait(seconds):
            with open(f'{workdir}.txt') as file:
                raise Difference(
                    f'{os.path.basename(workdir)} ended with status {process.returncode}: '
                    f'{(file.read().splitlines() or [""])[-1]}'
                )
    finally:
        stop(process)


def kill(process, workdir, aim, after, draw, steps, seen, seconds=300):
    """Kills the run when it does what is aimed at, after step `after` where that has a meaning, and
    a random moment later.

    Returns: {'aim', 'fell', 'seconds', 'checkpoint', 'row'}: what it was killed at, when, and the
    newest step in its files.
    """
    began, wall = time.monotonic(), time.time()
    try:
        startups = [one['seconds'] for one in seen if one['fell'] != 'start'] or [10]
        moment = {
            'start': min(startups),
            'resume': 0.1,
            'checkpoint': 0.03,
            'evaluation': 0.5,
            'training': 0.2,
            'end': 3,
        }[aim] * draw.random()
        before = trace(workdir)
        while (
            aim != 'start'
            and not reached(workdir, aim, after, wall, before, steps)
            and process.poll() is None
        ):
            if time.monotonic() - began > seconds:
                raise Difference(
                    f'after {seconds} s the run had not come to {aim} after step {after:.0f}'
                )
            time.sleep(0.0005)
        time.sleep(moment)
        if process.poll() is not None:
            finish(process, workdir)
            raise Difference(f'the run was over after {len(seen)} kills: give it more --steps')
    finally:
        stop(process)
    return {
        'aim': aim,
        'fell': where(workdir, wall, steps),
        'seconds': round(time.monotonic() - began, 2),
        'checkpoint': newest(workdir),
        'row': last_row(workdir).get('step', 0),
    }


def reached(workdir, aim, after, wall, before, steps):
    """Whether the run, started at the time `wall`, does now what is aimed at."""
    row = last_row(workdir)
    if aim in ('resume', 'end'):
        return trace(workdir) != before and (
            aim == 'resume' or row.get('step') == steps and 'eval/loss' in row
        )
    if aim == 'checkpoint':
        return any(step > after for step in fresh(workdir, wall))
    if row.get('wall_time', 0) < wall or row['step'] < after:
        return False
    return aim == 'training' or before_evaluation(row)


def where(workdir, wall, steps):
    """What a run that was started at the time `wall` did when it was killed, by its files."""
    unfinished, row = fresh(workdir, wall), last_row(workdir)
    if unfinished:
        return 'checkpoint' if max(unfinished) >= newest(workdir) else 'removal'
    if row.get('wall_time', 0) < wall:
        return 'end' if row.get('step') == steps and 'eval/loss' in row else 'start'
    if before_evaluation(row) and time.time() - row['wall_time'] > EVALUATION_SECONDS:
        return 'evaluation'
    return 'end' if row['step'] == steps and 'eval/loss' in row else 'training'


def before_evaluation(row):
    """Whether the next row after this one is that of an evaluation."""
    return 'eval/loss' not in row and -row['step'] % EVALUATE < LOG


def checkpoints(workdir):
    """({step: folder} of those with a manifest, the same of those without)."""
    folder = os.path.join(workdir, 'checkpoints')
    found = {True: {}, False: {}}
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        number = re.search(r'\d+', name)
        if number:
            path = os.path.join(folder, name)
            found[os.path.exists(os.path.join(path, 'manifest.json'))][int(number[0])] = path
    return found[True], found[False]


def newest(workdir):
    return max(checkpoints(workdir)[0], default=0)


def fresh(workdir, wall):
    """Steps of the unfinished checkpoints that were touched after the time `wall`."""
    try:
        return [
            step for step, path in checkpoints(workdir)[1].items() if os.stat(path).st_mtime >= wall
        ]
    except FileNotFoundError:  # gone while we looked
        return []


def trace(workdir):
    """Something that changes when the run begins to write."""
    paths = [os.path.join(workdir, name) for name in ('', 'checkpoints', 'metrics.jsonl')]
    return [(path, os.stat(path).st_mtime_ns) for path in paths if os.path.exists(path)]


def last_row(workdir):
    """The last whole row of metrics.jsonl, or {}."""
    try:
        with open(os.path.join(workdir, 'metrics.jsonl'), 'rb') as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            lines = file.read().split(b'\n')[:-1]
    except FileNotFoundError:
        return {}
    return json.loads(lines[-1]) if lines else {}


def rows(workdir):
    with open(os.path.join(workdir, 'metrics.jsonl')) as file:
        return [json.loads(line) for line in file]


def read(*path):
    with open(os.path.join(*path)) as file:
        return json.load(file)


def without_times(value):
    """The same without the numbers that differ between any two runs."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if not TIMES.search(key)}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def tensors(folder):
    """{name: array} of a checkpoint."""
    import tensorflow as tf

    reader = tf.train.load_checkpoint(os.path.join(folder, 'variables'))
    return {name: reader.get_tensor(name) for name in sorted(reader.get_variable_to_shape_map())}


def bits(array):
    return (array.dtype.str, array.shape, array.tobytes()) if hasattr(array, 'tobytes') else array


def compare_roughly(alone, killed):
    """What differs between the folders of two runs that round differently, a list of lines."""
    first, second = (read(folder, 'summary.json') for folder in (alone, killed))
    differences = [
        f'summary.json: {key} is {second[key]}, without kills {first[key]}'
        for key in ('steps', 'examples_seen', 'skipped_updates', 'eval/examples')
        if first[key] != second[key]
    ]
    if abs(first['eval/accuracy'] - second['eval/accuracy']) > ACCURACY:
        differences.append(
            f'accuracy {second["eval/accuracy"]}, without kills {first["eval/accuracy"]}'
        )
    steps, expected = ([row['step'] for row in rows(folder)] for folder in (killed, alone))
    if steps != expected:
        differences.append(f'metrics.jsonl has the steps {steps}, without kills {expected}')
    if set(os.listdir(alone)) != set(os.listdir(killed)):
        differences.append(f'files {os.listdir(killed)}, without kills {os.listdir(alone)}')
    return differences


def compare(alone, killed):
    """What differs between the folders of two runs, a list of lines: digest, summary, rows,
    checkpoints to the bit.
    """

    def differing(what, first, second):
        first, second = (
            {key: json.dumps(value) for key, value in without_times(one).items()}
            for one in (first, second)
        )
        return [
            f'{what}: {key} is {second.get(key)}, without kills {first.get(key)}'
            for key in sorted({*first, *second})
            if first.get(key) != second.get(key)
        ]

    differences = differing(
        'summary.json', read(alone, 'summary.json'), read(killed, 'summary.json')
    )
    steps = [row['step'] for row in rows(killed)]
    differences += [
        f'metrics.jsonl: step {step} is there twice, or too late'
        for step, following in itertools.pairwise(steps)
        if following <= step
    ]
    by_step = ({str(row['step']): row for row in rows(workdir)} for workdir in (alone, killed))
    differences += differing('metrics.jsonl', *by_step)
    differences += [
        f'{name} is in one of the two folders only'
        for name in sorted(set(os.listdir(alone)) ^ set(os.listdir(killed)))
    ]
    (first, _), (second, unfinished) = checkpoints(alone), checkpoints(killed)
    differences += [f'{path} was left unfinished' for path in unfinished.values()]
    if set(first) != set(second):
        differences.append(
            f'checkpoints of the steps {sorted(second)}, without kills {sorted(first)}'
        )
    for step in sorted(set(first) & set(second)):
        manifests = [
            read(folder, 'manifest.json')['manifest'] for folder in (first[step], second[step])
        ]
        differences += differing(
            f'manifest of step {step}',
            *(
                {key: value for key, value in manifest.items() if key != 'files'}
                for manifest in manifests
            ),
        )
        expected, found = tensors(first[step]), tensors(second[step])
        names = [
            name
            for name in sorted({*expected, *found})
            if name not in expected
            or name not in found
            or bits(expected[name]) != bits(found[name])
        ]
        differences += [
            f'{name} in the checkpoint of step {step}' for name in names if not TIMES.search(name)
        ]
    return differences


if __name__ == '__main__':
    main()
