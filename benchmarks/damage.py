"""Damages the checkpoints of a run at random and takes them up: never wrong weights, and never an
older checkpoint without a word.

    python benchmarks/damage.py [--damages 200] [--seed N] [--output=benchmarks/results/damage.json]

Each damage is done to a fresh copy of a run of the tiny model with four checkpoints, the last three
and the best. What is restored has to be, to the bit, what was in a checkpoint of that very step; it
has to be the newest that is whole; what was passed over has to be named, unless it or its manifest
is gone; and where none is whole, one line has to say so. Then the run has to be able to go on.
"""

import argparse
import collections
import contextlib
import filecmp
import hashlib
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.update(CUDA_VISIBLE_DEVICES='-1')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import tensorflow as tf  # noqa: E402

from benchmarks import torture  # noqa: E402
from common.errors import RunError  # noqa: E402
from outputs.checkpoints import Checkpoints  # noqa: E402

PAGE = 4096


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--damages', type=int, default=200)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output')
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = os.path.join(folder, 'alone')
        torture.finish(torture.start(run, 160, ['keep_checkpoints=3']), run)
        pristine = os.path.join(run, 'checkpoints')
        result = damage_all(pristine, variables_of(pristine), options.damages, options.seed)
    for outcome, count in sorted(result['outcomes'].items()):
        print(f'{outcome:60} {count:4}')
    if options.output:
        with open(options.output, 'w') as file:
            json.dump(
                {'seed': options.seed, **result, 'seconds': round(time.monotonic() - began)},
                file,
                indent=1,
            )
    if result['failures']:
        sys.exit(
            f'error: {len(result["failures"])} of {options.damages} damages went wrong, the '
            f'first: {result["failures"][0]}'
        )


def damage_all(pristine, variables, damages, seed):
    """{'outcomes': {'kind: outcome': how often}, 'failures': lines} of so many damages to copies of
    a folder of checkpoints.
    """
    truth = {
        step: digest(torture.tensors(folder))
        for step, folder in torture.checkpoints(os.path.dirname(pristine))[0].items()
    }
    outcomes, failures = collections.Counter(), []
    for number in range(damages):
        draw = random.Random(f'{seed} {number}')
        with tempfile.TemporaryDirectory() as workdir:
            copy = os.path.join(workdir, 'checkpoints')
            shutil.copytree(pristine, copy)
            kinds = [draw.choice(list(KINDS)) for _ in range(draw.choice((1, 1, 1, 2, 3, 8)))]
            done = [f'{kind} {KINDS[kind](draw, copy)}' for kind in kinds]
            for which in ('best', 'last'):
                try:
                    outcome = restore_and_judge(copy, which, variables, truth, pristine)
                except AssertionError as failure:
                    outcome = 'FAILURE'
                    failures.append(
                        f'{which} after {", ".join(done)} (seed {seed} {number}): {failure}'
                    )
                outcomes[f'{kinds[0] if len(kinds) == 1 else "several":12} {which}: {outcome}'] += 1
    return {
        'damages': damages,
        'steps': sorted(truth),
        'outcomes': dict(outcomes),
        'failures': failures,
    }


def digest(arrays):
    """sha256 of {name: array}."""
    sha256 = hashlib.sha256()
    for name in sorted(arrays):
        sha256.update(
            f'{name} {arrays[name].dtype} {arrays[name].shape}'.encode() + arrays[name].tobytes()
        )
    return sha256.hexdigest()


def any_step(draw, folder):
    """A step of the folder, twice as often as not the newest."""
    steps = sorted(int(name[5:]) for name in os.listdir(folder) if re.fullmatch(r'step-\d+', name))
    return draw.choice([*steps, *steps[-1:] * len(steps)]) if steps else None


def any_file(draw, folder):
    """A file of a checkpoint, or None if there is none left."""
    for _ in range(20):
        step = any_step(draw, folder)
        names = sorted(os.listdir(os.path.join(folder, f'step-{step}'))) if step is not None else ()
        if names:
            return os.path.join(folder, f'step-{step}', draw.choice(names))
    return None


