"""Checkpoints of a run: the last few, and the best.

What is saved are the raw variables in a fixed order, under their part and number: it holds under every strategy, and
does not depend on the names that Keras gives out.
"""
import os

import tensorflow as tf

from errors import RunError, one_line


class Checkpoints:
    """The folder `checkpoints/` of a run.

    Args:
        directory: the folder; made when something is saved.
        variables: {part: [tf.Variable]}, see `TrainState.variables`.
        keep: how many of the last checkpoints stay.
        writes: whether this process saves; of several workers one does.
    """

    def __init__(self, directory, variables, keep, writes=True):
        self._writes = writes
        self.best_accuracy = tf.Variable(-1.0, dtype=tf.float64, trainable=False)
        self.train_seconds = tf.Variable(0.0, dtype=tf.float64, trainable=False)
        self.input_seconds = tf.Variable(0.0, dtype=tf.float64, trainable=False)
        self.step = tf.Variable(0, trainable=False, dtype=tf.int64)
        checkpoint = tf.train.Checkpoint(step=self.step, best_accuracy=self.best_accuracy, train_seconds=self.train_seconds,
                                         input_seconds=self.input_seconds, **variables)
        self._checkpoint = checkpoint
        self._last = tf.train.CheckpointManager(checkpoint, directory, max_to_keep=keep, checkpoint_name='step')
        self._best = tf.train.CheckpointManager(checkpoint, os.path.join(directory, 'best'), max_to_keep=1, checkpoint_name='step')

    def save(self, step):
        """Saves everything after `step` updates, unless that is there already."""
        self.step.assign(step)
        if self._writes and self.latest_step() != step:
            self._last.save(checkpoint_number=step)

    def save_if_best(self, step, accuracy):
        """Keeps a copy when `accuracy` is the highest so far; returns whether it was."""
        if accuracy <= float(self.best_accuracy):
            return False
        self.best_accuracy.assign(accuracy)
        self.step.assign(step)
        if self._writes:
            self._best.save(checkpoint_number=step)
        return True

    def latest_step(self):
        """The step of the last checkpoint, or None."""
        path = self._last.latest_checkpoint
        return int(path.rsplit('-', 1)[1]) if path else None

    def restore(self, which='last'):
        """Reads the last or the best checkpoint into the variables; returns its step.

        Raises: RunError if there is none, or if it is of another model.
        """
        manager = {'last': self._last, 'best': self._best}[which]
        if not manager.latest_checkpoint:
            raise RunError(f'there is no {which} checkpoint in {manager.directory}: train first')
        try:
            found = self._checkpoint.restore(manager.latest_checkpoint)
            found.assert_existing_objects_matched()
            found.expect_partial()  # without a word about an optimizer that evaluation has no use for
        except (AssertionError, ValueError, tf.errors.OpError) as error:
            raise RunError(f'{manager.latest_checkpoint} does not fit this config or is damaged '
                           f'({one_line(error, 200)}): take the config it was made with') from error
        return int(self.step)
