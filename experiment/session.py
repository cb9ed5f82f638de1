"""Builds strategy, data, plan and state from a config, for `train`, `evaluate` and `export`."""

import dataclasses
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from ml_collections import ConfigDict

from common import console, storage
from devices.strategy import (
    device_kind,
    make_strategy,
    make_sum_over_workers,
    resolve_jit_compile,
    resolve_precision,
    runs_as_chief,
)
from experiment import planning, resume
from inputs import datasets
from modeling import distillation, loops, models, optimizers, pretrained, steps
from outputs.checkpoints import Checkpoints, find_checkpoint
from outputs.train_progress import Progress


@dataclasses.dataclass
class Session:
    """Everything a mode works with.

    Attributes:
        strategy_reason: which strategy was chosen, and why.
        kind: 'TPU', 'GPU' or 'CPU'.
        dtype_policy: the Keras dtype policy.
        data_changes: lines on what has changed since the run began.
        synchronize: makes unsynchronized statistics the same on all replicas, and brings the
            state into TensorFlow's variables; call it before reading them. A collective.
        is_chief: whether this process writes files; only one of several workers does.
        sum_over_workers: a collective sum of numbers; every worker must call it at the same point.
        loaded: one line on what `config.model.weights` provided; '' for random weights.
    """

    config: ConfigDict
    strategy: tf.distribute.Strategy
    strategy_reason: str
    kind: str
    dtype_policy: str
    jit_compile: bool
    source: datasets.Source
    data_changes: tuple[str, ...]
    plan: planning.Plan
    state: steps.TrainState
    checkpoints: Checkpoints
    synchronize: Callable[[], None]
    is_chief: bool
    sum_over_workers: Callable[[Sequence[float]], list[float]]
    loaded: str
    teacher: distillation.Teacher | None

    def continue_from(self, progress: Progress) -> None:
        """Moves the plan and the learning rate to a restored run's position."""
        position = progress.step, progress.examples_seen, progress.distinct_seen
        self.plan = planning.resumed_plan(self.plan, self.config, *position)
        if self.plan.offset.updates:
            arguments = planning.schedule_arguments(self.config, self.plan)
            optimizers.shift_schedule(self.state.optimizer, arguments, self.plan.offset.updates)

    def wait_for_all(self) -> None:
        """Waits until every worker has reached this point."""
        self.sum_over_workers([1])

    def describe(self) -> list[tuple[str, str]]:
        """Describes the choices made and the plan, as (name, text) rows."""
        is_compiled = self.jit_compile or isinstance(self.strategy, loops.RunsSteps)
        xla = 'on' if is_compiled else 'off'
        plan = planning.summarize(self.config, self.plan)
        return [
            ('strategy', self.strategy_reason),
            ('compute', f'{self.dtype_policy}, jit_compile {xla}'),
            *plan.rows().items(),
            *self._describe_micro_batches(),
            *self._describe_transfer(),
            *(('note', change) for change in self.data_changes),
        ]

    def describe_runtime(self) -> dict[str, Any]:
        """Returns what runs the steps, and JAX's devices if it does, for environment.json."""
        if not isinstance(self.strategy, loops.RunsSteps):
            return {'runtime': 'TensorFlow'}
        devices = self.strategy.describe_devices()
        return {'runtime': self.strategy.runtime, 'devices': devices}

    def print_description(self) -> None:
        for name, text in self.describe():
            console.row(name, text)

    def _describe_micro_batches(self) -> Iterator[tuple[str, str]]:
        plan, on_tpu = self.plan, self.kind == 'TPU'
        count = steps.num_micro_batches(self.config, plan.num_replicas, on_tpu)
        if count > 1:
            size = plan.batch_size // plan.num_replicas // count
            yield 'parts', f'{count:,} micro-batches of {size:,} on each replica'

    def _describe_transfer(self) -> Iterator[tuple[str, str]]:
        model, distill = self.config.model, self.config.distill
        if self.loaded:
            yield 'weights', self.loaded
        if model.freeze:
            trained = _size(self.state.model.trainable_variables)
            everything = _size(models.float_variables(self.state.model))
            is_all = model.freeze == 'backbone'
            frozen = 'the backbone' if is_all else f'everything up to {model.freeze}'
            yield 'frozen', f'{frozen}: {trained:,} of {everything:,} parameters are trained'
        if model.layer_decay < 1:
            least = min(models.layer_lr_multipliers(self.state.model, model.layer_decay))
            yield 'rates', f'x 1 at the head, down to x {least:.3g} at the first trained layers'
        if self.teacher:
            weight = f'{distill.alpha:.0%} of the loss, temperature {distill.temperature:g}'
            yield 'teacher', f'{self.teacher.name}; {weight}'


