"""A run goes on as if nothing had happened, or says in one line why not; nothing that was saved is lost."""
import errno
import json
import os
import shutil
import time

import numpy as np
import pytest
import tensorflow as tf

import evaluate
import preview
import train
from errors import ConfigError, RunError
from outputs import files, lock
from outputs.checkpoints import steps_in
from outputs.files import read_json
from outputs.logbook import read_metrics
from tests.conftest import reading_here, tiny_config
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
    ours, theirs = (read_json(os.path.join(folder, 'summary.json')) for folder in (workdir, reference))
    for key in ('weights_sha256', 'eval/accuracy', 'eval/loss', 'best/accuracy', 'best/step', 'steps', 'skipped_updates'):
        assert ours[key] == theirs[key], key
    assert without_times(workdir) == without_times(reference)


def test_a_run_that_is_stopped_within_a_window_has_the_same_metrics(tiny, workdir, reference, monkeypatch):
    stopped_at(tiny, workdir, 14, monkeypatch)  # rows are of steps 10 and 15
    assert train.run(tiny, workdir) == 0
    assert read_json(os.path.join(workdir, 'summary.json'))['resumed_from'] == [14]
    assert_same_run(workdir, reference)


def test_a_signal_during_evaluation_does_not_wait_for_its_end_and_it_is_made_up_for(tiny, workdir, reference, monkeypatch):
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
    assert evaluate.run(tiny, workdir, 'best')['eval/accuracy'] == read_json(os.path.join(workdir, 'summary.json'))['best/accuracy']


def test_the_last_evaluation_may_be_the_best_although_it_was_broken_off(tiny, workdir, monkeypatch):
    tiny.eval_every, tiny.checkpoint_every, tiny.steps_per_loop, tiny.eval_batch_size = '30 steps', '30 steps', 1, 12
    make = train.evaluate.make_evaluation
    with monkeypatch.context() as patch:
        patch.setattr(train.evaluate, 'make_evaluation', lambda session: lambda *stop: os.kill(os.getpid(), train.signal.SIGTERM) or make(session)(*stop))
        assert train.run(tiny, workdir) == 143
    assert train.run(tiny, workdir) == 0
    assert read_json(os.path.join(workdir, 'summary.json'))['best/step'] == 30
    assert evaluate.run(tiny, workdir, 'best')['eval/accuracy'] == read_json(os.path.join(workdir, 'summary.json'))['eval/accuracy']


def test_it_goes_on_with_another_number_of_devices(still, workdir, tmp_path, monkeypatch):
    assert train.run(still, str(tmp_path / 'whole')) == 0
    stopped_at(still, workdir, 14, monkeypatch)
    still.virtual_devices = 2
    assert train.run(still, workdir) == 0
    for ours, theirs in zip(without_times(workdir), without_times(str(tmp_path / 'whole')), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3), ours  # the same pictures, added up in another order


def test_a_changed_config_goes_on_only_on_purpose_and_says_what_becomes_of_the_rate(tiny, workdir, monkeypatch, capsys):
    stopped_at(tiny, workdir, 14, monkeypatch)
    tiny.schedule.peak_lr, tiny.keep_checkpoints = 2e-2, 1
    with pytest.raises(ConfigError, match=r'holds a run of another config \(schedule.peak_lr was 0.01, is 0.02\): use that config, or give this one its own '
                                          '--workdir. On purpose, --resume=changed trains on with the new config, and --resume=never moves that run aside'):
        train.run(tiny, workdir)
    capsys.readouterr()
    assert train.run(tiny, workdir, 'changed') == 0
    rate = float(train.planning.learning_rate_of(tiny, train.planning.make_plan(tiny, 1437, 360, 10, 1))(14))
    said = f'changed at step 14: schedule.peak_lr was 0.01, is 0.02; the learning rate goes on from {rate / 2:.4g} to {rate:.4g}'
    assert f'note      {said}' in capsys.readouterr().out and said in files.read(os.path.join(workdir, 'report.md')).decode()
    assert read_json(os.path.join(workdir, 'config.json'))['schedule']['peak_lr'] == 2e-2
    assert train.run(tiny, workdir) == 0 and 'is finished' in capsys.readouterr().out


def test_a_finished_run_can_be_made_longer_on_purpose_but_not_shorter(tiny, workdir, reference):
    shutil.copytree(reference, workdir)
    tiny.train_for = '20 steps'
    with pytest.raises(ConfigError, match='the run is at step 30, after the end of this config at step 20: raise config.train_for'):
        train.run(tiny, workdir, 'changed')
    tiny.train_for = '40 steps'
    assert train.run(tiny, workdir, 'changed') == 0
    assert read_json(os.path.join(workdir, 'summary.json'))['steps'] == 40 and [row['step'] for row in read_metrics(workdir)] == [*range(5, 41, 5)]


