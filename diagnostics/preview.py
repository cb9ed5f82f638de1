"""What training will see, without training: batches as the model gets them, and the learning rate of the whole run."""

import os

import numpy as np
import tensorflow as tf

from common import storage
from common.errors import ConfigError
from devices.strategy import make_strategy
from experiment import planning
from experiment.resume import SKIPPED
from inputs import augment, datasets, pipeline
from outputs import plots

MOST_PICTURES = 64  # of a batch that are drawn


def run(config, workdir, step=None):
    """Draws into `workdir`/preview: learning_rate.png, and batch_STEP.png of update `step`.

    By default that is the first update that was skipped where such have ended the run in `workdir`, else the first of each stage.
    """
    strategy, _ = make_strategy(config)
    source = datasets.load(config.dataset)
    plan = planning.make_plan(
        config,
        source.num_train,
        source.num_eval,
        len(source.class_names),
        strategy.num_replicas_in_sync,
    )
    print(plan.describe(), planning.describe_stages(config, plan), sep='\n', flush=True)
    skipped = os.path.join(workdir, SKIPPED)
    if step is None and storage.exists(skipped):
        found = storage.read_json(skipped)
        step = found['first_update']
        # As the run was: before, batches may have had another size.
        plan = planning.moved(plan, planning.Ahead(*found.get('ahead', ())))
        print(
            f'update {step:,} and those after it were skipped: their loss or gradient was not finite'
        )
    if step is not None and not 0 <= step < plan.total_steps:
        raise ConfigError(
            f'--step={step} is no update of this run: it has 0 to {plan.total_steps - 1:,}'
        )
    folder = os.path.join(workdir, 'preview')
    path = os.path.join(folder, 'learning_rate.png')
    plots.plot_learning_rate(
        path, *planning.planned_rates(config, plan), [], plan.warmup_steps, plan.hold_steps
    )
    print(path)
    begin = 0
    for end, stage in planning.stages(config, plan):
        drawn = begin if step is None else step
        if begin <= drawn < end:
            images, labels = batch_of(stage, source, plan, strategy, drawn)
            path = os.path.join(folder, f'batch_{drawn}.png')
            shown = min(len(images), MOST_PICTURES)
            title = f'{shown} of the {len(images)} pictures of update {drawn:,}, {stage.image_size} x {stage.image_size} pixels'
            plots.plot_batch(
                path,
                images[:shown],
                [caption(label, source.class_names) for label in labels[:shown]],
                title,
            )
            print(path)
        begin = end


def batch_of(config, source, plan, strategy, step):
    """One global batch as the model gets it: images float32 [batch, size, size, 3] in 0..255, labels float32 [batch, classes]."""
    change = augment.on_device(config.augment, plan.num_classes)
    parts = []
    for _, batch in zip(
        range(1), pipeline.training_batches(source, config, plan, step, step + 1, strategy)
    ):
        columns = [strategy.experimental_local_results(column) for column in tf.nest.flatten(batch)]
        parts = [
            change(*tf.nest.pack_sequence_as(batch, list(replica))) for replica in zip(*columns)
        ]
    return tuple(np.concatenate([tensor.numpy() for tensor in tensors]) for tensors in zip(*parts))


def caption(label, class_names):
    """'cat', or of a mixed picture 'cat 70 %, dog 30 %'."""
    present = [index for index in np.argsort(-label, kind='stable') if label[index] >= 0.005]
    if len(present) == 1:
        return class_names[present[0]]
    return ', '.join(f'{class_names[index]} {label[index]:.0%}' for index in present)
