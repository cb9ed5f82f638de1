"""What a checkpoint says is there is there: whole, verified, the last few and the best, on a disk
and in a bucket.
"""

import errno
import os
import threading

import numpy as np
import pytest
import tensorflow as tf

from common import storage
from common.errors import RunError
from outputs import checkpoints as module
from outputs.checkpoints import Checkpoints, find_checkpoint, steps_in, verify
from tests.conftest import refused


def variables(value=0.0):
    return {
        'model': [tf.Variable(value), tf.Variable([value, 2.0])],
        'optimizer': [tf.Variable(tf.constant(3, tf.int64))],
    }


def saved(directory, steps=(10, 20, 30, 40), best=(10, 20, 20, 40), keep=2):
    """Checkpoints after these steps, whose first variable is the step, and the best as it was known
    then.
    """
    ours = variables()
    checkpoints = Checkpoints(str(directory), ours, keep)
    for step, best_step in zip(steps, best, strict=True):
        ours['model'][0].assign(step)
        checkpoints.save(step, {'step': step}, best_step)
    checkpoints.wait()
    return checkpoints


def restored(directory, which='last', keep=2):
    """(step, the first variable) of a new start."""
    ours = variables(-1.0)
    step, progress = Checkpoints(str(directory), ours, keep).restore(which)
    assert progress == {'step': step}
    return step, float(ours['model'][0])


def spoil(path, content=b'damaged'):
    with open(path, 'wb') as file:
        file.write(content)


@pytest.mark.parametrize('place', ['', 'file://', 'ram://'])
def test_the_last_few_stay_and_the_best_that_they_name(tmp_path, place):
    directory = place + str(tmp_path)
    saved(directory, steps=(10, 20, 30), best=(10, 10, 10))
    assert steps_in(directory) == [10, 20, 30]
    saved(directory, steps=(40, 50), best=(10, 50))
    assert steps_in(directory) == [10, 40, 50]  # 10 is what 40 names, should 50 be damaged
    saved(directory, steps=(60,), best=(50,))
    assert steps_in(directory) == [50, 60]
    assert restored(directory) == (60, 60) and restored(directory, 'best') == (50, 50)


def test_a_save_is_a_snapshot_although_training_continues(tmp_path, monkeypatch):
    ours, may_write = variables(1.0), threading.Event()
    checkpoints = Checkpoints(str(tmp_path), ours, keep=1)
    original = checkpoints._write
    monkeypatch.setattr(
        checkpoints, '_write', lambda *arguments: may_write.wait() and original(*arguments)
    )
    checkpoints.save(1, {'step': 1})  # returns before it is written
    assert steps_in(str(tmp_path)) == []
    for variable in (*ours['model'], *ours['optimizer']):
        variable.assign_add(tf.ones_like(variable))
    may_write.set()
    checkpoints.wait()
    other = variables()
    Checkpoints(str(tmp_path), other, keep=1).restore()
    assert [variable.numpy().tolist() for variable in (*other['model'], *other['optimizer'])] == [
        1.0,
        [1.0, 2.0],
        3,
    ]


@pytest.mark.parametrize(
    'content',
    [
        '[]',
        '{"sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a", '
        '"manifest": {}}',
    ],
)
def test_a_manifest_of_another_kind_is_damaged(tmp_path, content):
    saved(tmp_path)
    spoil(tmp_path / 'step-40' / 'manifest.json', content.encode())
    assert restored(tmp_path) == (30, 30)


@pytest.mark.parametrize(
    'name', ['variables.index', 'variables.data-00000-of-00001', 'manifest.json']
)
def test_a_damaged_checkpoint_is_named_and_an_older_one_used(tmp_path, capsys, name):
    saved(tmp_path)
    spoil(tmp_path / 'step-40' / name)
    assert restored(tmp_path) == (30, 30)
    assert (
        capsys.readouterr().out
        == f'damaged   {tmp_path}/step-40/{name} is damaged: its checksum does not match\n'
    )
    with refused(RunError, f'step-40/{name}'):
        find_checkpoint(str(tmp_path))


