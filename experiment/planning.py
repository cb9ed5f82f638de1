"""From a config and the facts of a data set to numbers: steps, warmup, intervals, stages. Once, and checked."""

import copy
import dataclasses
import functools
import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

import schedules
from common.errors import ConfigError
from experiment.config_schema import KEYS, parse_duration

MOST_STEPS = 2**31 - 1  # a loop's steps are counted in 32 bits


class Ahead(NamedTuple):
    """How much further a run is than its updates would be with batches of today's size.

    All is 0 unless the batch size has changed during the run.

    Attributes:
        updates: by which the schedule is ahead of the updates that were made.
        examples: seen beyond those of that many batches.
        distinct: the same without the copies of `augment.repeats`: by which the stream of examples
            is ahead.
    """

    updates: int = 0
    examples: int = 0
    distinct: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """The numbers of a run. Steps are updates of the weights, whatever their batch size was."""

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
    checkpoint_every: int | None  # steps, or None when in seconds
    checkpoint_seconds: float | None
    patience: int | None  # steps without a better evaluation after which the run ends, or None
    ahead: Ahead = Ahead()  # see `continued`

    @property
    def steps_per_epoch(self):
        """A fraction where the batch does not divide the split: batches go on across the end of an epoch."""
        return self.train_examples / self.batch_size

    @property
    def intervals(self):
        """Steps at whose multiples the host has something to do."""
        return tuple(filter(None, (self.log_every, self.eval_every, self.checkpoint_every)))

    @property
    def schedule_steps(self) -> int:
        """The length of the schedule, which is that of the run in batches of today's size."""
        return self.total_steps + self.ahead.updates

    @property
    def epochs(self):
        return (self.total_steps * self.batch_size + self.ahead.examples) / self.train_examples

    def stream_position(self, step: int, repeats: int) -> int:
        """Returns how many examples the first `step` updates take from the stream."""
        return step * (self.batch_size // repeats) + self.ahead.distinct

    def describe(self):
        """What the durations of the config came to, as text of a few lines."""
        saving = (
            f'{self.checkpoint_every:,} steps'
            if self.checkpoint_every
            else f'{self.checkpoint_seconds / 60:g} minutes'
        )
        per_replica = self.batch_size // self.num_replicas
        epochs, steps_per_epoch = f'{self.epochs:.4g} epochs', f'{self.steps_per_epoch:.6g} steps'
        length = f'{self.total_steps:,} = {epochs} x {steps_per_epoch}'
        if self.ahead.updates or self.ahead.examples:
            other_sizes = 'some of them with batches of another size'
            length = f'{self.total_steps:,}, {other_sizes}; {epochs}, now of {steps_per_epoch}'
        return '\n'.join(
            (
                f'data      {self.train_examples:,} training and {self.eval_examples:,} evaluation examples, {self.num_classes:,} classes',
                f'batch     {self.batch_size:,} = {per_replica:,} x {self.num_replicas} replica{"s" * (self.num_replicas > 1)}',
                f'steps     {length}',
                f'schedule  warmup {self.warmup_steps:,}, hold {self.hold_steps:,}, '
                f'decay {self.schedule_steps - self.warmup_steps - self.hold_steps:,} steps',
                f'every     log {self.log_every:,}, evaluate {self.eval_every:,} steps, checkpoint {saving}',
            )
        )


def make_plan(config, train_examples, eval_examples, num_classes, num_replicas):
    """Turns the durations of a checked config into steps.

    Args:
        config: a ConfigDict that passed `config_schema.check_config`.
        train_examples, eval_examples, num_classes: of the data set. Without training examples the run has no updates:
            it only evaluates.
        num_replicas: devices that train in sync.

    Raises:
        ConfigError: the parts of the schedule are longer than the run, the batch cannot be split over the replicas,
            or the run has no step at all.
    """
    eval_batch_size = math.ceil(config.eval_batch_size / num_replicas) * num_replicas
    if not train_examples:
        return Plan(
            train_examples=0,
            eval_examples=eval_examples,
            num_classes=num_classes,
            num_replicas=num_replicas,
            batch_size=config.batch_size,
            eval_batch_size=eval_batch_size,
            total_steps=0,
            warmup_steps=0,
            hold_steps=0,
            log_every=0,
            eval_every=0,
            checkpoint_every=None,
            checkpoint_seconds=None,
            patience=None,
        )
    if config.batch_size % num_replicas:
        best = max(num_replicas, config.batch_size // num_replicas * num_replicas)
        raise ConfigError(
            f'config.batch_size={config.batch_size} cannot be split evenly over {num_replicas} replicas: '
            f'write --config.batch_size={best}'
        )

    if config.batch_size // num_replicas % config.accumulate_steps:
        raise ConfigError(
            f'config.accumulate_steps={config.accumulate_steps} does not divide the {config.batch_size // num_replicas} examples of a '
            f'replica: write --config.batch_size={_rounded_up(config.batch_size, num_replicas * config.accumulate_steps)}'
        )
    if config.batch_size // num_replicas % config.augment.repeats:
        raise ConfigError(
            f'config.augment.repeats={config.augment.repeats} does not divide the {config.batch_size // num_replicas} examples of a '
            f'replica: write --config.batch_size={_rounded_up(config.batch_size, num_replicas * config.augment.repeats)}'
        )
    if (config.augment.mixup or config.augment.cutmix) and config.batch_size // num_replicas % 2:
        raise ConfigError(
            f'config.batch_size={config.batch_size} gives each of {num_replicas} replicas an odd share, and mixup and cutmix '
            f'mix pairs: write --config.batch_size={config.batch_size + num_replicas}'
        )

    def steps(key, total=None, least=0):
        amount, unit = parse_duration(key, _get(config, key), KEYS[key].units)
        if unit == '%':
            exact = amount * total / 100
        else:
            exact = (
                amount
                * {
                    'epochs': Fraction(train_examples, config.batch_size),
                    'steps': 1,
                    'examples': Fraction(1, config.batch_size),
                }[unit]
            )
        return max(least, int(exact))

    total_steps = steps('train_for')
    if total_steps < 1:
        raise ConfigError(
            f'config.train_for={config.train_for!r} is less than one step of {config.batch_size} examples: '
            f'train longer or lower config.batch_size'
        )
    if total_steps < config.progressive.stages:
        raise ConfigError(
            f'config.progressive.stages={config.progressive.stages} are more than the {total_steps:,} steps of the run'
        )
    if total_steps > MOST_STEPS:
        raise ConfigError(
            f'config.train_for={config.train_for!r} is {float(total_steps):.3g} steps: at most {MOST_STEPS:,} can be counted'
        )
    warmup_steps, hold_steps = (
        steps('schedule.warmup', total_steps),
        steps('schedule.hold', total_steps),
    )
    if warmup_steps + hold_steps > total_steps:
        raise ConfigError(
            f'config.schedule.warmup and hold take {warmup_steps:,} + {hold_steps:,} steps, but the run has '
            f'{total_steps:,}: shorten them (as percent they follow the run) or raise config.train_for'
        )
    amount, unit = parse_duration(
        'checkpoint_every', config.checkpoint_every, KEYS['checkpoint_every'].units
    )
    in_minutes = unit == 'minutes'
    plan = Plan(
        train_examples=train_examples,
        eval_examples=eval_examples,
        num_classes=num_classes,
        num_replicas=num_replicas,
        batch_size=config.batch_size,
        eval_batch_size=eval_batch_size,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        hold_steps=hold_steps,
        log_every=steps('log_every', total_steps, least=1),
        eval_every=steps('eval_every', total_steps, least=1),
        checkpoint_every=None if in_minutes else steps('checkpoint_every', total_steps, least=1),
        checkpoint_seconds=float(amount) * 60 if in_minutes else None,
        patience=steps('patience', total_steps, least=1) if config.patience else None,
    )
    try:
        learning_rate_of(config, plan)(0)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'config.schedule: {error}') from error
    return plan


def continued(plan: Plan, config, step: int, examples_seen: int, distinct_seen: int) -> Plan:
    """Returns the plan of a run that has made `step` updates, perhaps with batches of other sizes.

    The position of a run is the number of examples it has seen. There the stream of examples goes
    on, exactly, and the schedule, in whole updates of today's size, rounded down: the run is at
    most one batch longer than `config.train_for`, and its rate at most one update behind the curve.
    Where `config.train_for` counts updates, the position of the schedule is their number.

    Args:
        plan: of `make_plan`, or of this function.
        config: the config of that plan.
        step, examples_seen, distinct_seen: see `outputs.train_progress.Progress`.
    """
    _, unit = parse_duration('train_for', config.train_for, KEYS['train_for'].units)
    position = step if unit == 'steps' else examples_seen // plan.batch_size
    ahead = Ahead(
        updates=position - step,
        examples=examples_seen - step * plan.batch_size,
        distinct=distinct_seen - step * (plan.batch_size // config.augment.repeats),
    )
    return moved(plan, ahead)


def moved(plan: Plan, ahead: Ahead) -> Plan:
    """Returns the same plan for a run that is so far ahead."""
    return dataclasses.replace(plan, total_steps=plan.schedule_steps - ahead.updates, ahead=ahead)


def stages(config, plan):
    """The parts of a run with progressive learning (Tan and Le, EfficientNetV2, 2021); one part without it.

    Stages are equal parts of the run. From the first to the last grow, linearly: the size of the pictures, in multiples of
    32 pixels, from `progressive.image_size` to `image_size`; and dropout, the magnitude of RandAugment, colour jitter, mixup
    and cutmix from the share `progressive.strength` of their values.

    Returns: a list of (step at which it ends, config of this stage).
    """
    number = config.progressive.stages
    parts = []
    for index in range(number):
        stage = copy.deepcopy(config)
        if index < number - 1:
            grown = index / (number - 1)
            size = config.progressive.image_size + grown * (
                config.image_size - config.progressive.image_size
            )
            stage.image_size = max(1, round(size / 32)) * 32
            strength = config.progressive.strength + grown * (1 - config.progressive.strength)
            stage.model.dropout *= strength
            stage.augment.policy.magnitude *= strength
            for key in ('color_jitter', 'mixup', 'cutmix'):
                stage.augment[key] *= strength
        parts.append((plan.schedule_steps * (index + 1) // number - plan.ahead.updates, stage))
    return parts


def describe_stages(config, plan):
    """The stages of a progressive run as a line of text; '' for one without."""
    parts = stages(config, plan)
    return (
        'stages    '
        + ', '.join(f'{stage.image_size} pixels to step {end:,}' for end, stage in parts)
        if len(parts) > 1
        else ''
    )


def schedule_arguments(config, plan):
    """The arguments of `schedules.learning_rate` and `schedules.WarmupDecay` for this run.

    Their updates are those of the schedule, which may be ahead of those of the run: see `Ahead`.
    """
    named = ('name', 'peak_lr', 'start_lr', 'end_lr', 'warmup', 'hold')
    curve_arguments = {key: value for key, value in config.schedule.items() if key not in named}
    return dict(
        curve=config.schedule.name,
        warmup_steps=plan.warmup_steps,
        hold=plan.hold_steps,
        total_steps=plan.schedule_steps,
        start_lr=config.schedule.start_lr,
        target_lr=config.schedule.peak_lr,
        end_lr=config.schedule.end_lr,
        **curve_arguments,
    )


def learning_rate_of(config, plan):
    """The learning rate of this run: a function of the update, or of an array of them."""
    curve = functools.partial(schedules.learning_rate, **schedule_arguments(config, plan))
    return lambda step: curve(np.asarray(step) + plan.ahead.updates)


def planned_rates(config, plan, most=2000):
    """About `most` steps, evenly from the first to the last, and the learning rate at each: two lists."""
    first = max(0, -plan.ahead.updates)  # in batches of today's size the schedule begins there
    chosen = list(range(first, plan.total_steps + 1, max(1, plan.total_steps // most)))
    return chosen, learning_rate_of(config, plan)(chosen)


def _rounded_up(number, multiple):
    return math.ceil(number / multiple) * multiple


def _get(config, key):
    for part in key.split('.'):
        config = config[part]
    return config
