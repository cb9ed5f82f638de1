"""Several processes on this machine train as one: the same weights, one set of files, and they stop
and fail together.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

import main
from common.commands import ROOT
from common.storage import read_json
from outputs.checkpoints import steps_in
from outputs.metrics_logger import read_metrics
from tests.modeling.test_pretrained import write_foreign_teacher

ARGUMENTS = (
    '--config=configs/digits.py',
    '--config.model.name=tiny',
    '--config.image_size=16',
    '--config.batch_size=32',
    '--config.train_for=30 steps',
    '--config.schedule.warmup=3 steps',
    '--config.log_every=5 steps',
    '--config.eval_every=10 steps',
    '--config.checkpoint_every=10 steps',
    '--config.steps_per_loop=2',
    '--config.model.sync_batch_norm=false',
)


def free_ports(count):
    sockets = [socket.create_server(('localhost', 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def start(arguments, workers=2):
    """Starts the same command in several processes, each with its TF_CONFIG, as a launcher on
    several machines would.
    """
    addresses = [f'localhost:{port}' for port in free_ports(workers)]
    processes = []
    for index in range(workers):
        cluster = json.dumps(
            {'cluster': {'worker': addresses}, 'task': {'type': 'worker', 'index': index}}
        )
        environment = {**os.environ, 'TF_CONFIG': cluster}
        processes.append(
            subprocess.Popen(
                [sys.executable, os.path.join(ROOT, 'main.py'), *arguments],
                env=environment,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def finish(processes, timeout=300):
    """[(exit status, standard output, standard error)] of all; kills what is left."""
    try:
        ended = [process.communicate(timeout=timeout) for process in processes]
        return [(process.returncode, *said) for process, said in zip(processes, ended, strict=True)]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A run of two workers with a frozen block and a teacher: (its arguments, its folder, how it
    ended).
    """
    folder = tmp_path_factory.mktemp('workers')
    write_foreign_teacher(str(folder / 'teacher'))
    workdir = str(folder / 'run')
    arguments = [
        *ARGUMENTS,
        f'--workdir={workdir}',
        f'--config.distill.teacher={folder}/teacher',
        '--config.model.freeze=block1',
        '--config.model.layer_decay=0.5',
    ]
    return arguments, workdir, finish(start(arguments))


@pytest.mark.slow
def test_one_worker_writes_and_speaks_for_all(finished):
    _, workdir, ended = finished
    assert [status for status, *_ in ended] == [0, 0], ended
    assert (
        'MultiWorkerMirroredStrategy on 2 workers, 2 replicas' in ended[0][1] and ended[1][1] == ''
    )
    assert [row['step'] for row in read_metrics(workdir)] == [5, 10, 15, 20, 25, 30]
    summary = read_json(os.path.join(workdir, 'summary.json'))
    assert (
        summary['eval/examples'] == 360
        and summary['steps'] == 30
        and summary['export/accuracy'] == summary['eval/accuracy']
    )
    assert sorted(os.listdir(workdir)) == [
        'checkpoints',
        'config.json',
        'environment.json',
        'export',
        'metrics.jsonl',
        'plots',
        'report.md',
        'summary.json',
        'tensorboard',
    ]


@pytest.mark.slow
def test_workers_forget_the_same_and_export_the_best_together(finished, tmp_path):
    """If one of them evaluated or stopped where another does not, both would wait for ever."""
    arguments, before, _ = finished
    workdir = str(tmp_path / 'run')
    shutil.copytree(before, workdir)
    changes = [
        '--config.dataset.eval_split=train[:300]',
        '--config.train_for=60 steps',
        '--config.patience=10 steps',
        '--config.batch_size=16',
        '--config.schedule.peak_lr=1e3',
        '--config.max_skipped_updates=0',
    ]
    ended = finish(start([*arguments, f'--workdir={workdir}', '--resume=changed', *changes]))
    assert [status for status, *_ in ended] == [0, 0], ended
    summary = read_json(os.path.join(workdir, 'summary.json'))
    assert (summary['steps'], summary['export/step'], summary['best/step']) == (40, 30, 30)
    assert (
        summary['eval/examples'] == 300
        and summary['export/accuracy'] == summary['export/eval_accuracy'] > summary['eval/accuracy']
    )
    assert summary['examples_seen'] == 30 * 32 + 10 * 16