def test_damaged_checkpoints_are_deleted_after_a_newer_good_one(tmp_path):
    saved(tmp_path, keep=1)
    assert steps_in(str(tmp_path)) == [40]
    checkpoints = saved(tmp_path, steps=(50,), best=(50,), keep=2)
    spoil(tmp_path / 'step-50' / 'variables.index')
    checkpoints = Checkpoints(str(tmp_path), variables(), keep=1)
    assert checkpoints.restore()[0] == 40 and steps_in(str(tmp_path)) == [40, 50]
    checkpoints.save(45, {'step': 45}, 40)
    checkpoints.wait()
    assert steps_in(str(tmp_path)) == [40, 45] and restored(tmp_path) == (45, 45 * 0 + 40)


def test_a_damaged_checkpoint_is_rewritten_at_its_step(tmp_path):
    saved(tmp_path)
    spoil(tmp_path / 'step-40' / 'variables.index')
    ours = variables()
    checkpoints = Checkpoints(str(tmp_path), ours, keep=2)
    checkpoints.restore()
    ours['model'][0].assign(40)
    checkpoints.save(40, {'step': 40}, 20)
    checkpoints.wait()
    assert restored(tmp_path) == (40, 40)


def test_half_of_a_checkpoint_is_none_and_goes_away(tmp_path):
    saved(tmp_path)
    os.makedirs(tmp_path / 'step-35')
    os.remove(tmp_path / 'step-40' / 'manifest.json')
    assert steps_in(str(tmp_path)) == [20, 30] and restored(tmp_path) == (30, 30)
    saved(tmp_path, steps=(50,), best=(50,), keep=1)
    assert os.listdir(tmp_path) == ['step-50']


def test_without_a_good_one_nothing_is_restored(tmp_path):
    with refused(RunError, 'last', tmp_path, fix='train first'):
        restored(tmp_path)
    saved(tmp_path, steps=(10, 20), best=(None, None))
    with refused(RunError, 'best', tmp_path):
        restored(tmp_path, 'best')
    for step in (10, 20):
        os.remove(tmp_path / f'step-{step}' / 'variables.index')
    with refused(RunError, '2 checkpoints', 'step-20/variables.index', fix='--resume=never'):
        restored(tmp_path)


def test_a_best_one_that_is_damaged_is_named(tmp_path):
    saved(tmp_path, steps=(10, 20), best=(10, 10))
    spoil(tmp_path / 'step-10' / 'variables.index')
    with refused(RunError, 'step-10/variables.index', fix='--checkpoint=last'):
        restored(tmp_path, 'best')
    assert restored(tmp_path) == (20, 20)


def test_checkpoints_that_were_swapped_are_noticed(tmp_path):
    saved(tmp_path)
    for old, new in (('step-30', 'other'), ('step-40', 'step-30'), ('other', 'step-40')):
        os.rename(tmp_path / old, tmp_path / new)
    assert restored(tmp_path) == (20, 20)


@pytest.mark.parametrize('allow_extra', [False, True])
def test_a_checkpoint_of_other_variables_does_not_fit(tmp_path, allow_extra):
    saved(tmp_path)
    for other, says in (
        (
            {'model': [tf.Variable(0.0), tf.Variable([1.0, 2.0, 3.0])]},
            "model/0001 is ('float32', [2]) in the checkpoint but ('float32', [3]) here",
        ),
        ({**variables(), 'average': [tf.Variable(0.0)]}, 'average/0000 is missing'),
    ):
        with refused(RunError, 'step-40', says):
            Checkpoints(str(tmp_path), other, 2).restore(allow_extra=allow_extra)
    fewer = {'model': variables()['model']}
    if allow_extra:  # evaluation has no use for the optimizer
        assert Checkpoints(str(tmp_path), fewer, 2).restore(allow_extra=True)[0] == 40
    else:
        with refused(RunError, 'optimizer/0000'):
            Checkpoints(str(tmp_path), fewer, 2).restore()


def test_nonfinite_values_never_replace_good_ones(tmp_path):
    ours = variables()
    checkpoints = Checkpoints(str(tmp_path), ours, keep=1)
    checkpoints.save(1, {'step': 1})
    ours['model'][1].assign([np.nan, 1.0])
    checkpoints.save(2, {'step': 2})
    with refused(RunError, 'step 2', '1 of 3 variables', 'model/0001'):
        checkpoints.wait()
    assert steps_in(str(tmp_path)) == [1]


def fail_with(number):
    def fail(*arguments, **named):
        raise OSError(number, os.strerror(number))

    return fail


