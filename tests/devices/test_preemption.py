"""A run that is told to stop says so at once, has time to save, and ends at once when it is told
again.
"""

import contextlib
import http.server
import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from common.commands import ROOT
from devices import preemption

LINE = {
    'SIGINT': 'SIGINT: finishing the loop, then saving; interrupt again to stop at once',
    'SIGTERM': 'SIGTERM: finishing the loop, then saving',
}

# Within one call of C that releases the interpreter, as TensorFlow does while it computes, but that
# no signal interrupts: it waits for a lock of its own, until a line comes on the standard input.
COMPUTING = """
import ctypes, os, signal, sys, threading, time
from devices import preemption

libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(256)
libc.pthread_mutex_init(lock, None)
libc.pthread_mutex_lock(lock)


def release():
    sys.stdin.readline()
    libc.pthread_mutex_unlock(lock)


threading.Thread(target=release, daemon=True).start()
with preemption.watch(on_google_cloud=False) as stop:
    print('computing', flush=True)
    libc.pthread_mutex_lock(lock)
    print('saved because of', stop.why, flush=True)
sys.exit(preemption.exit_status(stop.signal))
"""


@contextlib.contextmanager
def computing(code=COMPUTING):
    pipes = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, text=True, **pipes)
    clock = threading.Timer(20, process.kill)  # who waits for a line gets the end instead
    clock.start()
    try:
        assert process.stdout.readline() == 'computing\n', process.communicate()
        yield process
    finally:
        clock.cancel()
        process.kill()
        process.communicate()


def send(process, name):
    process.send_signal(getattr(signal, name))


def told(process):
    """The line after an empty one: the progress bar's may not have ended."""
    assert process.stdout.readline() == '\n'
    return process.stdout.readline().rstrip('\n')


def wait_for(condition, seconds=8):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def threads():
    return {thread.name for thread in threading.enumerate()} & {
        'signals',
        'notices of Google Cloud',
    }


@pytest.mark.parametrize('name, status', [('SIGINT', 0), ('SIGTERM', 143)])
def test_a_signal_during_compute_is_answered_and_the_run_saves(name, status):
    with computing() as process:
        send(process, name)
        assert told(process) == LINE[name]
        assert process.poll() is None
        output, errors = process.communicate('go on\n', timeout=8)
        assert (
            output == f'saved because of {name}\n' and errors == '' and process.returncode == status
        )


@pytest.mark.parametrize('first', ['SIGINT', 'SIGTERM'])
def test_the_second_ctrl_c_stops_at_once_during_compute(first):
    with computing() as process:
        send(process, first)
        assert told(process) == LINE[first]
        send(process, 'SIGINT')
        assert process.wait(8) == 130
        assert (
            process.stderr.read()
            == 'stopped at once; the same command continues from the last checkpoint\n'
            and process.stdout.read() == ''
        )


@pytest.mark.parametrize('first', ['SIGINT', 'SIGTERM'])
def test_further_sigterm_change_nothing(first):
    with computing() as process:
        send(process, first)
        assert told(process) == LINE[first]
        for _ in range(3):
            send(process, 'SIGTERM')
            time.sleep(0.1)
        output, errors = process.communicate('go on\n', timeout=8)
        assert (output, errors, process.returncode) == (
            f'saved because of {first}\n',
            '',
            preemption.exit_status(getattr(signal, first)),
        )


def test_ctrl_c_twice_stops_a_run_whose_output_nobody_takes():
    """As in `python main.py | less`: the main thread waits for the pipe, and the thread that would
    say something for the main thread.
    """
    code = COMPUTING.replace(
        'libc.pthread_mutex_lock(lock)\n    print',
        "while True:\n        sys.stdout.write('progress ' * 1000)\n    print",
    )
    with computing(code) as process:
        time.sleep(0.5)  # until the pipe is full
        for _ in range(2):
            send(process, 'SIGINT')
            time.sleep(0.5)
        assert process.wait(8) == 130


def test_what_comes_next_in_the_main_thread_sees_the_signal():
    with (
        contextlib.redirect_stdout(io.StringIO()) as output,
        preemption.watch(on_google_cloud=False) as stop,
    ):
        assert stop == preemption.Stop(None, '')
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop == preemption.Stop(signal.SIGTERM, 'SIGTERM')
        os.kill(os.getpid(), signal.SIGTERM)
        assert wait_for(lambda: output.getvalue() == f'\n{LINE["SIGTERM"]}\n')


def test_afterwards_all_is_as_before(capsys):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    before = len(os.listdir('/dev/fd'))
    with contextlib.suppress(ZeroDivisionError), preemption.watch(on_google_cloud=False):
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert signal.set_wakeup_fd(-1) == -1 and not threads() and len(os.listdir('/dev/fd')) == before
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert capsys.readouterr().out == ''


def test_ctrl_c_ignored_by_the_shell_does_not_stop_a_job():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with preemption.watch(on_google_cloud=False) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_a_window_that_changes_its_size_stops_nothing():
    before = signal.signal(signal.SIGWINCH, lambda number, frame: None)
    try:
        with preemption.watch(on_google_cloud=False) as stop:
            os.kill(os.getpid(), signal.SIGWINCH)
            time.sleep(0.2)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGWINCH, before)