def test_another_model_cannot_take_the_weights_over(tiny, workdir, reference):
    shutil.copytree(reference, workdir)
    tiny.optimizer = {'name': 'sgd'}
    with pytest.raises(RunError, match=r'checkpoints/step-30 does not fit this config \(.*: take the config it was made with'):
        train.run(tiny, workdir, 'changed')
    assert os.path.exists(os.path.join(workdir, 'summary.json'))


def test_a_run_is_moved_aside_and_nothing_of_it_is_lost(tiny, workdir, reference, capsys):
    shutil.copytree(reference, workdir)
    held = sorted(os.listdir(workdir))
    files.write(os.path.join(workdir, 'thesis.tex'), 'not of a run')
    tiny.seed = 1
    assert train.run(tiny, workdir, 'never') == 0
    aside = os.path.join(workdir, 'before-1')
    assert f'the run before is in {aside}' in capsys.readouterr().out
    assert sorted(os.listdir(aside)) == held and os.path.exists(os.path.join(workdir, 'thesis.tex')) and read_json(os.path.join(workdir, 'config.json'))['seed'] == 1
    assert_same_run(aside, reference)


def spoil_updates(monkeypatch, first, last):
    """Makes the labels of updates `first` to `last` what is not a number; of one replica."""
    original = train.augment.on_device

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

    monkeypatch.setattr(train.augment, 'on_device', on_device)
    monkeypatch.setattr(train.steps, 'make_train_step', make_train_step)


def test_an_update_that_is_not_a_number_is_skipped_and_the_run_goes_on(tiny, workdir, monkeypatch):
    spoil_updates(monkeypatch, 12, 13)
    assert train.run(tiny, workdir) == 0
    summary = read_json(os.path.join(workdir, 'summary.json'))
    assert summary['skipped_updates'] == 2 and summary['steps'] == 30 and summary['eval/accuracy'] > 0.15
    assert [row['train/skipped_updates'] for row in read_metrics(workdir)] == [0, 0, 2, 0, 0, 0]
    assert all(np.isfinite(value) for row in read_metrics(workdir) for value in row.values())
    plan = train.planning.make_plan(tiny, 1437, 360, 10, 1)
    assert read_metrics(workdir)[-1]['train/learning_rate'] == pytest.approx(float(train.planning.learning_rate_of(tiny, plan)(29)), rel=1e-5)


def test_too_many_in_a_row_end_the_run_and_leave_the_last_good_checkpoint_and_the_batch(tiny, workdir, reference, monkeypatch, capsys):
    tiny.max_skipped_updates, tiny.checkpoint_every = 6, '1 steps'
    with monkeypatch.context() as patch:
        spoil_updates(patch, 17, 29)
        with pytest.raises(RunError, match='not finite in updates 17 to 22, which were skipped: look at the first batch with --mode=preview; lower '
                                           'config.schedule.peak_lr, .* and go on from step 17, which is saved, with --resume=changed') as error:
            train.run(tiny, workdir)
    assert '\n' not in str(error.value) and steps_in(os.path.join(workdir, 'checkpoints'))[-2:] == [16, 17]
    preview.run(tiny, workdir)
    assert 'update 17 and those after it were skipped' in capsys.readouterr().out
    assert os.path.getsize(os.path.join(workdir, 'preview', 'batch_17.png')) > 10_000
    assert train.run(tiny, workdir) == 0  # the cause has gone
    assert not os.path.exists(os.path.join(workdir, 'skipped.json'))
    ours, theirs = (read_json(os.path.join(folder, 'summary.json'))['weights_sha256'] for folder in (workdir, reference))
    assert ours == theirs


def test_a_run_out_of_patience_ends_and_remembers_what_was_best_over_a_stop(tiny, workdir, monkeypatch, capsys):
    tiny.train_for, tiny.eval_every, tiny.patience, tiny.best_metric = '60 steps', '5 steps', '10 steps', 'eval/loss'
    values = iter([2.0, 1.5, 1.7, 1.6, 1.4])
    make = train.evaluate.make_evaluation

    def make_evaluation(session):
        evaluation = make(session)
        return lambda *should_stop: {**evaluation(*should_stop), 'eval/loss': next(values)}

    monkeypatch.setattr(train.evaluate, 'make_evaluation', make_evaluation)
    stopped_at(tiny, workdir, 14, monkeypatch)
    assert train.run(tiny, workdir) == 0
    summary = read_json(os.path.join(workdir, 'summary.json'))
    assert (summary['steps'], summary['best/step'], summary['best/loss'], summary['eval/loss']) == (20, 10, 1.5, 1.6)
    assert steps_in(os.path.join(workdir, 'checkpoints'))[0] == 10
    capped = evaluate.run(tiny, workdir, 'best')
    assert capped['eval/loss'] == pytest.approx(next(row['eval/loss'] for row in read_metrics(workdir) if row['step'] == 10), abs=3)
    assert json.loads(files.read(os.path.join(workdir, 'evaluation.json')))['step'] == 10
    said = 'ended at step 20 of 60: no eval/loss was better than that of step 10 for 10 steps, config.patience; with another one --resume=changed trains on'
    assert said in capsys.readouterr().out and said in files.read(os.path.join(workdir, 'report.md')).decode()
    tiny.patience = ''
    with monkeypatch.context() as patch:
        patch.setattr(train.evaluate, 'make_evaluation', make)
        assert train.run(tiny, workdir, 'changed') == 0
    assert read_json(os.path.join(workdir, 'summary.json'))['steps'] == 60


def test_a_diverged_model_is_never_right_and_never_the_best(tiny, workdir, monkeypatch):
    stopped_at(tiny, workdir, 14, monkeypatch)
    best = read_json(os.path.join(workdir, 'checkpoints', 'step-14', 'manifest.json'))['manifest']['best_step']
    tiny.schedule.peak_lr, tiny.eval_every, tiny.max_skipped_updates = 1e30, '1 steps', 10
    with pytest.raises(RunError, match='not finite in updates 15 to 24'):
        train.run(tiny, workdir, 'changed')
    assert [row['eval/accuracy'] for row in read_metrics(workdir) if row['step'] > 16] == [0.0] * 8
    manifest = read_json(os.path.join(workdir, 'checkpoints', f'step-{steps_in(os.path.join(workdir, "checkpoints"))[-1]}', 'manifest.json'))['manifest']
    assert manifest['best_step'] == best == 10 and manifest['step'] <= 15


def test_what_does_not_hold_any_more_is_forgotten_when_the_config_changes(tiny, workdir, monkeypatch):
    stopped_at(tiny, workdir, 14, monkeypatch)
    tiny.best_metric, tiny.batch_size = 'eval/loss', 4
    assert train.run(tiny, workdir, 'changed') == 0
    summary, rows = read_json(os.path.join(workdir, 'summary.json')), read_metrics(workdir)
    assert summary['best/loss'] == min(row['eval/loss'] for row in rows if row['step'] > 14 and 'eval/loss' in row)
    assert all(row['train/accuracy'] <= 1 for row in rows) and summary['examples_seen'] == 14 * 32 + 16 * 4


def test_without_config_json_nobody_knows_which_config_it_was(tiny, workdir, monkeypatch):
    stopped_at(tiny, workdir, 14, monkeypatch)
    os.remove(os.path.join(workdir, 'config.json'))
    with pytest.raises(ConfigError, match='config.json is missing, so nobody knows which.*--resume=changed trains on'):
        train.run(tiny, workdir)
    assert train.run(tiny, workdir, 'changed') == 0


def test_a_damaged_row_is_named_and_the_others_stay(tiny, workdir, monkeypatch, capsys):
    tiny.log_every = '2 steps'
    stopped_at(tiny, workdir, 14, monkeypatch)
    path = os.path.join(workdir, 'metrics.jsonl')
    lines = files.read(path).decode().splitlines(keepends=True)
    files.write(path, ''.join([*lines[:2], '{"step": 6, "tra\n', '3\n', *lines[4:]]))
    assert train.run(tiny, workdir) == 0
    assert capsys.readouterr().out.count(f'damaged   {path}: line 3, 4 cannot be read and is left out') == 1
    assert [row['step'] for row in read_metrics(workdir)] == [2, 4, *range(10, 31, 2)]


@pytest.mark.parametrize('name, content', [('config.json', '[]'), ('config.json', 'null'), ('config.json', ''), ('environment.json', '[]')])
def test_files_that_are_not_what_was_written_are_one_line(tiny, workdir, reference, name, content):
    shutil.copytree(reference, workdir)
    os.remove(os.path.join(workdir, 'summary.json'))
    files.write(os.path.join(workdir, name), content)
    with pytest.raises(RunError, match=f'{name} is damaged .*: bring it back from a copy, or begin anew with --resume=never, which moves the run aside'):
        train.run(tiny, workdir)


def test_what_is_in_the_way_of_checkpoints_shows_at_once(tiny, workdir):
    files.make_folder(workdir)
    files.write(os.path.join(workdir, 'checkpoints'), 'a file')
    with pytest.raises(RunError, match='checkpoints cannot be written: a file has the name of this folder'):
        train.run(tiny, workdir)


def test_two_runs_in_one_folder_are_refused_by_name(tiny, workdir):
    with lock.hold(workdir):
        with pytest.raises(RunError, match='is in use: .*--workdir'):
            train.run(tiny, workdir)
        assert os.listdir(workdir) == ['.lock']


