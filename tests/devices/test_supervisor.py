"""The loss of another process ends a process of JAX with one line, which names the lost one."""

import signal
import subprocess
import sys
import time

import pytest

from common.commands import ROOT
from devices import supervisor

# What the service of jaxlib 0.10.2 wrote when process 1, and when process 0 had been killed.
OTHER_LOST = """\
F1128 02:27:41.028443    7439 client.h:80] Terminating process because the JAX distributed service \
detected fatal errors. absl::Status: UNAVAILABLE: The following tasks are unhealthy (stopped \
sending heartbeats):
1
The tasks have crashed. Check the task logs for an earlier error.
*** Check failure stack trace: ***
    @     0x7fba00240634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""
LEADER_LOST = """\
F1128 02:27:45.615507    7858 client.h:80] Terminating process because the JAX distributed service \
detected fatal errors. absl::Status: UNAVAILABLE: Failed to send RPC to coordination service. \
Either the leader task was preempted/died/restarted unexpectedly.
"""


def supervised(program, **options):
    begin = (
        f'import sys; sys.path.insert(0, {ROOT!r})\n'
        'from devices import supervisor\nsupervisor.run_as_child()\nimport os, signal, time\n'
    )
    return subprocess.Popen(
        [sys.executable, '-c', begin + program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize(
    'words, lost',
    [
        (OTHER_LOST, '1'),
        (OTHER_LOST.replace('\n1\n', '\n1\n3\n'), '1, 3'),
        (LEADER_LOST, '0'),
        ('F1128 02:27:41.0 1 host.cc:1] something else\n', None),
        ('', None),
    ],
)
def test_the_lost_process_is_read_from_the_service(words, lost):
    assert supervisor.lost_process(words) == lost


@pytest.mark.parametrize('words, lost', [(OTHER_LOST, 1), (LEADER_LOST, 0)])
def test_a_loss_is_one_line_and_status_1(words, lost):
    program = f'sys.stderr.write("a note\\n" + {words!r}); sys.stderr.flush(); os.abort()'
    process = supervised(program)
    _, said = process.communicate(timeout=60)
    note, line = said.splitlines()
    assert process.returncode == 1 and note == 'a note'
    assert line.startswith(f'error: process {lost} no longer responds: restart all processes')


ENDED = 'error: this process was ended by'


@pytest.mark.parametrize(
    'program, status, out, err',
    [
        ('print("done")', 0, 'done\n', ''),
        ('print("error: no", file=sys.stderr); sys.exit(2)', 2, '', 'error: no\n'),
        ('os.kill(os.getpid(), signal.SIGKILL)', 137, '', f'{ENDED} SIGKILL, perhaps for lack'),
        (
            'os.write(2, b"F1128 02:27:41.0 1 client.h:1] why\\n"); os.abort()',
            134,
            '',
            f'F1128 02:27:41.0 1 client.h:1] why\n{ENDED} SIGABRT',
        ),
    ],
)
def test_all_else_is_passed_on_with_its_status(program, status, out, err):
    process = supervised(program)
    output, errors = process.communicate(timeout=60)
    assert output == out and errors.startswith(err) and (err or not errors)
    assert process.returncode == status


def test_signals_reach_the_child_once():
    process = supervised(
        'heard = []\n'
        'signal.signal(signal.SIGTERM, lambda *_: heard.append(1))\n'
        'print("ready", flush=True)\n'
        'time.sleep(1)\n'
        'sys.exit(100 + len(heard))'
    )
    assert process.stdout.readline() == 'ready\n'
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 101


@pytest.mark.skipif(sys.platform != 'linux', reason='Linux ends a child with its parent')
def test_the_child_does_not_outlive_a_killed_parent():
    process = supervised('print(os.getpid(), flush=True); time.sleep(60)')
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)


def is_alive(process):
    """Whether it runs; a zombie, which nobody has waited for, does not."""
    try:
        with open(f'/proc/{process}/status') as status:
            return 'State:\tZ' not in status.read()
    except OSError:
        return False