def test_a_signal_to_a_forked_process_is_its_own():
    code = """
import os, signal, time
from devices import preemption

with preemption.watch(on_google_cloud=False) as stop:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b'.')
        time.sleep(20)
        os._exit(1)
    os.read(reading, 1)
    print('computing', flush=True)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    time.sleep(0.3)
    print(os.WTERMSIG(status), stop.signal)
"""
    with computing(code) as process:
        assert process.communicate(timeout=8) == ('15 None\n', '')


def test_in_another_thread_signals_stay_as_they_are():
    handlers, seen = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], []

    def work():
        with preemption.watch(on_google_cloud=False) as stop:
            seen.append(
                (
                    stop.signal,
                    [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
                )
            )

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, handlers)]


@pytest.fixture
def google(monkeypatch):
    """What the metadata server of this machine says, a dict of text, or of the status of an error;
    and what it was asked.
    """
    values, asked = {'preempted': 'FALSE', 'maintenance-event': 'NONE'}, []

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start, _, key = self.path.rpartition('/')
            asked.append(key)
            answer = (
                values[key]
                if (start, self.headers['Metadata-Flavor'])
                == ('/computeMetadata/v1/instance', 'Google')
                else 403
            )
            self.send_response(200 if isinstance(answer, str) else answer)
            self.end_headers()
            self.wfile.write(str(answer).encode())

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Metadata)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv('GCE_METADATA_HOST', f'127.0.0.1:{server.server_port}')
    monkeypatch.setenv('http_proxy', 'http://127.0.0.1:9')  # nothing is there
    yield values, asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    'key, value, why',
    [
        ('preempted', 'TRUE', 'Google Cloud is reclaiming this machine'),
        (
            'maintenance-event',
            'TERMINATE_ON_HOST_MAINTENANCE',
            'Google Cloud is stopping this machine for maintenance',
        ),
    ],
)
def test_a_notice_of_google_cloud_counts_as_sigterm(google, key, value, why):
    values, asked = google
    values.update({name: 404 for name in values if name != key})  # the other one may be missing
    with contextlib.redirect_stdout(io.StringIO()) as output, preemption.watch() as stop:
        assert wait_for(lambda: key in asked) and stop.signal is None
        values[key] = value
        assert wait_for(lambda: stop.signal is not None, seconds=5)
        assert (
            stop == preemption.Stop(signal.SIGTERM, why)
            and preemption.exit_status(stop.signal) == 143
        )
        os.kill(os.getpid(), signal.SIGTERM)  # that of the machine, when it goes down
        assert (
            wait_for(lambda: output.getvalue() == f'\n{why}: finishing the loop, then saving\n')
            and stop.why == why
        )
    assert wait_for(lambda: not threads())


def test_a_notice_stops_a_run_in_another_thread_too(google):
    google[0]['preempted'] = 'TRUE'
    seen = []

    def work():
        with preemption.watch() as stop:
            seen.append(wait_for(lambda: stop.signal))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.SIGTERM]


def test_a_machine_that_moves_while_it_runs_is_not_stopped(google):
    values, asked = google
    values['maintenance-event'] = 'MIGRATE_ON_HOST_MAINTENANCE'
    with preemption.watch() as stop:
        assert wait_for(lambda: asked.count('preempted') == 2)
        assert stop.signal is None


@pytest.mark.parametrize('trouble', ['nothing is there', '403', 'no host'])
def test_a_silent_metadata_server_is_polled_less_and_less(google, monkeypatch, capfd, trouble):
    google[0].update(preempted=403, **{'maintenance-event': 403})
    if trouble != '403':
        monkeypatch.setenv(
            'GCE_METADATA_HOST', '127.0.0.1:9' if trouble == 'nothing is there' else 'no host:x'
        )
    pauses = []

    class Ended(threading.Event):
        def wait(self, timeout=None):
            pauses.append(timeout)
            if len(pauses) == 7:
                self.set()

    preemption._ask_google(lambda *arguments: pytest.fail(f'told {arguments}'), Ended())
    assert pauses == [4, 8, 16, 32, 60, 60, 60]
    assert capfd.readouterr() == ('', '')


def test_only_machines_of_google_are_asked(tmp_path):
    assert not preemption._on_google_cloud({}, tmp_path)
    (tmp_path / 'sys/class/dmi/id').mkdir(parents=True)
    for name, expected in (
        ('Google Compute Engine\n', True),
        ('Google\n', True),
        ('Standard PC (Q35 + ICH9, 2009)\n', False),
    ):
        (tmp_path / 'sys/class/dmi/id/product_name').write_text(name)
        assert preemption._on_google_cloud({}, tmp_path) == expected
    assert preemption._on_google_cloud({'GCE_METADATA_HOST': 'metadata.google.internal'}, tmp_path)
    with preemption.watch(on_google_cloud=False):
        assert threads() == {'signals'}