def training(tmp_path):
    """(processes, folder) of a long run that has begun to train."""
    workdir = str(tmp_path / 'run')
    processes = start(
        [
            *ARGUMENTS,
            '--config.train_for=20000 steps',
            '--config.schedule.warmup=3 steps',
            f'--workdir={workdir}',
        ]
    )
    deadline = time.monotonic() + 200
    while not read_metrics(workdir) and time.monotonic() < deadline:
        time.sleep(0.2)
    return processes, workdir


@pytest.mark.slow
def test_a_signal_to_any_worker_stops_all_resumably(tmp_path):
    processes, workdir = training(tmp_path)
    processes[1].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert [status for status, *_ in ended] == [143, 143], ended
    stopped = int(
        re.search(r'continues from step ([\d,]+), the last one saved', ended[0][1])[1].replace(
            ',', ''
        )
    )
    assert os.path.exists(os.path.join(workdir, 'checkpoints', f'step-{stopped}', 'manifest.json'))


@pytest.mark.slow
def test_a_waiting_worker_says_so_and_ends_by_ctrl_c(tmp_path):
    process, absent = start([*ARGUMENTS, f'--workdir={tmp_path}/run'])
    absent.kill()
    assert (
        process.stderr.readline()
        == 'waiting for the other workers that TF_CONFIG names, 2 in all\n'
    )
    time.sleep(3)  # it waits in TensorFlow now
    process.send_signal(signal.SIGINT)
    (status, *_), _ = finish([process, absent], timeout=60)
    assert status == -signal.SIGINT


@pytest.mark.slow
def test_a_killed_worker_ends_the_others_and_a_restart_continues(
    tmp_path,
):
    processes, workdir = training(tmp_path)
    deadline = time.monotonic() + 60
    while not steps_in(os.path.join(workdir, 'checkpoints')) and time.monotonic() < deadline:
        time.sleep(0.1)
    processes[1].kill()
    (status, _, said), _ = finish(processes, timeout=60)
    assert (
        status == 1 and 'error: worker 1 no longer responds: ' in said and 'Traceback' not in said
    )
    again, _ = training(tmp_path)
    deadline = time.monotonic() + 100
    while (
        not read_json(os.path.join(workdir, 'environment.json'))['resumed_from']
        and time.monotonic() < deadline
    ):
        time.sleep(0.2)
    again[0].send_signal(signal.SIGTERM)
    ended = finish(again)
    assert [status for status, *_ in ended] == [143, 143] and 'resumes   at step' in ended[0][1], (
        ended
    )


@pytest.mark.slow
def test_the_evaluation_of_several_workers_is_that_of_one(finished):
    arguments, workdir, _ = finished
    expected = read_json(os.path.join(workdir, 'summary.json'))['eval/accuracy']
    ended = finish(start([*arguments, '--mode=evaluate']))
    assert [status for status, *_ in ended] == [0, 0], ended
    assert json.loads(ended[0][1].splitlines()[-1])['eval/accuracy'] == expected
    alone = subprocess.run(
        [sys.executable, os.path.join(ROOT, 'main.py'), *arguments, '--mode=evaluate'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert json.loads(alone.stdout.splitlines()[-1])['eval/accuracy'] == expected


@pytest.mark.parametrize(
    'said',
    [
        'Collective ops is aborted by: connection refused. Additional GRPC error information '
        'from remote target /job:worker/replica:0/task:1 while calling',
        'The following tasks are unhealthy (stopped sending heartbeats):\n'
        '/job:worker/replica:0/task:1\nThe tasks have crashed.',
    ],
)
def test_both_tensorflow_errors_of_a_lost_worker_are_recognized(said):
    import tensorflow as tf  # here: the workers of this file are processes of their own

    message = f'Graph execution error: {said}'
    error = main.as_user_error(tf.errors.UnavailableError(None, None, message))
    assert error.problem == 'worker 1 no longer responds' and error.exit_status == 1
