"""Evaluates every example of the split exactly once, on any number of replicas."""

import collections
import math
import os
from collections.abc import Callable

import tensorflow as tf
from ml_collections import ConfigDict

from common import console
from common.errors import RunError
from common.storage import as_json, write_json
from experiment.config_diff import RESUMABLE_KEYS
from experiment.resume import require_same_config
from experiment.session import Session, open_session
from inputs import pipeline
from modeling import loops, steps

DATA_KEYS = (  # may differ: evaluation may use another test set, such as imagenet_v2
    'dataset.name',
    'dataset.train_split',
    'dataset.eval_split',
    'dataset.image_key',
    'dataset.label_key',
    'eval_crop',
)


def run(config: ConfigDict, workdir: str, which: str | None = None) -> dict[str, float]:
    """Evaluates a checkpoint of `workdir`; prints the metrics and writes evaluation.json.

    Args:
        which: 'last' (the same as None) or 'best'.
    """
    which = which or 'last'
    require_same_config(config, workdir, (*RESUMABLE_KEYS, *DATA_KEYS))
    session = open_session(config, workdir, trains=False)
    step, _ = session.checkpoints.restore(which, allow_extra=True)
    metrics = make_evaluation(session)()
    assert metrics is not None  # no should_stop was given
    if session.is_chief:
        found = {'checkpoint': which, 'step': step, **metrics}
        write_json(os.path.join(workdir, 'evaluation.json'), found)
        if not math.isfinite(metrics['eval/loss']):
            has_better = which == 'last' and session.checkpoints.has_best()
            better = '; --checkpoint=best evaluates the best checkpoint' if has_better else ''
            console.note(f'the loss is not finite: the model has diverged{better}')
        console.line(as_json(found))
    return metrics


def make_evaluation(session: Session) -> Callable[..., dict[str, float] | None]:
    """Returns a function that evaluates the current state.

    That function calls its argument `should_stop` before each loop of `config.steps_per_loop`
    batches, and returns None once it is true; else {'eval/loss', 'eval/accuracy', 'eval/top5',
    'eval/examples'}. It raises RunError if it did not see exactly the examples of the split.
    """
    plan = session.plan
    eval_loop = loops.make_eval_loop(
        session.strategy, steps.make_eval_step(session.state, num_classes=plan.num_classes)
    )

    def evaluation(should_stop: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        session.synchronize()
        batches, num_steps = pipeline.evaluation_batches(
            session.source, session.config, plan, session.strategy
        )
        iterator = iter(batches)
        sums: collections.Counter = collections.Counter()
        for first in range(0, num_steps, session.config.steps_per_loop):
            if should_stop():
                return None
            results = eval_loop(
                iterator, tf.constant(min(session.config.steps_per_loop, num_steps - first))
            )
            sums.update({key: float(value) for key, value in results.items()})
        if sums['examples'] != plan.eval_examples:
            raise RunError(
                f'evaluated {sums["examples"]:.0f} examples, but '
                f'{session.source.eval_split!r} has {plan.eval_examples}',
                'prepare the data set again',
            )
        return {
            'eval/loss': sums['loss'] / plan.eval_examples,
            'eval/accuracy': sums['correct'] / plan.eval_examples,
            'eval/top5': sums['top5'] / plan.eval_examples,
            'eval/examples': plan.eval_examples,
        }

    return evaluation
