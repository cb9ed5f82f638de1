"""Logs a run's metrics to metrics.jsonl, TensorBoard and the progress bar."""

import json
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from typing import Any

from tqdm import tqdm

from common import console, storage

NAME = 'metrics.jsonl'
SHOWN = {  # metrics in the progress bar, with short names
    'train/loss': 'loss',
    'train/skipped_updates': 'skipped',
    'train/learning_rate': 'lr',
    'train/examples_per_second': 'img/s',
    'eval/accuracy': 'accuracy',
}
EVENTS = 'events.out.tfevents'  # prefix of the files that TensorBoard reads


class MetricsLogger:
    """Writes a run's metrics, one JSON object per line and one line per step.

    A number that is not finite is null in metrics.jsonl, which is JSON, and NaN in TensorBoard's
    files. These always match metrics.jsonl: if rows are dropped or replaced, they are rewritten.

    Args:
        workdir: the folder of the run.
        first_step: step at which the run starts or resumes; rows after it are dropped, because they
            will be redone.
        total_steps: length of the progress bar.
    """

    def __init__(self, workdir: str, first_step: int, total_steps: int) -> None:
        import tensorflow as tf  # here, because reading metrics does not need it

        self.path = os.path.join(workdir, NAME)
        rows, damaged = _read(self.path)
        # A damaged last line is expected after a crash.
        lost = [str(number) for number in damaged if number <= len(rows)]
        if lost:
            line = f'line {", ".join(lost)} cannot be read; skipped'
            console.row('damaged', f'{self.path}: {line}')
        self._rows = [row for row in rows if row['step'] <= first_step]
        self._board_folder = os.path.join(workdir, 'tensorboard')
        self._summary = tf.summary
        if damaged or len(self._rows) < len(rows):
            # Before metrics.jsonl is rewritten: if this run is killed in between, the next one
            # still sees the need.
            rewrite_tensorboard(self._board_folder, self._rows)
        storage.write(self.path, _as_text(self._rows))
        self._tensorboard = tf.summary.create_file_writer(self._board_folder)
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit='step',
            dynamic_ncols=True,
            smoothing=0.1,
            disable=None if sys.stderr.isatty() else True,
        )
        self._bar_text: dict[str, str] = {}
        self._last_tenth = 0  # last tenth of the run for which a line was printed

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds numbers measured after `step` updates to the row of that step."""
        if self._rows and self._rows[-1]['step'] == step:
            replaces = any(name in self._rows[-1] for name in metrics)
            self._rows[-1].update(metrics)
            storage.write(self.path, _as_text(self._rows))
            if replaces:  # for example after evaluating a different split
                self._tensorboard.close()
                rewrite_tensorboard(self._board_folder, self._rows)
                self._tensorboard = self._summary.create_file_writer(self._board_folder)
                self._show(step, metrics)
                return
        else:
            self._rows.append({'step': step, 'wall_time': time.time(), **metrics})
            storage.append(self.path, _as_text(self._rows[-1:]))
        with self._tensorboard.as_default(step):
            for name, value in metrics.items():
                self._summary.scalar(name, value)
        self._tensorboard.flush()
        self._show(step, metrics)

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step`."""
        self._bar.update(step - self._bar.n)

    def note(self, text: str) -> None:
        """Prints a note, above the progress bar."""
        width, has_colors = console.terminal_width(), console.has_colors()
        self._bar.write(console.format_row('note', text, width, has_colors))

    def close(self) -> None:
        self._bar.close()
        self._tensorboard.close()

    def _show(self, step: int, metrics: Mapping[str, float]) -> None:
        shown = {}
        for name, value in metrics.items():
            is_shown = name in SHOWN and (value or name != 'train/skipped_updates')
            if is_shown:
                form = '.2%' if name == 'eval/accuracy' else '.4g'
                shown[SHOWN[name]] = format(value, form)
        self._bar_text.update(shown)
        self._bar.set_postfix(self._bar_text, refresh=not self._bar.disable)
        if not self._bar.disable:
            return
        # Without a terminal, print one line per evaluation and per tenth of the run.
        tenth = step // max(1, self._bar.total // 10)
        if 'eval/accuracy' in metrics or tenth > self._last_tenth:
            self._last_tenth = tenth
            numbers = '  '.join(f'{name} {value}' for name, value in shown.items())
            console.line(f'step {step:,}/{self._bar.total:,}  {numbers}')


def read_metrics(workdir: str) -> list[dict[str, Any]]:
    """Returns the readable rows of metrics.jsonl: a crash may have truncated the last one.

    null becomes NaN.
    """
    return _read(os.path.join(workdir, NAME))[0]


def rewrite_tensorboard(folder: str, rows: list[dict]) -> None:
    """Rewrites TensorBoard's files in `folder` from `rows` of metrics.jsonl, with their times.

    Other files in the folder are left alone.
    """
    before = [name for name in storage.list_folder(folder) if name.startswith(EVENTS)]
    if rows:
        storage.make_folder(folder)
        storage.write(os.path.join(folder, _event_file_name(rows)), _events(rows))
    for name in before:
        storage.delete(os.path.join(folder, name))


def _event_file_name(rows: list[dict]) -> str:
    """Returns a file name in TensorBoard's format: time, host and process ID.

    TensorBoard reads files in name order, so the time is that of the first row, which puts this
    file before the current writer's.
    """
    seconds = int(rows[0].get('wall_time', 0))
    host = re.sub('[^A-Za-z0-9-]', '-', socket.gethostname())
    return f'{EVENTS}.{seconds:010d}.{host}.{os.getpid()}.{time.time_ns()}.v2'


def _events(rows: list[dict]) -> bytes:
    """Returns the content of a TensorBoard event file, as `tf.summary.scalar` would write it."""
    import tensorflow as tf

    v1 = tf.compat.v1
    scalars = v1.SummaryMetadata(plugin_data=v1.SummaryMetadata.PluginData(plugin_name='scalars'))
    events = [v1.Event(wall_time=rows[0].get('wall_time', 0), file_version='brain.Event:2')]
    for row in rows:
        summary = v1.Summary()
        for name, value in row.items():
            if name not in ('step', 'wall_time'):
                tensor = tf.make_tensor_proto(float(value), tf.float32)
                summary.value.add(tag=name, tensor=tensor, metadata=scalars)
        events.append(
            v1.Event(wall_time=row.get('wall_time', 0), step=row['step'], summary=summary)
        )
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, 'events')
        with tf.io.TFRecordWriter(path) as writer:
            for event in events:
                writer.write(event.SerializeToString())
        return storage.read(path)


def _read(path: str) -> tuple[list[dict[str, Any]], list[int]]:
    """Returns the rows of a file, and the numbers of the unreadable lines."""
    rows, damaged = [], []
    for number, line in enumerate(
        storage.read(path).decode(errors='replace').splitlines() if storage.exists(path) else (), 1
    ):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get('step'), int):
            rows.append(storage.nan_for_null(row))
        else:
            damaged.append(number)
    return rows, damaged


def _as_text(rows: Iterable[Mapping[str, Any]]) -> str:
    return ''.join(storage.as_json(row) + '\n' for row in rows)
