"""Turns a config and the facts of a data set into numbers: steps, warmup, intervals, stages."""

import copy
import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

import schedules
from common.errors import ConfigError, counted
from experiment.config_schema import KEYS, parse_duration

MAX_STEPS = 2**31 - 1  # a loop's steps are counted in 32 bits


class ScheduleOffset(NamedTuple):
    """How far a run is ahead of where its updates would be at the current batch size.

    All fields are 0 unless the batch size has changed during the run.

    Attributes:
        updates: how far the schedule is ahead of the updates made.
        examples: examples seen minus updates made times the current batch size.
        distinct: the same without the copies of `augment.repeats`: how far the example stream is
            ahead.
    """

    updates: int = 0
    examples: int = 0
    distinct: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """The numbers of a run. A step is an update of the weights, whatever its batch size."""

    train_examples: int
    eval_examples: int
    num_classes: int
    num_replicas: int
    batch_size: int  # global
    eval_batch_size: int  # global, rounded up to a multiple of num_replicas
    total_steps: int
    warmup_steps: int
    hold_steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int | None  # steps; None if the interval is in seconds
    checkpoint_seconds: float | None
    patience: int | None  # steps without a better evaluation after which the run ends, or None
    offset: ScheduleOffset = ScheduleOffset()  # see `resumed_plan`

    @property
    def steps_per_epoch(self) -> float:
        """Returns batches per epoch, not rounded: a batch may span two epochs."""
        return self.train_examples / self.batch_size

    @property
    def intervals(self) -> tuple[int, ...]:
        """Returns the step intervals at which the host logs, evaluates or saves."""
        return tuple(filter(None, (self.log_every, self.eval_every, self.checkpoint_every)))

    @property
    def schedule_steps(self) -> int:
        """Returns the length of the schedule: that of the run at the current batch size."""
        return self.total_steps + self.offset.updates

    @property
    def epochs(self) -> float:
        return (self.total_steps * self.batch_size + self.offset.examples) / self.train_examples

    def stream_position(self, step: int, repeats: int) -> int:
        """Returns how many examples the first `step` updates take from the stream."""
        return step * (self.batch_size // repeats) + self.offset.distinct


class PlanSummary(NamedTuple):
    """The plan as text; '' for parts that a run does not have."""

    data: str
    batch: str
    steps: str
    schedule: str
    intervals: str
    stages: str

    def rows(self) -> dict[str, str]:
        """Returns {name: text}, in order."""
        return {name: text for name, text in self._asdict().items() if text}


def summarize(config: ConfigDict, plan: Plan) -> PlanSummary:
    per_replica = plan.batch_size // plan.num_replicas
    epochs, steps_per_epoch = (
        f'{plan.epochs:.4g} epochs',
        f'{plan.steps_per_epoch:.6g} {"step" if plan.steps_per_epoch == 1 else "steps"}',
    )
    length = f'{plan.total_steps:,} = {epochs} x {steps_per_epoch}'
    if plan.offset.updates or plan.offset.examples:
        other_sizes = 'some with another batch size'
        length = f'{plan.total_steps:,}, {other_sizes}; {epochs}, now {steps_per_epoch} each'
    decay_steps = plan.schedule_steps - plan.warmup_steps - plan.hold_steps
    saving = counted(plan.checkpoint_every, 'step') if plan.checkpoint_every else ''
    if plan.checkpoint_seconds:
        saving = f'{plan.checkpoint_seconds / 60:g} minutes'
    parts = stages(config, plan)
    growth = [f'{stage.image_size} pixels to step {end:,}' for end, stage in parts]
    return PlanSummary(
        data=f'{plan.train_examples:,} training and {plan.eval_examples:,} evaluation examples, '
        f'{plan.num_classes:,} classes',
        batch=f'{plan.batch_size:,} = {per_replica:,} x {counted(plan.num_replicas, "replica")}',
        steps=length,
        schedule=f'warmup {plan.warmup_steps:,}, hold {plan.hold_steps:,}, '
        f'decay {decay_steps:,} steps',
        intervals=f'log {counted(plan.log_every, "step")}, '
        f'evaluate {counted(plan.eval_every, "step")}, checkpoint {saving}',
        stages=', '.join(growth) if len(growth) > 1 else '',
    )


def make_plan(
    config: ConfigDict,
    train_examples: int,
    eval_examples: int,
    num_classes: int,
    num_replicas: int,
) -> Plan:
    """Turns the durations of a checked config into steps.

    Args:
        config: one that has passed `config_schema.check_config`.
        train_examples, eval_examples, num_classes: of the data set. Without training examples the
            run has no updates: it only evaluates.
        num_replicas: devices that train in sync.

    Raises:
        ConfigError: the parts of the schedule are longer than the run, the batch cannot be split
            over the replicas, or the run has no step at all.
    """
    eval_batch_size = _round_up(config.eval_batch_size, num_replicas)
    facts = {
        'train_examples': train_examples,
        'eval_examples': eval_examples,
        'num_classes': num_classes,
        'num_replicas': num_replicas,
        'batch_size': config.batch_size,
        'eval_batch_size': eval_batch_size,
    }
    if not train_examples:
        return Plan(
            **facts,
            total_steps=0,
            warmup_steps=0,
            hold_steps=0,
            log_every=0,
            eval_every=0,
            checkpoint_every=None,
            checkpoint_seconds=None,
            patience=None,
        )
    _check_batch(config, num_replicas)

    def steps(key: str, total: int | None = None, least: int = 0) -> int:
        amount, unit = parse_duration(key, _get(config, key), KEYS[key].units)
        if unit == '%':
            return max(least, int(amount * (total or 0) / 100))
        in_steps: dict[str, Fraction | int] = {
            'epochs': Fraction(train_examples, config.batch_size),
            'steps': 1,
            'examples': Fraction(1, config.batch_size),
        }
        return max(least, int(amount * in_steps[unit]))

    total_steps = steps('train_for')
    _check_length(config, total_steps)
    warmup_steps = steps('schedule.warmup', total_steps)
    hold_steps = steps('schedule.hold', total_steps)
    if warmup_steps + hold_steps > total_steps:
        raise ConfigError(
            f'config.schedule.warmup and hold take {warmup_steps:,} + {hold_steps:,} steps, '
            f'but the run has {total_steps:,}',
            'shorten them (percentages scale with the run) or raise config.train_for',
            'schedule.warmup',
        )
    amount, unit = parse_duration(
        'checkpoint_every', config.checkpoint_every, KEYS['checkpoint_every'].units
    )
    is_by_clock = unit == 'minutes'
    plan = Plan(
        **facts,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        hold_steps=hold_steps,
        log_every=steps('log_every', total_steps, least=1),
        eval_every=steps('eval_every', total_steps, least=1),
        checkpoint_every=None if is_by_clock else steps('checkpoint_every', total_steps, least=1),
        checkpoint_seconds=float(amount) * 60 if is_by_clock else None,
        patience=steps('patience', total_steps, least=1) if config.patience else None,
    )
    try:
        learning_rate_of(config, plan)(0)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'config.schedule: {error}', key='schedule') from error
    return plan


