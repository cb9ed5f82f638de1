"""One run in a folder at a time: a lock that the kernel lets go of when its process dies, and a lease where there are no locks.

Two runs in one folder write over each other's checkpoints and metrics, and neither notices.
"""
import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid

from errors import RunError
from outputs import files

BEAT = 20.0  # seconds between two signs of life in a lease
SILENCE = 70.0  # seconds without one after which a lease counts as left behind: three beats, and 10 s for a slow network
SETTLE = 2.0  # seconds in which two that take a lease at the same moment have both written it
READ_BYTES = 1 << 16  # many times a lease
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
    held = _Lease(workdir) if '://' in workdir else _Lock(workdir)
    try:
        if not held.take():
            held = _Lease(os.path.abspath(workdir))
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
        with self._changing, files.explained(self.path):
            while True:
                # Looked at before the file is opened: to close it again would let go of the lock that this process has on it.
                if self._inodes.get(_inode(self.path)) == self._pid:
                    raise RunError(f'{self.workdir} is in use: this very process trains there already; end that run first, or give another --workdir')
                file = self._open()
                try:
                    if not self._lock(file):
                        return False
                    if _inode(self.path) == _inode(file):  # else its last holder removed it after it was opened here
                        os.ftruncate(file, 0)
                        os.write(file, _written(_this_process()))
                        self._inodes[_inode(file)], self._file = self._pid, file
                        return True
                finally:
                    if self._file is None:
                        os.close(file)

    def _open(self):
        """A descriptor of the file, in a folder that is made if needed."""
        for _ in range(TRIES):
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another start failed and has just taken its empty folder away
                return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)

    def require(self):
        """Raises RunError if the folder was deleted, moved or replaced."""
        with files.explained(self.path):
            if _inode(self.path) != _inode(self._file):
                raise RunError(f'{self.workdir} has vanished: the folder of this run was deleted, moved or replaced while it trained; '
                               'nothing more is written')
            self._lock(self._file)  # again, for it is lost when any other part of this process opens and closes the file

    def release(self):
        if self._file is None or os.getpid() != self._pid:  # a forked child that leaves the block has nothing to give back
            return
        with self._changing:
            with contextlib.suppress(OSError):  # the folder may be gone, and the run's own error counts for more
                if _inode(self.path) == _inode(self._file):
                    os.remove(self.path)  # while it is locked: who waits for it sees that it is another file by now
            self._inodes.pop(_inode(self._file), None)
            os.close(self._file)
            self._file = None

    def _lock(self, file):
        """Returns False where the file system has no locks. Raises RunError if another process has it."""
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD_BY_ANOTHER:
                raise _in_use(self.workdir, _parsed(os.pread(file, READ_BYTES, 0))) from None
            if error.errno in NO_LOCKS:
                return False
            raise
        return True


