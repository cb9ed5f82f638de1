"""Several runs side by side: python compare.py RUN [RUN ...] [--output=comparison.png]"""
import argparse
import math
import os
import sys
from typing import NamedTuple

from errors import RunError, UserError, one_line
from main import end_unread
from outputs import files
from outputs.files import read_json
from outputs.logbook import read_metrics
from outputs.progress import changes_evaluation
from settings import flatten

COLUMNS = {  # title: (file, key, format)
    'model': ('config', 'model/name', '{}'),
    'schedule': ('config', 'schedule/name', '{}'),
    'peak_lr': ('config', 'schedule/peak_lr', '{:g}'),
    'warmup': ('config', 'schedule/warmup', '{}'),
    'batch': ('config', 'batch_size', '{:,}'),
    'steps': ('metrics', 'step', '{:,}'),
    'accuracy': ('metrics', 'eval/accuracy', '{:.2%}'),
    'best': ('best', 'eval/accuracy', '{:.2%}'),
    'loss': ('metrics', 'eval/loss', '{:.4f}'),
    'examples/s': ('median', 'train/examples_per_second', '{:,.0f}'),
}


def main(arguments):
    """Prints the table and draws the curves; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run, finished or not')
    parser.add_argument('--output', default='comparison.png', help='where the curves are drawn')
    options = parser.parse_args(arguments)
    try:
        runs = {name: read_run(path) for name, path in zip(_short_names(options.runs), options.runs)}
        print('\n'.join([table(runs), *differences(runs)]), flush=True)
        from outputs.plots import plot_curves

        plot_curves(options.output, {name: run.rows for name, run in runs.items()})
        print(f'curves in {options.output}')
    except BrokenPipeError:
        return end_unread()
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return error.exit_status
    except (OSError, ValueError) as error:  # of drawing
        print(f'error: --output={options.output}: {one_line(error)}', file=sys.stderr)
        return 2
    return 0


class Run(NamedTuple):
    """What is read of a run.

    Attributes:
        config: nested dicts.
        rows: of metrics.jsonl.
        evaluation_from: the step of the last change of its config with which the numbers of an
            evaluation are others.
    """

    config: dict
    rows: list
    evaluation_from: int = 0

    def evaluated(self, key: str) -> list[float]:
        """Returns the values of a metric that today's evaluation gave."""
        rows = [row for row in self.rows if not self.evaluation_from or row['step'] > self.evaluation_from]
        return [row[key] for row in rows if key in row]


def read_run(path: str) -> Run:
    """Reads a run. Raises RunError if `path` is none."""
    if not files.exists(os.path.join(path, 'config.json')):
        raise RunError(f'{path} is no run: it has no config.json')
    environment = os.path.join(path, 'environment.json')
    known = read_json(environment) if files.exists(environment) else {}
    config = read_json(os.path.join(path, 'config.json'))
    return Run(config, read_metrics(path), known.get('evaluation_from', 0))


def table(runs: dict[str, Run]) -> str:
    """Returns a Markdown table, one run a line."""
    lines = [['run', *COLUMNS]]
    for name, run in runs.items():
        lines.append([name] + [_cell(run, *column) for column in COLUMNS.values()])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ['-' * width for width in widths])
    return '\n'.join('| ' + ' | '.join(cell.ljust(width) for cell, width in zip(line, widths)) + ' |' for line in lines)


def differences(runs: dict[str, Run]) -> list[str]:
    """Returns a line for each key with which the runs were evaluated on other pictures, or on other parts of them."""
    lines = []
    configs = [flatten(run.config) for run in runs.values()]
    for key in dict.fromkeys(key for config in configs for key in config):
        if key != 'eval_crop' and not (key.startswith('dataset.') and changes_evaluation(key)):
            continue
        if key == 'dataset.data_dir' and any(config.get('dataset.name') != 'folder' for config in configs):
            continue
        if key == 'dataset.train_split':
            continue
        values = [str(config.get(key)) for config in configs]
        if len(set(values)) > 1:
            lines.append(f'not evaluated alike: {key} is {", ".join(values)}')
    return lines


def _cell(run: Run, source: str, key: str, style: str) -> str:
    if source == 'config':
        value = flatten(run.config).get(key.replace('/', '.'))
        return '-' if value is None else style.format(value)
    values = run.evaluated(key) if key.startswith('eval/') else [row[key] for row in run.rows if key in row]
    numbers = [value for value in values if math.isfinite(value)]
    if source == 'metrics':
        values = values[-1:]
        if not values:
            return '-'
        return style.format(values[0]) if math.isfinite(values[0]) else 'not finite'
    if not numbers:
        return '-'
    return style.format(max(numbers) if source == 'best' else sorted(numbers)[len(numbers) // 2])


def _short_names(paths):
    names = [os.path.basename(os.path.normpath(path)) for path in paths]
    return names if len(set(names)) == len(names) else [os.path.normpath(path) for path in paths]


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
