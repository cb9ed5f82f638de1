"""What `train`, `evaluate` and `export` have in common: from a config to strategy, data, plan and state."""

import dataclasses
import math
import os
import random

import keras
import tensorflow as tf

from common import storage
from devices.strategy import (
    device_kind,
    make_agreement,
    make_strategy,
    resolve_jit_compile,
    resolve_precision,
    runs_as_chief,
)
from experiment import planning, resume
from inputs import datasets
from modeling import distillation, loops, models, optimizers, pretrained, steps
from outputs.checkpoints import Checkpoints, find
from outputs.train_progress import Progress


@dataclasses.dataclass
class Session:
    """Everything a verb works with."""

    config: object
    strategy: tf.distribute.Strategy
    strategy_reason: str
    kind: str  # 'TPU', 'GPU' or 'CPU'
    dtype_policy: str
    jit_compile: bool
    source: datasets.Source
    data_changes: tuple[str, ...]  # since the run began, a line each
    plan: planning.Plan
    state: steps.TrainState
    checkpoints: Checkpoints
    synchronize: object  # call it before reading the variables: makes unsynchronized statistics the same on all replicas
    is_chief: bool  # whether this process writes; of several workers one does
    agree: object  # sums of numbers over all workers: see devices.strategy.make_agreement
    loaded: str  # what was taken from config.model.weights, in words; '' for random weights
    teacher: object  # a function, or None: see distillation.make_teacher
    teacher_name: str

    def continue_from(self, progress: Progress) -> None:
        """Puts plan and learning rate where a restored run stands, whatever its batches were."""
        position = progress.step, progress.examples_seen, progress.distinct_seen
        self.plan = planning.continued(self.plan, self.config, *position)
        if self.plan.ahead.updates:
            arguments = planning.schedule_arguments(self.config, self.plan)
            optimizers.shift_schedule(self.state.optimizer, arguments, self.plan.ahead.updates)

    def describe(self):
        """What was chosen and what the durations came to, as a few lines of text."""
        lines = [
            f'strategy  {self.strategy_reason}',
            f'compute   {self.dtype_policy}, jit_compile {"on" if self.jit_compile else "off"}',
            self.plan.describe(),
            planning.describe_stages(self.config, self.plan),
            *self._describe_transfer(),
            *(f'note      {change}' for change in self.data_changes),
        ]
        return '\n'.join(filter(None, lines))

    def _describe_transfer(self):
        config, model = self.config, self.state.model
        if self.loaded:
            yield f'weights   {self.loaded}'
        if config.model.freeze:
            trained, all_weights = (
                sum(math.prod(variable.shape) for variable in variables)
                for variables in (model.trainable_variables, models.float_variables(model))
            )
            frozen = (
                'the backbone'
                if config.model.freeze == 'backbone'
                else f'all up to {config.model.freeze}'
            )
            yield f'frozen    {frozen}: {trained:,} of {all_weights:,} numbers are trained'
        if config.model.layer_decay < 1:
            yield f'rates     x 1 at the head, down to x {min(models.layer_lr_multipliers(model, config.model.layer_decay)):.3g} at the first layers that are trained'
        if self.teacher:
            yield f'teacher   {self.teacher_name}; {config.distill.alpha:.0%} of the loss, temperature {config.distill.temperature:g}'


def open_session(config, workdir, trains=True):
    """Builds what a checked config describes, in the order of the data's way.

    Without `trains` there is no optimizer, and the data set needs no training split.

    Raises: ConfigError, RunError: see the functions called here.
    """
    strategy, reason = make_strategy(config)
    kind = device_kind(strategy)
    dtype_policy = resolve_precision(config.precision, kind)
    jit_compile = resolve_jit_compile(config.jit_compile, kind)
    is_chief, agree = runs_as_chief(config), make_agreement(strategy)
    if not is_chief:
        agree([1])  # the chief prepares the data first: on a disk that they share it is there then
    source = datasets.load(config.dataset, needs_training=trains)
    if is_chief:
        agree([1])
    train_examples, data_changes = resume.compare_data(source, workdir, trains)
    train_examples = (train_examples or source.num_train) if trains else 0
    plan = planning.make_plan(
        config,
        train_examples,
        source.num_eval,
        len(source.class_names),
        strategy.num_replicas_in_sync,
    )
    random.seed(
        config.seed
    )  # Keras draws the seeds of its initializers from it; all else is seeded where it is drawn
    keras.config.set_dtype_policy(dtype_policy)
    with strategy.scope():
        model = models.build_model(config, plan.num_classes)
        loaded = load_weights(model, config, workdir, source.class_names) if trains else ''
        state = build_state(model, config, plan, dtype_policy)
        teacher, teacher_name = None, ''
        if trains:
            teacher, origin = distillation.make_teacher(config, source.class_names)
            teacher_name = origin.name
    checkpoints = Checkpoints(
        os.path.join(workdir, 'checkpoints'),
        state.variables(),
        config.keep_checkpoints,
        writes=is_chief,
    )
    local_statistics = plan.num_replicas > 1 and not config.model.sync_batch_norm
    synchronize = (
        loops.make_average_statistics(strategy, state) if local_statistics else lambda: None
    )
    return Session(
        config,
        strategy,
        reason,
        kind,
        dtype_policy,
        jit_compile,
        source,
        data_changes,
        plan,
        state,
        checkpoints,
        synchronize,
        is_chief,
        agree,
        loaded,
        teacher,
        teacher_name,
    )


def load_weights(model, config, workdir, class_names):
    """What `config.model.weights` names goes into the model of a new run; returns what was loaded, in words.

    A run that goes on takes its own, and repeats what it said at its start.
    """
    if not config.model.weights:
        return ''
    if resume.begun(workdir) or resume.has_checkpoints(workdir):
        path = os.path.join(workdir, resume.ENVIRONMENT)
        return storage.read_json(path).get('weights', '') if storage.exists(path) else ''
    return pretrained.load_weights(model, config, class_names, find)


def build_state(model, config, plan, dtype_policy):
    """The model with an optimizer, if the plan has updates, and what else training changes; call it in the strategy's scope."""
    if not plan.total_steps:
        return steps.TrainState.create(model, None, config.ema_decay, scale_loss=False)
    optimizer = optimizers.build_optimizer(
        config, planning.schedule_arguments(config, plan), model.trainable_variables
    )
    models.derive_dropout_seeds(model, config.seed, optimizer.iterations)
    return steps.TrainState.create(
        model, optimizer, config.ema_decay, scale_loss=dtype_policy == 'mixed_float16'
    )
