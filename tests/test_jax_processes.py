"""Several processes on this machine train as one on JAX's runtime: the weights of one process with
as many devices, one set of files, and they stop and fail together.
"""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from common.commands import ROOT
from common.storage import read_json
from outputs.checkpoints import steps_in
from outputs.metrics_logger import read_metrics
from tests.test_workers import ARGUMENTS, finish, free_ports

pytest.importorskip('jax', '0.10', 'JAX 0.10 is for Python 3.11 and later')
pytestmark = pytest.mark.slow


def start(workdir, *changes):
    """Starts the same command in two processes, with two devices each."""
    (port,) = free_ports(1)
    arguments = [
        *ARGUMENTS,
        '--config.model.sync_batch_norm=true',
        '--config.strategy=pjrt',
        '--config.virtual_devices=2',
        f'--workdir={workdir}',
        *changes,
    ]
    clusters = [
        [f'--coordinator=localhost:{port}', '--num_processes=2', f'--process_id={index}']
        for index in range(2)
    ]
    return [
        subprocess.Popen(
            [sys.executable, os.path.join(ROOT, 'main.py'), *arguments, *cluster],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for cluster in clusters
    ]


def digest(workdir):
    return read_json(os.path.join(workdir, 'summary.json'))['weights_sha256']


def wait_until(happened, seconds=200):
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert happened()


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """The folder of a run of two processes, and how they ended."""
    workdir = str(tmp_path_factory.mktemp('processes') / 'run')
    return workdir, finish(start(workdir))


def test_two_processes_are_one_run(undisturbed):
    workdir, ended = undisturbed
    assert [status for status, *_ in ended] == [0, 0], ended
    assert "JAX's runtime on 4 virtual CPUs" in ended[0][1]
    assert [row['step'] for row in read_metrics(workdir)] == [5, 10, 15, 20, 25, 30]
    summary = read_json(os.path.join(workdir, 'summary.json'))
    assert summary['eval/examples'] == 360 and summary['steps'] == 30
    assert summary['export/accuracy'] == summary['eval/accuracy']


def test_a_killed_process_ends_the_other_and_both_continue(undisturbed, tmp_path):
    """The weights are in the end those of a run that was not disturbed."""
    workdir = str(tmp_path / 'run')
    checkpoints = os.path.join(workdir, 'checkpoints')
    for lost in (1, 0):
        before = steps_in(checkpoints)
        processes = start(workdir, '--config.steps_per_loop=1')
        wait_until(lambda before=before: steps_in(checkpoints) != before)
        processes[lost].kill()
        begin = time.monotonic()
        ended = finish(processes, timeout=60)
        assert time.monotonic() - begin < 60
        status, _, said = ended[1 - lost]
        (line,) = [line for line in said.splitlines() if 'error' in line]
        assert status == 1 and line == (
            f'error: process {lost} no longer responds: restart all processes; they continue at '
            'the last checkpoint'
        )
    ended = finish(start(workdir))
    assert [status for status, *_ in ended] == [0, 0], ended
    assert digest(workdir) == digest(undisturbed[0])


def test_a_signal_to_any_process_stops_all_resumably(tmp_path):
    workdir = str(tmp_path / 'run')
    processes = start(workdir, '--config.train_for=20000 steps')
    wait_until(lambda: read_metrics(workdir))
    processes[1].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert [status for status, *_ in ended] == [143, 143], ended
    stopped = re.search(r'continues from step ([\d,]+), the last one saved', ended[0][1])[1]
    step = int(stopped.replace(',', ''))
    assert os.path.exists(os.path.join(workdir, 'checkpoints', f'step-{step}', 'manifest.json'))
