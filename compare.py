"""Prints a table of several runs and draws their curves in one plot.

python compare.py RUN [RUN ...] [--output=comparison.png]
"""

import json
import math
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from common import console, storage
from common.commands import ArgumentParser
from common.console import discard_output
from common.errors import RunError, UserError, one_line
from common.storage import flatten, read_json
from configs import default
from outputs.metrics_logger import read_metrics
from outputs.train_progress import changes_evaluation

COLUMNS = {  # title: (source: config, last, best or median; key; format)
    'model': ('config', 'model.name', '{}'),
    'schedule': ('config', 'schedule.name', '{}'),
    'peak_lr': ('config', 'schedule.peak_lr', '{:g}'),
    'warmup': ('config', 'schedule.warmup', '{}'),
    'batch': ('config', 'batch_size', '{:,}'),
    'steps': ('last', 'step', '{:,}'),
    'accuracy': ('last', 'eval/accuracy', '{:.2%}'),
    'best': ('best', 'eval/accuracy', '{:.2%}'),
    'loss': ('last', 'eval/loss', '{:.4f}'),
    'examples/s': ('median', 'train/examples_per_second', '{:,.0f}'),
}


def main(arguments: Sequence[str] | None) -> int:
    """Prints the table and draws the curves; returns the exit status."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run, finished or not')
    parser.add_argument('--output', default='comparison.png', help='PNG file for the curves')
    options = parser.parse_args(arguments)
    try:
        runs = {
            name: read_run(path)
            for name, path in zip(_short_names(options.runs), options.runs, strict=True)
        }
        console.line('\n'.join([table(runs), *comparability_warnings(runs)]))
        from outputs.plots import plot_curves

        plot_curves(options.output, {name: run.rows for name, run in runs.items()})
        console.line(f'curves in {options.output}')
    except BrokenPipeError:
        return discard_output()
    except UserError as error:
        console.error(error.problem, error.fix)
        return error.exit_status
    except (OSError, ValueError) as error:  # raised while drawing
        console.error(f'--output={options.output}: {one_line(error)}')
        return 2
    return 0


class Run(NamedTuple):
    """The parts of a run that are compared.

    Attributes:
        config: {key: value}; keys that did not exist when the run was made have their defaults.
        rows: the rows of metrics.jsonl.
        evaluation_from: the first step whose evaluation is comparable with the last one; before it,
            the run was evaluated under another config.
        summary: the content of summary.json; {} if the run is not finished.
    """

    config: dict
    rows: list
    evaluation_from: int = 0
    summary: dict = {}

    def values(self, key: str) -> list[float]:
        """Returns all values of a metric; for evaluation metrics, only the comparable ones."""
        first = self.evaluation_from if key.startswith('eval/') else 0
        return [row[key] for row in self.rows if key in row and row['step'] >= first]


def read_run(path: str) -> Run:
    """Reads a run. Raises RunError if `path` is not a run."""
    config = os.path.join(path, 'config.json')
    if not storage.exists(config):
        raise RunError(f'{path} is not a run', 'it has no config.json')
    defaults = json.loads(default.get_config().to_json())
    evaluation_from = _read(path, 'environment.json').get('evaluation_from', 0)
    summary = _read(path, 'summary.json')
    return Run(
        flatten(defaults) | flatten(read_json(config)), read_metrics(path), evaluation_from, summary
    )


def _read(path: str, name: str) -> dict:
    """Returns the content of a JSON file of a run, or {} if it does not exist yet."""
    path = os.path.join(path, name)
    return read_json(path) if storage.exists(path) and storage.read(path).strip() else {}


def table(runs: dict[str, Run]) -> str:
    """Returns a Markdown table with one row per run."""
    lines = [['run', *COLUMNS]]
    for name, run in runs.items():
        lines.append([name] + [_cell(run, *column) for column in COLUMNS.values()])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ['-' * width for width in widths])
    rows = [map(str.ljust, line, widths) for line in lines]
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def comparability_warnings(runs: dict[str, Run]) -> list[str]:
    """Returns one line per reason why numbers in the table are not comparable."""
    keys = [key for key in next(iter(runs.values())).config if _selects_evaluation_data(key, runs)]
    differing = {
        key: values
        for key in keys
        if len(set(values := [run.config.get(key) for run in runs.values()])) > 1
    }
    numbers = [_last(run.values('eval/examples')) for run in runs.values()]
    if not differing and len(set(numbers) - {None}) > 1:
        differing = {'the number of evaluation examples': numbers}
    lines = []
    for key, values in differing.items():
        pairs = zip(runs, values, strict=True)
        each = ', '.join(f'{value!r} in {name}' for name, value in pairs)
        lines.append(f'not evaluated on the same terms: {key} is {each}')
    for name, run in runs.items():
        if any('eval/loss' in row and row['step'] < run.evaluation_from for row in run.rows):
            lines.append(
                f'{name} was evaluated under another config before step '
                f'{run.evaluation_from:,}: the curves include those values, the table does not'
            )
    return lines


def _last(values: Sequence[float]) -> float | None:
    return values[-1] if values else None


def _selects_evaluation_data(key: str, runs: dict[str, Run]) -> bool:
    """Returns whether this key selects the images to evaluate, or which part of each is used."""
    if key == 'eval_crop':
        return True
    if not key.startswith('dataset.') or not changes_evaluation(key):
        return False
    if key == 'dataset.train_split':
        return False
    # For other data sets, data_dir is only a location and nothing is held out.
    of_folders = all(run.config.get('dataset.name') == 'folder' for run in runs.values())
    return of_folders or key not in ('dataset.data_dir', 'dataset.eval_share', 'dataset.split_seed')


def _cell(run: Run, source: str, key: str, style: str) -> str:
    if source == 'config':
        value = run.config.get(key)
        return '-' if value is None else style.format(value)
    values = run.values(key)
    numbers = [value for value in values if math.isfinite(value)]
    if source == 'last':
        if not values:
            return '-'
        return style.format(values[-1]) if math.isfinite(values[-1]) else 'not finite'
    if source == 'best' and 'best/accuracy' in run.summary:  # the value that report.md gives
        best = run.summary['best/accuracy']
        return '-' if best is None else style.format(best)
    if not numbers:
        return '-'
    return style.format(max(numbers) if source == 'best' else sorted(numbers)[len(numbers) // 2])


def _short_names(paths: Sequence[str]) -> list[str]:
    names = [os.path.basename(os.path.normpath(path)) for path in paths]
    return names if len(set(names)) == len(names) else [os.path.normpath(path) for path in paths]


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
