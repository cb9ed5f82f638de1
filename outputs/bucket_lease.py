"""Implements a lease on a run's folder, for buckets and for disks without locks."""

import contextlib
import os
import threading
import time
import uuid

from common import console, storage
from common.errors import RunError
from outputs.lock_holder import (
    decode_record,
    describe_holder,
    encode_record,
    has_died_here,
    in_use_error,
    this_process,
)

HEARTBEAT_SECONDS = 20.0  # between renewals of a lease
# Seconds without a heartbeat after which a lease counts as abandoned: three heartbeats plus 10 s
# for a slow network.
STALE_SECONDS = 70.0
SETTLE_SECONDS = (
    2.0  # seconds within which two runs that take the lease at once have both written it
)
READ_BYTES = 1 << 16  # far more than a lease needs


class Lease:
    """An object that holds a random token and a heartbeat counter.

    The run whose token it holds owns the folder as long as it keeps incrementing the counter. Only
    changes are observed, never timestamps, because clocks differ and may jump. A bucket has no
    atomic read-and-write, so the guarantee is that the last writer keeps the folder and every other
    run stops at its next `check_ownership()`.
    """

    def __init__(self, workdir: str) -> None:
        import tensorflow as tf  # here, because a lock on disk does not need it

        self.workdir, self.path = workdir, os.path.join(workdir, '.lock')
        self._files, self._errors = tf.io.gfile, tf.errors
        self._record = {**this_process(), 'token': uuid.uuid4().hex, 'count': 0}
        self._pid, self._is_writing, self._ended = os.getpid(), threading.Lock(), threading.Event()
        self._heartbeat = threading.Thread(
            target=self._beat, name='lease of the workdir', daemon=True
        )

    def take(self) -> bool:
        """Takes the lease, first waiting out one whose holder may be dead.

        Always returns True; `Lock.take` can return False.
        """
        with storage.one_line_errors(self.path):
            self._files.makedirs(self.workdir)
            found = self._read()
            if found == b'':  # created by a run that is about to write it, or died first
                time.sleep(SETTLE_SECONDS)
                found = self._read()
            if found and not has_died_here(decode_record(found)):
                self._wait_until_stale(found)
            self._write()
            time.sleep(SETTLE_SECONDS)
            winner = self._read()
        if not self._is_mine(winner):
            raise in_use_error(self.workdir, decode_record(winner))
        self._heartbeat.start()
        return True

    def check_ownership(self) -> None:
        """Raises RunError if the lease is gone or belongs to another run."""
        with self._is_writing, storage.one_line_errors(self.path):
            found = self._read()
        if found is None:
            raise RunError(
                f'{self.workdir} has vanished',
                f'the folder of this run, or {self.path}, was deleted or moved while it '
                'trained; nothing more is written',
            )
        if not self._is_mine(found):
            raise RunError(
                f'{self.workdir} was taken over by {describe_holder(decode_record(found))}, '
                'because this run seemed dead; nothing more is written'
            )

    def release(self) -> None:
        if os.getpid() != self._pid:  # a forked child has neither the thread nor the lease
            return
        self._ended.set()
        if self._heartbeat.is_alive():
            # A hanging network must not keep the process from exiting.
            self._heartbeat.join(HEARTBEAT_SECONDS)
        # A lease that cannot be removed goes stale and is taken over by the next run.
        with contextlib.suppress(OSError, self._errors.OpError):
            if self._is_mine(self._read()):
                self._files.remove(self.path)

    def _wait_until_stale(self, found: bytes) -> None:
        """Waits STALE_SECONDS; raises RunError if the holder shows a sign of life."""
        holder = describe_holder(decode_record(found))
        still = f'to see whether {holder} is still training in {self.workdir}'
        console.row('waiting', f'up to {STALE_SECONDS:g} s {still}')
        end = time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(min(HEARTBEAT_SECONDS / 4, max(0.0, end - time.monotonic())))
            now = self._read()
            if now is None:  # it ended meanwhile
                return
            if now != found:
                raise in_use_error(self.workdir, decode_record(now) or decode_record(found))
        console.row('waiting', f'no sign of life: taking over {self.workdir}')

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            # The next beat tries again.
            with (
                contextlib.suppress(OSError, self._errors.OpError),
                self._is_writing,
            ):
                before = time.monotonic()
                if not self._is_mine(self._read()):
                    return
                # Otherwise the process was suspended meanwhile, and another run may have taken
                # over.
                if time.monotonic() - before < HEARTBEAT_SECONDS:
                    self._record['count'] += 1
                    self._write()

    def _read(self) -> bytes | None:
        """Returns the content of the lease, or None."""
        try:
            with self._files.GFile(self.path, 'rb') as file:
                return file.read(
                    READ_BYTES
                    # With a limit: otherwise TensorFlow asks for the file size, which it caches for
                    # 5 s in a bucket.
                )
        except self._errors.NotFoundError:
            return None

    def _write(self) -> None:
        with self._files.GFile(self.path, 'wb') as file:
            file.write(encode_record(self._record))

    def _is_mine(self, found: bytes | None) -> bool:
        return decode_record(found).get('token') == self._record['token']
