"""One run in a folder at a time: a lock that the kernel lets go of when its process dies, and a lease where there are no locks.

Two runs in one folder write over each other's checkpoints and metrics, and neither notices.
"""

import contextlib
import errno
import fcntl
import os
import threading

from common import storage
from common.errors import RunError
from outputs.bucket_lease import READ_BYTES, Lease
from outputs.lock_holder import in_use, parsed, this_process, written

TRIES = 100  # to open a file in a folder that others make and remove at the same moment
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
HELD_BY_ANOTHER = {errno.EACCES, errno.EAGAIN}  # POSIX allows both as fcntl's answer


@contextlib.contextmanager
def hold(workdir):
    """Keeps other runs out of the folder `workdir` while the block runs; makes the folder if needed.

    Yields an object whose `require()` raises RunError if the folder is this run's no more: to be called before a checkpoint is
    committed, by the process that holds it. `require()` costs microseconds on a disk and one read of an object in a bucket.

    A folder on a disk is locked, and free again in the moment in which its process ends, however it ends. A folder with '://' in its
    name, or on a disk without locks, is leased: what a killed run leaves behind is waited for, at most SILENCE seconds.

    Raises RunError if another run holds the folder, or if it cannot be written to.
    """
    workdir = os.fspath(workdir)
    is_new = '://' not in workdir and not os.path.exists(workdir)
    held = Lease(workdir) if '://' in workdir else _Lock(workdir)
    try:
        if not held.take():
            held = Lease(os.path.abspath(workdir))
            held.take()
        yield held
    finally:
        held.release()
        if is_new:  # a start that failed leaves no empty folder
            with contextlib.suppress(OSError):
                os.rmdir(workdir)


class _Lock:
    """A POSIX record lock, which the kernel gives to a process and not to its children."""

    _inodes = {}  # (device, inode) of each locked file -> pid: the kernel refuses nothing to the process that has the lock already
    _changing = threading.Lock()

    def __init__(self, workdir):
        self.workdir, self.path = workdir, os.path.join(os.path.abspath(workdir), '.lock')
        self._file, self._pid = None, os.getpid()

    def take(self):
        """Locks; returns False where the file system has no locks."""
        with self._changing, storage.explained(self.path):
            while True:
                # Looked at before the file is opened: to close it again would let go of the lock that this process has on it.
                if self._inodes.get(_inode(self.path)) == self._pid:
                    raise RunError(
                        f'{self.workdir} is in use: this very process trains there already; end that run first, or give another --workdir'
                    )
                file = self._open()
                try:
                    if not self._lock(file):
                        return False
                    if _inode(self.path) == _inode(
                        file
                    ):  # else its last holder removed it after it was opened here
                        os.ftruncate(file, 0)
                        os.write(file, written(this_process()))
                        self._inodes[_inode(file)], self._file = self._pid, file
                        return True
                finally:
                    if self._file is None:
                        os.close(file)

    def _open(self):
        """A descriptor of the file, in a folder that is made if needed."""
        for _ in range(TRIES):
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with contextlib.suppress(
                FileNotFoundError
            ):  # another start failed and has just taken its empty folder away
                return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)

    def require(self):
        """Raises RunError if the folder was deleted, moved or replaced."""
        with storage.explained(self.path):
            if _inode(self.path) != _inode(self._file):
                raise RunError(
                    f'{self.workdir} has vanished: the folder of this run was deleted, moved or replaced while it trained; '
                    'nothing more is written'
                )
            self._lock(
                self._file
            )  # again, for it is lost when any other part of this process opens and closes the file

    def release(self):
        if (
            self._file is None or os.getpid() != self._pid
        ):  # a forked child that leaves the block has nothing to give back
            return
        with self._changing:
            with contextlib.suppress(
                OSError
            ):  # the folder may be gone, and the run's own error counts for more
                if _inode(self.path) == _inode(self._file):
                    os.remove(
                        self.path
                    )  # while it is locked: who waits for it sees that it is another file by now
            self._inodes.pop(_inode(self._file), None)
            os.close(self._file)
            self._file = None

    def _lock(self, file):
        """Returns False where the file system has no locks. Raises RunError if another process has it."""
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD_BY_ANOTHER:
                raise in_use(self.workdir, parsed(os.pread(file, READ_BYTES, 0))) from None
            if error.errno in NO_LOCKS:
                return False
            raise
        return True


def _inode(file):
    """(device, inode) of a path or an open file, or None where the path leads nowhere."""
    try:
        status = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino
