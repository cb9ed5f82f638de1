"""A run goes on as if nothing had happened, or says in one line why not; nothing that was saved is
lost.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import time

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing import event_accumulator

import compare
import evaluate
import export
import train
from common import storage
from common.errors import ConfigError, RunError
from common.storage import flatten, read_json
from diagnostics import preview
from experiment import config_diff
from experiment.session import open_session
from inputs import datasets
from modeling import pretrained
from outputs import bucket_lease, metrics_logger, workdir_lock
from outputs.checkpoints import steps_in
from outputs.metrics_logger import read_metrics
from outputs.train_progress import ANY_KEY, Progress, changes_evaluation
from tests.conftest import reading_here, refused, tiny_config
from tests.test_train import stop_at, without_times

pytestmark = pytest.mark.usefixtures('read_here')


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    """The folder of a run of the tiny config that was never stopped."""
    workdir = str(tmp_path_factory.mktemp('reference') / 'run')
    with reading_here():
        assert train.run(tiny_config(), workdir) == 0
    return workdir


@pytest.fixture
def workdir(tmp_path):
    return str(tmp_path / 'run')


def stopped_at(config, workdir, step, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert train.run(config, workdir) == 143


def assert_same_run(workdir, reference):
    """Weights, what JSON says, and the best one, apart from times."""
    ours, theirs = (
        read_json(os.path.join(folder, 'summary.json')) for folder in (workdir, reference)
    )
    for key in (
        'weights_sha256',
        'eval/accuracy',
        'eval/loss',
        'best/accuracy',
        'best/step',
        'steps',
        'skipped_updates',
    ):
        assert ours[key] == theirs[key], key
    assert without_times(workdir) == without_times(reference)


@pytest.mark.slow
def test_a_run_stopped_within_a_window_has_the_same_metrics(tiny, workdir, reference, monkeypatch):
    stopped_at(tiny, workdir, 14, monkeypatch)  # rows are of steps 10 and 15
    assert train.run(tiny, workdir) == 0
    assert read_json(os.path.join(workdir, 'summary.json'))['resumed_from'] == [14]
    assert_same_run(workdir, reference)


@pytest.mark.slow
def test_a_signal_interrupts_evaluation_which_is_made_up_for(tiny, workdir, reference, monkeypatch):
    tiny.eval_batch_size, tiny.steps_per_loop = 12, 4  # 30 batches, in 8 calls
    original, calls = train.evaluate.loops.make_eval_loop, []

    def make(*arguments):
        loop = original(*arguments)

        def counted(*batches):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), train.signal.SIGTERM)
            return loop(*batches)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(train.evaluate.loops, 'make_eval_loop', make)
        assert train.run(tiny, workdir) == 143
    assert len(calls) == 2 and steps_in(os.path.join(workdir, 'checkpoints')) == [10]
    assert 'eval/loss' not in read_metrics(workdir)[-1] and read_metrics(workdir)[-1]['step'] == 10
    tiny.eval_batch_size = 128
    assert train.run(tiny, workdir) == 0
    assert_same_run(workdir, reference)
    assert (
        evaluate.run(tiny, workdir, 'best')['eval/accuracy']
        == read_json(os.path.join(workdir, 'summary.json'))['best/accuracy']
    )


@pytest.mark.slow
def test_an_interrupted_last_evaluation_may_be_the_best(tiny, workdir, monkeypatch):
    tiny.eval_every = '30 steps'
    tiny.checkpoint_every = '30 steps'
    tiny.steps_per_loop = 1
    tiny.eval_batch_size = 12
    make = train.evaluate.make_evaluation
    with monkeypatch.context() as patch:
        patch.setattr(
            train.evaluate,
            'make_evaluation',
            lambda session: (
                lambda *stop: os.kill(os.getpid(), train.signal.SIGTERM) or make(session)(*stop)
            ),
        )
        assert train.run(tiny, workdir) == 143
    assert train.run(tiny, workdir) == 0
    assert read_json(os.path.join(workdir, 'summary.json'))['best/step'] == 30
    assert (
        evaluate.run(tiny, workdir, 'best')['eval/accuracy']
        == read_json(os.path.join(workdir, 'summary.json'))['eval/accuracy']
    )


@pytest.mark.slow
def test_it_goes_on_with_another_number_of_devices(still, workdir, tmp_path, monkeypatch):
    assert train.run(still, str(tmp_path / 'whole')) == 0
    stopped_at(still, workdir, 14, monkeypatch)
    still.virtual_devices = 2
    assert train.run(still, workdir) == 0
    for ours, theirs in zip(
        without_times(workdir), without_times(str(tmp_path / 'whole')), strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-3), (
            ours
        )  # the same images, added up in another order


def test_a_changed_config_continues_only_on_purpose(tiny, workdir, monkeypatch, capsys):
    stopped_at(tiny, workdir, 14, monkeypatch)
    tiny.schedule.peak_lr, tiny.keep_checkpoints = 2e-2, 1
    with refused(
        ConfigError,
        'schedule.peak_lr was 0.01, is now 0.02',
        key='schedule.peak_lr',
        fix='--resume=changed',
    ):
        train.run(tiny, workdir)
    capsys.readouterr()
    assert train.run(tiny, workdir, 'changed') == 0
    rate = float(
        train.planning.learning_rate_of(tiny, train.planning.make_plan(tiny, 1437, 360, 10, 1))(14)
    )
    said = (
        'changed at step 14: schedule.peak_lr was 0.01, is now 0.02; the learning rate goes '
        f'from {rate / 2:.4g} to {rate:.4g}'
    )
    assert (
        f'note      {said}' in capsys.readouterr().out
        and said in storage.read(os.path.join(workdir, 'report.md')).decode()
    )
    assert read_json(os.path.join(workdir, 'config.json'))['schedule']['peak_lr'] == 2e-2
    assert train.run(tiny, workdir) == 0 and 'is finished' in capsys.readouterr().out


@pytest.mark.slow
def test_a_finished_run_can_be_extended_but_not_shortened(tiny, workdir, reference):
    shutil.copytree(reference, workdir)
    tiny.train_for = '20 steps'
    with refused(ConfigError, 30, 20, key='train_for'):
        train.run(tiny, workdir, 'changed')
    tiny.train_for = '40 steps'
    assert train.run(tiny, workdir, 'changed') == 0
    assert read_json(os.path.join(workdir, 'summary.json'))['steps'] == 40 and [
        row['step'] for row in read_metrics(workdir)
    ] == [*range(5, 41, 5)]


MISFITS = [
    ('ema_decay', 0.0),
    ('model.freeze', 'backbone'),
    ('optimizer', {'name': 'sgd'}),
    ('optimizer', {'name': 'sgd', 'momentum': 0.9}),
    ('optimizer', {'name': 'lion'}),
    ('optimizer', {'name': 'adamw', 'amsgrad': True}),
    ('precision', 'float16'),
    ('precision', 'float64'),
]


def set_key(config, key, value):
    with config.unlocked(), config.ignore_type():
        section, _, name = key.rpartition('.')
        (config[section] if section else config)[name] = value


@pytest.mark.parametrize('key, value', MISFITS)
def test_what_does_not_fit_is_refused_before_anything_is_built(
    tiny, reference, monkeypatch, key, value
):
    set_key(tiny, key, value)
    session = open_session(tiny, reference)
    with refused(RunError, 'step-30', fix='--workdir=NEW --config.model.weights='):
        session.checkpoints.restore()  # that is so
    monkeypatch.setattr(train, 'open_session', lambda *_: pytest.fail('something was built'))
    for continues in ('same', 'changed'):
        new_run = f'--workdir=NEW --config.model.weights={reference}'
        with refused(ConfigError, reference, fix=new_run) as error:
            train.run(tiny, reference, continues)
        assert error.value.key.startswith(key) and '--resume' not in error.value.fix
    assert os.path.exists(os.path.join(reference, 'summary.json'))


def test_another_model_is_refused_without_offering_weights(tiny, reference):
    tiny.model.name = 'MobileNetV2'
    with refused(ConfigError, reference, key='model.name', fix='--workdir'):
        train.run(tiny, reference, 'changed')


@pytest.mark.slow
def test_a_new_run_with_its_weights_begins_as_good_as_it_was(tiny, workdir, reference):
    tiny.ema_decay, tiny.precision, tiny.model.weights = 0.0, 'float64', reference
    tiny.train_for = '10 steps'
    tiny.schedule.peak_lr = tiny.schedule.start_lr = 1e-7
    assert train.run(tiny, workdir) == 0
    ours, theirs = (
        read_json(os.path.join(folder, 'summary.json'))['eval/accuracy']
        for folder in (workdir, reference)
    )
    # Random weights give 0.1. The statistics of batch normalisation go on.
    assert ours > theirs - 0.02 and theirs > 0.25


def test_averages_of_another_meaning_are_refused_in_any_shape(tiny, workdir):
    def changes(before, after):
        return [config_diff.ConfigChange('optimizer.name', before, after)]

    for before, after in (('rmsprop', 'lion'), ('lion', 'rmsprop'), ('adamw', 'sgd')):
        assert config_diff.incompatible_changes(tiny, changes(before, after))
    for before, after in (('adam', 'adamw'), ('adamw', 'lamb')):
        assert not config_diff.incompatible_changes(tiny, changes(before, after))
    tiny.optimizer = {'name': 'sgd'}  # has none
    assert not config_diff.incompatible_changes(
        tiny, [config_diff.ConfigChange('model.freeze', '', 'backbone')]
    )


@pytest.mark.slow
def test_what_fits_goes_on_with_all_of_it_changed_at_once(tiny, workdir, reference):
    shutil.copytree(reference, workdir)
    changed = {
        'train_for': '34 steps',
        'optimizer': {'name': 'lamb'},
        'accumulate_steps': 2,
        'seed': 3,
        'label_smoothing': 0.0,
        'ema_decay': 0.5,
        'grad_clip_norm': 1.0,
        'weight_decay': 0.1,
        'precision': 'bfloat16',
        'image_size': 24,
        'schedule.name': 'linear',
        'augment.mixup': 0.2,
        'model.dropout': 0.0,
        'model.layer_decay': 0.9,
        'model.sync_batch_norm': False,
    }
    for key, value in changed.items():
        set_key(tiny, key, value)
    assert train.run(tiny, workdir, 'changed') == 0
    assert read_json(os.path.join(workdir, 'summary.json'))['steps'] == 34


@pytest.mark.slow
def test_a_run_is_moved_aside_and_nothing_of_it_is_lost(tiny, workdir, reference, capsys):
    shutil.copytree(reference, workdir)
    held = sorted(os.listdir(workdir))
    storage.write(os.path.join(workdir, 'thesis.tex'), 'not of a run')
    tiny.seed = 1
    assert train.run(tiny, workdir, 'never') == 0
    aside = os.path.join(workdir, 'before-1')
    assert f'the previous one was moved to {aside}' in capsys.readouterr().out
    assert (
        sorted(os.listdir(aside)) == held
        and os.path.exists(os.path.join(workdir, 'thesis.tex'))
        and read_json(os.path.join(workdir, 'config.json'))['seed'] == 1
    )
    assert_same_run(aside, reference)


def spoil_updates(monkeypatch, first, last):
    """Makes the labels of updates `first` to `last` what is not a number; of one replica."""
    original = train.augment.make_device_augment

    def on_device(*arguments):
        change = original(*arguments)

        def spoiled(images, labels, draws):
            images, targets = change(images, labels, draws)
            update = spoiled.iterations.value
            return images, tf.where((update >= first) & (update <= last), float('nan'), targets)

        on_device.last = spoiled
        return spoiled

    make = train.steps.make_train_step

    def make_train_step(state, config, change, **named):
        change.iterations = state.optimizer.iterations
        return make(state, config, change, **named)

    monkeypatch.setattr(train.augment, 'make_device_augment', on_device)
    monkeypatch.setattr(train.steps, 'make_train_step', make_train_step)


@pytest.mark.slow
def test_a_nonfinite_update_is_skipped_and_the_run_continues(tiny, workdir, monkeypatch):
    spoil_updates(monkeypatch, 12, 13)
    assert train.run(tiny, workdir) == 0
    summary = read_json(os.path.join(workdir, 'summary.json'))
    assert (
        summary['skipped_updates'] == 2
        and summary['steps'] == 30
        and summary['eval/accuracy'] > 0.15
    )
    assert [row['train/skipped_updates'] for row in read_metrics(workdir)] == [0, 0, 2, 0, 0, 0]
    assert all(np.isfinite(value) for row in read_metrics(workdir) for value in row.values())
    plan = train.planning.make_plan(tiny, 1437, 360, 10, 1)
    assert read_metrics(workdir)[-1]['train/learning_rate'] == pytest.approx(
        float(train.planning.learning_rate_of(tiny, plan)(29)), rel=1e-5
    )


@pytest.mark.slow
def test_too_many_skips_end_the_run_and_keep_a_good_checkpoint(
    tiny, workdir, reference, monkeypatch, capsys
):
    tiny.max_skipped_updates, tiny.checkpoint_every = 6, '1 steps'
    with monkeypatch.context() as patch:
        spoil_updates(patch, 17, 29)
        with refused(RunError, 'updates 17 to 22', fix='step 17 with --resume=changed'):
            train.run(tiny, workdir)
    assert steps_in(os.path.join(workdir, 'checkpoints'))[-2:] == [
        16,
        17,
    ]
    preview.run(tiny, workdir)
    assert 'update 17 and those after it were skipped' in capsys.readouterr().out
    assert os.path.getsize(os.path.join(workdir, 'preview', 'batch_17.png')) > 10_000
    assert train.run(tiny, workdir) == 0  # the cause has gone
    assert not os.path.exists(os.path.join(workdir, 'skipped.json'))
    ours, theirs = (
        read_json(os.path.join(folder, 'summary.json'))['weights_sha256']
        for folder in (workdir, reference)
    )
    assert ours == theirs


@pytest.mark.slow
def test_a_run_out_of_patience_ends_and_remembers_its_best(tiny, workdir, monkeypatch, capsys):
    tiny.train_for = '60 steps'
    tiny.eval_every = '5 steps'
    tiny.patience = '10 steps'
    tiny.best_metric = 'eval/loss'
    values = iter([2.0, 1.5, 1.7, 1.6, 1.4])
    make = train.evaluate.make_evaluation

    def make_evaluation(session):
        evaluation = make(session)
        return lambda *should_stop: {**evaluation(*should_stop), 'eval/loss': next(values)}

    monkeypatch.setattr(train.evaluate, 'make_evaluation', make_evaluation)
    stopped_at(tiny, workdir, 14, monkeypatch)
    assert train.run(tiny, workdir) == 0
    summary = read_json(os.path.join(workdir, 'summary.json'))
    assert (summary['steps'], summary['best/step'], summary['best/loss'], summary['eval/loss']) == (
        20,
        10,
        1.5,
        1.6,
    )
    assert (summary['export/step'], summary['export/eval_loss']) == (10, 1.5)
    best, last = (
        tf.train.load_checkpoint(os.path.join(workdir, 'checkpoints', f'step-{step}', 'variables'))
        for step in (10, 20)
    )
    exported = pretrained._numbered_weights(
        os.path.join(workdir, 'export', 'variables', 'variables'), 'export'
    )
    for number, value in enumerate(exported):
        np.testing.assert_array_equal(value, best.get_tensor(f'average/{number:04d}'))
    digest = hashlib.sha256(
        b''.join(
            last.get_tensor(f'model/{number:04d}').tobytes() for number in range(len(exported))
        )
    )
    assert digest.hexdigest() == summary['weights_sha256']
    assert steps_in(os.path.join(workdir, 'checkpoints'))[0] == 10
    capped = evaluate.run(tiny, workdir, 'best')
    assert capped['eval/loss'] == pytest.approx(
        next(row['eval/loss'] for row in read_metrics(workdir) if row['step'] == 10), abs=3
    )
    assert json.loads(storage.read(os.path.join(workdir, 'evaluation.json')))['step'] == 10
    assert (
        capped['eval/accuracy'] == summary['export/eval_accuracy'] == summary['export/accuracy']
    )  # of all 360 examples
    report = storage.read(os.path.join(workdir, 'report.md')).decode()
    assert (
        report.splitlines()[2]
        == f'**{capped["eval/accuracy"]:.2%}** of 360 evaluation examples are classified correctly'
    )
    assert (
        'with the averaged weights after update 10 of 20: the best by eval/loss, '
        'exported because `patience` is set. After the last update '
        f'it is {summary["eval/accuracy"]:.2%}; '
        '`--mode=export --checkpoint=last` exports those weights.'
    ) in report.replace('\n', ' ')
    said = (
        'stopped at step 20 of 60: eval/loss has not improved since step 10, which is 10 steps '
        "(config.patience); to continue, raise it or set it to '', and add --resume=changed"
    )
    printed = capsys.readouterr().out
    assert (
        said in printed
        and said in report.partition('## Changes during the run')[2].partition('## ')[0]
    )
    assert (
        'exports   the weights after update 10, the best by eval/loss because config.patience is '
        'set; --mode=export --checkpoint=last exports those after update 20'
    ) in printed
    for which, step in ((None, 10), ('last', 20), (None, 10)):
        done = export.run(tiny, workdir, which)
        line = capsys.readouterr().out.splitlines()[0]
        assert line.startswith(
            f'exports   the weights after update {step}, the '
            f'{"best by eval/loss" if step == 10 else "last"}'
        )
        summary = {**summary, **read_json(os.path.join(workdir, 'summary.json'))}
        assert (done['export/step'], done['export/checkpoint']) == (
            step,
            'best' if step == 10 else 'last',
        )
        assert (summary['export/step'], summary['export/eval_loss']) == (
            step,
            1.5 if step == 10 else 1.6,
        )
        assert (
            summary['export/accuracy'] == summary['export/eval_accuracy'] == done['export/accuracy']
        )  # of all examples
        with_note = storage.read(os.path.join(workdir, 'report.md')).decode()
        title, empty, note, rest = with_note.split('\n', 3)
        assert f'{title}\n{rest}' == report
        assert (
            note == f'*Exported again since this report was written: {line[10:]}. summary.json has '
            'the numbers of this export.*'
        )
    tiny.patience = ''
    with monkeypatch.context() as patch:
        patch.setattr(train.evaluate, 'make_evaluation', make)
        assert train.run(tiny, workdir, 'changed') == 0
    assert export.run(tiny, workdir)['export/step'] == 60
    assert read_json(os.path.join(workdir, 'summary.json'))['steps'] == 60


@pytest.mark.slow
def test_the_last_weights_are_exported_if_the_best_are_damaged(tiny, workdir, monkeypatch, capsys):
    tiny.patience, tiny.best_metric = '90%', 'eval/loss'
    losses = iter([1.0, 2.0, 3.0, 3.0])
    make = train.evaluate.make_evaluation
    monkeypatch.setattr(
        train.evaluate,
        'make_evaluation',
        lambda session: lambda *stop: {**make(session)(*stop), 'eval/loss': next(losses)},
    )
    with monkeypatch.context() as patch:
        patch.setattr(export, 'write', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.run(tiny, workdir)
    storage.write(os.path.join(workdir, 'checkpoints', 'step-10', 'variables.index'), 'damaged')
    capsys.readouterr()
    assert train.run(tiny, workdir) == 0
    summary, printed = read_json(os.path.join(workdir, 'summary.json')), capsys.readouterr().out
    assert (summary['export/step'], summary['export/eval_loss'], summary['best/step']) == (
        30,
        3.0,
        10,
    )
    assert (
        'note      the best checkpoint cannot be used (' in printed
        and 'exporting the weights of the last update instead' in printed
    )
    assert (
        summary['export/accuracy']
        == summary['eval/accuracy']
        == evaluate.run(tiny, workdir)['eval/accuracy']
    )


@pytest.mark.slow
def test_a_diverged_model_is_never_right_and_never_the_best(tiny, workdir, monkeypatch):
    stopped_at(tiny, workdir, 14, monkeypatch)
    best = read_json(os.path.join(workdir, 'checkpoints', 'step-14', 'manifest.json'))['manifest'][
        'best_step'
    ]
    tiny.schedule.peak_lr, tiny.eval_every, tiny.max_skipped_updates = 1e30, '1 steps', 10
    with refused(RunError, 'updates 15 to 24'):
        train.run(tiny, workdir, 'changed')
    assert [row['eval/accuracy'] for row in read_metrics(workdir) if row['step'] > 16] == [0.0] * 8
    manifest = read_json(
        os.path.join(
            workdir,
            'checkpoints',
            f'step-{steps_in(os.path.join(workdir, "checkpoints"))[-1]}',
            'manifest.json',
        )
    )['manifest']
    assert manifest['best_step'] == best == 10 and manifest['step'] <= 15


@pytest.mark.slow
def test_progress_that_a_config_change_invalidates_is_reset(tiny, workdir, monkeypatch):
    stopped_at(tiny, workdir, 14, monkeypatch)
    tiny.best_metric, tiny.batch_size = 'eval/loss', 4
    assert train.run(tiny, workdir, 'changed') == 0
    summary, rows = read_json(os.path.join(workdir, 'summary.json')), read_metrics(workdir)
    assert summary['best/loss'] == min(
        row['eval/loss'] for row in rows if row['step'] > 14 and 'eval/loss' in row
    )
    assert (
        all(row['train/accuracy'] <= 1 for row in rows)
        and summary['examples_seen'] == 14 * 32 + 16 * 4
    )


@pytest.mark.slow
def test_without_config_json_nobody_knows_which_config_it_was(tiny, workdir, monkeypatch):
    stopped_at(tiny, workdir, 14, monkeypatch)
    os.remove(os.path.join(workdir, 'config.json'))
    with refused(ConfigError, 'no config.json', fix='--resume=changed'):
        train.run(tiny, workdir)
    tiny.best_metric = 'eval/loss'
    assert train.run(tiny, workdir, 'changed') == 0
    report = storage.read(os.path.join(workdir, 'report.md')).decode()
    assert (
        'changed at step 14: config.json was missing, so the config up to this step is unknown'
        in report
    )
    summary, rows = read_json(os.path.join(workdir, 'summary.json')), read_metrics(workdir)
    assert summary['best/loss'] == min(
        row['eval/loss'] for row in rows if row['step'] > 14 and 'eval/loss' in row
    )


# Another value for each key with which an evaluation of the same weights must give the same
# numbers. A key that is new in configs/default.py is missing here until somebody has decided.
# (The tiny model has no drop-path.)
SAME_EVALUATION = {
    'seed': 1,
    'dataset.max_broken': 0.5,
    'dataset.memory_gib': 0.5,
    'dataset.service': 'localhost:1',
    'batch_size': 48,
    'accumulate_steps': 2,
    'eval_batch_size': 100,
    'train_for': '50 steps',
    'schedule.name': 'linear',
    'schedule.peak_lr': 1.0,
    'schedule.start_lr': 0.1,
    'schedule.end_lr': 0.01,
    'schedule.warmup': '7%',
    'schedule.hold': '3%',
    'optimizer.name': 'sgd',
    'weight_decay': 0.3,
    'l2_regularization': 0.1,
    'label_smoothing': 0.5,
    'ema_decay': 0.5,
    'grad_clip_norm': 1.0,
    'model.weights': 'imagenet',
    'model.freeze': 'backbone',
    'model.layer_decay': 0.5,
    'model.dropout': 0.9,
    'model.drop_path': 0.0,
    'model.sync_batch_norm': False,
    'distill.teacher': 'ResNet50',
    'distill.weights': '',
    'distill.alpha': 0.1,
    'distill.temperature': 3.0,
    'augment.crop': 'random',
    'augment.crop_area': (0.5, 1.0),
    'augment.flip': True,
    'augment.translate': 0.9,
    'augment.rotate': 0.5,
    'augment.zoom': 0.5,
    'augment.repeats': 2,
    'augment.policy.name': 'rand_augment',
    'augment.policy.num_ops': 5,
    'augment.policy.magnitude': 20.0,
    'augment.policy.rate': 0.5,
    'augment.color_jitter': 0.5,
    'augment.random_erasing': 0.5,
    'augment.mixup': 0.5,
    'augment.cutmix': 0.5,
    'progressive.stages': 3,
    'progressive.image_size': 32,
    'progressive.strength': 0.9,
    'jit_compile': 'false',
    'strategy': 'one_device',
    'virtual_devices': 1,
    'tpu': 'mine',
    'steps_per_loop': 2,
    'log_every': '1 steps',
    'eval_every': '1 steps',
    'checkpoint_every': '1 steps',
    'keep_checkpoints': 1,
    'best_metric': 'eval/loss',
    'patience': '1 steps',
    'max_skipped_updates': 1,
}


def test_keys_that_keep_what_was_measured_change_no_evaluation(tiny, workdir, reference):
    shutil.copytree(
        os.path.join(reference, 'checkpoints'), os.path.join(workdir, 'checkpoints')
    )  # without config.json, which would refuse them
    for key, value in SAME_EVALUATION.items():
        set_key(tiny, key, value)
    found, before = evaluate.run(tiny, workdir), read_json(os.path.join(reference, 'summary.json'))
    for key, value in found.items():
        assert value == pytest.approx(before[key], rel=1e-5), key


@pytest.mark.parametrize('key', sorted(flatten(tiny_config())))
def test_what_a_run_knows_holds_or_is_forgotten(key):
    progress = Progress(
        step=40,
        evaluated_at=40,
        metrics={'eval/loss': 1.0},
        best_step=20,
        best=0.98,
        window={'loss': 3.0},
        window_start=35,
    )
    assert changes_evaluation(key) == (key not in SAME_EVALUATION)
    progress.reset_for_config_change({key})
    holds = key in SAME_EVALUATION and key != 'best_metric'
    assert (progress.evaluated_at, progress.metrics) == (
        (40, {'eval/loss': 1.0}) if holds else (None, {})
    )
    assert (progress.best_step, progress.best) == ((20, 0.98) if holds else (None, None))
    assert progress.evaluation_from == (0 if key in SAME_EVALUATION else None)
    assert progress.patience_from == (0 if key == 'patience' else 40)
    assert (progress.window, progress.window_start) == ({}, 40)


def test_without_a_config_all_that_was_measured_is_forgotten():
    progress = Progress(
        step=40, evaluated_at=40, metrics={'eval/loss': 1.0}, best_step=20, best=0.98
    )
    progress.reset_for_config_change({ANY_KEY})
    assert (
        progress.evaluated_at,
        progress.metrics,
        progress.best_step,
        progress.best,
        progress.patience_from,
    ) == (None, {}, None, None, 40)


@pytest.mark.slow
@pytest.mark.parametrize(
    'key, value', [('dataset.eval_split', 'train[:100]'), ('eval_crop', 0.5), ('image_size', 24)]
)
def test_another_evaluation_of_a_finished_run_is_made_at_its_end(
    tiny, workdir, reference, key, value
):
    shutil.copytree(reference, workdir)
    set_key(tiny, key, value)
    assert train.run(tiny, workdir, 'changed') == 0
    summary, last = read_json(os.path.join(workdir, 'summary.json')), read_metrics(workdir)[-1]
    found = evaluate.run(tiny, workdir)
    assert found['eval/loss'] != read_json(os.path.join(reference, 'summary.json'))['eval/loss']
    for name, number in found.items():
        assert summary[name] == last[name] == number, name
    assert (summary['steps'], summary['best/step'], summary['best/accuracy']) == (
        30,
        30,
        found['eval/accuracy'],
    )
    assert board_of(workdir) == numbers_of(read_metrics(workdir))
    run = compare.read_run(workdir)
    assert run.evaluation_from == 30 and run.values('eval/loss') == [found['eval/loss']]


@pytest.mark.slow
def test_runs_are_compared_by_evaluations_since_the_change(tiny, workdir, monkeypatch):
    stopped_at(tiny, workdir, 14, monkeypatch)
    tiny.eval_crop = 0.5
    with monkeypatch.context() as patch:
        stop_at(patch, 19)
        assert train.run(tiny, workdir, 'changed') == 143
    run = compare.read_run(workdir)
    assert [row['step'] for row in run.rows if 'eval/loss' in row] == [10]
    assert run.values('eval/loss') == [] and run.values('step') == [5, 10, 15]
    stopped_at(tiny, workdir, 24, monkeypatch)
    assert len(compare.read_run(workdir).values('eval/loss')) == 1
    assert train.run(tiny, workdir) == 0
    run = compare.read_run(workdir)
    assert run.evaluation_from == 20 and len(run.values('eval/loss')) == 2


@pytest.mark.slow
def test_what_was_forgotten_stays_so_when_the_start_is_killed(tiny, workdir, monkeypatch):
    stopped_at(tiny, workdir, 14, monkeypatch)
    tiny.best_metric = 'eval/loss'
    with monkeypatch.context() as patch:
        at_step(patch, 19, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.run(tiny, workdir, 'changed')
    assert train.run(tiny, workdir) == 0  # now it is the same config
    summary, rows = read_json(os.path.join(workdir, 'summary.json')), read_metrics(workdir)
    assert summary['best/loss'] == min(
        row['eval/loss'] for row in rows if row['step'] > 14 and 'eval/loss' in row
    )


@pytest.mark.slow
def test_patience_counts_from_the_change_of_what_is_best(tiny, workdir, monkeypatch, capsys):
    tiny.train_for = '60 steps'
    tiny.eval_every = '5 steps'
    tiny.patience = '10 steps'
    tiny.best_metric = 'eval/loss'
    losses = iter([1.0, 2.0, 2.0, *[float('nan')] * 3, 1.5, 1.6, 1.6])
    make = train.evaluate.make_evaluation
    monkeypatch.setattr(
        train.evaluate,
        'make_evaluation',
        lambda session: lambda *stop: {**make(session)(*stop), 'eval/loss': next(losses)},
    )
    assert train.run(tiny, workdir) == 0
    assert read_json(os.path.join(workdir, 'summary.json'))['steps'] == 15
    tiny.best_metric = 'eval/top5'
    assert (
        train.run(tiny, workdir, 'changed') == 0
    )  # evaluates step 15 again; a loss that is not a number is never the best
    assert (
        'stopped at step 25 of 60: eval/top5 has not improved since step 15, which is 10 steps '
        '(config.patience)' in ' '.join(capsys.readouterr().out.split())
    )
    tiny.best_metric = 'eval/loss'
    assert train.run(tiny, workdir, 'changed') == 0
    summary = read_json(os.path.join(workdir, 'summary.json'))
    assert (summary['steps'], summary['best/step'], summary['best/loss']) == (35, 25, 1.5)
    assert strict_json(workdir) >= {
        'metrics.jsonl',
        'summary.json',
        'environment.json',
        'manifest.json',
    }
    assert [row['step'] for row in read_metrics(workdir) if np.isnan(row.get('eval/loss', 0))] == [
        15,
        20,
    ]


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_leaves_files_that_are_json(tiny, workdir, monkeypatch, capsys):
    tiny.eval_every = '15 steps'
    make = train.evaluate.make_evaluation
    monkeypatch.setattr(
        train.evaluate,
        'make_evaluation',
        lambda session: lambda *stop: {**make(session)(*stop), 'eval/loss': np.float32('inf')},
    )
    assert train.run(tiny, workdir) == 0
    capsys.readouterr()
    evaluate.run(tiny, workdir)
    export.run(tiny, workdir)
    evaluated, exported = (
        json.loads(line, parse_constant=pytest.fail)
        for line in capsys.readouterr().out.splitlines()
        if line.startswith('{')
    )
    assert evaluated['eval/loss'] is None and evaluated['step'] == exported['export/step'] == 30
    assert strict_json(workdir) >= {
        'metrics.jsonl',
        'summary.json',
        'evaluation.json',
        'manifest.json',
    }
    assert read_json(os.path.join(workdir, 'summary.json'))['eval/loss'] is None
    assert (
        '| loss on the evaluation split | inf |'
        in storage.read(os.path.join(workdir, 'report.md')).decode()
    )
    assert (
        compare.main([workdir, f'--output={workdir}/compared.png']) == 0
        and '| not finite ' in capsys.readouterr().out
    )
    assert not np.isfinite(board_of(workdir)['eval/loss', 30].expected)
    tiny.train_for = '32 steps'  # the checkpoint has a number that is none
    assert train.run(tiny, workdir, 'changed') == 0


def strict_json(workdir):
    """The names of the JSON files of a run; fails where one holds NaN or Infinity."""
    names = set()
    for folder, _, found in os.walk(workdir):
        for name in found:
            if name.endswith(('.json', '.jsonl')):
                text = storage.read(os.path.join(folder, name)).decode()
                for part in text.splitlines() if name.endswith('l') else [text]:
                    json.loads(part, parse_constant=pytest.fail)
                names.add(name)
    return names


@pytest.mark.slow
def test_a_checkpoint_of_an_older_version_is_taken_up_exactly(
    tiny, workdir, reference, monkeypatch
):
    stopped_at(tiny, workdir, 14, monkeypatch)
    path = os.path.join(workdir, 'checkpoints', 'step-14', 'manifest.json')
    manifest = read_json(path)['manifest']
    for name in ('distinct_seen', 'patience_from', 'config'):
        del manifest['progress'][name]
    content = json.dumps(manifest, sort_keys=True)
    storage.write(
        path,
        json.dumps({'sha256': hashlib.sha256(content.encode()).hexdigest(), 'manifest': manifest}),
    )
    assert train.run(tiny, workdir) == 0
    assert_same_run(workdir, reference)


def events_of(workdir):
    """[(tag, step, value)] of all that TensorBoard reads of a run, in order."""
    folder = os.path.join(workdir, 'tensorboard')
    found = []
    for name in storage.list_folder(folder):
        for event in tf.compat.v1.train.summary_iterator(os.path.join(folder, name)):
            found += [
                (value.tag, event.step, float(tf.make_ndarray(value.tensor)))
                for value in event.summary.value
            ]
    return found


def board_of(workdir):
    """{(tag, step): value}; asserts that none is there twice."""
    found = events_of(workdir)
    assert len({(tag, step) for tag, step, _ in found}) == len(found)
    return {(tag, step): pytest.approx(value, rel=1e-6, nan_ok=True) for tag, step, value in found}


def numbers_of(rows):
    return {
        (name, row['step']): value
        for row in rows
        for name, value in row.items()
        if name not in ('step', 'wall_time')
    }


@pytest.mark.slow
@pytest.mark.parametrize('place', ['', 'file://'])
def test_tensorboard_has_updates_that_were_done_again_once(
    tiny, tmp_path, reference, monkeypatch, place
):
    monkeypatch.setattr(bucket_lease, 'SETTLE_SECONDS', 0.1)
    workdir = place + str(tmp_path / 'run')
    stopped_at(tiny, workdir, 29, monkeypatch)
    storage.write(os.path.join(workdir, 'tensorboard', 'mine.txt'), 'of the user')
    written = set(storage.list_folder(os.path.join(workdir, 'tensorboard')))
    storage.delete(
        os.path.join(workdir, 'checkpoints', 'step-29')
    )  # as a power cut does: rows and events go up to 25, checkpoints to 20
    assert ('train/loss', 25) in board_of(workdir)
    assert train.run(tiny, workdir) == 0
    assert_same_run(workdir, reference)
    assert board_of(workdir) == numbers_of(read_metrics(workdir))
    assert not written & set(storage.list_folder(os.path.join(workdir, 'tensorboard'))) - {
        'mine.txt'
    }
    accumulator = event_accumulator.EventAccumulator(
        os.path.join(workdir, 'tensorboard').removeprefix('file://')
    ).Reload()
    assert [event.step for event in accumulator.Tensors('train/loss')] == [5, 10, 15, 20, 25, 30]


@pytest.mark.slow
def test_tensorboards_files_stay_where_nothing_is_done_again(tiny, workdir, monkeypatch):
    stopped_at(tiny, workdir, 14, monkeypatch)
    monkeypatch.setattr(
        metrics_logger, 'rewrite_tensorboard', lambda *_: pytest.fail('written anew')
    )
    assert train.run(tiny, workdir) == 0
    assert board_of(workdir) == numbers_of(read_metrics(workdir))


def one_epoch(tiny, batch_size):
    """One epoch of batches of this size, with a row and a loop for each."""
    tiny.batch_size = batch_size
    tiny.train_for = '1 epochs'
    tiny.steps_per_loop = 1
    tiny.checkpoint_every = '100%'
    tiny.log_every, tiny.eval_every = '1 steps', '100%'


@pytest.fixture(scope='module')
def other_batch(tmp_path_factory):
    """A run of one epoch: 11 updates of 64 examples, then such of 32; and what that printed."""
    config, workdir = tiny_config(), str(tmp_path_factory.mktemp('batch') / 'run')
    said = io.StringIO()
    with reading_here(), pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        one_epoch(config, 64)
        stopped_at(config, workdir, 11, patch)
        one_epoch(config, 32)
        assert train.run(config, workdir, 'changed') == 0
    return workdir, said.getvalue()


@pytest.mark.slow
def test_another_batch_size_goes_on_to_the_same_length(tiny, other_batch):
    workdir, said = other_batch
    one_epoch(tiny, 32)
    plan = train.planning.make_plan(tiny, 1437, 360, 10, 1)
    assert plan.total_steps == 44
    rows, summary = read_metrics(workdir), read_json(os.path.join(workdir, 'summary.json'))
    assert [row['step'] for row in rows] == list(
        range(1, 11 + 22 + 1)
    )  # 22 of the 44 are done already, in 11
    assert summary['steps'] == 33 and summary['examples_seen'] == 44 * 32
    rate = train.planning.learning_rate_of(tiny, plan)
    for row in rows[11:]:
        assert row['train/learning_rate'] == pytest.approx(rate(row['step'] + 11 - 1), rel=1e-4)
    goes_on = (
        'changed at step 11: batch_size was 64, is now 32; the run continues after 704 examples '
        '(0.4899 of 0.9798 epochs); 22 updates of 32 examples remain; the learning rate stays '
        f'{rate(22):.4g}'
    )
    assert goes_on in said and goes_on in storage.read(os.path.join(workdir, 'report.md')).decode()
    assert (
        'steps     33, some with another batch size; 0.9798 epochs, '
        'now 44.9062 steps each' in storage.read(os.path.join(workdir, 'report.md')).decode()
    )


@pytest.mark.slow
def test_another_batch_size_goes_on_at_the_same_example(still):
    tiny = still
    """The images that follow are those that would have followed, in the same order."""

    def images(batch_size, first, last, done=None):
        one_epoch(tiny, batch_size)
        plan = train.planning.make_plan(tiny, source.num_train, source.num_eval, 10, 1)
        if done:
            plan = train.planning.resumed_plan(plan, tiny, *done)
        return np.concatenate(
            [
                batch[0].numpy()
                for batch in train.pipeline.training_batches(
                    source, tiny, plan, first, last, strategy
                )
            ]
        )

    source, strategy = datasets.load(tiny.dataset), tf.distribute.OneDeviceStrategy('CPU:0')
    tiny.augment.crop = 'random'
    expected = images(64, 3, 9)
    np.testing.assert_array_equal(images(32, 3, 15, (3, 192, 192)), expected)
    np.testing.assert_array_equal(images(48, 3, 11, (3, 192, 192)), expected)
    np.testing.assert_array_equal(
        images(128, 7, 10, (7, 192, 192)), expected
    )  # after 5 updates of 32 and 2 of 16
    tiny.augment.crop = 'center'
    expected = images(64, 3, 4)
    tiny.augment.repeats = 2
    np.testing.assert_array_equal(
        images(16, 12, 13, (12, 192, 192)), np.tile(expected[:8], (2, 1, 1, 1))
    )
    np.testing.assert_array_equal(
        images(16, 12, 13, (12, 384, 192)), np.tile(expected[:8], (2, 1, 1, 1))
    )


@pytest.mark.slow
def test_a_run_of_two_batch_sizes_that_is_stopped_is_the_same(
    tiny, workdir, other_batch, monkeypatch, capsys
):
    one_epoch(tiny, 64)
    stopped_at(tiny, workdir, 11, monkeypatch)
    one_epoch(tiny, 32)
    with monkeypatch.context() as patch:
        stop_at(patch, 20)
        assert train.run(tiny, workdir, 'changed') == 143
    capsys.readouterr()
    assert train.run(tiny, workdir) == 0
    said = 'after 992 examples at several batch sizes: the run has 33 updates'
    assert said in capsys.readouterr().out
    assert_same_run(workdir, other_batch[0])


@pytest.mark.slow
def test_a_batch_size_that_divides_nothing_ends_within_a_batch(tiny, workdir, other_batch):
    shutil.copytree(other_batch[0], workdir)
    one_epoch(tiny, 100)
    tiny.train_for = '2 epochs'
    assert train.run(tiny, workdir, 'changed') == 0
    summary = read_json(os.path.join(workdir, 'summary.json'))
    assert (
        2 * 1437 - 100 < summary['examples_seen'] < 2 * 1437 + 100
        and summary['steps'] == 33 + 28 - 14
    )
    assert [row['step'] for row in read_metrics(workdir)] == list(range(1, 48))


@pytest.mark.slow
def test_a_damaged_row_is_named_and_the_others_stay(tiny, workdir, monkeypatch, capsys):
    tiny.log_every = '2 steps'
    stopped_at(tiny, workdir, 14, monkeypatch)
    path = os.path.join(workdir, 'metrics.jsonl')
    lines = storage.read(path).decode().splitlines(keepends=True)
    storage.write(path, ''.join([*lines[:2], '{"step": 6, "tra\n', '3\n', *lines[4:]]))
    assert train.run(tiny, workdir) == 0
    assert (
        capsys.readouterr().out.count(f'damaged   {path}: line 3, 4 cannot be read; skipped') == 1
    )
    assert [row['step'] for row in read_metrics(workdir)] == [2, 4, *range(10, 31, 2)]


@pytest.mark.parametrize(
    'name, content',
    [
        ('config.json', '[]'),
        ('config.json', 'null'),
        ('config.json', ''),
        ('environment.json', '[]'),
    ],
)
def test_files_that_are_not_what_was_written_are_one_line(tiny, workdir, reference, name, content):
    shutil.copytree(reference, workdir)
    os.remove(os.path.join(workdir, 'summary.json'))
    storage.write(os.path.join(workdir, name), content)
    with refused(RunError, name, fix='--resume=never'):
        train.run(tiny, workdir)


def test_what_is_in_the_way_of_checkpoints_shows_at_once(tiny, workdir):
    storage.make_folder(workdir)
    storage.write(os.path.join(workdir, 'checkpoints'), 'a file')
    with refused(RunError, os.path.join(workdir, 'checkpoints')):
        train.run(tiny, workdir)


def test_two_runs_in_one_folder_are_refused_by_name(tiny, workdir):
    with workdir_lock.hold(workdir):
        with refused(RunError, workdir, fix='--workdir'):
            train.run(tiny, workdir)
        assert os.listdir(workdir) == ['.lock']


def at_step(monkeypatch, step, act):
    original = train.MetricsLogger.advance

    def advance(self, now):
        original(self, now)
        if now == step:
            act()

    monkeypatch.setattr(train.MetricsLogger, 'advance', advance)


def vanish(folder):
    """Takes it away at once: to delete its files one by one would race with those who write."""
    os.rename(folder, f'{folder}-gone')


def test_a_folder_that_vanishes_ends_the_run_with_one_line(tiny, workdir, monkeypatch):
    at_step(monkeypatch, 14, lambda: vanish(workdir))
    with refused(RunError, workdir):
        train.run(tiny, workdir)


@pytest.mark.slow
def test_a_folder_that_vanishes_during_read_back_is_named(tiny, workdir, monkeypatch):
    original = storage.read_chunks

    def parts(path):
        if 'step-10' in path and os.path.isdir(workdir):
            vanish(workdir)
        return original(path)

    monkeypatch.setattr(storage, 'read_chunks', parts)
    with refused(RunError, workdir):
        train.run(tiny, workdir)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_resumes(tiny, workdir, reference, monkeypatch):
    original = storage.write

    def write(path, content):
        if path.endswith('step-20/manifest.json'):
            raise OSError(errno.ENOSPC, 'No space left on device')
        original(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(
            storage,
            'write',
            lambda path, content: storage.one_line_errors(path).__enter__() or write(path, content),
        )
        with refused(RunError, 'step 20'):
            train.run(tiny, workdir)
    assert steps_in(os.path.join(workdir, 'checkpoints')) == [10]
    assert train.run(tiny, workdir) == 0
    assert read_json(os.path.join(workdir, 'summary.json'))['resumed_from'] == [10]
    assert_same_run(workdir, reference)


def test_a_read_only_folder_is_named_before_training(tiny):
    with refused(RunError, '/proc/run'):
        train.run(tiny, '/proc/run')


@pytest.mark.slow
def test_a_deleted_checkpoint_costs_its_steps_and_no_more(
    tiny, workdir, reference, monkeypatch, capsys
):
    stopped_at(tiny, workdir, 24, monkeypatch)
    shutil.rmtree(os.path.join(workdir, 'checkpoints', 'step-24'))
    assert train.run(tiny, workdir) == 0
    assert read_json(os.path.join(workdir, 'summary.json'))['resumed_from'] == [20]
    assert_same_run(workdir, reference)


@pytest.mark.slow
def test_without_any_checkpoint_it_says_that_it_begins_again(
    tiny, workdir, reference, monkeypatch, capsys
):
    stopped_at(tiny, workdir, 14, monkeypatch)
    shutil.rmtree(os.path.join(workdir, 'checkpoints'))
    assert train.run(tiny, workdir) == 0
    assert (
        'begins    at step 0: metrics.jsonl reaches step 10, but there is no checkpoint'
        in capsys.readouterr().out
    )
    assert_same_run(workdir, reference)


@pytest.mark.slow
def test_clocks_that_jump_change_nothing(tiny, workdir, reference, monkeypatch):
    now, jumps = time.time, np.random.RandomState(0)
    monkeypatch.setattr(time, 'time', lambda: now() + jumps.uniform(-1e9, 1e9))
    assert train.run(tiny, workdir) == 0
    assert_same_run(workdir, reference)
    summary = read_json(os.path.join(workdir, 'summary.json'))
    assert 0 < summary['train_seconds'] < 600 and summary['examples_per_second'] > 0


@pytest.mark.slow
def test_a_run_behind_tensorflows_file_system_is_the_same_run(
    tiny, tmp_path, reference, monkeypatch
):
    monkeypatch.setattr(bucket_lease, 'SETTLE_SECONDS', 0.1)
    # Everything goes through tf.io.gfile, as for gs://.
    workdir = f'file://{tmp_path}/bucket/runs/digits'
    stopped_at(tiny, workdir, 14, monkeypatch)
    assert train.run(tiny, workdir) == 0
    assert_same_run(workdir, reference)
    assert {'config.json', 'report.md', 'summary.json', 'export', 'plots', 'checkpoints'} <= set(
        storage.list_folder(workdir)
    )
    assert storage.read(workdir + '/plots/curves.png')[
        :4
    ] == b'\x89PNG' and 'saved_model.pb' in storage.list_folder(workdir + '/export')
    assert (
        evaluate.run(tiny, workdir)['eval/accuracy']
        == read_json(reference + '/summary.json')['eval/accuracy']
    )


@pytest.mark.slow
def test_loops_longer_than_a_preemption_notice_are_noted_once(tiny, workdir, monkeypatch, capsys):
    monkeypatch.setattr(train, 'LONG_LOOP_SECONDS', 0.0)
    assert train.run(tiny, workdir) == 0
    assert (
        capsys.readouterr().out.count(
            'a loop takes 0 s, and a preempted machine has only about 30: lower '
            'config.steps_per_loop'
        )
        == 1
    )
