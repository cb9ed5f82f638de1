"""The notebook from top to bottom, as it is shipped: seconds in all and of each cell, and the
accuracy that it reaches.

    python benchmarks/notebook.py [--output=benchmarks/results/notebook.json]

Its data and run are made in a temporary folder. What the notebook installs has to be there, as
after `make test`.
"""

import argparse
import datetime
import json
import os
import re
import tempfile
import time

import nbclient
import nbformat

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDER = os.path.join(ROOT, 'colab')
NOTEBOOK = os.path.join(FOLDER, 'train_tpu.ipynb')


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--output')
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        executed = execute({'STORAGE': folder})
        seconds = round(time.monotonic() - began, 1)
    train = text_of(executed, 'train')
    result = {
        'seconds': seconds,
        'cells': {cell.id: seconds_of(cell) for cell in executed.cells if cell.cell_type == 'code'},
        'accuracy': float(re.search(r'([\d.]+)% of [\d,]+ evaluation examples', train)[1]) / 100,
        'cpu_cores': os.cpu_count(),
        'load_before': round(
            load, 2
        ),  # of other processes: with more than a few tenths the seconds say little
    }
    print(json.dumps(result, indent=1))
    if options.output:
        with open(options.output, 'w') as file:
            json.dump(result, file, indent=1)


def execute(settings, environment=None, path=FOLDER):
    """The notebook with these settings in place of its own, executed in a kernel of its own from a
    folder `path`.

    Raises: nbclient.exceptions.CellExecutionError for a cell that fails; those below it were not
    run.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cell = next(cell for cell in notebook.cells if 'parameters' in cell.metadata.get('tags', ()))
    cell.source = '\n'.join(
        [cell.source, *(f'{name} = {value!r}' for name, value in settings.items())]
    )
    client = nbclient.NotebookClient(
        notebook, timeout=None, kernel_name='python3', resources={'metadata': {'path': path}}
    )
    client.execute(**({'env': {**os.environ, **environment}} if environment else {}))
    return notebook


def text_of(notebook, cell_id):
    """What a cell printed."""
    cell = next(cell for cell in notebook.cells if cell.id == cell_id)
    return ''.join(output.text for output in cell.outputs if output.output_type == 'stream')


def seconds_of(cell):
    times = [
        datetime.datetime.fromisoformat(cell.metadata.execution[name].replace('Z', '+00:00'))
        for name in ('iopub.execute_input', 'shell.execute_reply')
    ]
    return round((times[1] - times[0]).total_seconds(), 1)


if __name__ == '__main__':
    main()
