"""A whole run leaves every file that is promised, stops without loss, and goes on as if it had not
stopped.
"""

import json
import os
import re
import shutil
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import evaluate
import export
import train
from common.errors import ConfigError, RunError
from common.storage import read_json
from configs import folder
from experiment.session import open_session
from modeling import steps
from outputs.metrics_logger import read_metrics
from outputs.train_progress import Progress
from tests.conftest import refused, slow, tiny_config

FILES = (
    'config.json',
    'environment.json',
    'metrics.jsonl',
    'tensorboard',
    'checkpoints',
    'plots/learning_rate.png',
    'plots/curves.png',
    'export/saved_model.pb',
    'export/labels.txt',
    'report.md',
    'summary.json',
)


def without_times(workdir):
    """metrics.jsonl without what a clock wrote."""
    timed = ('wall_time', 'train/examples_per_second', 'train/input_wait_fraction')
    return [
        {key: value for key, value in row.items() if key not in timed}
        for row in read_metrics(workdir)
    ]


def stop_at(monkeypatch, step, signal_number=signal.SIGTERM):
    """Sends this process a signal when the progress bar reaches `step`."""
    original = train.MetricsLogger.advance

    def advance(self, now):
        original(self, now)
        if now == step:
            os.kill(os.getpid(), signal_number)

    monkeypatch.setattr(train.MetricsLogger, 'advance', advance)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A run of the tiny config, and the config."""
    config = tiny_config()
    workdir = str(tmp_path_factory.mktemp('finished') / 'run')
    assert train.run(config, workdir) == 0
    return config, workdir


def test_a_run_leaves_every_file(finished):
    _, workdir = finished
    for name in FILES:
        assert os.path.exists(os.path.join(workdir, name)), name
    assert any('tfevents' in name for name in os.listdir(os.path.join(workdir, 'tensorboard')))


def test_the_summary_says_what_happened(finished):
    config, workdir = finished
    summary, rows = read_json(os.path.join(workdir, 'summary.json')), read_metrics(workdir)
    assert (
        summary['steps'] == 30
        and summary['examples_seen'] == 30 * 32
        and summary['eval/examples'] == 360
    )
    assert summary['eval/accuracy'] == rows[-1]['eval/accuracy'] and summary['resumed_from'] == []
    assert summary['best/accuracy'] == pytest.approx(
        max(row['eval/accuracy'] for row in rows if 'eval/accuracy' in row)
    )
    assert (
        summary['train_seconds'] > 0
        and summary['examples_per_second'] > 0
        and 0 <= summary['input_wait_fraction'] <= 1
    )
    assert re.fullmatch('[0-9a-f]{64}', summary['weights_sha256'])
    report = Path(workdir, 'report.md').read_text()
    assert f'{summary["eval/accuracy"]:.2%}' in report and summary['weights_sha256'] in report


def test_metrics_have_a_row_per_interval_with_the_planned_rate(finished):
    from experiment import planning

    config, workdir = finished
    rows = read_metrics(workdir)
    assert [row['step'] for row in rows] == [5, 10, 15, 20, 25, 30]
    assert [row['step'] for row in rows if 'eval/loss' in row] == [10, 20, 30]
    rate = planning.learning_rate_of(config, planning.make_plan(config, 1437, 360, 10, 1))
    for row in rows:
        assert row['train/learning_rate'] == pytest.approx(rate(row['step'] - 1), rel=1e-5)
        assert set(row) >= {
            'wall_time',
            'train/loss',
            'train/accuracy',
            'train/grad_norm',
            'train/examples_per_second',
            'train/input_wait_fraction',
        }
    assert rows[0]['train/loss'] > rows[-1]['train/loss']


def test_tensorboard_shows_the_learning_rate(finished):
    folder = os.path.join(finished[1], 'tensorboard')
    seen = {}
    for name in os.listdir(folder):
        for record in tf.data.TFRecordDataset(os.path.join(folder, name)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(record)
            for value in event.summary.value:
                seen.setdefault(value.tag, {})[event.step] = float(tf.make_ndarray(value.tensor))
    assert seen['train/learning_rate'] == {
        row['step']: pytest.approx(row['train/learning_rate']) for row in read_metrics(finished[1])
    }


def test_a_finished_run_does_nothing_again(finished, capsys):
    config, workdir = finished
    times = {name: os.path.getmtime(os.path.join(workdir, name)) for name in FILES}
    assert train.run(config, workdir) == 0
    assert 'is finished' in capsys.readouterr().out
    assert times == {name: os.path.getmtime(os.path.join(workdir, name)) for name in FILES}


def test_evaluating_the_checkpoint_gives_what_training_reported(finished):
    config, workdir = finished
    summary = read_json(os.path.join(workdir, 'summary.json'))
    metrics = evaluate.run(config, workdir, 'last')
    assert metrics['eval/accuracy'] == summary['eval/accuracy'] and metrics[
        'eval/loss'
    ] == pytest.approx(summary['eval/loss'], rel=1e-5)
    assert evaluate.run(config, workdir, 'best')['eval/accuracy'] == pytest.approx(
        summary['best/accuracy']
    )
    config.virtual_devices = 4
    try:
        assert evaluate.run(config, workdir, 'last')['eval/accuracy'] == summary['eval/accuracy']
    finally:
        config.virtual_devices = 0


def test_the_exported_model_gives_the_accuracy_of_the_run(finished):
    summary = read_json(os.path.join(finished[1], 'summary.json'))
    assert (
        summary['export/examples'] == 360 and summary['export/accuracy'] == summary['eval/accuracy']
    )
    assert summary['export/max_difference'] < 1e-3


def test_the_export_takes_any_size_and_dtype_and_gives_labels(finished):
    directory = os.path.join(finished[1], 'export')
    model = tf.saved_model.load(directory)
    names = [name.decode() for name in model.label_names().numpy()]
    assert names == list('0123456789')
    assert names == Path(directory, 'labels.txt').read_text().split()
    pictures = np.random.RandomState(0).randint(0, 256, (3, 37, 53, 3)).astype(np.uint8)
    answers = model.signatures['serving_default'](images=tf.constant(pictures))
    same = model.signatures['classify_float'](images=tf.constant(pictures, tf.float32))
    files = model.signatures['classify_encoded'](
        encoded=tf.constant([tf.io.encode_png(picture).numpy() for picture in pictures])
    )
    for other in (same, files):
        np.testing.assert_allclose(other['logits'], answers['logits'], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(answers['probabilities'].numpy().sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(answers['class_index'], answers['logits'].numpy().argmax(-1))
    assert [label.decode() for label in answers['label'].numpy()] == [
        str(index) for index in answers['class_index'].numpy()
    ]


def test_an_export_that_disagrees_fails_and_keeps_the_old_one(finished, monkeypatch):
    config, workdir = finished
    before = os.path.getmtime(os.path.join(workdir, 'export', 'saved_model.pb'))
    expected = export._expected_logits
    monkeypatch.setattr(export, '_expected_logits', lambda *arguments: expected(*arguments) + 0.01)
    with refused(RunError, 'exported model', 'allowed'):
        export.run(config, workdir)
    assert os.path.getmtime(os.path.join(workdir, 'export', 'saved_model.pb')) == before


def test_weights_that_are_not_finite_are_not_exported(finished, tmp_path):
    config, workdir = finished
    session = open_session(config, workdir, trains=False)
    session.checkpoints.restore(allow_extra=True)
    first = steps.evaluated_weights(session.state)[0]
    first.assign(tf.fill(first.shape, float('nan')))
    with refused(RunError, 'kernel', fix='--checkpoint=best'):
        export.write(session, str(tmp_path / 'export'))
    assert not os.listdir(tmp_path)


def diverged(tiny, workdir):
    """Trains one update, so large that the weights are finite and the answers are not."""
    tiny.optimizer, tiny.schedule.name, tiny.schedule.warmup = {'name': 'sgd'}, 'constant', '0%'
    tiny.schedule.peak_lr, tiny.train_for, tiny.ema_decay = 1e30, '1 steps', 0.0
    with refused(RunError, '360 evaluation examples') as error:
        train.run(tiny, workdir)
    return error.value


@pytest.mark.slow
@pytest.mark.usefixtures('read_here')
def test_finite_weights_with_nonfinite_outputs_have_diverged(tiny, tmp_path, capsys):
    error = diverged(tiny, str(tmp_path / 'run'))
    assert re.search('[0-9]+ of 360 evaluation examples', error.problem)
    assert 'lower config.schedule.peak_lr' in error.fix
    assert 'best' not in error.fix  # there is none
    capsys.readouterr()
    assert evaluate.run(tiny, str(tmp_path / 'run'))['eval/accuracy'] == 0
    note, numbers = capsys.readouterr().out.splitlines()
    assert note == 'note      the loss is not finite: the model has diverged'
    assert json.loads(numbers)['eval/loss'] is None
    with refused(RunError, 'best checkpoint'):
        evaluate.run(tiny, str(tmp_path / 'run'), 'best')


@pytest.mark.usefixtures('read_here')
@pytest.mark.parametrize(
    'signal_number, status, step', [(signal.SIGTERM, 143, 13), slow(signal.SIGINT, 0, 20)]
)
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    finished, tmp_path, monkeypatch, signal_number, status, step
):
    config, reference = finished
    workdir = str(tmp_path / 'run')
    with monkeypatch.context() as patch:
        config.steps_per_loop = 1
        stop_at(patch, step, signal_number)
        assert train.run(config, workdir) == status
    config.steps_per_loop = 4
    assert not os.path.exists(os.path.join(workdir, 'summary.json'))
    assert train.run(config, workdir) == 0
    summary, expected = (
        read_json(os.path.join(folder, 'summary.json')) for folder in (workdir, reference)
    )
    assert summary['resumed_from'] == [step]
    for key in ('weights_sha256', 'eval/accuracy', 'eval/loss', 'best/accuracy'):
        assert summary[key] == expected[key], key
    assert [row['step'] for row in read_metrics(workdir)] == [5, 10, 15, 20, 25, 30]
    if step % 5 == 0:
        for ours, theirs in zip(without_times(workdir), without_times(reference), strict=True):
            assert ours == pytest.approx(
                theirs, rel=1e-6
            )  # the sums were made in loops of another length


@pytest.mark.slow
@pytest.mark.parametrize('virtual_devices', [0, 2])
def test_the_host_calls_once_per_loop_without_retracing(
    tiny, tmp_path, monkeypatch, virtual_devices
):
    tiny.virtual_devices = virtual_devices
    tiny.steps_per_loop = 7
    tiny.log_every = '10 steps'
    tiny.eval_every = '15 steps'
    made = {'make_train_loop': [], 'make_eval_loop': []}
    for name in made:
        original = getattr(train.loops, name)

        def make(*arguments, name=name, original=original):
            loop, calls = original(*arguments), []
            made[name].append((loop, calls))
            return lambda iterator, num_steps: (
                calls.append(int(num_steps)) or loop(iterator, num_steps)
            )

        monkeypatch.setattr(train.loops, name, make)
    session = open_session(tiny, str(tmp_path))
    logbook = train.MetricsLogger(str(tmp_path), 0, session.plan.total_steps)
    progress = Progress()
    assert (
        train.train(session, logbook, progress, train.preemption.Stop()) is None
        and progress.metrics['eval/examples'] == 360
    )
    session.checkpoints.wait()
    logbook.close()
    ((train_loop, train_calls),), ((eval_loop, eval_calls),) = made.values()
    assert train_calls == [7, 3, 5, 5, 7, 3]  # loops of 7, cut where the host logs or evaluates
    assert eval_calls == [3, 3]  # 360 examples in batches of 128
    assert (
        train_loop.experimental_get_tracing_count()
        == eval_loop.experimental_get_tracing_count()
        == 1
    )


@pytest.mark.slow
@pytest.mark.usefixtures('read_here')
def test_a_progressive_run_traces_once_per_size_and_resumes(tiny, tmp_path, monkeypatch):
    tiny.image_size = 96
    tiny.progressive.stages = 3
    tiny.progressive.image_size = 32
    tiny.augment.mixup = 0.2
    sizes, original = [], train.steps.make_train_step

    def watched(*arguments, **options):
        train_step = original(*arguments, **options)

        def traced(images, labels, draws):
            sizes.append(images.shape[1])
            return train_step(images, labels, draws)

        return traced

    monkeypatch.setattr(train.steps, 'make_train_step', watched)
    assert train.run(tiny, str(tmp_path / 'whole')) == 0
    assert sizes == [32, 64, 96]
    with monkeypatch.context() as patch:
        stop_at(patch, 14)
        tiny.steps_per_loop = 1
        assert train.run(tiny, str(tmp_path / 'stopped')) == 143
    assert train.run(tiny, str(tmp_path / 'stopped')) == 0
    whole, stopped = (
        read_json(str(tmp_path / name / 'summary.json')) for name in ('whole', 'stopped')
    )
    assert whole['weights_sha256'] == stopped['weights_sha256'] and stopped['resumed_from'] == [14]


@pytest.fixture
def grey_pictures(tmp_path):
    """A folder of dark and light images, and a config that trains on it for 60 steps of 8
    examples.
    """
    for split, count in (('train', 20), ('test', 5)):
        for label, name in enumerate(('dark', 'light')):
            os.makedirs(tmp_path / 'data' / split / name)
            for index in range(count):
                grey = (
                    np.random.RandomState(index).randint(0, 60, (30 + index, 40, 3)) + 150 * label
                )
                tf.io.write_file(
                    str(tmp_path / 'data' / split / name / f'{index}.jpg'),
                    tf.io.encode_jpeg(grey.astype(np.uint8)),
                )
    config = folder.get_config()
    config.dataset.data_dir = str(tmp_path / 'data')
    config.model.name, config.model.drop_path, config.image_size = 'tiny', 0.0, 32
    config.batch_size, config.train_for, config.checkpoint_every = 8, '60 steps', '60 steps'
    config.schedule.peak_lr, config.schedule.warmup, config.ema_decay = 1e-2, '5 steps', 0.0
    return tmp_path / 'data', config


@pytest.mark.slow
def test_a_folder_of_ones_own_pictures_is_trained_on_to_the_end(grey_pictures, tmp_path):
    _, config = grey_pictures
    assert train.run(config, str(tmp_path / 'run')) == 0
    summary = read_json(str(tmp_path / 'run' / 'summary.json'))
    assert (
        summary['eval/examples'] == 10
        and summary['eval/accuracy'] == summary['export/accuracy'] == 1.0
    )
    assert (tmp_path / 'run' / 'export' / 'labels.txt').read_text().split() == ['dark', 'light']
    config.unlock()
    config.dataset.data_dir = str(tmp_path / 'other')
    with refused(ConfigError, key='dataset.data_dir'):
        train.run(config, str(tmp_path / 'run'))


@pytest.mark.slow
def test_images_lost_during_a_stop_are_noted_and_schedule_stays(
    grey_pictures, tmp_path, monkeypatch, capsys
):
    data, config = grey_pictures
    config.train_for = '12 epochs'  # 60 steps of 40 images
    config.steps_per_loop = 1
    config.log_every = '20 steps'
    with monkeypatch.context() as patch:
        stop_at(patch, 20)
        assert train.run(config, str(tmp_path / 'run')) == 143
    for index in range(4):
        os.remove(data / 'train' / 'dark' / f'{index}.jpg')
    capsys.readouterr()
    assert train.run(config, str(tmp_path / 'run')) == 0
    changed = 'the training images have changed during the run: it began with 40, now there are 36'
    assert (
        f'note      {changed}' in capsys.readouterr().out
        and changed in (tmp_path / 'run' / 'report.md').read_text()
    )
    assert read_json(str(tmp_path / 'run' / 'summary.json'))['steps'] == 60


@pytest.mark.parametrize(
    'harm, says',
    [
        (lambda path: os.remove(path), 'no longer there'),
        (lambda path: path.write_bytes(b'no picture'), 'train/light/7.jpg'),
    ],
)
def test_a_picture_that_is_spoilt_while_it_is_in_use_is_named(
    grey_pictures, tmp_path, monkeypatch, harm, says
):
    data, config = grey_pictures
    config.train_for = '5000 steps'
    config.steps_per_loop = 1
    config.dataset.memory_gib = 0.001  # not kept in memory
    config.dataset.max_broken = 0.1
    for name in ('dark', 'light'):
        for index in range(20):
            path = data / 'train' / name / f'{index}.jpg'
            path.write_bytes(path.read_bytes() + bytes(8000))  # behind the image
    original = train.MetricsLogger.advance

    def advance(self, now):
        original(self, now)
        if now == 10:
            harm(data / 'train' / 'light' / '7.jpg')

    monkeypatch.setattr(train.MetricsLogger, 'advance', advance)
    with refused(RunError, 'light/7.jpg', says):
        train.run(config, str(tmp_path / 'run'))


def test_a_changed_config_is_refused_with_the_difference(finished):
    config, workdir = finished
    config.label_smoothing, smoothing = 0.2, config.label_smoothing
    try:
        with refused(ConfigError, 'label_smoothing was 0.1, is now 0.2', key='label_smoothing'):
            train.run(config, workdir)
    finally:
        config.label_smoothing = smoothing


def test_evaluating_another_config_is_refused_another_split_not(finished):
    config, workdir = finished
    config.dataset.eval_split = 'train[:50]'
    assert evaluate.run(config, workdir)['eval/examples'] == 50
    config.dataset.eval_split, config.image_size = 'test', 32
    try:
        for verb in (evaluate, export):
            with refused(ConfigError, 'image_size was 16, is now 32', key='image_size'):
                verb.run(config, workdir)
    finally:
        config.image_size = 16


@pytest.mark.slow
@pytest.mark.usefixtures('read_here')
def test_runs_of_one_seed_are_the_same_and_another_seed_differs(finished, tmp_path):
    config, workdir = finished
    digests = [read_json(os.path.join(workdir, 'summary.json'))['weights_sha256']]
    for seed in (0, 1):
        config.seed = seed
        train.run(config, str(tmp_path / str(seed)))
        digests.append(read_json(str(tmp_path / str(seed) / 'summary.json'))['weights_sha256'])
    config.seed = 0
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.usefixtures('read_here')
def test_a_loss_that_is_not_a_number_ends_the_run_with_advice(tiny, tmp_path):
    tiny.optimizer = {'name': 'sgd'}
    tiny.schedule.peak_lr = tiny.schedule.start_lr = 1e30
    tiny.max_skipped_updates = 5
    with refused(RunError, 'updates 1 to 8', fix='--mode=preview'):
        train.run(tiny, str(tmp_path / 'run'))
    assert os.listdir(tmp_path / 'run' / 'checkpoints') == []
    tiny.max_skipped_updates = 0  # not skipped, then
    with refused(RunError, 'updates 0 to 3', fix='--mode=preview'):
        train.run(tiny, str(tmp_path / 'run'))
    assert os.listdir(tmp_path / 'run' / 'checkpoints') == []


@pytest.mark.slow
@pytest.mark.usefixtures('read_here')
def test_a_run_that_diverged_at_once_is_in_nobodys_way(tiny, tmp_path):
    tiny.optimizer, tiny.max_skipped_updates = {'name': 'sgd'}, 0
    tiny.schedule.peak_lr = tiny.schedule.start_lr = 1e30
    with refused(RunError, 'updates 0 to 3'):
        train.run(tiny, str(tmp_path / 'run'))
    tiny.schedule.peak_lr = tiny.schedule.start_lr = 1e-3
    assert train.run(tiny, str(tmp_path / 'run')) == 0


def test_a_stop_before_the_first_checkpoint_is_described():
    checkpoints = types.SimpleNamespace(latest_step=lambda: None)
    session = types.SimpleNamespace(checkpoints=checkpoints)
    line = train.describe_stop(session, signal.SIGTERM, 3)
    assert line.startswith('SIGTERM: stopped at step 3; nothing')
    checkpoints.latest_step = lambda: 1000
    assert 'step 1,000' in train.describe_stop(session, signal.SIGTERM, 1003)


def test_verbs_without_a_checkpoint_say_so(tiny, tmp_path):
    for verb in (evaluate, export):
        with refused(RunError, 'last checkpoint', tmp_path):
            verb.run(tiny, str(tmp_path / 'none'))


def test_a_checkpoint_of_another_model_or_a_damaged_one_is_named(finished, tmp_path):
    config, workdir = finished
    shutil.copytree(
        os.path.join(workdir, 'checkpoints'), tmp_path / 'checkpoints'
    )  # without config.json, which would say it first
    config.image_size, config.model.name = 32, 'MobileNetV2'
    try:
        with refused(RunError, 'step-30', 'model/0000'):
            evaluate.run(config, str(tmp_path))
    finally:
        config.image_size, config.model.name = 16, 'tiny'
    for step in (20, 30):
        (tmp_path / 'checkpoints' / f'step-{step}' / 'variables.index').write_bytes(b'damaged')
    with refused(RunError, '2 checkpoints', 'step-30/variables.index'):
        evaluate.run(config, str(tmp_path))


def test_metrics_cut_short_by_a_crash_are_read_up_to_there(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text(
        json.dumps({'step': 1}) + '\n' + '{"step": 2, "train/lo'
    )
    assert read_metrics(str(tmp_path)) == [{'step': 1}]
