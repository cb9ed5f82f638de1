"""Reads and writes files of a run, on disk or in a bucket (gs://bucket/run).

Buckets are reached through TensorFlow's file system. `write` is atomic, even across a power
failure. Every error is one line.
"""

import contextlib
import errno
import json
import math
import numbers
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from common.errors import RunError, one_line

CONTINUES = 'and the same command continues from the last checkpoint'
ELSEWHERE = 'choose another --workdir'
# Why a write failed: {errno: (reason, fix)}.
CAUSES = {
    errno.ENOSPC: ('the disk is full', f'free some space, {CONTINUES}'),
    errno.EDQUOT: ('your disk quota is used up', f'free some space, {CONTINUES}'),
    errno.EROFS: ('the disk is read-only', ELSEWHERE),
    errno.EACCES: ('you do not have permission to write there', ELSEWHERE),
    errno.EPERM: ('you may not write there', ELSEWHERE),
    errno.ENOENT: (
        'its folder does not exist',
        'it was deleted, moved or cannot be created: restore it, or choose another --workdir',
    ),
    errno.ENOTDIR: ('a part of this path is a file', ELSEWHERE),
    errno.EEXIST: ('a file has the name of this folder', ELSEWHERE),
    errno.EIO: ('the disk is failing', 'check the system log (dmesg)'),
    errno.ESTALE: ('the network disk is gone', f'mount it again, {CONTINUES}'),
}
# TensorFlow's errors and their errno.
CODES = {
    'ResourceExhaustedError': errno.ENOSPC,
    'PermissionDeniedError': errno.EACCES,
    'NotFoundError': errno.ENOENT,
}


