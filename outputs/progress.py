"""What a run knows beside its variables; saved with each checkpoint, so that a run goes on as if it had not stopped."""
import dataclasses
import math

LOWER_IS_BETTER = ('eval/loss',)


@dataclasses.dataclass
class Progress:
    """Numbers, texts and dicts of them: what JSON can say.

    Attributes:
        step, examples_seen: updates done, and examples in them.
        window_start, window, window_seconds: sums over the updates since the last row of metrics.jsonl, and how long they took.
        learning_rate: of the last update.
        skipped_updates, skipped_in_a_row: see `TrainState`.
        train_seconds, input_seconds: in the training loop and of it waiting for batches, since the run began.
        evaluated_at, metrics: the step of the last evaluation, and what it gave.
        best_step, best: where `config.best_metric` was best, and how good.
    """

    step: int = 0
    examples_seen: int = 0
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

    def add(self, step, results, seconds, batch_size):
        """Adds what a train loop up to `step` returned, as floats, and how long it took."""
        self.examples_seen += (step - self.step) * batch_size
        self.step, self.learning_rate, self.skipped_in_a_row = step, results['learning_rate'], round(results['skipped_in_a_row'])
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
        means = {} if not counted else {
            'train/loss': sums['loss'] / counted,
            'train/accuracy': sums['correct'] / (counted * batch_size),
            'train/grad_norm': sums['grad_norm'] / counted,
        }
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
        value = metrics[best_metric]
        better = math.isfinite(value) and math.isfinite(metrics['eval/loss']) and not self.skipped_in_a_row and (
            self.best is None or (value < self.best if best_metric in LOWER_IS_BETTER else value > self.best))
        if better:
            self.best_step, self.best = self.step, value
        return better

    def forget(self, changes):
        """Lets go of what does not hold any more under a config with these changes, texts that begin with the key."""
        self.window_start, self.window, self.window_seconds = self.step, {}, 0.0
        if any(change.startswith(('best_metric ', 'dataset.')) for change in changes):
            self.best_step = self.best = None

    def out_of_patience(self, patience):
        """Whether the last evaluation, at this step, is `patience` updates or more after the best one; None never is."""
        return patience is not None and self.evaluated_at == self.step and self.step - (self.best_step or 0) >= patience
