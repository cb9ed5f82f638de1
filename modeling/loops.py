"""Runs the steps of modeling/steps.py in loops: many steps per host call."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import tensorflow as tf

from modeling.steps import TrainState, statistics_of

# Results of a training step: those summed over all steps, and those of the last step.
SUMS = ('correct', 'grad_norm', 'loss', 'skipped')
LAST = ('learning_rate', 'skipped_in_a_row')
# Results of an evaluation step, all summed.
EVAL_SUMS = ('correct', 'examples', 'loss', 'top5')

Results = dict[str, tf.Tensor]


@runtime_checkable
class RunsSteps(Protocol):
    """A strategy whose steps another runtime runs: `devices.pjrt.PjrtStrategy`."""

    runtime: str  # its name and version

    def make_loop(
        self, step: Callable[..., Results], sums: Sequence[str], last: Sequence[str]
    ) -> Callable[[Any, tf.Tensor], Any]:
        """Makes a function of batches and a number of steps, as `make_train_loop` does."""

    def make_call(self, step: Callable[[], None]) -> Callable[[], None]:
        """Makes a function that runs a step without arguments or results on all replicas."""

    def describe_devices(self) -> list[str]:
        """Describes the devices, in a few words each."""

    def read_back(self) -> None:
        """Brings the state, which is elsewhere, into TensorFlow's variables."""

    def forget(self) -> None:
        """Takes the state from TensorFlow's variables again."""


def make_train_loop(
    strategy: tf.distribute.Strategy, train_step: Callable[..., Results]
) -> Callable[[Any, tf.Tensor], Results]:
    """Makes a function that runs several training steps in one host call.

    Returns: a tf.function of a distributed iterator and a number of steps, int32 []; it returns
        sums over these steps, {'loss', 'correct', 'grad_norm', 'skipped'}, float32 [], the
        'learning_rate' and 'skipped_in_a_row' of the last, and 'input_seconds', float64 [], the
        time spent waiting for batches.
    """
    if isinstance(strategy, RunsSteps):
        return strategy.make_loop(train_step, SUMS, LAST)

    @tf.function(autograph=False)
    def train_loop(iterator: Any, num_steps: tf.Tensor) -> Results:
        def body(step: tf.Tensor, input_seconds: tf.Tensor, totals: Results) -> tuple:
            with tf.control_dependencies([totals['loss']]):  # the step before is done
                begin = tf.timestamp()
            with tf.control_dependencies([begin]):
                batch = next(iterator)
            with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)):
                waited = tf.timestamp() - begin
            results = sum_over_replicas(strategy, strategy.run(train_step, args=batch))
            sums = {key: totals[key] + results[key] for key in SUMS}
            last = {key: results[key] for key in LAST}
            return step + 1, input_seconds + waited, sums | last

        zeros = {key: tf.constant(0.0) for key in SUMS + LAST}
        start = (tf.constant(0), tf.constant(0.0, tf.float64), zeros)
        _, input_seconds, totals = tf.while_loop(
            lambda step, *_: step < num_steps, body, start, parallel_iterations=1
        )
        return {**totals, 'input_seconds': input_seconds}

    return train_loop


def make_eval_loop(
    strategy: tf.distribute.Strategy, eval_step: Callable[..., Results]
) -> Callable[[Any, tf.Tensor], Results]:
    """Makes a function that runs a whole evaluation in one host call.

    Returns: a tf.function of an iterator and a number of steps that returns the sums.
    """
    if isinstance(strategy, RunsSteps):
        return strategy.make_loop(eval_step, EVAL_SUMS, ())

    @tf.function(autograph=False)
    def eval_loop(iterator: Any, num_steps: tf.Tensor) -> Results:
        def body(step: tf.Tensor, sums: Results) -> tuple:
            results = sum_over_replicas(strategy, strategy.run(eval_step, args=next(iterator)))
            return step + 1, {key: sums[key] + results[key] for key in EVAL_SUMS}

        start = (tf.constant(0), {key: tf.constant(0.0) for key in EVAL_SUMS})
        _, sums = tf.while_loop(
            lambda step, _: step < num_steps, body, start, parallel_iterations=1
        )
        return sums

    return eval_loop


def make_average_statistics(
    strategy: tf.distribute.Strategy, state: TrainState
) -> Callable[[], None]:
    """Returns a function that sets the statistics of all replicas to their mean.

    They are those of unsynchronized batch normalisation. Keras gives them no aggregation, so they
    drift apart, and reading one returns the first replica's.
    """
    statistics = statistics_of(state.model) + list(state.average)

    # Not a lambda: TPUStrategy makes a scope of its name, and rejects '<lambda>'.
    def average() -> None:
        means = tf.distribute.get_replica_context().all_reduce(
            tf.distribute.ReduceOp.MEAN, [tf.identity(value) for value in statistics]
        )
        for variable, mean in zip(statistics, means, strict=True):
            variable.assign(mean)

    if isinstance(strategy, RunsSteps):
        return strategy.make_call(average)

    @tf.function(autograph=False)
    def average_statistics() -> None:
        strategy.run(average)

    return average_statistics


def sum_over_replicas(strategy: tf.distribute.Strategy, results: Results) -> Results:
    """Sums one value at a time: TPUStrategy does not reduce a dict."""
    return {
        key: strategy.reduce(tf.distribute.ReduceOp.SUM, value, axis=None)
        for key, value in results.items()
    }
