"""The loops that run the steps of modeling/steps.py: one call from the host for many of them."""

import tensorflow as tf

from modeling.models import float_variables

SUMS, LAST = (
    ('correct', 'grad_norm', 'loss', 'skipped'),
    ('learning_rate', 'skipped_in_a_row'),
)  # what a training step returns: over all steps, of the last


def make_train_loop(strategy, train_step):
    """Several training steps in one host call.

    Returns: a tf.function of a distributed iterator and a number of steps, int32 []; it returns sums over these steps,
        {'loss', 'correct', 'grad_norm', 'skipped'}, float32 [], the 'learning_rate' and 'skipped_in_a_row' of the last, and
        'input_seconds', float64 [], the time spent waiting for batches.
    """

    @tf.function(autograph=False)
    def train_loop(iterator, num_steps):
        def body(step, input_seconds, sums):
            with tf.control_dependencies([sums['loss']]):  # the step before is done
                asked = tf.timestamp()
            with tf.control_dependencies([asked]):
                batch = next(iterator)
            with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)):
                waited = tf.timestamp() - asked
            results = sum_over_replicas(strategy, strategy.run(train_step, args=batch))
            sums = {key: results[key] if key in LAST else sums[key] + results[key] for key in sums}
            return step + 1, input_seconds + waited, sums

        zeros = {key: tf.constant(0.0) for key in SUMS + LAST}
        start = (tf.constant(0), tf.constant(0.0, tf.float64), zeros)
        _, input_seconds, sums = tf.while_loop(
            lambda step, *_: step < num_steps, body, start, parallel_iterations=1
        )
        return {**sums, 'input_seconds': input_seconds}

    return train_loop


def make_eval_loop(strategy, eval_step):
    """A whole evaluation in one host call: a tf.function of an iterator and a number of steps that returns the sums."""
    keys = ('correct', 'examples', 'loss', 'top5')

    @tf.function(autograph=False)
    def eval_loop(iterator, num_steps):
        def body(step, sums):
            results = sum_over_replicas(strategy, strategy.run(eval_step, args=next(iterator)))
            return step + 1, {key: sums[key] + results[key] for key in keys}

        start = (tf.constant(0), {key: tf.constant(0.0) for key in keys})
        return tf.while_loop(lambda step, _: step < num_steps, body, start, parallel_iterations=1)[
            1
        ]

    return eval_loop


def make_average_statistics(strategy, state):
    """A tf.function that makes the statistics of unsynchronized batch normalisation the same on all replicas: their mean.

    Keras gives them no aggregation, so they drift apart, and reading one takes the first replica's.
    """
    trained = {id(variable) for variable in state.model.trainable_variables}
    statistics = [
        variable.value for variable in float_variables(state.model) if id(variable) not in trained
    ] + list(state.average)

    def average():
        means = tf.distribute.get_replica_context().all_reduce(
            tf.distribute.ReduceOp.MEAN, [tf.identity(value) for value in statistics]
        )
        for variable, mean in zip(statistics, means):
            variable.assign(mean)

    @tf.function(autograph=False)
    def average_statistics():  # a name: TPUStrategy makes a scope of it, and a lambda's is refused
        strategy.run(average)

    return average_statistics


def sum_over_replicas(strategy, results):
    """One value at a time: TPUStrategy does not reduce a dict."""
    return {
        key: strategy.reduce(tf.distribute.ReduceOp.SUM, value, axis=None)
        for key, value in results.items()
    }
