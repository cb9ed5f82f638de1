"""Writes report.md: what was run, on what hardware, its accuracy, its speed and the bottleneck."""

import os
from collections.abc import Sequence

from common import console, storage
from common.errors import counted
from common.storage import read_json

# Above this fraction of time spent waiting for batches, the input pipeline is the bottleneck.
INPUT_BOUND = 0.2
EXPORTED_AGAIN = '*Exported again since this report was written'


def headline(summary: dict) -> str:
    """Returns one line on the accuracy of the exported weights."""
    accuracy, examples = summary['export/eval_accuracy'], summary['eval/examples']
    right = f'{accuracy:.2%} of {examples:,} evaluation examples are classified correctly'
    if summary['export/step'] == summary['steps']:
        return right
    last = f'{summary["eval/accuracy"]:.2%} after the last update ({summary["steps"]:,})'
    return f'{right} with the exported weights (update {summary["export/step"]:,}); {last}'


def write_report(
    workdir: str,
    summary: dict,
    description: Sequence[tuple[str, str]],
    data_notes: Sequence[str] = (),
    changes: Sequence[str] = (),
) -> None:
    """Writes report.md into `workdir`.

    Args:
        workdir: the folder of the run, with config.json, environment.json and plots/.
        summary: the content of summary.json.
        description: (name, text) rows about strategy, precision and plan.
        data_notes: lines on what may be unexpected about the data, such as skipped broken files.
        changes: lines on what changed during the run, such as its config, and on why it ended
            early.
    """
    config = read_json(os.path.join(workdir, 'config.json'))
    environment = read_json(os.path.join(workdir, 'environment.json'))
    waiting = summary['input_wait_fraction']
    limit = f'the model: only {waiting:.1%} of the time was spent waiting for batches'
    if waiting > INPUT_BOUND:
        limit = f'the input: {waiting:.0%} of the time went into waiting for batches'
    packages = ', '.join(f'{name} {version}' for name, version in environment['packages'].items())
    commit = environment['git_commit'] or 'unknown'
    changed_files = environment['git_changed_files']
    changed = f' with {counted(len(changed_files), "changed file")}' if changed_files else ''
    sections = _section('Changes during the run', changes)
    sections += _section('What to know about the data', data_notes)
    resumed = ', '.join(f'{step:,}' for step in summary['resumed_from']) or 'never'
    name = config['best_metric'].removeprefix('eval/')
    text = f"""# {config['model']['name']} on {config['dataset']['name']}

{_first_lines(summary, config)}

| | |
| --- | --- |
| loss on the evaluation split | {summary['export/eval_loss']:.4f} |
| best {name} during the run | {_best(summary, name)} |
| accuracy of the exported model, loaded with TensorFlow alone | {_accuracy_of_export(summary)} |
| largest difference of its logits from the model's | {summary['export/max_difference']:.2g} |
| examples seen | {summary['examples_seen']:,} |
| updates skipped, because their loss or gradient was not finite | {summary['skipped_updates']:,} |
| time in the training loop | {summary['train_seconds']:,.0f} s |
| speed | {summary['examples_per_second']:,.0f} examples/s (median) |
| bottleneck | {limit} |
| resumed at step | {resumed} |
| SHA-256 of the weights after the last update | `{summary['weights_sha256']}` |

![curves](plots/curves.png)

![learning rate](plots/learning_rate.png)

## What was run

```
{console.format_rows(description)}
```

config.json lists every config value.

{sections}## Hardware and software

- {environment['platform']}, {environment['cpu_cores']} CPU cores
- {', '.join(environment['devices'])}
- Python {environment['python']}; {packages}
- commit {commit}{changed}
"""
    storage.write(os.path.join(workdir, 'report.md'), text)


def note_export(workdir: str, weights: str) -> None:
    """Adds a note to the top of report.md on which weights a later export used."""
    path = os.path.join(workdir, 'report.md')
    if not storage.exists(path):
        return
    title, *lines = storage.read(path).decode().split('\n')
    before = '\n'.join(line for line in lines if not line.startswith(EXPORTED_AGAIN)).lstrip('\n')
    note = f'{EXPORTED_AGAIN}: {weights}. summary.json has the numbers of this export.*'
    storage.write(path, f'{title}\n\n{note}\n\n{before}')


def _first_lines(summary: dict, config: dict) -> str:
    """Returns the introduction: accuracy and step of the exported weights, and others to export."""
    step, last = summary['export/step'], summary['steps']
    accuracy, top5 = summary['export/eval_accuracy'], summary['export/eval_top5']
    weights = 'averaged weights' if config['ema_decay'] else 'weights'
    with_weights = f'(top-5: {top5:.2%}), with the {weights} after'
    lines = [
        f'**{accuracy:.2%}** of {summary["eval/examples"]:,} evaluation examples are '
        'classified correctly',
        f'{with_weights} the last of {last:,} updates.',
    ]
    if step != last:
        lines[1:] = [
            f'{with_weights} update {step:,} of {last:,}:',
            f'the best by {config["best_metric"]}, exported because `patience` is set.',
            f'After the last update it is {summary["eval/accuracy"]:.2%};',
            '`--mode=export --checkpoint=last` exports those weights.',
        ]
    return '\n'.join(lines)


def _best(summary: dict, name: str) -> str:
    step = summary['best/step']
    if step is None:
        return 'none'
    value = summary[f'best/{name}']
    best = f'{value:.4f}' if name == 'loss' else f'{value:.2%}'
    best += f' after update {step:,}'
    if step in (summary['export/step'], summary['steps']):
        return best
    return f'{best}; `--mode=export --checkpoint=best` exports it'


def _accuracy_of_export(summary: dict) -> str:
    """Returns the accuracy of the exported and the trained model on the same examples, as text."""
    examples = summary['export/examples']
    which = 'examples evenly spaced through the split'
    if examples == summary['eval/examples']:
        which = 'evaluation examples (all of them)'
    text = f'{summary["export/accuracy"]:.2%} of {examples:,} {which}'
    itself = summary.get('export/model_accuracy')
    if itself is None:
        return text
    return f'{text} (the trained model on the same examples: {itself:.2%})'


def _section(title: str, lines: Sequence[str]) -> str:
    return '\n'.join((f'## {title}', '', '```', *lines, '```', '', '')) if lines else ''
