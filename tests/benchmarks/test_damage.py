"""Checkpoints with random damages give the right weights or say why they do not:
benchmarks/damage.py on a few small tensors.
"""

import numpy as np
import tensorflow as tf

from benchmarks import damage, torture
from outputs.checkpoints import Checkpoints


def make_variables():
    return {
        'model': [tf.Variable(tf.zeros([30, 40])), tf.Variable(tf.zeros([7]))],
        'average': [tf.Variable(tf.zeros([30, 40])), tf.Variable(tf.zeros([7]))],
        'optimizer': [tf.Variable(0, dtype=tf.int64)],
    }


def write_checkpoints(folder):
    """Steps 20 (the best), 40, 50 and 60, with different numbers in each."""
    variables = make_variables()
    checkpoints = Checkpoints(folder, variables, keep=3)
    for step in (10, 20, 30, 40, 50, 60):
        numbers = np.random.default_rng(step)
        for variable in sum(variables.values(), []):
            variable.assign(
                numbers.integers(1000, size=variable.shape)
                if variable.dtype.is_integer
                else numbers.normal(size=variable.shape)
            )
        checkpoints.save(step, {'step again': step}, best_step=min(step, 20))
        checkpoints.wait()


def test_no_damage_gives_wrong_weights(tmp_path):
    folder = str(tmp_path / 'checkpoints')
    write_checkpoints(folder)
    assert sorted(torture.checkpoints(str(tmp_path))[0]) == [20, 40, 50, 60]
    result = damage.damage_all(folder, make_variables(), damages=60, seed=3)
    assert result['failures'] == []
    said = ' '.join(result['outcomes'])
    assert 'the newest' in said and 'one before, and said so' in said and 'reported' in said
