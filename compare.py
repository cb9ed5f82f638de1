"""Several runs side by side: python compare.py RUN [RUN ...] [--output=comparison.png]"""
import argparse
import math
import os
import sys

from errors import RunError, UserError, one_line
from main import end_unread
from outputs import files
from outputs.files import read_json
from outputs.logbook import read_metrics

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
        print(table(runs), flush=True)
        from outputs.plots import plot_curves

        plot_curves(options.output, {name: rows for name, (_, rows) in runs.items()})
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


def read_run(path):
    """(config, rows of metrics.jsonl) of a run. Raises RunError if `path` is none."""
    if not files.exists(os.path.join(path, 'config.json')):
        raise RunError(f'{path} is no run: it has no config.json')
    return read_json(os.path.join(path, 'config.json')), read_metrics(path)


def table(runs):
    """A Markdown table of {name: (config, rows)}, one run a line."""
    lines = [['run', *COLUMNS]]
    for name, (config, rows) in runs.items():
        lines.append([name] + [_cell(config, rows, *column) for column in COLUMNS.values()])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ['-' * width for width in widths])
    return '\n'.join('| ' + ' | '.join(cell.ljust(width) for cell, width in zip(line, widths)) + ' |' for line in lines)


def _cell(config, rows, source, key, style):
    if source == 'config':
        for part in key.split('/'):
            config = config.get(part)
            if config is None:
                return '-'
        return style.format(config)
    values = [row[key] for row in rows if key in row]
    numbers = [value for value in values if math.isfinite(value)]
    if source == 'metrics':
        return style.format(values[-1]) if values else '-'
    if not numbers:
        return '-'
    return style.format(max(numbers) if source == 'best' else sorted(numbers)[len(numbers) // 2])


def _short_names(paths):
    names = [os.path.basename(os.path.normpath(path)) for path in paths]
    return names if len(set(names)) == len(names) else [os.path.normpath(path) for path in paths]


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
