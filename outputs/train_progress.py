"""What a run knows beside its variables; saved with each checkpoint, so that a run goes on as if it had not stopped."""

import dataclasses
import math
from collections.abc import Collection

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
    """Numbers, texts and dicts of them: what JSON can say.

    Attributes:
        step, examples_seen: updates done, and examples in them.
        distinct_seen: how many of these were no copies, see `augment.repeats`: how far the stream
            of training examples has come.
        window_start, window, window_seconds: sums over the updates since the last row of metrics.jsonl, and how long they took.
        learning_rate: of the last update.
        skipped_updates, skipped_in_a_row: see `TrainState`.
        train_seconds, input_seconds: in the training loop and of it waiting for batches, since the run began.
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

    def add(self, step, results, seconds, batch_size, repeats=1):
        """Adds what a train loop up to `step` returned, as floats, and how long it took.

        A batch has `batch_size` examples, each of them `repeats` times.
        """
        self.examples_seen += (step - self.step) * batch_size
        self.distinct_seen += (step - self.step) * (batch_size // repeats)
        self.step, self.learning_rate, self.skipped_in_a_row = (
            step,
            results['learning_rate'],
            round(results['skipped_in_a_row']),
        )
        self.skipped_updates += round(results['skipped'])
        for key in ('loss', 'correct', 'grad_norm', 'skipped', 'input_seconds'):
            self.window[key] = self.window.get(key, 0.0) + results[key]
        self.window_seconds += seconds
        self.train_seconds += seconds
        self.input_seconds += results['input_seconds']

    def close_window(self, batch_size):
        """The means over the window as a row of metrics.jsonl; skipped updates do not count. A new window begins."""
        sums, seconds = self.window, self.window_seconds
        num_steps = self.step - self.window_start
        counted = num_steps - round(sums['skipped'])
        means = (
            {}
            if not counted
            else {
                'train/loss': sums['loss'] / counted,
                'train/accuracy': sums['correct'] / (counted * batch_size),
                'train/grad_norm': sums['grad_norm'] / counted,
            }
        )
        row = {
            **means,
            'train/learning_rate': self.learning_rate,  # that the last update used
            'train/examples_per_second': num_steps * batch_size / seconds,
            'train/input_wait_fraction': min(1.0, sums['input_seconds'] / seconds),
            'train/skipped_updates': round(sums['skipped']),
        }
        self.window_start, self.window, self.window_seconds = self.step, {}, 0.0
        return row

    def evaluated(self, metrics, best_metric):
        """Notes an evaluation at this step; returns whether it was the best so far. That of a model which is diverging never is."""
        self.evaluated_at, self.metrics = self.step, metrics
        if self.evaluation_from is None:
            self.evaluation_from = self.step
        value = metrics[best_metric]
        better = (
            math.isfinite(value)
            and math.isfinite(metrics['eval/loss'])
            and not self.skipped_in_a_row
            and (
                self.best is None
                or (value < self.best if best_metric in LOWER_IS_BETTER else value > self.best)
            )
        )
        if better:
            self.best_step, self.best = self.step, value
        return better

    def forget(self, keys: Collection[str]) -> None:
        """Lets go of what does not hold any more when these keys of the config have changed."""
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

    def out_of_patience(self, patience):
        """Whether the last evaluation, at this step, is `patience` updates or more after the best one; None never is."""
        if patience is None or self.evaluated_at != self.step:
            return False
        return self.step - max(self.best_step or 0, self.patience_from) >= patience