def at_step(monkeypatch, step, act):
    original = train.Logbook.advance

    def advance(self, now):
        original(self, now)
        if now == step:
            act()

    monkeypatch.setattr(train.Logbook, 'advance', advance)


def test_a_folder_that_vanishes_ends_the_run_with_one_line(tiny, workdir, monkeypatch):
    at_step(monkeypatch, 14, lambda: shutil.rmtree(workdir))
    with pytest.raises(RunError, match='vanished|somebody has deleted or moved it') as error:
        train.run(tiny, workdir)
    assert '\n' not in str(error.value)


def test_a_folder_that_vanishes_while_a_checkpoint_is_read_back_is_what_the_line_speaks_of(tiny, workdir, monkeypatch):
    original = files.parts

    def parts(path):
        if 'step-10' in path and os.path.isdir(workdir):
            shutil.rmtree(workdir)
        return original(path)

    monkeypatch.setattr(files, 'parts', parts)
    with pytest.raises(RunError, match='vanished'):
        train.run(tiny, workdir)


def test_a_full_disk_ends_the_run_with_one_line_and_it_goes_on_when_there_is_room(tiny, workdir, reference, monkeypatch):
    original = files.write

    def write(path, content):
        if path.endswith('step-20/manifest.json'):
            raise OSError(errno.ENOSPC, 'No space left on device')
        original(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(files, 'write', lambda path, content: files.explained(path).__enter__() or write(path, content))
        with pytest.raises(RunError, match='step 20 could not be written|the disk is full') as error:
            train.run(tiny, workdir)
    assert '\n' not in str(error.value) and steps_in(os.path.join(workdir, 'checkpoints')) == [10]
    assert train.run(tiny, workdir) == 0
    assert read_json(os.path.join(workdir, 'summary.json'))['resumed_from'] == [10]
    assert_same_run(workdir, reference)


def test_a_folder_that_can_only_be_read_is_named_before_anything_is_trained(tiny):
    with pytest.raises(RunError, match='/proc/run') as error:
        train.run(tiny, '/proc/run')
    assert '\n' not in str(error.value)


def test_a_deleted_checkpoint_costs_its_steps_and_no_more(tiny, workdir, reference, monkeypatch, capsys):
    stopped_at(tiny, workdir, 24, monkeypatch)
    shutil.rmtree(os.path.join(workdir, 'checkpoints', 'step-24'))
    assert train.run(tiny, workdir) == 0
    assert read_json(os.path.join(workdir, 'summary.json'))['resumed_from'] == [20]
    assert_same_run(workdir, reference)


def test_without_any_checkpoint_it_says_that_it_begins_again(tiny, workdir, reference, monkeypatch, capsys):
    stopped_at(tiny, workdir, 14, monkeypatch)
    shutil.rmtree(os.path.join(workdir, 'checkpoints'))
    assert train.run(tiny, workdir) == 0
    assert 'begins    at step 0: metrics.jsonl reaches step 10, but no checkpoint is there' in capsys.readouterr().out
    assert_same_run(workdir, reference)


def test_clocks_that_jump_change_nothing(tiny, workdir, reference, monkeypatch):
    now, jumps = time.time, np.random.RandomState(0)
    monkeypatch.setattr(time, 'time', lambda: now() + jumps.uniform(-1e9, 1e9))
    assert train.run(tiny, workdir) == 0
    assert_same_run(workdir, reference)
    summary = read_json(os.path.join(workdir, 'summary.json'))
    assert 0 < summary['train_seconds'] < 600 and summary['examples_per_second'] > 0


def test_a_run_behind_tensorflows_file_system_is_the_same_run(tiny, tmp_path, reference, monkeypatch):
    monkeypatch.setattr(lock, 'SETTLE', 0.1)
    workdir = f'file://{tmp_path}/bucket/runs/digits'  # everything goes through tf.io.gfile, as for gs://
    stopped_at(tiny, workdir, 14, monkeypatch)
    assert train.run(tiny, workdir) == 0
    assert_same_run(workdir, reference)
    assert {'config.json', 'report.md', 'summary.json', 'export', 'plots', 'checkpoints'} <= set(files.list_folder(workdir))
    assert files.read(workdir + '/plots/curves.png')[:4] == b'\x89PNG' and 'saved_model.pb' in files.list_folder(workdir + '/export')
    assert evaluate.run(tiny, workdir)['eval/accuracy'] == read_json(reference + '/summary.json')['eval/accuracy']


def test_loops_that_are_longer_than_a_notice_are_pointed_out_once(tiny, workdir, monkeypatch, capsys):
    monkeypatch.setattr(train, 'LONG_LOOP', 0.0)
    assert train.run(tiny, workdir) == 0
    assert capsys.readouterr().out.count('a loop takes 0 s, and a machine that is taken back gives about 30: lower config.steps_per_loop') == 1