class _Lease:
    """An object with a random token and a count that rises: whose token is in it has the folder, as long as it goes on counting.

    Only changes are looked at, never times: the clocks of two machines differ, and each may jump. A bucket has no operation that
    both looks and writes, so what is sure is that the last writer keeps the folder, and that each other one stops at its next `require()`.
    """

    def __init__(self, workdir):
        import tensorflow as tf  # here, because a lock on a disk needs none

        self.workdir, self.path = workdir, os.path.join(workdir, '.lock')
        self._files, self._errors = tf.io.gfile, tf.errors
        self._me = {**_this_process(), 'token': uuid.uuid4().hex, 'count': 0}
        self._pid, self._is_writing, self._ended = os.getpid(), threading.Lock(), threading.Event()
        self._beats = threading.Thread(target=self._beat, name='lease of the workdir', daemon=True)

    def take(self):
        """Writes the lease; waits first where there is one whose holder may be dead. Returns True."""
        with files.explained(self.path):
            self._files.makedirs(self.workdir)
            found = self._read()
            if found == b'':  # opened by one who is about to write, or who died before
                time.sleep(SETTLE)
                found = self._read()
            if found and not _has_died_here(_parsed(found)):
                self._wait_for_silence(found)
            self._write()
            time.sleep(SETTLE)
            winner = self._read()
        if not self._is_mine(winner):
            raise _in_use(self.workdir, _parsed(winner))
        self._beats.start()
        return True

    def require(self):
        """Raises RunError if the lease is gone or another's."""
        with self._is_writing, files.explained(self.path):
            found = self._read()
        if found is None:
            raise RunError(f'{self.workdir} has vanished: the folder of this run, or {self.path}, was deleted or moved while it trained; '
                           'nothing more is written')
        if not self._is_mine(found):
            raise RunError(f'{self.workdir} was taken over by {_name(_parsed(found))}, to which this run seemed dead; nothing more is written')

    def release(self):
        if os.getpid() != self._pid:  # a forked child has neither the thread nor the lease
            return
        self._ended.set()
        if self._beats.is_alive():
            self._beats.join(BEAT)  # a network that hangs must not keep the process from its end
        with contextlib.suppress(OSError, self._errors.OpError):  # what cannot be removed is silent, and taken over by the next run
            if self._is_mine(self._read()):
                self._files.remove(self.path)

    def _wait_for_silence(self, found):
        print(f'waiting   up to {SILENCE:g} s to see whether {_name(_parsed(found))} still trains in {self.workdir}', flush=True)
        end = time.monotonic() + SILENCE
        while time.monotonic() < end:
            time.sleep(min(BEAT / 4, max(0.0, end - time.monotonic())))
            now = self._read()
            if now is None:  # it ended meanwhile
                return
            if now != found:
                raise _in_use(self.workdir, _parsed(now) or _parsed(found))
        print(f'waiting   it gave no sign of life: {self.workdir} is taken over', flush=True)

    def _beat(self):
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError, self._errors.OpError), self._is_writing:  # the next beat tries again
                before = time.monotonic()
                if not self._is_mine(self._read()):
                    return
                if time.monotonic() - before < BEAT:  # else the process was stopped in between, and somebody else may have come
                    self._me['count'] += 1
                    self._write()

    def _read(self):
        """The bytes of the lease, or None."""
        try:
            with self._files.GFile(self.path, 'rb') as file:
                return file.read(READ_BYTES)  # with a number, for without one TensorFlow asks for the size, and keeps that of a bucket for 5 s
        except self._errors.NotFoundError:
            return None

    def _write(self):
        with self._files.GFile(self.path, 'wb') as file:
            file.write(_written(self._me))

    def _is_mine(self, found):
        return _parsed(found).get('token') == self._me['token']


def _this_process():
    return {'host': socket.gethostname(), 'machine': _machine(), 'pid': os.getpid(),
            'started': datetime.datetime.now().astimezone().isoformat(timespec='seconds')}


def _machine():
    """What tells apart whose process numbers are the same ones: this start of the machine and this container, or '' if unknown."""
    try:
        with open('/proc/sys/kernel/random/boot_id') as file:
            return f'{file.read().strip()} {os.readlink("/proc/self/ns/pid")}'
    except OSError:
        return ''


def _has_died_here(holder):
    """Whether it was a process of this very machine and is none any more; False if that cannot be known."""
    here, pid = _this_process(), holder.get('pid')
    if not here['machine'] or any(holder.get(key) != here[key] for key in ('host', 'machine')) or type(pid) is not int or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # another user's, or no process number
        pass
    return False


def _written(holder):
    return (json.dumps(holder) + '\n').encode()


def _parsed(text):
    """What was written last, or {}. The last line: TensorFlow's ram:// appends to a file that is written again."""
    try:
        holder = json.loads((text or b'').splitlines()[-1])
    except (IndexError, ValueError):  # empty, or half written
        return {}
    return holder if isinstance(holder, dict) else {}


def _name(holder):
    if 'pid' not in holder:
        return 'another run'
    return f'process {holder.get("pid")} on {holder.get("host")} (since {holder.get("started")})'


def _in_use(workdir, holder):
    return RunError(f'{workdir} is in use: {_name(holder)} trains there; wait for it, end that process, or give another --workdir')


def _inode(file):
    """(device, inode) of a path or an open file, or None where the path leads nowhere."""
    try:
        status = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino
