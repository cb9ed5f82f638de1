"""Two runs never train in one folder, and a run that was killed keeps nobody out."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid

import pytest
import tensorflow as tf

from common import storage
from common.commands import ROOT
from common.errors import RunError
from outputs import bucket_lease, lock_holder, workdir_lock
from tests.conftest import refused

HOLDS = """
import os, sys, time
from outputs import workdir_lock
with workdir_lock.hold(sys.argv[1]):
    child = os.fork() if 'fork' in sys.argv else None
    if child != 0:
        print('held', child, flush=True)
    sys.stdin.readline() if child != 0 else time.sleep(60)
"""

TRIES = """
import sys
from common.errors import RunError
from outputs import workdir_lock
try:
    with workdir_lock.hold(sys.argv[1]):
        print('held')
except RunError as error:
    print(error)
"""

TAKES_TURNS = """
import os, sys
from common.errors import RunError
from outputs import workdir_lock
turns = 0
while turns < 40:
    try:
        with workdir_lock.hold(sys.argv[1]) as held:
            os.mkdir(sys.argv[2])  # fails if somebody else is inside
            held.check_ownership()
            os.rmdir(sys.argv[2])
            turns += 1
    except RunError as error:
        assert 'is in use' in str(error), error
"""


@contextlib.contextmanager
def holder_of(folder, *options):
    """Another process that trains in the folder until its standard input ends; with 'fork' it has a
    child that outlives it.
    """
    with subprocess.Popen(
        [sys.executable, '-c', HOLDS, str(folder), *options],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            word, child = process.stdout.readline().split()
            assert word == 'held'
            process.child = None if child == 'None' else int(child)
            yield process
        finally:
            process.kill()


def tried_by_another_process(folder):
    return subprocess.run(
        [sys.executable, '-c', TRIES, str(folder)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    ).stdout.strip()


def refusal(folder):
    with refused(RunError) as caught, workdir_lock.hold(folder):
        pass
    return str(caught.value)


# A folder on a disk.


def test_a_second_run_in_the_folder_is_refused_naming_the_first(tmp_path):
    with holder_of(tmp_path / 'run') as process:
        message = refusal(tmp_path / 'run')
        with open(tmp_path / 'run' / '.lock') as file:
            written = json.load(file)
    assert written['host'] == socket.gethostname() and written['pid'] == process.pid
    assert f'process {process.pid} on {written["host"]} (since {written["started"]})' in message
    assert 'wait for it' in message
    assert '--workdir' in message


def test_a_killed_run_keeps_nobody_out(tmp_path):
    with holder_of(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / '.lock').exists()
        with workdir_lock.hold(tmp_path) as held:
            held.check_ownership()
            with open(tmp_path / '.lock', 'rb') as file:
                assert json.load(file)['pid'] == os.getpid()


def test_an_orphan_of_a_killed_run_keeps_nobody_out(tmp_path):
    with holder_of(tmp_path, 'fork') as process:
        try:
            process.send_signal(signal.SIGKILL)
            process.wait()
            os.kill(process.child, 0)  # it is alive
            with workdir_lock.hold(tmp_path) as held:
                held.check_ownership()
        finally:
            os.kill(process.child, signal.SIGKILL)


def test_a_run_that_ends_removes_its_lock_also_after_an_error(tmp_path):
    with holder_of(tmp_path) as process:
        process.communicate()
        assert process.returncode == 0 and os.listdir(tmp_path) == []
    with pytest.raises(ZeroDivisionError), workdir_lock.hold(tmp_path):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_a_lock_that_cannot_be_removed_does_not_fail_the_run(tmp_path, monkeypatch):
    def fails(_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with workdir_lock.hold(tmp_path):
        monkeypatch.setattr(os, 'remove', fails)
    monkeypatch.undo()
    assert tried_by_another_process(tmp_path) == 'held'


def test_runs_in_one_process_exclude_each_other_by_any_path(tmp_path, monkeypatch):
    os.symlink(tmp_path, tmp_path / 'other-name')
    monkeypatch.chdir(tmp_path.parent)
    with workdir_lock.hold(tmp_path), workdir_lock.hold(tmp_path / 'another-run'):
        for name in (tmp_path, tmp_path / 'other-name', tmp_path.name):
            assert 'this process' in refusal(name)
        assert f'process {os.getpid()} on' in tried_by_another_process(
            tmp_path
        )  # to be asked has not unlocked it
    with workdir_lock.hold(tmp_path / 'other-name'):
        pass


def test_of_many_processes_one_is_in_the_folder_at_a_time(tmp_path):
    command = [sys.executable, '-c', TAKES_TURNS, str(tmp_path / 'run'), str(tmp_path / 'inside')]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [process.communicate()[1] for process in processes] == [''] * 3
    assert [process.returncode for process in processes] == [0] * 3


def test_a_lock_removed_while_it_is_opened_is_not_taken(tmp_path, monkeypatch):
    lockf, removed = fcntl.lockf, []

    def removed_before(file, how):
        if not removed:
            removed.append(os.remove(tmp_path / '.lock'))
        lockf(file, how)

    monkeypatch.setattr(fcntl, 'lockf', removed_before)
    with workdir_lock.hold(tmp_path) as held:
        held.check_ownership()
        assert removed and 'is in use' in tried_by_another_process(tmp_path)


def test_a_forked_child_does_not_release_the_folder(tmp_path):
    held = workdir_lock.Lock(tmp_path)
    assert held.take()
    child = os.fork()
    if child == 0:
        held.release()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    held.check_ownership()
    assert 'is in use' in tried_by_another_process(tmp_path)
    held.release()
    assert tried_by_another_process(tmp_path) == 'held'


def test_the_lock_survives_another_reader_in_the_process(tmp_path):
    with workdir_lock.hold(tmp_path) as held:
        shutil.copytree(
            tmp_path, tmp_path.with_name('copy')
        )  # the kernel lets go of a lock when its process closes the file
        held.check_ownership()
        assert 'is in use' in tried_by_another_process(tmp_path)


@pytest.mark.parametrize('what', ['deleted', 'moved', 'replaced', 'its lock removed'])
def test_a_vanished_folder_is_noticed_before_writing(tmp_path, what):
    folder = tmp_path / 'run'
    with (
        refused(RunError, folder),
        workdir_lock.hold(folder) as held,
    ):
        held.check_ownership()
        if what == 'its lock removed':
            os.remove(folder / '.lock')
        elif what == 'deleted':
            shutil.rmtree(folder)
        else:
            os.rename(folder, tmp_path / 'moved')
        if what == 'replaced':
            shutil.copytree(tmp_path / 'moved', folder)
        held.check_ownership()
    with workdir_lock.hold(folder):  # a new run may begin there
        pass


@pytest.mark.parametrize(
    'number', [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EIO]
)
@pytest.mark.parametrize('function', ['makedirs', 'open', 'write'])
def test_an_unwritable_folder_is_one_line_with_a_fix(tmp_path, monkeypatch, number, function):
    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, function, fails)
    message = refusal(tmp_path)
    reason, fix = storage.CAUSES[number]
    assert message == f'{tmp_path}/.lock cannot be written: {reason}: {fix}'
    monkeypatch.undo()
    with workdir_lock.hold(tmp_path):
        pass


def test_a_file_in_the_place_of_the_folder_is_said_in_one_line(tmp_path):
    (tmp_path / 'file').write_text('')
    for folder in (tmp_path / 'file', tmp_path / 'file' / 'run'):
        assert re.search(
            'a file has the name of this folder|a part of this path is a file', refusal(folder)
        )


# A folder in a bucket, or on a disk without locks.


@pytest.fixture
def quick(monkeypatch):
    """Seconds are hundredths; a lease that rises is seen long before the silence is over."""
    monkeypatch.setattr(bucket_lease, 'HEARTBEAT_SECONDS', 0.05)
    monkeypatch.setattr(bucket_lease, 'STALE_SECONDS', 1.0)
    monkeypatch.setattr(bucket_lease, 'SETTLE_SECONDS', 0.01)


@pytest.fixture
def bucket(tmp_path, quick):
    """A folder that is reached through TensorFlow alone. Its files are not replaced as a whole, as
    they are in a bucket: that is harder.
    """
    return f'file://{tmp_path}/bucket/run'


def leave_behind(bucket, **changes):
    """The lease of a run that was killed on another machine; returns its path."""
    holder = {
        'host': 'far-away',
        'machine': 'another',
        'pid': 4711,
        'started': '2020-02-02T02:02:02+00:00',
        'token': 'x',
        'count': 5,
        **changes,
    }
    tf.io.gfile.makedirs(bucket)
    path = os.path.join(bucket, '.lock')
    with tf.io.gfile.GFile(path, 'w') as file:
        file.write(json.dumps(holder))
    return path


def lease_in(bucket):
    with tf.io.gfile.GFile(os.path.join(bucket, '.lock')) as file:
        return json.loads(file.read().splitlines()[-1])


def dead_pid():
    with subprocess.Popen(['true']) as process:
        process.wait()
    return process.pid


def test_a_second_run_in_a_bucket_is_refused_at_a_heartbeat(bucket, capsys):
    with workdir_lock.hold(bucket) as held:
        message = refusal(bucket)
        assert (
            f'process {os.getpid()} on {socket.gethostname()} (since ' in message
            and '--workdir' in message
        )
        assert 'waiting   up to 1 s' in capsys.readouterr().out
        held.check_ownership()
    assert not tf.io.gfile.exists(os.path.join(bucket, '.lock'))
    with workdir_lock.hold(bucket) as held:
        held.check_ownership()


def test_a_lease_of_a_run_killed_elsewhere_expires(bucket, capsys, monkeypatch):
    monkeypatch.setattr(bucket_lease, 'STALE_SECONDS', 0.3)
    leave_behind(bucket, started='2999-01-01T00:00:00+00:00')  # clocks are not asked
    start = time.monotonic()
    with workdir_lock.hold(bucket) as held:
        assert time.monotonic() - start >= 0.3
        held.check_ownership()
        assert lease_in(bucket)['pid'] == os.getpid()
    out = capsys.readouterr().out
    assert (
        'up to 0.3 s to see whether process 4711 on far-away (since 2999' in out
        and 'taking over' in out
    )


def test_a_lease_of_a_run_killed_here_is_taken_over_at_once(bucket, capsys, monkeypatch):
    monkeypatch.setattr(bucket_lease, 'STALE_SECONDS', 60.0)
    monkeypatch.setattr(lock_holder, '_machine', lambda: 'this start of this container')
    leave_behind(
        bucket, host=socket.gethostname(), machine='this start of this container', pid=dead_pid()
    )
    with workdir_lock.hold(bucket) as held:
        held.check_ownership()
    assert 'waiting' not in capsys.readouterr().out


@pytest.mark.parametrize('machine', ['another container with the same host name', ''])
def test_a_pid_of_another_container_proves_no_death(bucket, capsys, monkeypatch, machine):
    monkeypatch.setattr(bucket_lease, 'STALE_SECONDS', 0.1)
    monkeypatch.setattr(lock_holder, '_machine', lambda: machine and 'this container')
    leave_behind(bucket, host=socket.gethostname(), machine=machine, pid=dead_pid())
    with workdir_lock.hold(bucket):
        assert 'taking over' in capsys.readouterr().out


def test_a_waiting_run_starts_when_the_holder_ends(bucket, capsys, monkeypatch):
    monkeypatch.setattr(bucket_lease, 'STALE_SECONDS', 60.0)
    path = leave_behind(bucket)
    end = threading.Timer(0.1, tf.io.gfile.remove, [path])
    end.start()
    with workdir_lock.hold(bucket) as held:
        held.check_ownership()
    assert 'taking over' not in capsys.readouterr().out


@pytest.mark.parametrize('left', ['', '{"host": "far-aw', '[]', '\x00\xff', '{"pid": "x"}'])
def test_a_damaged_lease_keeps_nobody_out(bucket, monkeypatch, left):
    monkeypatch.setattr(bucket_lease, 'STALE_SECONDS', 0.1)
    path = leave_behind(bucket)
    with tf.io.gfile.GFile(path, 'wb') as file:
        file.write(left.encode('latin-1'))
    with workdir_lock.hold(bucket) as held:
        held.check_ownership()


def test_of_two_simultaneous_runs_the_last_writer_gets_a_bucket(bucket, monkeypatch):
    write = bucket_lease.Lease._write

    def and_another_one_writes(lease):
        write(lease)
        leave_behind(bucket)

    monkeypatch.setattr(bucket_lease.Lease, '_write', and_another_one_writes)
    assert 'is in use: process 4711 on far-away' in refusal(bucket)
    assert lease_in(bucket)['token'] == 'x'  # the loser has left it alone


def test_a_run_that_seemed_dead_writes_no_more(bucket):
    with (
        refused(RunError, 'process 4711 on far-away'),
        workdir_lock.hold(bucket) as held,
    ):
        leave_behind(bucket)
        held._heartbeat.join(2)
        assert not held._heartbeat.is_alive()
        held.check_ownership()
    assert lease_in(bucket)['token'] == 'x'


def test_a_run_paused_between_reading_and_writing_reads_again(bucket, monkeypatch):
    read, stopped = bucket_lease.Lease._read, threading.Event()

    def stopped_after(lease):
        found = read(lease)
        if threading.current_thread() is lease._heartbeat and not stopped.is_set():
            leave_behind(bucket)  # by a run to which this one seemed dead
            time.sleep(0.1)
            stopped.set()
        return found

    monkeypatch.setattr(bucket_lease.Lease, '_read', stopped_after)
    with workdir_lock.hold(bucket) as held:
        assert stopped.wait(2)
        held._heartbeat.join(2)
        assert not held._heartbeat.is_alive() and lease_in(bucket)['token'] == 'x'


def test_a_vanished_bucket_folder_is_noticed_and_not_recreated(bucket):
    with refused(RunError, bucket), workdir_lock.hold(bucket) as held:
        tf.io.gfile.rmtree(bucket)
        held._heartbeat.join(2)
        assert not held._heartbeat.is_alive()
        held.check_ownership()
    assert not tf.io.gfile.exists(bucket)


def test_a_brief_network_outage_does_not_end_the_lease(bucket, monkeypatch):
    read, failed = bucket_lease.Lease._read, threading.Event()

    def fails_once(lease):
        if threading.current_thread() is lease._heartbeat and not failed.is_set():
            failed.set()
            raise tf.errors.UnavailableError(None, None, 'away')
        return read(lease)

    monkeypatch.setattr(bucket_lease.Lease, '_read', fails_once)
    with workdir_lock.hold(bucket) as held:
        assert failed.wait(2)
        count = lease_in_rises(bucket)
        held.check_ownership()
    assert count > 0


def lease_in_rises(bucket):
    """The count of the lease when it has risen, at most 2 s later."""
    end = time.monotonic() + 2
    while time.monotonic() < end:
        with contextlib.suppress(IndexError, ValueError):  # read while it was written
            if lease_in(bucket)['count'] > 0:
                return lease_in(bucket)['count']
        time.sleep(0.02)
    return 0


def test_a_lease_works_in_a_file_system_that_appends(quick):
    folder = f'ram://{uuid.uuid4().hex}/run'
    with workdir_lock.hold(folder) as held:
        assert lease_in_rises(folder) > 0
        held.check_ownership()
    assert not tf.io.gfile.exists(os.path.join(folder, '.lock'))


def test_an_unreachable_file_system_is_one_line():
    assert (
        "zz://bucket/run/.lock cannot be written (File system scheme 'zz' not implemented"
        in refusal('zz://bucket/run')
    )


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_lease_protects_a_disk_without_locks(tmp_path, quick, monkeypatch, number):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, 'lockf', no_locks)
    with workdir_lock.hold(tmp_path) as held:
        held.check_ownership()
        assert f'process {os.getpid()} on' in refusal(tmp_path)
    assert os.listdir(tmp_path) == []
