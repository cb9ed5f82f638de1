"""A lease on the folder of a run in a bucket, or on a disk without locks."""

import contextlib
import os
import threading
import time
import uuid

from common import console, storage
from common.errors import RunError
from outputs.lock_holder import has_died_here, in_use, name_of, parsed, this_process, written

BEAT = 20.0  # seconds between two signs of life in a lease
# Seconds without one after which a lease counts as left behind: three beats, and 10 s for a slow
# network.
SILENCE = 70.0
SETTLE = 2.0  # seconds in which two that take a lease at the same moment have both written it
READ_BYTES = 1 << 16  # many times a lease


class Lease:
    """An object with a random token and a rising count.

    The run whose token is in it has the folder, as long as it goes on counting. Only changes are
    observed, never times: the clocks of two machines differ, and each may jump. A bucket has no
    operation that both reads and writes, so what is sure is that the last writer keeps the folder,
    and that each other one stops at its next `check_ownership()`.
    """

    def __init__(self, workdir: str) -> None:
        import tensorflow as tf  # here, because a lock on a disk needs none

        self.workdir, self.path = workdir, os.path.join(workdir, '.lock')
        self._files, self._errors = tf.io.gfile, tf.errors
        self._me = {**this_process(), 'token': uuid.uuid4().hex, 'count': 0}
        self._pid, self._is_writing, self._ended = os.getpid(), threading.Lock(), threading.Event()
        self._beats = threading.Thread(target=self._beat, name='lease of the workdir', daemon=True)

    def take(self) -> bool:
        """Writes the lease, after waiting for one whose holder may be dead. Returns True."""
        with storage.explained(self.path):
            self._files.makedirs(self.workdir)
            found = self._read()
            if found == b'':  # opened by one who is about to write, or who died before
                time.sleep(SETTLE)
                found = self._read()
            if found and not has_died_here(parsed(found)):
                self._wait_for_silence(found)
            self._write()
            time.sleep(SETTLE)
            winner = self._read()
        if not self._is_mine(winner):
            raise in_use(self.workdir, parsed(winner))
        self._beats.start()
        return True

    def check_ownership(self) -> None:
        """Raises RunError if the lease is gone or is another run's."""
        with self._is_writing, storage.explained(self.path):
            found = self._read()
        if found is None:
            raise RunError(
                f'{self.workdir} has vanished',
                f'the folder of this run, or {self.path}, was deleted or moved while it '
                'trained; nothing more is written',
            )
        if not self._is_mine(found):
            raise RunError(
                f'{self.workdir} was taken over by {name_of(parsed(found))}, to which this run '
                'seemed dead; nothing more is written'
            )

    def release(self) -> None:
        if os.getpid() != self._pid:  # a forked child has neither the thread nor the lease
            return
        self._ended.set()
        if self._beats.is_alive():
            self._beats.join(BEAT)  # a network that hangs must not keep the process from its end
        # What cannot be removed is silent, and taken over by the next run.
        with contextlib.suppress(OSError, self._errors.OpError):
            if self._is_mine(self._read()):
                self._files.remove(self.path)

    def _wait_for_silence(self, found: bytes) -> None:
        """Waits for SILENCE seconds without a sign of life. Raises RunError if there is one."""
        holder = name_of(parsed(found))
        still = f'to see whether {holder} still trains in {self.workdir}'
        console.row('waiting', f'up to {SILENCE:g} s {still}')
        end = time.monotonic() + SILENCE
        while time.monotonic() < end:
            time.sleep(min(BEAT / 4, max(0.0, end - time.monotonic())))
            now = self._read()
            if now is None:  # it ended meanwhile
                return
            if now != found:
                raise in_use(self.workdir, parsed(now) or parsed(found))
        console.row('waiting', f'it gave no sign of life: {self.workdir} is taken over')

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            # The next beat tries again.
            with (
                contextlib.suppress(OSError, self._errors.OpError),
                self._is_writing,
            ):
                before = time.monotonic()
                if not self._is_mine(self._read()):
                    return
                # Else the process was stopped in between, and somebody else may have come.
                if time.monotonic() - before < BEAT:
                    self._me['count'] += 1
                    self._write()

    def _read(self) -> bytes | None:
        """Returns the content of the lease, or None."""
        try:
            with self._files.GFile(self.path, 'rb') as file:
                return file.read(
                    READ_BYTES
                    # With a number, for without one TensorFlow asks for the size, and keeps that of
                    # a bucket for 5 s.
                )
        except self._errors.NotFoundError:
            return None

    def _write(self) -> None:
        with self._files.GFile(self.path, 'wb') as file:
            file.write(written(self._me))

    def _is_mine(self, found: bytes | None) -> bool:
        return parsed(found).get('token') == self._me['token']
