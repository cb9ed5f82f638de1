"""Checkpoints of a run that can be trusted: the last few, and the best.

A checkpoint is a folder `step-N` with the raw variables in a fixed order, as TensorFlow's file
`variables` (it holds under every strategy and does not depend on the names that Keras gives out),
and `manifest.json`, which has a checksum for each file and for itself. The manifest is written last
and appears whole: a folder without it is no checkpoint. An older one is deleted only when a newer
one was read back. Nothing in a checkpoint is code.
"""

import contextlib
import hashlib
import json
import os
import re
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from common import console, storage
from common.errors import RunError, one_line

MANIFEST, VARIABLES = 'manifest.json', 'variables'


class Checkpoints:
    """The folder `checkpoints/` of a run.

    Args:
        directory: the folder; made when something is saved. Local or gs://.
        variables: {part: [tf.Variable]}, see `TrainState.variables`.
        keep: how many of the last checkpoints stay; beside them stays the best that each of them
            names.
        writes: whether this process saves; of several workers one does.

    Attributes:
        before_commit: a function without arguments, called before a checkpoint counts, in the
            thread that writes it.
    """

    def __init__(
        self,
        directory: str,
        variables: Mapping[str, Sequence[tf.Variable]],
        keep: int,
        writes: bool = True,
    ) -> None:
        self.directory, self._keep, self._writes = directory, keep, writes
        self.before_commit: Callable[[], None] = lambda: None
        self._variables = {
            f'{part}/{index:04d}': variable
            for part, variables in variables.items()
            for index, variable in enumerate(variables)
        }
        self._good: dict[int, dict] = {}  # {step: manifest} that was read back
        self._damaged: dict[int, str] = {}  # {step: reason}
        self._writing: threading.Thread | None = None
        self._failure: Exception | None = None

    def save(self, step: int, progress: dict, best_step: int | None = None) -> None:
        """Saves a snapshot of the variables after `step` updates, in the background; see `wait`.

        If a checkpoint of that step exists, only its progress and best step are renewed.

        Args:
            progress: what else `restore` returns: JSON values.
            best_step: the step of the best checkpoint so far, which may be this one.

        Raises: RunError: the previous save failed.
        """
        self.wait()
        if not self._writes:
            return
        values = None
        if step not in self._good:
            with tf.device('CPU:0'):
                values = [tf.identity(variable) for variable in self._variables.values()]
        self._writing = threading.Thread(
            target=self._try_to_write, args=(step, values, progress, best_step), name='checkpoint'
        )
        self._writing.start()

    def wait(self) -> None:
        """Waits until the last save is on the disk. Raises RunError if it failed."""
        if self._writing:
            self._writing.join()
            self._writing = None
        if self._failure:
            failure, self._failure = self._failure, None
            raise failure

    def latest_step(self) -> int | None:
        """Returns the step of the last intact checkpoint, or None; reports damaged ones.

        It reads all of the checkpoint.

        Raises: RunError if there are only damaged ones.
        """
        self.wait()
        present = steps_in(self.directory)
        step = next((step for step in reversed(present) if self._is_good(step)), None)
        if step is None and present:
            raise RunError(
                f'none of the {len(present)} checkpoints in {self.directory} can be '
                f'used ({self._damaged[present[-1]]})',
                'bring one back from a copy, or begin anew with --resume=never, which '
                'moves these files aside',
            )
        return step

    def restore(self, which: str = 'last', partly: bool = False) -> tuple[int, dict]:
        """Reads the last or the best intact checkpoint into the variables.

        Args:
            partly: whether the checkpoint may hold more variables than this run has, such as those
                of an optimizer.

        Returns: (its step, the `progress` that was saved with it).

        Raises: RunError if there is none, or if it is of another model.
        """
        step, missing = self.latest_step(), 'train first'
        if which == 'best' and step is not None:
            step = self._good[step]['best_step']
            missing = 'no evaluation of this run is the best yet'
        if step is None:
            raise RunError(f'there is no {which} checkpoint in {self.directory}', missing)
        if not self._is_good(step):
            raise RunError(
                f'the best checkpoint cannot be used ({self._damaged[step]})',
                '--checkpoint=last takes the last one',
            )
        self._read(_folder(self.directory, step), partly)
        return step, self._good[step]['progress']

    def _read(self, folder: str, partly: bool) -> None:
        prefix = os.path.join(folder, VARIABLES)
        # Of this very file, and no folder of this name.
        reader = tf.compat.v1.train.NewCheckpointReader(prefix)
        found = {
            key: (reader.get_variable_to_dtype_map()[key].name, shape)
            for key, shape in reader.get_variable_to_shape_map().items()
        }
        wanted = {
            key: (variable.dtype.base_dtype.name, variable.shape.as_list())
            for key, variable in self._variables.items()
        }
        differs = [
            f'{key} is {found.get(key, "missing")} there and {wanted[key]} here'
            for key in wanted
            if found.get(key) != wanted[key]
        ]
        more = [
            f'{key} is there and not here'
            for key in sorted(found)
            if key not in wanted and not partly
        ]
        if differs or more:
            otherwise = 'begin anew with --resume=never'
            if _model_shapes(found) == _model_shapes(wanted):  # else the weights fit no better
                otherwise = (
                    'begin a new run with its weights: '
                    f'--workdir=NEW --config.model.weights={shlex.quote(folder)}'
                )
            raise RunError(
                f'{folder} does not fit this config ({(differs + more)[0]})',
                f'take the config it was made with, or {otherwise}',
            )
        for variable, value in zip(self._variables.values(), self._load(prefix), strict=True):
            variable.assign(value)

    def _load(self, prefix: str) -> list[tf.Tensor]:
        """Returns the values in a file, in the order of the variables.

        TensorFlow checks its own checksums of what was in memory.
        """
        return tf.raw_ops.RestoreV2(
            prefix=prefix,
            tensor_names=list(self._variables),
            shape_and_slices=[''] * len(self._variables),
            dtypes=[variable.dtype.base_dtype for variable in self._variables.values()],
        )

    def _try_to_write(self, step: int, *arguments: Any) -> None:
        # On Linux the priority is that of this thread alone, so that training comes first: a third
        # of its share. With 19, a fiftieth, a stop might wait for a minute.
        with contextlib.suppress(AttributeError, OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
        try:
            self._write(step, *arguments)
        except Exception as error:  # for the thread that trains, when it saves the next one
            self._failure = self._explained(step, error)

    def _explained(self, step: int, error: Exception) -> Exception:
        try:
            # A folder that has vanished or is another run's now is the cause of all that follows.
            self.before_commit()
        except RunError as cause:
            return cause
        if isinstance(error, RunError):
            return error
        reason = f'{type(error).__name__}: {one_line(error)}'
        return RunError(f'the checkpoint of step {step:,} could not be written ({reason})')

    def _write(
        self, step: int, values: list[tf.Tensor] | None, progress: dict, best_step: int | None
    ) -> None:
        self.before_commit()  # a folder that has vanished is not made again
        folder = _folder(self.directory, step)
        written = (
            self._write_variables(folder, step, values) if values else self._good[step]['files']
        )
        manifest = {'step': step, 'best_step': best_step, 'progress': progress, 'files': written}
        content = storage.as_json(manifest, sort_keys=True)
        self.before_commit()
        storage.write(
            os.path.join(folder, MANIFEST),
            f'{{"sha256": "{_checksum(content.encode())}", "manifest": {content}}}\n',
        )
        for above in (self.directory, os.path.dirname(self.directory)):  # may be new
            storage.fsync(above)
        self._good[step] = json.loads(content)
        self._damaged.pop(step, None)
        self._delete_old()

    def _write_variables(self, folder: str, step: int, values: list[tf.Tensor]) -> dict[str, dict]:
        """Writes the values and reads them back; returns {file name: its size and checksum}."""
        spoiled = [
            key
            for key, value in zip(self._variables, values, strict=True)
            if value.dtype.is_floating and not np.isfinite(value.numpy()).all()
        ]
        if spoiled:
            raise RunError(
                f'after step {step:,} there are numbers that are not finite in '
                f'{len(spoiled)} of {len(values)} variables ({spoiled[0]}), which are '
                'not saved',
                'lower config.schedule.peak_lr or lengthen config.schedule.warmup',
            )
        storage.delete(folder)  # damaged, or of a start that was killed while it wrote
        storage.make_folder(folder)
        prefix = os.path.join(folder, VARIABLES)
        with storage.explained(folder):
            tf.raw_ops.SaveV2(
                prefix=prefix,
                tensor_names=list(self._variables),
                shape_and_slices=[''] * len(values),
                tensors=values,
            )
        names = storage.list_folder(folder)
        for path in (*(os.path.join(folder, name) for name in names), folder):
            storage.fsync(path)
        checksums = {name: _size_and_checksum(os.path.join(folder, name)) for name in names}
        with storage.explained(folder, 'read'):
            self._load(prefix)
        return checksums

    def _delete_old(self) -> None:
        """Deletes all but the last few, and the best that each of them names."""
        last = [step for step in steps_in(self.directory) if step not in self._damaged][
            -self._keep :
        ]
        kept = {name for step in last for name in (step, self._best_named_by(step))}
        for name in storage.list_folder(self.directory):
            if re.fullmatch('step-[0-9]+', name) and int(name[5:]) not in kept:
                folder = os.path.join(self.directory, name)
                # First: half of a checkpoint is none.
                storage.delete(os.path.join(folder, MANIFEST))
                storage.delete(folder)
                self._good.pop(int(name[5:]), None)

    def has_best(self) -> bool:
        """Returns whether there is a best checkpoint to restore."""
        step = self.latest_step()
        return step is not None and self._best_named_by(step) is not None

    def _best_named_by(self, step: int) -> int | None:
        try:
            return (self._good.get(step) or _manifest(_folder(self.directory, step)))['best_step']
        except RunError:  # damaged, which shows when it is asked for
            return None

    def _is_good(self, step: int) -> bool:
        if step in self._good:
            return True
        try:
            self._good[step] = verify(_folder(self.directory, step))
            return True
        except RunError as error:
            if step not in self._damaged:
                console.row('damaged', str(error))
            self._damaged[step] = str(error)
            return False


def steps_in(directory: str) -> list[int]:
    """Returns the steps of the checkpoints in a folder, ascending; they may be damaged."""
    steps = [
        int(name[5:])
        for name in storage.list_folder(directory)
        if re.fullmatch('step-[0-9]+', name)
    ]
    return [
        step
        for step in sorted(steps)
        if storage.exists(os.path.join(_folder(directory, step), MANIFEST))
    ]


def verify(folder: str) -> dict:
    """Returns the manifest of a checkpoint whose files are as they were written.

    Raises: RunError that names a file that is missing or damaged.
    """
    manifest = _manifest(folder)
    for name, expected in manifest['files'].items():
        path = os.path.join(folder, os.path.basename(name))
        if not storage.exists(path):
            raise RunError(f'{path} is missing')
        if _size_and_checksum(path) != expected:
            raise RunError(f'{path} is damaged: it is not what was written')
    return manifest


def find(path: str) -> str | None:
    """Returns the TensorFlow prefix of the checkpoint that `path` names, verified; None if none.

    Args:
        path: of a run, of its `checkpoints`, of `checkpoints/best` or of `checkpoints/step-500`.

    Raises: RunError if it is damaged.
    """
    path = path.rstrip('/')
    if storage.exists(os.path.join(path, MANIFEST)):
        folder = path
    else:
        wants_best = os.path.basename(path) == 'best'
        directories = (
            [os.path.dirname(path)] if wants_best else [os.path.join(path, 'checkpoints'), path]
        )
        directory = next((directory for directory in directories if steps_in(directory)), None)
        if directory is None:
            return None
        folder = _folder(directory, steps_in(directory)[-1])
        if wants_best:
            best_step = verify(folder)['best_step']
            if best_step is None:
                raise RunError(f'{path} is not there', 'the run has not been evaluated yet')
            folder = _folder(directory, best_step)
    verify(folder)
    return os.path.join(folder, VARIABLES)


def _model_shapes(variables: dict) -> dict:
    """Returns {key: shape} of the weights among {key: (dtype, shape)}."""
    return {key: shape for key, (_, shape) in variables.items() if key.startswith('model/')}


def _folder(directory: str, step: int) -> str:
    return os.path.join(directory, f'step-{step}')


def _manifest(folder: str) -> dict:
    path = os.path.join(folder, MANIFEST)
    if not storage.exists(path):
        raise RunError(f'{path} is missing')
    try:
        content = json.loads(storage.read(path))
        manifest = content['manifest']
        whole = (
            content['sha256'] == _checksum(json.dumps(manifest, sort_keys=True).encode())
            and manifest.keys() >= {'best_step', 'progress', 'files'}
            and _folder('', manifest['step']) == os.path.basename(folder)
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise RunError(f'{path} is damaged: it is not what was written')
    return manifest


def _size_and_checksum(path: str) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    for part in storage.parts(path):
        digest.update(part)
        size += len(part)
    return {'bytes': size, 'sha256': digest.hexdigest()}


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
