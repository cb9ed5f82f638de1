"""Draws what training will see: batches as the model gets them, and the learning rate."""

import os
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from common import console, storage
from common.errors import ConfigError
from devices.strategy import make_strategy
from experiment import planning
from experiment.resume import SKIPPED
from inputs import augment, datasets, pipeline
from inputs.datasets import Source
from outputs import plots

MAX_IMAGES = 64  # of a batch that are drawn


def run(config: ConfigDict, workdir: str, step: int | None = None) -> None:
    """Draws into `workdir`/preview: learning_rate.png, and batch_STEP.png of update `step`.

    By default, that is the first skipped update if skipped updates ended the run in `workdir`, else
    the first update of each stage.
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
    for name, text in planning.summarize(config, plan).rows().items():
        console.row(name, text)
    skipped = os.path.join(workdir, SKIPPED)
    if step is None and storage.exists(skipped):
        found = storage.read_json(skipped)
        step = found['first_update']
        # The plan that the run followed then: earlier batches may have had another size.
        plan = planning.shifted(plan, planning.ScheduleOffset(*found.get('ahead', ())))
        reason = 'their loss or gradient was not finite'
        console.line(f'update {step:,} and those after it were skipped: {reason}')
    if step is not None and not 0 <= step < plan.total_steps:
        raise ConfigError(
            f'--step={step} is not an update of this run', f'it has 0 to {plan.total_steps - 1:,}'
        )
    folder = os.path.join(workdir, 'preview')
    path = os.path.join(folder, 'learning_rate.png')
    plots.plot_learning_rate(
        path, *planning.planned_rates(config, plan), [], plan.warmup_steps, plan.hold_steps
    )
    console.line(path)
    begin = 0
    for end, stage in planning.stages(config, plan):
        drawn = begin if step is None else step
        if begin <= drawn < end:
            images, labels = global_batch(stage, source, plan, drawn)
            path = os.path.join(folder, f'batch_{drawn}.png')
            shown = min(len(images), MAX_IMAGES)
            title = (
                f'{shown} of the {len(images)} images of update {drawn:,}, '
                f'{stage.image_size} x {stage.image_size} pixels'
            )
            plots.plot_batch(
                path,
                images[:shown],
                [caption(label, source.class_names) for label in labels[:shown]],
                title,
            )
            console.line(path)
        begin = end


def global_batch(
    config: ConfigDict,
    source: Source,
    plan: planning.Plan,
    step: int,
) -> tuple[np.ndarray, ...]:
    """Returns one global batch as the model gets it.

    Returns: images float32 [batch, size, size, 3] in 0..255, labels float32 [batch, classes].
    """
    change = augment.make_device_augment(config.augment, plan.num_classes)
    # One device after the other: the batch of each replica is an element of the data set.
    device = tf.distribute.OneDeviceStrategy('CPU:0')
    batches = pipeline.training_batches(source, config, plan, step, step + 1, device)
    parts = [change(*batch) for batch in batches]
    return tuple(np.concatenate(tensors) for tensors in zip(*parts, strict=True))


def caption(label: np.ndarray, class_names: Sequence[str]) -> str:
    """Returns 'cat', or for a mixed image 'cat 70 %, dog 30 %'."""
    present = [index for index in np.argsort(-label, kind='stable') if label[index] >= 0.005]
    if len(present) == 1:
        return class_names[present[0]]
    return ', '.join(f'{class_names[index]} {label[index]:.0%}' for index in present)
