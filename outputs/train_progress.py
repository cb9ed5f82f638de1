"""The state of a run beside its variables, saved with each checkpoint: it makes resuming exact."""

import dataclasses
import math
from collections.abc import Collection, Mapping

LOWER_IS_BETTER = ('eval/loss',)
ANY_KEY = '*'  # stands for all keys of a config, where nobody knows which have changed
EVALUATION_KEYS = ('image_size', 'eval_crop', 'model.name', 'precision')
LOADING_KEYS = ('dataset.memory_gib', 'dataset.service', 'dataset.max_broken')


def changes_evaluation(key: str) -> bool:
    """Returns whether an evaluation of the same weights may depend on this key of the config.

    It does not on `ema_decay`: the averages go on from where they are.
    """
    if key.startswith('dataset.'):
        return key not in LOADING_KEYS
    return key in (ANY_KEY, *EVALUATION_KEYS)


@dataclasses.dataclass
class Progress:
    """The state of a run beside its variables: numbers, strings and dicts of them, as in JSON.

    Attributes:
        step, examples_seen: updates done, and examples in them.
        distinct_seen: how many of these were no copies, see `augment.repeats`: how far the stream
            of training examples has come.
        window_start, window, window_seconds: sums over the updates since the last row of
            metrics.jsonl, and how long they took.
        learning_rate: of the last update.
        skipped_updates, skipped_in_a_row: see `TrainState`.
        train_seconds, input_seconds: in the training loop, and of these waiting for batches, since
            the run began.
        evaluated_at, metrics: the step of the last evaluation, and what it gave.
        best_step, best: where `config.best_metric` was best, and how good.
        evaluation_from: the step from which on evaluations can be compared with the last one; None
            until there is one.
        patience_from: the step from which on `config.patience` counts, if nothing was better since.
        config: {key: value}, the config that all of this was measured under, without the keys that
            may differ between starts; None where an older version of this program wrote it.
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

    def add(
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
            'train/learning_rate': self.learning_rate,  # that the last update used
            'train/examples_per_second': num_steps * batch_size / seconds,
            'train/input_wait_fraction': min(1.0, sums['input_seconds'] / seconds),
            'train/skipped_updates': round(sums['skipped']),
        }
        self.window_start, self.window, self.window_seconds = self.step, {}, 0.0
        return row

    def evaluated(self, metrics: dict[str, float], best_metric: str) -> bool:
        """Records an evaluation at this step; returns whether it is the best so far.

        That of a diverging model never is.
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
        if set(keys) != {'patience'}:  # what is trained now has had no chance yet to be better
            self.patience_from = self.step

    def out_of_patience(self, patience: int | None) -> bool:
        """Returns whether the best evaluation is `patience` updates or more behind the last one.

        The last one is at this step. It is never so if `patience` is None.
        """
        if patience is None or self.evaluated_at != self.step:
            return False
        return self.step - max(self.best_step or 0, self.patience_from) >= patience
