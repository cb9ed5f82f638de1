"""From a config and the facts of a data set to numbers: steps, warmup, intervals. Once, and checked.

`check_config` needs no data and no device, so that a mistake is answered at once; `make_plan` does the rest.
"""
import dataclasses
import functools
import math
import re
from fractions import Fraction

import schedules
from configs import default
from errors import ConfigError, did_you_mean

CHOICES = {
    'precision': ('auto', 'float32', 'bfloat16', 'float16', 'float64'),
    'jit_compile': ('auto', 'true', 'false'),
    'strategy': ('auto', 'tpu', 'multi_worker', 'mirrored', 'one_device'),
    'augment.crop': ('center', 'random'),
    'augment.policy.name': ('', 'rand_augment', 'trivial_augment'),
    'schedule.name': schedules.CURVES,
}
# Inclusive bounds. None: no bound on that side.
RANGES = {
    'seed': (0, 2**31 - 1),
    'dataset.memory_gib': (0.001, 2**20),
    'image_size': (8, 4096),
    'batch_size': (1, 2**24),
    'eval_batch_size': (1, 2**24),
    'schedule.peak_lr': (0, None),
    'schedule.start_lr': (0, None),
    'schedule.end_lr': (0, None),
    'weight_decay': (0, None),
    'l2_regularization': (0, None),
    'label_smoothing': (0, 0.999),
    'ema_decay': (0, 0.999999),
    'grad_clip_norm': (0, None),
    'model.dropout': (0, 0.999),
    'model.drop_path': (0, 0.999),
    'augment.translate': (0, 1),
    'augment.rotate': (0, 1),
    'augment.zoom': (0, 0.999),
    'augment.policy.num_ops': (1, 16),
    'augment.policy.magnitude': (0, 30),
    'augment.policy.rate': (0, 1),
    'augment.color_jitter': (0, 1),
    'augment.random_erasing': (0, 1),
    'augment.mixup': (0, None),
    'augment.cutmix': (0, None),
    'eval_crop': (0.05, 1),
    'virtual_devices': (0, 64),
    'steps_per_loop': (1, 2**31 - 1),
    'keep_checkpoints': (1, None),
}
UNITS = {
    'train_for': ('epochs', 'steps', 'examples'),
    'schedule.warmup': ('epochs', 'steps', 'examples', '%'),
    'schedule.hold': ('epochs', 'steps', 'examples', '%'),
    'log_every': ('epochs', 'steps', 'examples', '%'),
    'eval_every': ('epochs', 'steps', 'examples', '%'),
    'checkpoint_every': ('epochs', 'steps', 'examples', '%', 'minutes'),
}
MOST_STEPS = 2**31 - 1  # a loop's steps are counted in 32 bits


@dataclasses.dataclass(frozen=True)
class Plan:
    """The numbers of a run. Steps are updates of the weights."""

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

    @property
    def steps_per_epoch(self):
        """A fraction where the batch does not divide the split: batches go on across the end of an epoch."""
        return self.train_examples / self.batch_size

    @property
    def intervals(self):
        """Steps at whose multiples the host has something to do."""
        return tuple(filter(None, (self.log_every, self.eval_every, self.checkpoint_every)))

    @property
    def epochs(self):
        return self.total_steps / self.steps_per_epoch

    def describe(self):
        """What the durations of the config came to, as text of a few lines."""
        saving = f'{self.checkpoint_every:,} steps' if self.checkpoint_every else f'{self.checkpoint_seconds / 60:g} minutes'
        per_replica = self.batch_size // self.num_replicas
        return '\n'.join((
            f'data      {self.train_examples:,} training and {self.eval_examples:,} evaluation examples, {self.num_classes:,} classes',
            f'batch     {self.batch_size:,} = {per_replica:,} x {self.num_replicas} replica{"s" * (self.num_replicas > 1)}',
            f'steps     {self.total_steps:,} = {self.epochs:.4g} epochs x {self.steps_per_epoch:.6g} steps',
            f'schedule  warmup {self.warmup_steps:,}, hold {self.hold_steps:,}, '
            f'decay {self.total_steps - self.warmup_steps - self.hold_steps:,} steps',
            f'every     log {self.log_every:,}, evaluate {self.eval_every:,} steps, checkpoint {saving}',
        ))


