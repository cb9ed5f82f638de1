"""What a run writes down while it goes on: metrics.jsonl, TensorBoard and the progress bar."""
import json
import os
import sys
import time

from tqdm import tqdm

from outputs import files

NAME = 'metrics.jsonl'


class Logbook:
    """Metrics of a run, one object a line, each step once.

    Args:
        workdir: the folder of the run.
        first_step: what comes after it in the files of an earlier, interrupted start is dropped: it will be redone.
        total_steps: length of the progress bar.
    """

    def __init__(self, workdir, first_step, total_steps):
        import tensorflow as tf  # here, because reading a logbook needs none

        self.path = os.path.join(workdir, NAME)
        rows, damaged = _read(self.path)
        lost = [number for number in damaged if number <= len(rows)]  # not the last line: that is what a crash leaves
        if lost:
            print(f'damaged   {self.path}: line {", ".join(map(str, lost))} cannot be read and is left out', flush=True)
        self._rows = [row for row in rows if row['step'] <= first_step]
        files.write(self.path, _as_text(self._rows))
        self._summary = tf.summary
        self._board = tf.summary.create_file_writer(os.path.join(workdir, 'tensorboard'))
        self._bar = tqdm(total=total_steps, initial=first_step, unit='step', dynamic_ncols=True, smoothing=0.1,
                         disable=None if sys.stderr.isatty() else True)
        self._bar_text = {}

    def write(self, step, metrics):
        """Adds numbers measured after `step` updates to the row of that step."""
        if self._rows and self._rows[-1]['step'] == step:
            self._rows[-1].update(metrics)
            files.write(self.path, _as_text(self._rows))
        else:
            self._rows.append({'step': step, 'wall_time': time.time(), **metrics})
            files.append(self.path, _as_text(self._rows[-1:]))
        with self._board.as_default(step):
            for name, value in metrics.items():
                self._summary.scalar(name, value)
        self._board.flush()
        self._show(step, metrics)

    def advance(self, step):
        """Moves the progress bar to `step`."""
        self._bar.update(step - self._bar.n)

    def say(self, text):
        """Prints a line, above the progress bar."""
        self._bar.write(text)

    def close(self):
        self._bar.close()
        self._board.close()

    def _show(self, step, metrics):
        names = {'train/loss': 'loss', 'train/skipped_updates': 'skipped', 'train/learning_rate': 'lr', 'train/examples_per_second': 'img/s', 'eval/accuracy': 'accuracy'}
        shown = {names[name]: f'{value:.4g}' for name, value in metrics.items() if name in names and (value or name != 'train/skipped_updates')}
        self._bar_text.update(shown)
        self._bar.set_postfix(self._bar_text, refresh=not self._bar.disable)
        if self._bar.disable:  # no terminal: a line for each evaluation and each tenth of the run is enough
            tenth = max(1, self._bar.total // 10)
            if 'eval/accuracy' in metrics or step // tenth > getattr(self, '_shown', 0):
                self._shown = step // tenth
                print(f'step {step:,}/{self._bar.total:,}  ' + '  '.join(f'{name} {value}' for name, value in shown.items()), flush=True)


def read_metrics(workdir):
    """The rows of metrics.jsonl that can be read: a crash may have cut the last one short."""
    return _read(os.path.join(workdir, NAME))[0]


def _read(path):
    """(rows, numbers of the lines that are none)."""
    rows, damaged = [], []
    for number, line in enumerate(files.read(path).decode(errors='replace').splitlines() if files.exists(path) else (), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get('step'), int):
            rows.append(row)
        else:
            damaged.append(number)
    return rows, damaged


def _as_text(rows):
    return ''.join(json.dumps(row) + '\n' for row in rows)
