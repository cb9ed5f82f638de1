"""Holds what a run knows besides its variables; saved with each checkpoint for exact resuming."""

import dataclasses
import math
from collections.abc import Collection, Mapping

LOWER_IS_BETTER = ('eval/loss',)
ANY_KEY = '*'  # stands for any key of the config, when it is unknown which have changed
EVALUATION_KEYS = ('image_size', 'eval_crop', 'model.name', 'precision')
LOADING_KEYS = ('dataset.memory_gib', 'dataset.service', 'dataset.max_broken')


def changes_evaluation(key: str) -> bool:
    """Returns whether an evaluation of the same weights may depend on this key of the config.

    It does not depend on `ema_decay`, because the averages continue from their current values.
    """
    if key.startswith('dataset.'):
        return key not in LOADING_KEYS
    return key in (ANY_KEY, *EVALUATION_KEYS)


@dataclasses.dataclass
class Progress:
    """The state of a run beside its variables: numbers, strings and dicts of them, as in JSON.

    Attributes:
        step, examples_seen: updates done, and examples in them.
        distinct_seen: how many of these were not copies (`augment.repeats`), which is the position
            in the stream of training examples.
        window_start, window, window_seconds: sums over the updates since the last row of
            metrics.jsonl, and how long they took.
        learning_rate: of the last update.
        skipped_updates, skipped_in_a_row: see `TrainState`.
        train_seconds, input_seconds: time in the training loop since the run began, and the part of
            it spent waiting for batches.
        evaluated_at, metrics: the step of the last evaluation, and its metrics.
        best_step, best: the step with the best `config.best_metric`, and its value.
        evaluation_from: the first step whose evaluation is comparable with the last one; None until
            there is one.
        patience_from: the step from which `config.patience` counts if there is no later
            improvement.
        config: {key: value}, the config under which all this was measured, without the keys that
            may change on resuming; None if an older version wrote it.
    """

    step: int = 0
    examples_seen: int = 0
    distinct_seen: int = 0
    window_start: int = 0
    window: dict = dataclasses.field(default_factory=dict)
    window_seconds: float = 0.0
    learning_rate: float = 0.0
    skipped_updates: int = 0
    skipped_in_a_row: int = 0
    train_seconds: float = 0.0
    input_seconds: float = 0.0
    evaluated_at: int | None = None
    metrics: dict = dataclasses.field(default_factory=dict)
    best_step: int | None = None
    best: float | None = None
    evaluation_from: int | None = 0
    patience_from: int = 0
    config: dict | None = None

    def record_loop(
        self,
        step: int,
        results: Mapping[str, float],
        seconds: float,
        batch_size: int,
        repeats: int = 1,
    ) -> None:
        """Adds the results of a train loop up to `step`, and how long it took.

        A batch has `batch_size` examples, each of them `repeats` times.
        """
        self.examples_seen += (step - self.step) * batch_size
        self.distinct_seen += (step - self.step) * (batch_size // repeats)
        self.step = step
        self.learning_rate = results['learning_rate']
        self.skipped_in_a_row = round(results['skipped_in_a_row'])
        self.skipped_updates += round(results['skipped'])
        for key in ('loss', 'correct', 'grad_norm', 'skipped', 'input_seconds'):
            self.window[key] = self.window.get(key, 0.0) + results[key]
        self.window_seconds += seconds
        self.train_seconds += seconds
        self.input_seconds += results['input_seconds']

    def close_window(self, batch_size: int) -> dict[str, float]:
        """Returns the means over the window as a row of metrics.jsonl, and begins a new window.

        Skipped updates do not count.
        """
        sums, seconds = self.window, self.window_seconds
        num_steps = self.step - self.window_start
        counted = num_steps - round(sums['skipped'])
        row = {}
        if counted:
            row = {
                'train/loss': sums['loss'] / counted,
                'train/accuracy': sums['correct'] / (counted * batch_size),
                'train/grad_norm': sums['grad_norm'] / counted,
            }
        row |= {
            'train/learning_rate': self.learning_rate,  # used by the last update
            'train/examples_per_second': num_steps * batch_size / seconds,
            'train/input_wait_fraction': min(1.0, sums['input_seconds'] / seconds),
            'train/skipped_updates': round(sums['skipped']),
        }
        self.window_start, self.window, self.window_seconds = self.step, {}, 0.0
        return row

    def record_evaluation(self, metrics: dict[str, float], best_metric: str) -> bool:
        """Records an evaluation at this step; returns whether it is the best so far.

        An evaluation of a diverging model is never the best.
        """
        self.evaluated_at, self.metrics = self.step, metrics
        if self.evaluation_from is None:
            self.evaluation_from = self.step
        value = metrics[best_metric]
        is_finite = math.isfinite(value) and math.isfinite(metrics['eval/loss'])
        is_best = is_finite and not self.skipped_in_a_row
        if self.best is not None:
            is_better = value < self.best if best_metric in LOWER_IS_BETTER else value > self.best
            is_best = is_best and is_better
        if is_best:
            self.best_step, self.best = self.step, value
        return is_best

    def reset_for_config_change(self, keys: Collection[str]) -> None:
        """Resets what is no longer valid now that these keys of the config have changed."""
        if not keys:
            return
        self.window_start, self.window, self.window_seconds = self.step, {}, 0.0
        if any(key == 'best_metric' or changes_evaluation(key) for key in keys):
            self.evaluated_at, self.metrics = None, {}
            self.best_step = self.best = None
        if any(map(changes_evaluation, keys)):
            self.evaluation_from = None
        if set(keys) != {'patience'}:  # the changed run has had no chance to improve yet
            self.patience_from = self.step

    def is_out_of_patience(self, patience: int | None) -> bool:
        """Returns whether the best evaluation is at least `patience` updates behind this one.

        False if `patience` is None or this step has not been evaluated.
        """
        if patience is None or self.evaluated_at != self.step:
            return False
        return self.step - max(self.best_step or 0, self.patience_from) >= patience