def changed(change):
    """A damage that changes the bytes of one file by `change(draw, bytes)`."""

    def damage(draw, folder):
        path = any_file(draw, folder)
        if path is None:
            return ''
        with open(path, 'rb') as file:
            content = bytearray(file.read())
        with open(path, 'wb') as file:
            file.write(change(draw, content))
        return os.path.relpath(path, folder)

    return damage


def flip_bit(draw, content):
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return content


def overwrite(draw, content):
    first = draw.randrange(len(content) + 1)
    last = min(len(content), first + draw.randint(1, 64))
    return content[:first] + draw.randbytes(last - first) + content[last:]


def zero_page(draw, content):
    first = draw.randrange(len(content) // PAGE + 1) * PAGE
    return content[:first] + bytes(len(content[first : first + PAGE])) + content[first + PAGE :]


def other_digit(draw, content):
    """As a hand would: what was JSON stays JSON."""
    digits = [index for index, value in enumerate(content) if chr(value).isdigit()]
    if digits:
        content[draw.choice(digits)] = ord(draw.choice('123456789'))
    return content


def delete(draw, folder):
    path = any_file(draw, folder)
    if path is None:
        return ''
    os.remove(path)
    return os.path.relpath(path, folder)


def swap(draw, folder):
    """A file with that of the same name in another checkpoint."""
    path, other = any_file(draw, folder), any_step(draw, folder)
    twin = path and os.path.join(folder, f'step-{other}', os.path.basename(path))
    if not path or not os.path.exists(twin) or twin == path:
        return ''
    os.rename(path, path + '.away')
    os.rename(twin, path)
    os.rename(path + '.away', twin)
    return f'{os.path.relpath(path, folder)} with step-{other}'


def replace(draw, folder):
    """A file by that of the same name in another checkpoint."""
    path, other = any_file(draw, folder), any_step(draw, folder)
    twin = path and os.path.join(folder, f'step-{other}', os.path.basename(path))
    if not path or not os.path.exists(twin) or twin == path:
        return ''
    shutil.copy(twin, path)
    return f'{os.path.relpath(path, folder)} by step-{other}'


def swap_folders(draw, folder):
    one, other = any_step(draw, folder), any_step(draw, folder)
    if one == other:
        return ''
    first, second = (os.path.join(folder, f'step-{step}') for step in (one, other))
    os.rename(first, first + '.away')
    os.rename(second, first)
    os.rename(first + '.away', second)
    return f'step-{one} with step-{other}'


def rename_folder(draw, folder):
    """To a step that may be there or not: then it takes its place."""
    one, other = any_step(draw, folder), draw.choice((any_step(draw, folder), draw.randint(1, 400)))
    if one is None or one == other:
        return ''
    shutil.rmtree(os.path.join(folder, f'step-{other}'), ignore_errors=True)
    os.rename(os.path.join(folder, f'step-{one}'), os.path.join(folder, f'step-{other}'))
    return f'step-{one} to step-{other}'


def delete_folder(draw, folder):
    step = any_step(draw, folder)
    shutil.rmtree(os.path.join(folder, f'step-{step}'), ignore_errors=True)
    return f'step-{step}'


KINDS = {
    'truncate': changed(
        lambda draw, content: content[: draw.choice((0, draw.randrange(len(content) + 1)))]
    ),
    'flip': changed(flip_bit),
    'overwrite': changed(overwrite),
    'zero page': changed(zero_page),
    'digit': changed(other_digit),
    'append': changed(lambda draw, content: content + draw.randbytes(draw.randint(1, PAGE))),
    'delete': delete,
    'swap': swap,
    'replace': replace,
    'swap all': swap_folders,
    'rename all': rename_folder,
    'delete all': delete_folder,
}


def is_whole(pristine, copy, step):
    """Whether a checkpoint is as it was, byte for byte."""
    first, second = (os.path.join(folder, f'step-{step}') for folder in (pristine, copy))
    names = os.listdir(first)
    return (
        os.path.isdir(second)
        and sorted(os.listdir(second)) == sorted(names)
        and filecmp.cmpfiles(first, second, names, shallow=False)[0] == names
    )


def restore_and_judge(copy, which, variables, truth, pristine):
    """Restores from a damaged folder, and goes on; returns what happened, in words. Raises
    AssertionError if that must not happen.
    """
    whole = [step for step in truth if is_whole(pristine, copy, step)]
    best = {
        step: torture.read(pristine, f'step-{step}', 'manifest.json')['manifest']['best_step']
        for step in truth
    }
    there = [
        step
        for step in truth
        if os.path.exists(os.path.join(copy, f'step-{step}', 'manifest.json'))
    ]  # without it, it never was one
    said = io.StringIO()
    for variable in sum(variables.values(), []):
        variable.assign(variable + 1)  # nothing of before may pass
    checkpoints = Checkpoints(copy, variables, keep=3)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            step, progress = checkpoints.restore(which)
    except RunError as error:
        assert len(str(error).splitlines()) == 1, f'not one line: {error}'
        assert not whole or which == 'best' and best[max(whole)] not in whole, (
            f'gave up, though step-{max(whole)} is whole: {error}'
        )
        return 'reported'
    except Exception as error:
        raise AssertionError(f'{type(error).__name__}: {error}') from error
    assert step in truth, f'began at step {step}, which was never saved'
    assert digest_of(variables) == truth[step], f'WRONG WEIGHTS of step {step}'
    assert (
        progress == torture.read(pristine, f'step-{step}', 'manifest.json')['manifest']['progress']
    ), f'progress of another step than {step}'
    if which == 'best':
        assert step in [best[last] for last in truth if last >= max(whole, default=0)], (
            f'the best is not step {step}'
        )
        return 'the best'
    assert step >= max(whole, default=0), (
        f'went back to step {step}, though step-{max(whole)} is whole'
    )
    unsaid = [
        newer
        for newer in there
        if newer > step and not re.search(rf'step-{newer}\b', said.getvalue())
    ]
    go_on(checkpoints, copy, variables, step, best[step])
    assert not unsaid, f'step-{unsaid[0]} was passed over without a word: {said.getvalue()!r}'
    if step == max(truth):
        return 'the newest'
    return 'one before, and said so' if step < max(there) else 'one before, as the rest is gone'


def go_on(checkpoints, copy, variables, step, best_step):
    """What a run does next: it saves, for the first time what may be there already in a damaged
    form.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        for later in (step + 10, step + 20):
            for variable in sum(variables.values(), []):
                variable.assign(variable + 1)
            expected = digest_of(variables)
            try:
                checkpoints.save(later, {}, best_step)
                checkpoints.wait()
                found = Checkpoints(copy, variables, keep=3).restore()[0]
            except RunError as error:
                raise AssertionError(
                    f'restored step {step}, but could not go on at {later}: {error}'
                ) from error
            assert (found, digest_of(variables)) == (later, expected), (
                f'saved step {later} after {step}, and found {found}'
            )


def digest_of(variables):
    return digest(
        {
            f'{group}/{index:04}': variable.numpy()
            for group, members in variables.items()
            for index, variable in enumerate(members)
        }
    )


def variables_of(pristine):
    """{'model': [...], 'optimizer': [...], ...}: variables of the shapes that the checkpoints in a
    folder hold.
    """
    variables = collections.defaultdict(list)
    for name, array in torture.tensors(
        next(iter(torture.checkpoints(os.path.dirname(pristine))[0].values()))
    ).items():
        variables[name.split('/')[0]].append(tf.Variable(array))
    return dict(variables)


if __name__ == '__main__':
    main()
