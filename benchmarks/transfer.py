"""What fine-tuning and a teacher are worth, on scikit-learn's digits: runs from the command line,
each from nothing.

    python benchmarks/transfer.py [--seeds 0 1 2] [--output=benchmarks/results/transfer.json]

Fine-tuning: EfficientNetV2B0 learns the digits 0 to 4, and then 5 to 9 from ten pictures of each:
from random weights, from its weights, from its weights with a lower rate for earlier blocks, and
with nothing but the head trained.
Distillation: EfficientNetV2B0 learns all 1,437 digits; another one learns 72 of them, with mixtures
of two, alone and taught by the first on the very same pictures.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHOTS = 10  # pictures of each new digit
STUDENT = (
    'dataset.train_split=train[:5%]',
    'batch_size=48',
    'train_for=400 steps',
    'augment.mixup=1.0',
    'ema_decay=0.0',
    'log_every=10%',
    'eval_every=100%',
)
FEW = (
    'dataset.train_split=few',
    'batch_size=50',
    'train_for=60 steps',
    'ema_decay=0.0',
    'log_every=10 steps',
    'eval_every=100%',
)


def write_folders(folder):
    """folder/old: digits 0 to 4; folder/new: 5 to 9, with few/ and test/. A fifth of each is held
    out.
    """
    digits = load_digits()
    seen = dict.fromkeys(range(10), 0)
    for image, label in zip(digits.images, digits.target, strict=True):
        seen[label] += 1
        old, held_out = label < 5, seen[label] % 5 == 0
        if not old and not held_out and seen[label] * 4 // 5 >= SHOTS + 1:
            continue
        path = os.path.join(
            folder,
            'old' if old else 'new',
            'test' if held_out else 'train' if old else 'few',
            str(label),
        )
        os.makedirs(path, exist_ok=True)
        Image.fromarray((image / 16 * 255).astype(np.uint8)).save(
            os.path.join(path, f'{seen[label]}.png')
        )


def accuracy(folder, name, *changes):
    """Accuracy of a run of configs/digits.py with these changes, on its evaluation split."""
    workdir = os.path.join(folder, name)
    command = [
        sys.executable,
        os.path.join(ROOT, 'main.py'),
        '--config=configs/digits.py',
        f'--workdir={workdir}',
        *(f'--config.{change}' for change in changes),
    ]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    with open(os.path.join(workdir, 'summary.json')) as file:
        summary = json.load(file)
    print(f'{name}: {summary["eval/accuracy"]:.2%} of {summary["eval/examples"]}', flush=True)
    return summary['eval/accuracy']


def of_one_seed(folder, seed):
    """{way: accuracy} with this seed."""

    def run(name, *changes):
        return accuracy(folder, f'{seed} {name}', f'seed={seed}', *changes)

    def pictures(part):
        return (
            'dataset.name=folder',
            f'dataset.data_dir={folder}/pictures/{part}',
            'dataset.eval_split=test',
        )

    write_folders(os.path.join(folder, 'pictures'))
    begun = f'model.weights={folder}/{seed} old digits'
    return {
        'old digits': run('old digits', *pictures('old'), 'dataset.train_split=train'),
        'new digits, from random weights': run('from random weights', *pictures('new'), *FEW),
        'new digits, fine-tuned': run('fine-tuned', *pictures('new'), *FEW, begun),
        'new digits, fine-tuned, layer_decay 0.9': run(
            'fine-tuned by layer', *pictures('new'), *FEW, begun, 'model.layer_decay=0.9'
        ),
        'new digits, the head alone': run(
            'head alone',
            *pictures('new'),
            *FEW,
            begun,
            'model.freeze=backbone',
            'schedule.peak_lr=3e-2',
        ),
        'teacher, all digits': run('teacher', 'eval_every=100%'),
        'student, 72 digits, alone': run('alone', *STUDENT),
        'student, 72 digits, taught': run(
            'taught', *STUDENT, f'distill.teacher={folder}/{seed} teacher', 'distill.alpha=1.0'
        ),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--output')
    options = parser.parse_args()
    runs = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            runs.append(of_one_seed(folder, seed))
        medians = {way: statistics.median(run[way] for run in runs) for way in runs[0]}
        if options.output:  # after each seed: they take a while
            with open(options.output, 'w') as file:
                json.dump(
                    {'seeds': options.seeds[: len(runs)], 'median_accuracy': medians, 'runs': runs},
                    file,
                    indent=1,
                )
    for way, median in medians.items():
        print(f'{way:45} {median:.2%}')


if __name__ == '__main__':
    main()
