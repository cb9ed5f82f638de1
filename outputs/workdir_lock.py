"""Allows one run in a folder at a time.

On disk this is a lock, which the kernel releases when its process dies; where locks are unavailable
it is a lease. Otherwise two runs in one folder would silently overwrite each other's checkpoints
and metrics.
"""

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from typing import ClassVar

from common import storage
from common.errors import RunError
from outputs.bucket_lease import READ_BYTES, Lease
from outputs.lock_holder import decode_record, encode_record, in_use_error, this_process

TRIES = 100  # attempts to open a file in a folder that others may be creating and removing
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
HELD_BY_ANOTHER = {errno.EACCES, errno.EAGAIN}  # POSIX allows fcntl to fail with either


@contextlib.contextmanager
def hold(workdir: str) -> Iterator['Held']:
    """Keeps other runs out of the folder `workdir` during the block; creates it if needed.

    Yields an object whose `check_ownership()` raises RunError if the folder is no longer this
    run's; the holder calls it before committing a checkpoint. It costs microseconds on disk and one
    object read in a bucket.

    A folder on disk is locked, and freed as soon as its process ends, however it ends. A folder
    with '://' in its name, or on a disk without locks, is leased; a lease left by a killed run is
    waited out, for at most SILENCE seconds.

    Raises: RunError if another run holds the folder, or if it cannot be written to.
    """
    workdir = os.fspath(workdir)
    is_new = '://' not in workdir and not os.path.exists(workdir)
    held = Lease(workdir) if '://' in workdir else Lock(workdir)
    try:
        if not held.take():
            held = Lease(os.path.abspath(workdir))
            held.take()
        yield held
    finally:
        held.release()
        if is_new:  # do not leave an empty folder after a failed launch
            with contextlib.suppress(OSError):
                os.rmdir(workdir)


class Lock:
    """A POSIX record lock, which belongs to a process and is not inherited by its children."""

    # {(device, inode) of a locked file: pid}, needed because the kernel lets a process re-lock its
    # own file.
    _inodes: ClassVar[dict[tuple[int, int] | None, int]] = {}
    _changing = threading.Lock()

    def __init__(self, workdir: str) -> None:
        self.workdir, self.path = workdir, os.path.join(os.path.abspath(workdir), '.lock')
        self._file: int | None = None
        self._pid = os.getpid()

    def take(self) -> bool:
        """Locks the folder; returns False if the file system has no locks."""
        with self._changing, storage.one_line_errors(self.path):
            while True:
                # Checked before opening, because closing the file again would release this
                # process's lock on it.
                if self._inodes.get(_inode(self.path)) == self._pid:
                    raise RunError(
                        f'{self.workdir} is in use: this process is already training there',
                        'end that run first, or choose another --workdir',
                    )
                file = self._open()
                try:
                    if not self._lock(file):
                        return False
                    # Otherwise its last holder removed it after we opened it: try again.
                    if _inode(self.path) == _inode(file):
                        os.ftruncate(file, 0)
                        os.write(file, encode_record(this_process()))
                        self._inodes[_inode(file)], self._file = self._pid, file
                        return True
                finally:
                    if self._file is None:
                        os.close(file)

    def _open(self) -> int:
        """Returns a descriptor of the lock file, in a folder that is created if needed."""
        for _ in range(TRIES):
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            # Another start may have failed and just removed its empty folder.
            with contextlib.suppress(FileNotFoundError):
                return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)

    def check_ownership(self) -> None:
        """Raises RunError if the folder was deleted, moved or replaced."""
        with storage.one_line_errors(self.path):
            if _inode(self.path) != _inode(self._file):
                raise RunError(
                    f'{self.workdir} has vanished: the folder of this run was deleted, moved or '
                    'replaced while it trained; nothing more is written'
                )
            # Lock again: the lock is lost if any other code in this process opens and closes the
            # file.
            if self._file is not None:
                self._lock(self._file)

    def release(self) -> None:
        if self._file is None or os.getpid() != self._pid:
            return  # a forked child that leaves the block has nothing to release
        with self._changing:
            # The folder may be gone, and the run's own error matters more.
            with contextlib.suppress(OSError):
                if _inode(self.path) == _inode(self._file):
                    # While still locked, so that other processes notice the replacement.
                    os.remove(self.path)
            self._inodes.pop(_inode(self._file), None)
            os.close(self._file)
            self._file = None

    def _lock(self, file: int) -> bool:
        """Locks a file; returns False if the file system has no locks.

        Raises: RunError if another process holds it.
        """
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD_BY_ANOTHER:
                raise in_use_error(
                    self.workdir, decode_record(os.pread(file, READ_BYTES, 0))
                ) from None
            if error.errno in NO_LOCKS:
                return False
            raise
        return True


def _inode(file: str | int | None) -> tuple[int, int] | None:
    """Returns (device, inode) of a path or a descriptor, or None if the path does not exist."""
    if file is None:
        return None
    try:
        status = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


Held = Lock | Lease