def tensorflow_is_full(*arguments, **named):
    raise tf.errors.ResourceExhaustedError(None, None, 'variables.data; No space left on device')


@pytest.mark.parametrize(
    'where, failure, says, fix',
    [
        ('SaveV2', tensorflow_is_full, 'full', 'free some space'),
        ('replace', fail_with(errno.ENOSPC), 'full', 'free some space'),
        ('replace', fail_with(errno.EROFS), 'read-only', '--workdir'),
        ('replace', fail_with(errno.EDQUOT), 'quota', 'free some space'),
        ('makedirs', fail_with(errno.EACCES), 'permission', '--workdir'),
        ('makedirs', fail_with(errno.ENOENT), 'does not exist', '--workdir'),
        ('fsync', fail_with(errno.EIO), 'failing', 'dmesg'),
    ],
)
def test_a_failed_write_is_one_line_and_keeps_the_old_files(
    tmp_path, monkeypatch, where, failure, says, fix
):
    checkpoints = saved(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(tf.raw_ops if where == 'SaveV2' else module.storage.os, where, failure)
        checkpoints.save(50, {'step': 50})
        with refused(RunError, 'cannot be written', says, fix=fix):
            checkpoints.wait()
    assert restored(tmp_path) == (40, 40)
    checkpoints.save(50, {'step': 50})  # there is room again
    checkpoints.wait()
    assert restored(tmp_path)[0] == 50


def test_a_checkpoint_counts_only_after_what_must_come_before(tmp_path):
    checkpoints = saved(tmp_path)

    def taken_over():
        assert not os.path.exists(tmp_path / 'step-50' / 'manifest.json')
        raise RunError('the folder is in use')

    checkpoints.before_commit = taken_over
    checkpoints.save(50, {'step': 50})
    with refused(RunError, 'the folder is in use'):
        checkpoints.wait()
    assert steps_in(str(tmp_path)) == [20, 30, 40][-len(steps_in(str(tmp_path))) :] and restored(
        tmp_path
    ) == (40, 40)


def test_what_is_learned_about_a_checkpoint_later_is_added_to_it(tmp_path):
    saved(tmp_path, steps=(10, 20), best=(None, None))
    os.makedirs(tmp_path / 'step-15')  # of a start that was killed
    again = Checkpoints(str(tmp_path), variables(), keep=1)
    again.restore()
    before = os.stat(tmp_path / 'step-20' / 'variables.index').st_ino
    again.save(20, {'step': 20}, 20)  # it was evaluated, after a stop
    again.wait()
    assert restored(tmp_path, 'best') == (20, 20) and os.listdir(tmp_path) == ['step-20']
    assert os.stat(tmp_path / 'step-20' / 'variables.index').st_ino == before


def test_paths_that_name_a_checkpoint(tmp_path):
    saved(tmp_path / 'none' / 'checkpoints', best=(None,) * 4)
    with refused(RunError, 'checkpoints/best'):
        find_checkpoint(str(tmp_path / 'none' / 'checkpoints' / 'best'))
    saved(tmp_path / 'checkpoints', best=(10, 20, 20, 30))
    for name, step in (
        ('', 40),
        ('checkpoints', 40),
        ('checkpoints/best', 30),
        ('checkpoints/step-30', 30),
        ('checkpoints/step-30/', 30),
    ):
        assert find_checkpoint(os.path.join(str(tmp_path), name)) == str(
            tmp_path / 'checkpoints' / f'step-{step}' / 'variables'
        ), name
    assert find_checkpoint(str(tmp_path / 'nothing')) is None
    assert (
        tf.train.load_checkpoint(find_checkpoint(str(tmp_path))).get_tensor('model/0000') == 40
    )  # anybody can read it
    assert verify(str(tmp_path / 'checkpoints' / 'step-40'))['step'] == 40


def test_files_are_whole_also_when_writing_them_fails(tmp_path):
    path = str(tmp_path / 'file')
    storage.write(path, 'one\n')
    os.symlink('/dev/full', path + '.part')  # what is written through it finds no space
    with refused(RunError, path, 'disk is full', fix='free some space'):
        storage.write(path, 'two\n')
    assert storage.read(path) == b'one\n'
    with refused(RunError, tmp_path / 'gone'):
        storage.write(str(tmp_path / 'gone' / 'file'), 'x')
    with refused(RunError, path + '/below'):
        storage.make_folder(path + '/below')
