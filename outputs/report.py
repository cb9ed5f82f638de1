"""report.md: what was run, on what, how well, how fast, and what limited it."""
import os

from outputs import files
from outputs.files import read_json

INPUT_BOUND = 0.2  # from this share of the time spent waiting for batches on, the input is what limits


def write_report(workdir, summary, description, notes=()):
    """Writes report.md into `workdir`.

    Args:
        workdir: the folder of the run, with config.json, environment.json and plots/.
        summary: the content of summary.json.
        description: lines of text about strategy, precision and plan.
        notes: lines of text about the data that the user may not expect, such as broken files that were skipped.
    """
    config, environment = (read_json(os.path.join(workdir, name)) for name in ('config.json', 'environment.json'))
    waiting = summary['input_wait_fraction']
    limit = (f'the input: {waiting:.0%} of the time went into waiting for batches' if waiting > INPUT_BOUND
             else f'the model: only {waiting:.1%} of the time went into waiting for batches')
    packages = ', '.join(f'{name} {version}' for name, version in environment['packages'].items())
    commit = environment['git_commit'] or 'unknown'
    changed = f' with {len(environment["git_changed_files"])} changed files' if environment['git_changed_files'] else ''
    about_data = '\n'.join(('## What to know about the data', '', '```', *notes, '```', '', '')) if notes else ''
    resumed = ', '.join(f'{step:,}' for step in summary['resumed_from']) or 'never'
    name = config['best_metric'].removeprefix('eval/')
    best = 'none' if summary['best/step'] is None else f'{summary[f"best/{name}"]:.4g} after update {summary["best/step"]:,}'
    text = f"""# {config['model']['name']} on {config['dataset']['name']}

**{summary['eval/accuracy']:.2%}** of {summary['eval/examples']:,} evaluation examples are right
({summary['eval/top5']:.2%} among the first five), with the {'averaged ' if config['ema_decay'] else ''}weights after the last of {summary['steps']:,} updates.

| | |
| --- | --- |
| loss on the evaluation split | {summary['eval/loss']:.4f} |
| best {name} on the way | {best} |
| accuracy of the exported model, loaded with TensorFlow alone | {summary['export/accuracy']:.2%} of {summary['export/examples']:,} examples |
| largest difference of its logits from the model's | {summary['export/max_difference']:.2g} |
| examples seen | {summary['examples_seen']:,} |
| updates skipped, because their loss or gradient was not finite | {summary['skipped_updates']:,} |
| time in the training loop | {summary['train_seconds']:,.0f} s |
| speed | {summary['examples_per_second']:,.0f} examples/s (median) |
| what limited it | {limit} |
| resumed at step | {resumed} |
| SHA-256 of the weights | `{summary['weights_sha256']}` |

![curves](plots/curves.png)

![learning rate](plots/learning_rate.png)

## What was run

```
{description}
```

config.json has every value of the config.

{about_data}## On what

- {environment['platform']}, {environment['cpu_cores']} CPU cores
- {', '.join(environment['devices'])}
- Python {environment['python']}; {packages}
- commit {commit}{changed}
"""
    files.write(os.path.join(workdir, 'report.md'), text)