def _check_batch(config: ConfigDict, num_replicas: int) -> None:
    """Raises ConfigError, suggesting a batch size that fits, if the batch cannot be divided."""
    batch_size = config.batch_size
    if batch_size % num_replicas:
        fits = max(num_replicas, batch_size // num_replicas * num_replicas)
        raise ConfigError(
            f'config.batch_size={batch_size} cannot be split evenly over {num_replicas} replicas',
            f'--config.batch_size={fits}',
            'batch_size',
        )
    per_replica = batch_size // num_replicas
    for key in ('accumulate_steps', 'augment.repeats'):
        divisor = _get(config, key)
        if divisor != 'auto' and per_replica % divisor:
            raise ConfigError(
                f'config.{key}={divisor} does not divide the {per_replica} examples of a replica',
                f'--config.batch_size={_round_up(batch_size, num_replicas * divisor)}',
                key,
            )
    mixes = config.augment.mixup or config.augment.cutmix
    if mixes and per_replica % 2:
        raise ConfigError(
            f'config.batch_size={batch_size} gives each of {num_replicas} replicas an odd number '
            'of examples, and mixup and cutmix mix pairs',
            f'--config.batch_size={batch_size + num_replicas}',
            'batch_size',
        )


def _check_length(config: ConfigDict, total_steps: int) -> None:
    if total_steps < 1:
        raise ConfigError(
            f'config.train_for={config.train_for!r} is less than one step of '
            f'{config.batch_size} examples',
            'train longer or lower config.batch_size',
            'train_for',
        )
    if total_steps < config.progressive.stages:
        raise ConfigError(
            f'config.progressive.stages={config.progressive.stages} is more than the '
            f'{total_steps:,} steps of the run',
            f'--config.progressive.stages={total_steps}',
            'progressive.stages',
        )
    if total_steps > MAX_STEPS:
        raise ConfigError(
            f'config.train_for={config.train_for!r} is {float(total_steps):.3g} steps',
            f'write at most {MAX_STEPS:,} steps',
            'train_for',
        )


def resumed_plan(
    plan: Plan, config: ConfigDict, step: int, examples_seen: int, distinct_seen: int
) -> Plan:
    """Returns the plan for resuming after `step` updates, some perhaps at other batch sizes.

    A run's position is the number of examples it has seen. The example stream resumes exactly
    there; the schedule resumes at that many whole updates of the current size, rounded down, so the
    run is at most one batch longer than `config.train_for` and its rate at most one update behind
    the curve. If `config.train_for` is in steps, the schedule's position is the number of updates.

    Args:
        plan: returned by `make_plan` or this function.
        config: the config it was made from.
        step, examples_seen, distinct_seen: see `outputs.train_progress.Progress`.
    """
    _, unit = parse_duration('train_for', config.train_for, KEYS['train_for'].units)
    position = step if unit == 'steps' else examples_seen // plan.batch_size
    offset = ScheduleOffset(
        updates=position - step,
        examples=examples_seen - step * plan.batch_size,
        distinct=distinct_seen - step * (plan.batch_size // config.augment.repeats),
    )
    return shifted(plan, offset)


def shifted(plan: Plan, offset: ScheduleOffset) -> Plan:
    """Returns `plan` shifted by `offset`."""
    return dataclasses.replace(
        plan, total_steps=plan.schedule_steps - offset.updates, offset=offset
    )


def stages(config: ConfigDict, plan: Plan) -> list[tuple[int, ConfigDict]]:
    """Returns the stages of progressive learning; a single stage without it.

    Tan and Le, EfficientNetV2, 2021. Stages are equal parts of the run. From first to last, these
    grow linearly: the image size, in multiples of 32 pixels, from `progressive.image_size` to
    `image_size`; and dropout, RandAugment's magnitude, colour jitter, mixup and cutmix, from
    `progressive.strength` times their values.

    Returns: [(end step, config of the stage)].
    """
    number = config.progressive.stages
    parts = []
    for index in range(number):
        stage = copy.deepcopy(config)
        if index < number - 1:
            grown = index / (number - 1)
            first_size = config.progressive.image_size
            size = first_size + grown * (config.image_size - first_size)
            stage.image_size = max(1, round(size / 32)) * 32
            strength = config.progressive.strength + grown * (1 - config.progressive.strength)
            stage.model.dropout *= strength
            stage.augment.policy.magnitude *= strength
            for key in ('color_jitter', 'mixup', 'cutmix'):
                stage.augment[key] *= strength
        end = plan.schedule_steps * (index + 1) // number - plan.offset.updates
        parts.append((end, stage))
    return parts


def schedule_arguments(config: ConfigDict, plan: Plan) -> dict[str, Any]:
    """Returns the arguments of `schedules.learning_rate` and `schedules.WarmupDecay`.

    They count the schedule's updates, which may be ahead of the run's: see `ScheduleOffset`.
    """
    named = ('name', 'peak_lr', 'start_lr', 'end_lr', 'warmup', 'hold')
    curve_arguments = {key: value for key, value in config.schedule.items() if key not in named}
    return {
        'curve': config.schedule.name,
        'warmup_steps': plan.warmup_steps,
        'hold': plan.hold_steps,
        'total_steps': plan.schedule_steps,
        'start_lr': config.schedule.start_lr,
        'target_lr': config.schedule.peak_lr,
        'end_lr': config.schedule.end_lr,
        **curve_arguments,
    }


def learning_rate_of(config: ConfigDict, plan: Plan) -> Callable[[Any], Any]:
    """Returns a function from an update, or an array of updates, to the learning rate."""
    arguments = schedule_arguments(config, plan)
    return lambda step: schedules.learning_rate(np.asarray(step) + plan.offset.updates, **arguments)


def planned_rates(config: ConfigDict, plan: Plan, most: int = 2000) -> tuple[list[int], np.ndarray]:
    """Returns about `most` steps, evenly from the first to the last, and the rate at each."""
    first = max(0, -plan.offset.updates)  # where the schedule begins at the current batch size
    chosen = list(range(first, plan.total_steps + 1, max(1, plan.total_steps // most)))
    return chosen, learning_rate_of(config, plan)(chosen)


def _round_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


def _get(config: ConfigDict, key: str) -> Any:
    for part in key.split('.'):
        config = config[part]
    return config
