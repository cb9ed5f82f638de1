"""Saves and restores verified checkpoints of a run: the last few, and the best.

A checkpoint is a folder `step-N` with the variables in a fixed order, in TensorFlow's format
(`variables`, valid under every strategy and independent of Keras' variable names), and
`manifest.json`, with checksums of each file and of itself. The manifest is written last and
atomically: a folder without it is not a checkpoint. An older checkpoint is deleted only after a
newer one has been read back. Nothing in a checkpoint is code.
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
        directory: the folder, local or gs://; created at the first save.
        variables: {part: [tf.Variable]}, see `TrainState.variables`.
        keep: how many of the latest checkpoints are kept, in addition to the best one that each of
            them names.
        writes: whether this process saves; only one of several workers does.

    Attributes:
        before_commit: a function without arguments, called in the writing thread before a
            checkpoint is committed.
        after_restore: a function without arguments, called when the variables have been read.
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
        self.after_restore: Callable[[], None] = lambda: None
        self._variables = {
            f'{part}/{index:04d}': variable
            for part, variables in variables.items()
            for index, variable in enumerate(variables)
        }
        self._verified: dict[int, dict] = {}  # {step: manifest} of verified checkpoints
        self._damaged: dict[int, str] = {}  # {step: reason}
        self._writing: threading.Thread | None = None
        self._failure: Exception | None = None

    def save(self, step: int, progress: dict, best_step: int | None = None) -> None:
        """Saves a snapshot of the variables after `step` updates, in the background; see `wait`.

        If that step is already saved, only its progress and best step are updated.

        Args:
            progress: JSON values to store with it, which `restore` returns.
            best_step: the step of the best checkpoint so far, which may be this one.

        Raises: RunError if the previous save failed.
        """
        self.wait()
        if not self._writes:
            return
        values = None
        if step not in self._verified:
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

        It verifies by reading the whole checkpoint.

        Raises: RunError if all checkpoints are damaged.
        """
        self.wait()
        present = steps_in(self.directory)
        step = next((step for step in reversed(present) if self._is_intact(step)), None)
        if step is None and present:
            raise RunError(
                f'none of the {len(present)} checkpoints in {self.directory} can be '
                f'used ({self._damaged[present[-1]]})',
                'restore one from a backup, or start over with --resume=never, which moves these '
                'files aside',
            )
        return step

    def restore(self, which: str = 'last', allow_extra: bool = False) -> tuple[int, dict]:
        """Reads the last or the best intact checkpoint into the variables.

        Args:
            allow_extra: whether the checkpoint may hold variables that this run lacks, such as the
                optimizer's.

        Returns: (its step, the `progress` that was saved with it).

        Raises: RunError if there is none, or it belongs to another model.
        """
        step, missing = self.latest_step(), 'train first'
        if which == 'best' and step is not None:
            step = self._verified[step]['best_step']
            missing = 'this run has no best evaluation yet'
        if step is None:
            raise RunError(f'there is no {which} checkpoint in {self.directory}', missing)
        if not self._is_intact(step):
            raise RunError(
                f'the best checkpoint cannot be used ({self._damaged[step]})',
                '--checkpoint=last takes the last one',
            )
        self._read(_folder(self.directory, step), allow_extra)
        return step, self._verified[step]['progress']

    def _read(self, folder: str, allow_extra: bool) -> None:
        prefix = os.path.join(folder, VARIABLES)
        # Reads exactly this prefix, never a folder of that name.
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
            f'{key} is {found.get(key, "missing")} in the checkpoint but {wanted[key]} here'
            for key in wanted
            if found.get(key) != wanted[key]
        ]
        more = [
            f'{key} exists only in the checkpoint'
            for key in sorted(found)
            if key not in wanted and not allow_extra
        ]
        if differs or more:
            otherwise = 'start over with --resume=never'
            # Otherwise the weights would not fit either.
            if _model_shapes(found) == _model_shapes(wanted):
                otherwise = (
                    'start a new run with its weights: '
                    f'--workdir=NEW --config.model.weights={shlex.quote(folder)}'
                )
            raise RunError(
                f'{folder} does not fit this config ({(differs + more)[0]})',
                f'use the config it was saved with, or {otherwise}',
            )
        for variable, value in zip(self._variables.values(), self._load(prefix), strict=True):
            variable.assign(value)
        self.after_restore()

    def _load(self, prefix: str) -> list[tf.Tensor]:
        """Returns the values in a file, in the order of the variables.

        TensorFlow verifies its own checksums while reading.
        """
        return tf.raw_ops.RestoreV2(
            prefix=prefix,
            tensor_names=list(self._variables),
            shape_and_slices=[''] * len(self._variables),
            dtypes=[variable.dtype.base_dtype for variable in self._variables.values()],
        )

    def _try_to_write(self, step: int, *arguments: Any) -> None:
        # On Linux this lowers the priority of this thread alone, to a third of training's CPU
        # share. With 19 (a fiftieth), stopping might take a minute.
        with contextlib.suppress(AttributeError, OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
        try:
            self._write(step, *arguments)
        except Exception as error:  # raised in the training thread by the next `wait`
            self._failure = self._explained(step, error)

    def _explained(self, step: int, error: Exception) -> Exception:
        try:
            # If the folder has vanished or belongs to another run, that is the root cause.
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
        self.before_commit()  # do not recreate a folder that has vanished
        folder = _folder(self.directory, step)
        written = (
            self._write_variables(folder, step, values) if values else self._verified[step]['files']
        )
        manifest = {'step': step, 'best_step': best_step, 'progress': progress, 'files': written}
        content = storage.as_json(manifest, sort_keys=True)
        self.before_commit()
        storage.write(
            os.path.join(folder, MANIFEST),
            f'{{"sha256": "{_checksum(content.encode())}", "manifest": {content}}}\n',
        )
        for above in (self.directory, os.path.dirname(self.directory)):  # these folders may be new
            storage.fsync(above)
        self._verified[step] = json.loads(content)
        self._damaged.pop(step, None)
        self._delete_old()

    def _write_variables(self, folder: str, step: int, values: list[tf.Tensor]) -> dict[str, dict]:
        """Writes the values and reads them back; returns {file name: its size and checksum}."""
        nonfinite = [
            key
            for key, value in zip(self._variables, values, strict=True)
            if value.dtype.is_floating and not np.isfinite(value.numpy()).all()
        ]
        if nonfinite:
            raise RunError(
                f'after step {step:,} {len(nonfinite)} of {len(values)} variables hold non-finite '
                f'values ({nonfinite[0]}), so nothing is saved',
                'lower config.schedule.peak_lr or lengthen config.schedule.warmup',
            )
        storage.delete(folder)  # damaged, or left by a run that was killed while writing
        storage.make_folder(folder)
        prefix = os.path.join(folder, VARIABLES)
        with storage.one_line_errors(folder):
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
        with storage.one_line_errors(folder, 'read'):
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
                # The manifest first, so that a half-deleted checkpoint does not count as one.
                storage.delete(os.path.join(folder, MANIFEST))
                storage.delete(folder)
                self._verified.pop(int(name[5:]), None)

    def has_best(self) -> bool:
        """Returns whether there is a best checkpoint to restore."""
        step = self.latest_step()
        return step is not None and self._best_named_by(step) is not None

    def _best_named_by(self, step: int) -> int | None:
        try:
            return (self._verified.get(step) or _manifest(_folder(self.directory, step)))[
                'best_step'
            ]
        except RunError:  # damaged; reported when it is restored
            return None

    def _is_intact(self, step: int) -> bool:
        if step in self._verified:
            return True
        try:
            self._verified[step] = verify(_folder(self.directory, step))
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
    """Verifies a checkpoint's files against its manifest, and returns the manifest.

    Raises: RunError that names a missing or damaged file.
    """
    manifest = _manifest(folder)
    for name, expected in manifest['files'].items():
        path = os.path.join(folder, os.path.basename(name))
        if not storage.exists(path):
            raise RunError(f'{path} is missing')
        if _size_and_checksum(path) != expected:
            raise RunError(f'{path} is damaged: its checksum does not match')
    return manifest


def find_checkpoint(path: str) -> str | None:
    """Verifies the checkpoint that `path` names; returns its TensorFlow prefix, or None.

    Args:
        path: a run's folder, its `checkpoints`, `checkpoints/best` or `checkpoints/step-500`.

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
    """Returns {key: shape} of the model's weights, given {key: (dtype, shape)}."""
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
        raise RunError(f'{path} is damaged: its checksum does not match')
    return manifest


def _size_and_checksum(path: str) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    for part in storage.read_chunks(path):
        digest.update(part)
        size += len(part)
    return {'bytes': size, 'sha256': digest.hexdigest()}


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