def flatten(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Flattens a ConfigDict or nested dicts to {'model.name': ...}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if hasattr(value, 'items'):
            flat |= flatten(value, f'{prefix}{key}.')
        else:
            flat[prefix + key] = value
    return flat


def is_remote(path: str) -> bool:
    """Returns whether a path needs TensorFlow's file system, as 'gs://bucket/run' does."""
    return '://' in path


def exists(path: str) -> bool:
    with one_line_errors(path, 'read'):
        return _gfile().exists(path) if is_remote(path) else os.path.exists(path)


def is_folder(path: str) -> bool:
    with one_line_errors(path, 'read'):
        return _gfile().isdir(path) if is_remote(path) else os.path.isdir(path)


def list_folder(path: str) -> list[str]:
    """Returns the names in a folder, sorted; none if there is no such folder."""
    with one_line_errors(path, 'read'):
        if not is_remote(path):
            return sorted(os.listdir(path)) if os.path.isdir(path) else []
        return (
            sorted(name.rstrip('/') for name in _gfile().listdir(path))
            if _gfile().isdir(path)
            else []
        )


def make_folder(path: str) -> None:
    """Creates a folder and its parents unless they exist.

    '' is the current folder: `os.path.dirname` returns it for a bare file name.
    """
    with one_line_errors(path):
        _gfile().makedirs(path) if is_remote(path) else os.makedirs(path or '.', exist_ok=True)


def delete(path: str) -> None:
    """Deletes a file, or a folder with its content, if it exists."""
    with one_line_errors(path):
        if is_remote(path):
            if _gfile().isdir(path):
                _gfile().rmtree(path)
            elif _gfile().exists(path):
                _gfile().remove(path)
        elif os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


def move(source: str, target: str) -> None:
    """Renames a file or a folder; a file at `target` is replaced."""
    with one_line_errors(target):
        _gfile().rename(source, target, overwrite=True) if is_remote(source) else os.replace(
            source, target
        )


def read(path: str) -> bytes:
    """Returns the content of a file."""
    with (
        one_line_errors(path, 'read'),
        _gfile().GFile(path, 'rb') if is_remote(path) else open(path, 'rb') as file,
    ):
        return file.read()


def read_chunks(path: str, size: int = 1 << 20) -> Iterator[bytes]:
    """Yields the content of a file in parts of `size` bytes."""
    with (
        one_line_errors(path, 'read'),
        _gfile().GFile(path, 'rb') if is_remote(path) else open(path, 'rb') as file,
    ):
        while part := file.read(size):
            yield part


def write(path: str, content: str | bytes) -> None:
    """Replaces the content of a file atomically. Its folder must exist."""
    content = content.encode() if isinstance(content, str) else content
    with one_line_errors(path):
        if is_remote(path):  # in a bucket an object appears only once complete
            with _gfile().GFile(path, 'wb') as file:
                file.write(content)
            return
        with open(path + '.part', 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + '.part', path)
        fsync(os.path.dirname(path))


def append(path: str, text: str) -> None:
    """Appends text to a file. It survives a power failure only after `fsync`."""
    if is_remote(path):  # objects in a bucket cannot be appended to
        write(path, (read(path) if exists(path) else b'') + text.encode())
        return
    with one_line_errors(path), open(path, 'a') as file:
        file.write(text)


def fsync(path: str) -> None:
    """Flushes a local file, or a folder's directory entries, to the disk."""
    if is_remote(path):
        return
    with one_line_errors(path):
        descriptor = os.open(path or '.', os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some file systems cannot fsync a folder
                raise
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def atomic_directory(folder: str) -> Iterator[str]:
    """Yields an empty local folder that replaces `folder` when the block succeeds.

    If the block fails, the partial folder is left for inspection.
    """
    partial = tempfile.mkdtemp() if is_remote(folder) else folder + '.part'
    delete(partial)
    make_folder(partial)
    yield partial
    delete(folder)
    if not is_remote(folder):
        return move(partial, folder)
    for above, _, names in os.walk(partial):
        for name in names:
            path = os.path.join(above, name)
            target = os.path.join(folder, os.path.relpath(path, partial))
            make_folder(os.path.dirname(target))
            write(target, read(path))
    delete(partial)


def as_json(value: object, **options: Any) -> str:
    """Returns `value` as JSON, with null for non-finite numbers, which JSON cannot represent.

    Args:
        value: numbers (also NumPy's), strings, None, and dicts, lists and tuples of them. Anything
            else is converted with `str`.
        options: passed to `json.dumps`.
    """
    return json.dumps(_finite(value), allow_nan=False, default=str, **options)


def nan_for_null(numbers_by_name: dict) -> dict:
    """Returns a copy of `numbers_by_name` with NaN for each None, the inverse of `as_json`."""
    return {name: math.nan if value is None else value for name, value in numbers_by_name.items()}


def _finite(value: Any) -> Any:
    """Returns `value` with None for each number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, (bool, int)) or not isinstance(value, numbers.Real):
        return value
    if isinstance(value, numbers.Integral):  # of NumPy
        return int(value)
    return float(value) if math.isfinite(value) else None


def write_json(path: str, value: object) -> None:
    write(path, as_json(value, indent=2) + '\n')


def read_json(path: str) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises RunError if the file is damaged."""
    try:
        content = json.loads(read(path))
    except ValueError as error:
        content = error
    if not isinstance(content, dict):
        raise RunError(
            f'{path} is damaged ({one_line(content, 100)})',
            'restore it from a backup, or start over with --resume=never, which moves the run '
            'aside',
        )
    return content


@contextlib.contextmanager
def one_line_errors(path: str, act: str = 'write') -> Iterator[None]:
    """Turns file system errors raised in the block into a RunError of one line."""
    try:
        yield
    except OSError as error:
        raise _run_error(path, act, error.errno, error) from error
    except Exception as error:
        if type(error).__module__ != 'tensorflow.python.framework.errors_impl':
            raise
        code = CODES.get(type(error).__name__)
        if 'Read-only file system' in str(error):
            code = errno.EROFS
        raise _run_error(path, act, code, error) from error


def _run_error(path: str, act: str, code: int | None, error: Exception) -> RunError:
    if act == 'write' and code in CAUSES:
        reason, fix = CAUSES[code]
        return RunError(f'{path} cannot be written: {reason}', fix)
    verb = {'write': 'written', 'read': 'read'}[act]
    return RunError(f'{path} cannot be {verb} ({one_line(error, 200)})')


def _gfile() -> Any:
    import tensorflow as tf  # imported only when needed: reading local metrics does not need it

    return tf.io.gfile