def check_config(config):
    """Raises ConfigError, one line, for an unknown key, a wrong type, an impossible value or a duration without unit.

    A config that passes is locked.
    """
    reference = flatten(default.get_config())
    values = flatten(config)
    for key, value in values.items():
        if key in reference:
            _check_type(key, value, reference[key])
        elif not key.startswith(('optimizer.', 'schedule.')) or key.count('.') > 1:
            raise ConfigError(_unknown(key, reference))
        elif isinstance(value, str):  # arguments of the optimizer and of the curve are numbers
            raise ConfigError(f'config.{key}={value!r} must be a number, true or false{did_you_mean(key, reference)}')
    for key in reference:
        if key not in values:
            raise ConfigError(f'config.{key} is missing: start from configs/default.py and change values, do not remove them')
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            raise ConfigError(f'config.{key}={values[key]!r} is not one of {", ".join(choices)}{did_you_mean(values[key], choices)}')
    for key, (low, high) in RANGES.items():
        if not math.isfinite(values[key]) or values[key] < low or (high is not None and values[key] > high):
            bounds = f'from {low} to {high:,}' if high is not None else f'at least {low}'
            raise ConfigError(f'config.{key}={values[key]} is impossible: it must be {bounds}')
    for key, units in UNITS.items():
        parse_duration(key, values[key], units)
    curve_arguments = schedules.CURVES[config.schedule.name].__kwdefaults__ or {}
    for key in config.schedule:
        if f'schedule.{key}' not in reference and key not in curve_arguments:
            known = [name.split('.')[1] for name in reference if name.startswith('schedule.')] + list(curve_arguments)
            raise ConfigError(f'config.schedule.{key} does not exist{did_you_mean(key, known)}; {config.schedule.name} has {", ".join(known)}')
    low, high = _crop_area(values['augment.crop_area'])
    if not 0 < low <= high <= 1:
        raise ConfigError(f'config.augment.crop_area={(low, high)} is impossible: two shares of the picture, 0 < low <= high <= 1')
    config.lock()


def parse_duration(key, text, units):
    """'90 epochs' -> (Fraction(90), 'epochs'); raises ConfigError for anything that is not a number and one of `units`."""
    match = re.fullmatch(r'\s*((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9][0-9_]*)(?:\.[0-9]+)?)\s*(%|[A-Za-z]+)\s*', text)
    spelled = {unit[:-1]: unit for unit in units if unit.endswith('s')} | {unit: unit for unit in units}
    if match is None or len(match[1]) > 20 or match[2].lower() not in spelled:
        number = re.match(r'\s*([0-9][0-9_,.]*)', text)
        example = number[1].rstrip('.,_') if number else '10'
        examples = [f"'{example}{'' if unit == '%' else ' '}{unit}'" for unit in units]
        raise ConfigError(f'config.{key}={text!r} is no duration: write a number with a unit, {", ".join(examples[:-1])} or {examples[-1]}')
    amount, unit = Fraction(re.sub('[_,]', '', match[1])), spelled[match[2].lower()]
    if unit == '%' and amount > 100:
        raise ConfigError(f'config.{key}={text!r} is more than the whole run: write at most 100%')
    if unit in ('steps', 'examples') and amount.denominator != 1:
        raise ConfigError(f'config.{key}={text!r} is impossible: {unit} come as whole numbers')
    if key.endswith('_every') and not amount:
        raise ConfigError(f'config.{key}={text!r} is impossible: write at least 1 step, or 100% for once, at the end')
    return amount, unit