def open_session(config: ConfigDict, workdir: str, trains: bool = True) -> Session:
    """Builds what a checked config describes, in the order of the data flow.

    Without `trains` there is no optimizer, and the data set needs no training split.

    Raises: ConfigError, RunError: see the functions called here.
    """
    strategy, reason = make_strategy(config)
    kind = device_kind(strategy)
    dtype_policy = resolve_precision(config.precision, kind)
    # On JAX's runtime all of the step is compiled, and nothing in it once more.
    runs_compiled = isinstance(strategy, loops.RunsSteps)
    jit_compile = not runs_compiled and resolve_jit_compile(config.jit_compile, kind)
    is_chief, sum_over_workers = runs_as_chief(config), make_sum_over_workers(strategy)
    if not is_chief:
        # The chief prepares the data first; the others then find it on the shared disk.
        sum_over_workers([1])
    source = datasets.load(config.dataset, needs_training=trains)
    if is_chief:
        sum_over_workers([1])
    train_examples, data_changes = resume.compare_data(source, workdir, trains)
    plan = planning.make_plan(
        config,
        (train_examples or source.num_train) if trains else 0,
        source.num_eval,
        len(source.class_names),
        strategy.num_replicas_in_sync,
    )
    # Keras draws its initializers' seeds from `random`; everything else is seeded explicitly.
    random.seed(config.seed)
    keras.config.set_dtype_policy(dtype_policy)
    loaded, teacher = '', None
    with strategy.scope():
        model = models.build_model(config, plan.num_classes)
        if trains:
            loaded = load_weights(model, config, workdir, source.class_names)
        state = build_state(model, config, plan, dtype_policy)
        if trains:
            teacher = distillation.make_teacher(config, source.class_names)
    checkpoints = Checkpoints(
        os.path.join(workdir, 'checkpoints'),
        state.variables(),
        config.keep_checkpoints,
        writes=is_chief,
    )
    if isinstance(strategy, loops.RunsSteps):
        checkpoints.after_restore = strategy.forget
    return Session(
        config=config,
        strategy=strategy,
        strategy_reason=reason,
        kind=kind,
        dtype_policy=dtype_policy,
        jit_compile=jit_compile,
        source=source,
        data_changes=data_changes,
        plan=plan,
        state=state,
        checkpoints=checkpoints,
        synchronize=make_synchronize(strategy, state, config.model.sync_batch_norm),
        is_chief=is_chief,
        sum_over_workers=sum_over_workers,
        loaded=loaded,
        teacher=teacher,
    )


def make_synchronize(
    strategy: tf.distribute.Strategy, state: steps.TrainState, sync_batch_norm: bool
) -> Callable[[], None]:
    """Returns what makes TensorFlow's variables those of the run: see `Session.synchronize`."""
    average: Callable[[], None] = _do_nothing
    if strategy.num_replicas_in_sync > 1 and not sync_batch_norm:
        average = loops.make_average_statistics(strategy, state)

    def synchronize() -> None:
        average()
        if isinstance(strategy, loops.RunsSteps):
            strategy.read_back()

    return synchronize


def load_weights(
    model: keras.Model, config: ConfigDict, workdir: str, class_names: Sequence[str]
) -> str:
    """Loads what `config.model.weights` names into the model of a new run.

    A resumed run has its own weights, so nothing is loaded and the original line is returned.

    Returns: one line on what was loaded.
    """
    if not config.model.weights:
        return ''
    if resume.has_run(workdir) or resume.has_checkpoints(workdir):
        path = os.path.join(workdir, resume.ENVIRONMENT)
        return storage.read_json(path).get('weights', '') if storage.exists(path) else ''
    return pretrained.load_weights(model, config, class_names, find_checkpoint)


def build_state(
    model: keras.Model, config: ConfigDict, plan: planning.Plan, dtype_policy: str
) -> steps.TrainState:
    """Builds the training state, with an optimizer if the plan has updates.

    Call it in the strategy's scope.
    """
    if not plan.total_steps:
        return steps.TrainState.create(model, None, config.ema_decay, scale_loss=False)
    arguments = planning.schedule_arguments(config, plan)
    optimizer = optimizers.build_optimizer(config, arguments, model.trainable_variables)
    models.derive_dropout_seeds(model, config.seed, optimizer.iterations)
    scale_loss = dtype_policy == 'mixed_float16'
    return steps.TrainState.create(model, optimizer, config.ema_decay, scale_loss)


def _size(variables: Sequence[tf.Variable]) -> int:
    return sum(math.prod(variable.shape) for variable in variables)


def _do_nothing() -> None:
    pass
