"""Images prepared by a tf.data service are those of the local pipeline, in the same order."""

import os
import re
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from common.commands import ROOT
from common.errors import RunError
from experiment import planning
from inputs import datasets, pipeline, record_index, service
from tests.conftest import refused


@pytest.fixture
def start():
    """Starts a server in a process of its own, as a user would; returns what it says when it is
    ready.
    """
    running = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, '-m', 'inputs.service', *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process.stdout.readline().strip()

    start.running = running
    yield start
    for process in running:
        process.kill()
        process.wait()


def batches_of(config, begin=0, strategy=None):
    strategy = strategy or tf.distribute.OneDeviceStrategy('CPU:0')
    source = datasets.load(config.dataset)
    plan = planning.make_plan(
        config, source.num_train, source.num_eval, 10, strategy.num_replicas_in_sync
    )
    dataset = pipeline.training_batches(source, config, plan, begin, plan.total_steps, strategy)
    return [
        [
            part.numpy()
            for value in tf.nest.flatten(batch)
            for part in strategy.experimental_local_results(value)
        ]
        for batch in dataset
    ]


def assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for batch, expected_batch in zip(batches, expected, strict=True):
        for part, expected_part in zip(batch, expected_batch, strict=True):
            np.testing.assert_array_equal(part, expected_part)


@pytest.mark.slow
def test_several_workers_match_the_local_pipeline_after_a_resume(tiny, start, monkeypatch):
    dispatchers = workers = 2
    tiny.train_for = '47 steps'  # more than an epoch
    tiny.augment.flip = True
    tiny.augment.mixup = 0.2
    tiny.augment.policy.name = 'rand_augment'
    monkeypatch.setattr(
        record_index, 'PIECES_PER_EPOCH', 100
    )  # runs of 14 examples in a file, of which the local pipeline keeps each in memory
    expected = batches_of(tiny)
    addresses = [
        re.fullmatch(
            f'serving at (localhost:[0-9]+) with {workers} workers?', start(f'--workers={workers}')
        )[1]
        for _ in range(dispatchers)
    ]
    tiny.dataset.service = ','.join(addresses * workers)
    assert_equal(batches_of(tiny), expected)
    assert_equal(batches_of(tiny, begin=33), expected[33:])


@pytest.mark.slow
def test_replicas_share_what_a_service_prepares(tiny, start):
    two = tf.distribute.MirroredStrategy(['CPU:0', 'CPU:1'], tf.distribute.ReductionToOneDevice())
    expected = batches_of(tiny, strategy=two)
    tiny.dataset.service = start().split()[2]
    assert_equal(batches_of(tiny, strategy=two), expected)


@pytest.mark.parametrize('address', ['localhost:99999', 'localhost:{free}'])
def test_an_address_where_nothing_answers_is_one_line(tiny, address):
    with socket.socket() as taken:
        taken.bind(('localhost', 0))
        tiny.dataset.service = address.format(free=taken.getsockname()[1])
        with refused(RunError, tiny.dataset.service):
            service.prepare(None, None, 1, tiny.dataset.service, 1)


@pytest.mark.slow
def test_a_service_that_dies_ends_the_run_with_its_name(tmp_path, start):
    address = start().split()[2]
    environment = {**os.environ, 'PYTHONPATH': ROOT}
    script = (
        'import sys, main; from inputs import service; service.PATIENCE = 3; '
        'sys.exit(main.main(sys.argv))'
    )
    run = subprocess.Popen(
        [
            sys.executable,
            '-c',
            script,
            '--config=configs/digits.py',
            '--config.model.name=tiny',
            '--config.image_size=16',
            '--config.train_for=1000000 steps',
            '--config.log_every=5 steps',
            '--config.eval_every=100%',
            f'--workdir={tmp_path}/run',
            f'--config.dataset.service={address}',
        ],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while run.poll() is None and not os.path.exists(tmp_path / 'run' / 'metrics.jsonl'):
            time.sleep(0.1)
        start.running[0].kill()
        _, said = run.communicate(timeout=120)
    finally:
        run.kill()
    assert (
        run.returncode == 1
        and said.count('error: ') == 1
        and f'nothing answers at {address!r}' in said
        and 'Traceback' not in said
    )