def make_plan(config, train_examples, eval_examples, num_classes, num_replicas):
    """Turns the durations of a checked config into steps.

    Args:
        config: a ConfigDict that passed `check_config`.
        train_examples, eval_examples, num_classes: of the data set.
        num_replicas: devices that train in sync.

    Raises:
        ConfigError: the parts of the schedule are longer than the run, the batch cannot be split over the replicas,
            or the run has no step at all.
    """
    if config.batch_size % num_replicas:
        best = max(num_replicas, config.batch_size // num_replicas * num_replicas)
        raise ConfigError(f'config.batch_size={config.batch_size} cannot be split evenly over {num_replicas} replicas: '
                          f'write --config.batch_size={best}')

    if (config.augment.mixup or config.augment.cutmix) and config.batch_size // num_replicas % 2:
        raise ConfigError(f'config.batch_size={config.batch_size} gives each of {num_replicas} replicas an odd share, and mixup and cutmix '
                          f'mix pairs: write --config.batch_size={config.batch_size + num_replicas}')

    def steps(key, total=None, least=0):
        amount, unit = parse_duration(key, _get(config, key), UNITS[key])
        if unit == '%':
            exact = amount * total / 100
        else:
            exact = amount * {'epochs': Fraction(train_examples, config.batch_size), 'steps': 1,
                              'examples': Fraction(1, config.batch_size)}[unit]
        return max(least, int(exact))

    total_steps = steps('train_for')
    if total_steps < 1:
        raise ConfigError(f'config.train_for={config.train_for!r} is less than one step of {config.batch_size} examples: '
                          f'train longer or lower config.batch_size')
    if total_steps > MOST_STEPS:
        raise ConfigError(f'config.train_for={config.train_for!r} is {float(total_steps):.3g} steps: at most {MOST_STEPS:,} can be counted')
    warmup_steps, hold_steps = steps('schedule.warmup', total_steps), steps('schedule.hold', total_steps)
    if warmup_steps + hold_steps > total_steps:
        raise ConfigError(f'config.schedule.warmup and hold take {warmup_steps:,} + {hold_steps:,} steps, but the run has '
                          f'{total_steps:,}: shorten them (as percent they follow the run) or raise config.train_for')
    amount, unit = parse_duration('checkpoint_every', config.checkpoint_every, UNITS['checkpoint_every'])
    in_minutes = unit == 'minutes'
    plan = Plan(
        train_examples=train_examples,
        eval_examples=eval_examples,
        num_classes=num_classes,
        num_replicas=num_replicas,
        batch_size=config.batch_size,
        eval_batch_size=math.ceil(config.eval_batch_size / num_replicas) * num_replicas,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        hold_steps=hold_steps,
        log_every=steps('log_every', total_steps, least=1),
        eval_every=steps('eval_every', total_steps, least=1),
        checkpoint_every=None if in_minutes else steps('checkpoint_every', total_steps, least=1),
        checkpoint_seconds=float(amount) * 60 if in_minutes else None,
    )
    try:
        learning_rate_of(config, plan)(0)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'config.schedule: {error}') from error
    return plan


def schedule_arguments(config, plan):
    """The arguments of `schedules.learning_rate` and `schedules.WarmupDecay` for this run."""
    named = ('name', 'peak_lr', 'start_lr', 'end_lr', 'warmup', 'hold')
    curve_arguments = {key: value for key, value in config.schedule.items() if key not in named}
    return dict(
        curve=config.schedule.name,
        warmup_steps=plan.warmup_steps,
        hold=plan.hold_steps,
        total_steps=plan.total_steps,
        start_lr=config.schedule.start_lr,
        target_lr=config.schedule.peak_lr,
        end_lr=config.schedule.end_lr,
        **curve_arguments,
    )


def learning_rate_of(config, plan):
    """The learning rate of this run: a function of the update, or of an array of them."""
    return functools.partial(schedules.learning_rate, **schedule_arguments(config, plan))


def flatten(config, prefix=''):
    """{'model.name': ...} of a ConfigDict or of nested dicts."""
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f'{prefix}{key}.') if hasattr(value, 'items') else {prefix + key: value}
    return flat


def _get(config, key):
    for part in key.split('.'):
        config = config[part]
    return config


def _unknown(key, reference):
    last = [known for known in reference if known.split('.')[-1] == key.split('.')[-1]]
    return f'config.{key} does not exist{did_you_mean(key, reference) or did_you_mean(key, last, cutoff=0)}; configs/default.py lists every key'


def _check_type(key, value, reference):
    kinds = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'text', tuple: 'several values in brackets'}
    kind = type(reference)
    fits = isinstance(value, (kind, int) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not fits:
        raise ConfigError(f'config.{key}={value!r} has the wrong type: write {kinds[kind]}, as in {key}={reference!r}')


def _crop_area(value):
    if len(value) != 2 or not all(isinstance(number, (int, float)) for number in value):
        raise ConfigError(f'config.augment.crop_area={tuple(value)!r} is impossible: write two numbers, as in (0.08, 1.0)')
    return value
