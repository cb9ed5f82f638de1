"""Evaluation over every example of the split exactly once, on any number of replicas."""

import collections
import math
import os

import tensorflow as tf

from common.errors import RunError
from common.storage import as_json, write_json
from experiment.resume import FREE_KEYS, require_same_config
from experiment.session import open_session
from inputs import pipeline
from modeling import loops, steps

ANY_DATA = (  # another test set, such as imagenet_v2
    'dataset.name',
    'dataset.train_split',
    'dataset.eval_split',
    'dataset.image_key',
    'dataset.label_key',
    'eval_crop',
)


def run(config, workdir, which=None):
    """Evaluates the last or the best checkpoint in `workdir`; prints the numbers and writes evaluation.json.

    Args:
        which: 'last', which None means too, or 'best'.
    """
    which = which or 'last'
    require_same_config(config, workdir, (*FREE_KEYS, *ANY_DATA))
    session = open_session(config, workdir, trains=False)
    step, _ = session.checkpoints.restore(which, partly=True)
    metrics = make_evaluation(session)()
    if session.is_chief:
        found = {'checkpoint': which, 'step': step, **metrics}
        write_json(os.path.join(workdir, 'evaluation.json'), found)
        if not math.isfinite(metrics['eval/loss']):
            better = (
                '; --checkpoint=best evaluates the best'
                if which == 'last' and session.checkpoints.has_best()
                else ''
            )
            print(f'note      the loss is not finite: the model has diverged{better}', flush=True)
        print(as_json(found))
    return metrics


def make_evaluation(session):
    """Returns: a function that evaluates the state as it is, {'eval/loss', 'eval/accuracy', 'eval/top5', 'eval/examples'}.

    Before each loop of `config.steps_per_loop` batches it asks its argument `should_stop`, and returns None when told to.
    It raises RunError when the number of examples seen is not the size of the split.
    """
    plan = session.plan
    eval_loop = loops.make_eval_loop(
        session.strategy, steps.make_eval_step(session.state, num_classes=plan.num_classes)
    )

    def evaluation(should_stop=lambda: False):
        session.synchronize()
        batches, num_steps = pipeline.evaluation_batches(
            session.source, session.config, plan, session.strategy
        )
        iterator, sums = iter(batches), collections.Counter()
        for first in range(0, num_steps, session.config.steps_per_loop):
            if should_stop():
                return None
            results = eval_loop(
                iterator, tf.constant(min(session.config.steps_per_loop, num_steps - first))
            )
            sums.update({key: float(value) for key, value in results.items()})
        if sums['examples'] != plan.eval_examples:
            raise RunError(
                f'evaluated {sums["examples"]:.0f} examples, but {session.source.eval_split!r} has {plan.eval_examples}: prepare the data set again'
            )
        return {
            'eval/loss': sums['loss'] / plan.eval_examples,
            'eval/accuracy': sums['correct'] / plan.eval_examples,
            'eval/top5': sums['top5'] / plan.eval_examples,
            'eval/examples': plan.eval_examples,
        }

    return evaluation
