"""Files of a run, on a disk or, through TensorFlow's file system, in a bucket (gs://bucket/run).

A file is written whole or not at all, also when the power is cut, and what goes wrong is said in one line.
"""

import contextlib
import errno
import json
import math
import numbers
import os
import shutil
import tempfile

from common.errors import RunError, one_line

CAUSES = {  # of a failure to write, and what to do
    errno.ENOSPC: 'the disk is full: free some space, and the same command continues at the last checkpoint',
    errno.EDQUOT: 'your quota of disk space is used up: free some, and the same command continues at the last checkpoint',
    errno.EROFS: 'the disk can only be read: choose another --workdir',
    errno.EACCES: 'you may not write there: choose another --workdir',
    errno.EPERM: 'you may not write there: choose another --workdir',
    errno.ENOENT: 'its folder is not there any more: somebody has deleted or moved it',
    errno.ENOTDIR: 'a part of this path is a file: choose another --workdir',
    errno.EEXIST: 'a file has the name of this folder: choose another --workdir',
    errno.EIO: 'the disk does not answer as it should: see what the system says about it (dmesg)',
    errno.ESTALE: 'the network disk has gone: mount it again, and the same command continues at the last checkpoint',
}
CODES = {
    'ResourceExhaustedError': errno.ENOSPC,
    'PermissionDeniedError': errno.EACCES,
    'NotFoundError': errno.ENOENT,
}  # of TensorFlow's errors


def flatten(config, prefix=''):
    """Returns {'model.name': ...} of a ConfigDict or of nested dicts."""
    flat = {}
    for key, value in config.items():
        flat |= (
            flatten(value, f'{prefix}{key}.') if hasattr(value, 'items') else {prefix + key: value}
        )
    return flat


def is_remote(path):
    """Whether TensorFlow's file system is needed, as for 'gs://bucket/run'."""
    return '://' in path


def exists(path):
    with explained(path, 'read'):
        return _gfile().exists(path) if is_remote(path) else os.path.exists(path)


def is_folder(path):
    with explained(path, 'read'):
        return _gfile().isdir(path) if is_remote(path) else os.path.isdir(path)


def list_folder(path):
    """The names in a folder, sorted; none where there is no folder."""
    with explained(path, 'read'):
        if not is_remote(path):
            return sorted(os.listdir(path)) if os.path.isdir(path) else []
        return (
            sorted(name.rstrip('/') for name in _gfile().listdir(path))
            if _gfile().isdir(path)
            else []
        )


def make_folder(path):
    """Makes a folder, and those above it, unless it is there.

    '' is the current one: `os.path.dirname` says so of a name without a folder.
    """
    with explained(path):
        _gfile().makedirs(path) if is_remote(path) else os.makedirs(path or '.', exist_ok=True)


def delete(path):
    """Deletes a file, or a folder with all that is in it, if it is there."""
    with explained(path):
        if is_remote(path):
            if _gfile().exists(path):
                _gfile().rmtree(path) if _gfile().isdir(path) else _gfile().remove(path)
        elif os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


def move(source, target):
    """Renames a file or a folder; a file at `target` is replaced."""
    with explained(target):
        _gfile().rename(source, target, overwrite=True) if is_remote(source) else os.replace(
            source, target
        )


def read(path):
    """The bytes of a file."""
    with (
        explained(path, 'read'),
        _gfile().GFile(path, 'rb') if is_remote(path) else open(path, 'rb') as file,
    ):
        return file.read()


def parts(path, size=1 << 20):
    """Yields the bytes of a file in parts of `size`."""
    with (
        explained(path, 'read'),
        _gfile().GFile(path, 'rb') if is_remote(path) else open(path, 'rb') as file,
    ):
        while part := file.read(size):
            yield part


def write(path, content):
    """Writes text or bytes so that `path` is either what it was or all of this. Its folder must exist."""
    content = content.encode() if isinstance(content, str) else content
    with explained(path):
        if is_remote(path):  # an object appears when it is complete
            with _gfile().GFile(path, 'wb') as file:
                file.write(content)
            return
        with open(path + '.part', 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + '.part', path)
        force(os.path.dirname(path))


def append(path, text):
    """Adds text to the end of a file. Only `force` makes sure that it outlives a power cut."""
    if is_remote(path):  # objects do not grow
        return write(path, (read(path) if exists(path) else b'') + text.encode())
    with explained(path), open(path, 'a') as file:
        file.write(text)


def force(path):
    """Waits until a local file, or the names in a folder, are on the disk and not in memory only."""
    if is_remote(path):
        return
    with explained(path):
        descriptor = os.open(path or '.', os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some file systems do not know this for a folder
                raise
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def written_beside(folder):
    """Yields an empty local folder, which takes the place of `folder` when the block ends well; else it stays, to be looked at."""
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


def as_json(value: object, **options) -> str:
    """Returns `value` as JSON, with null for numbers that are not finite, which JSON cannot say.

    Args:
        value: numbers, also NumPy's, texts, None, and dicts, lists and tuples of them. What is
            something else becomes its text.
        options: of `json.dumps`.
    """
    return json.dumps(_finite(value), allow_nan=False, default=str, **options)


def nan_for_null(numbers_by_name: dict) -> dict:
    """Returns a dict that `as_json` wrote with NaN in place of None: all are numbers again."""
    return {name: math.nan if value is None else value for name, value in numbers_by_name.items()}


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, (bool, int)) or not isinstance(value, numbers.Real):
        return value
    if isinstance(value, numbers.Integral):  # of NumPy
        return int(value)
    return float(value) if math.isfinite(value) else None


def write_json(path, value):
    write(path, as_json(value, indent=2) + '\n')


def read_json(path):
    """The object in a JSON file, a dict. Raises RunError if it is damaged."""
    try:
        content = json.loads(read(path))
    except ValueError as error:
        content = error
    if not isinstance(content, dict):
        raise RunError(
            f'{path} is damaged ({one_line(content, 100)}): bring it back from a copy, or begin anew with --resume=never, which moves the run aside'
        )
    return content


@contextlib.contextmanager
def explained(path, act='write'):
    """Turns an error of the file system inside into a RunError of one line."""
    try:
        yield
    except OSError as error:
        raise RunError(_explain(path, act, error.errno, error)) from error
    except Exception as error:
        if type(error).__module__ != 'tensorflow.python.framework.errors_impl':
            raise
        code = CODES.get(type(error).__name__)
        raise RunError(
            _explain(
                path, act, errno.EROFS if 'Read-only file system' in str(error) else code, error
            )
        ) from error


def _explain(path, act, code, error):
    verb = {'write': 'written', 'read': 'read'}[act]
    if act == 'write' and code in CAUSES:
        return f'{path} cannot be written: {CAUSES[code]}'
    return f'{path} cannot be {verb} ({one_line(error, 200)})'


def _gfile():
    import tensorflow as tf  # only where it is needed: reading a logbook needs none

    return tf.io.gfile
