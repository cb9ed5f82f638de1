"""The copy of a run in a bucket can be continued at any moment. A folder stands for the bucket."""
import os
import signal
import subprocess
import sys
import time

import pytest
import tensorflow as tf

import mirror

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture
def run(tmp_path):
    return Run(str(tmp_path / 'run'), str(tmp_path / 'copy'))


class Run:
    """A folder with checkpoints of one variable, and its copy."""

    def __init__(self, folder, copy):
        self.folder, self.copy = folder, copy
        self._variable = tf.Variable(0)
        self._manager = tf.train.CheckpointManager(tf.train.Checkpoint(step=self._variable), os.path.join(folder, 'checkpoints'), max_to_keep=1, checkpoint_name='step')

    def save(self, step):
        self._variable.assign(step)
        self._manager.save(checkpoint_number=step)
        with open(os.path.join(self.folder, 'metrics.jsonl'), 'a') as file:
            file.write(f'{step}\n')


def restored(folder):
    """What the last checkpoint of a run holds."""
    variable = tf.Variable(-1)
    tf.train.Checkpoint(step=variable).restore(tf.train.latest_checkpoint(os.path.join(folder, 'checkpoints'))).assert_consumed()
    return int(variable)


def test_the_copy_holds_what_the_run_holds(run):
    copy = mirror.Copy(run.folder, run.copy)
    for step in (10, 20):
        run.save(step)
        open(os.path.join(run.folder, 'report.md.part'), 'w').close()
        copy.renew()
        assert restored(run.copy) == step
        files = {os.path.relpath(os.path.join(place, name), run.copy) for place, _, names in os.walk(run.copy) for name in names}
        assert files == {'metrics.jsonl', 'checkpoints/checkpoint', f'checkpoints/step-{step}.index', f'checkpoints/step-{step}.data-00000-of-00001'}
    with open(os.path.join(run.copy, 'metrics.jsonl')) as file:
        assert file.read() == '10\n20\n'


def test_a_copy_during_which_a_checkpoint_is_saved_can_be_continued(run, monkeypatch):
    run.save(10)
    copy, write, steps = mirror.Copy(run.folder, run.copy), mirror.Copy._write, iter(range(20, 50, 10))

    def save_meanwhile(self, path, state):
        for step in steps if path.endswith('.index') else ():
            run.save(step)  # and delete the one before
            break
        write(self, path, state)

    monkeypatch.setattr(mirror.Copy, '_write', save_meanwhile)
    copy.renew()  # three tries, and each was overtaken
    assert not os.path.exists(os.path.join(run.copy, 'checkpoints', 'checkpoint'))
    copy.renew()
    assert restored(run.copy) == 40


def test_what_is_unchanged_is_not_copied_again(run, monkeypatch):
    run.save(10)
    copy = mirror.Copy(run.folder, run.copy)
    copy.renew()
    monkeypatch.setattr(mirror.Copy, '_write', lambda *arguments: pytest.fail(f'copied again: {arguments}'))
    copy.renew()


def test_a_run_is_fetched_where_it_is_not_and_left_where_it_is(run, tmp_path):
    run.save(10)
    mirror.Copy(run.folder, run.copy).renew()
    other = str(tmp_path / 'other')
    assert mirror.fetch(run.copy, other) and restored(other) == 10
    run.save(20)
    assert not mirror.fetch(run.copy, run.folder) and restored(run.folder) == 20
    assert not mirror.fetch(str(tmp_path / 'nothing'), str(tmp_path / 'new'))


def test_the_command_gets_environment_and_signals_and_its_last_files_are_copied(run):
    command = ("import os, signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
               "os.makedirs(sys.argv[1]); open(sys.argv[1] + '/begun', 'w').write(os.environ.get('TPU_LOAD_LIBRARY', 'mine'))\n"
               "try:\n    time.sleep(100)\nexcept KeyboardInterrupt:\n    open(sys.argv[1] + '/ended', 'w').close(); sys.exit(7)")
    environment = {key: value for key, value in os.environ.items() if key != 'TPU_LOAD_LIBRARY'}
    process = subprocess.Popen([sys.executable, 'mirror.py', run.folder, run.copy, '--', sys.executable, '-c', command, run.folder], cwd=ROOT, env=environment)
    while not os.path.exists(os.path.join(run.folder, 'begun')):
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 7
    assert sorted(os.listdir(run.copy)) == ['begun', 'ended']
    assert open(os.path.join(run.copy, 'begun')).read() == 'mine'


def test_without_a_command_it_says_how_it_is_used(capsys):
    assert mirror.main(['runs/digits', 'gs://bucket/digits']) == 2
    assert 'python mirror.py runs/digits' in capsys.readouterr().err


@pytest.mark.parametrize('place', ['{run}', '{run}/', '{run}/copy', '{above}', '{link}'])
def test_a_run_is_not_copied_onto_itself(run, place, tmp_path, capsys):
    run.save(1)
    (tmp_path / 'link').symlink_to(run.folder)
    before = {path: path.stat().st_size for path in (tmp_path / 'run').rglob('*')}
    copy = place.format(run=run.folder, above=str(tmp_path), link=str(tmp_path / 'link'))
    assert mirror.main([run.folder, copy, '--', 'true']) == 2
    assert 'are the same folder, or one lies in the other' in capsys.readouterr().err
    assert before == {path: path.stat().st_size for path in (tmp_path / 'run').rglob('*')}


@pytest.fixture
def own_environment(monkeypatch):
    """What `mirror` sets for its process goes with the test."""
    for name in ('TPU_LOAD_LIBRARY', 'TPU_SKIP_MDS_QUERY', 'CUDA_VISIBLE_DEVICES', 'TF_CPP_MIN_LOG_LEVEL'):
        monkeypatch.setenv(name, os.environ.get(name, '0'))


def test_a_place_that_cannot_be_written_to_and_a_missing_command_are_named_before_anything_runs(run, tmp_path, capsys, own_environment):
    (tmp_path / 'file').write_text('')
    ran = tmp_path / 'ran'
    assert mirror.main([run.folder, str(tmp_path / 'file'), '--', 'touch', str(ran)]) == 1
    assert 'cannot be read or written' in capsys.readouterr().err and not ran.exists()
    assert mirror.main([run.folder, run.copy, '--', 'no-such-command']) == 127
    assert capsys.readouterr().err == 'error: no-such-command cannot be run: No such file or directory\n'
