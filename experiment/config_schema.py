"""What a config may say: its keys, types, choices, bounds and durations. Needs no data and no device.

A mistake is answered at once, in one line that says what to write instead.
"""
import math
import re
from fractions import Fraction

import schedules
from common.errors import ConfigError, did_you_mean
from common.storage import flatten
from configs import default

CHOICES = {
    'precision': ('auto', 'float32', 'bfloat16', 'float16', 'float64'),
    'jit_compile': ('auto', 'true', 'false'),
    'strategy': ('auto', 'tpu', 'multi_worker', 'mirrored', 'one_device'),
    'augment.crop': ('center', 'random'),
    'augment.policy.name': ('', 'rand_augment', 'trivial_augment'),
    'schedule.name': schedules.CURVES,
    'best_metric': ('eval/accuracy', 'eval/top5', 'eval/loss'),
}
# Inclusive bounds. None: no bound on that side.
RANGES = {
    'seed': (0, 2**31 - 1),
    'dataset.eval_share': (0.001, 0.999),
    'dataset.split_seed': (0, 2**31 - 1),
    'dataset.max_broken': (0, 1),
    'dataset.white_level': (255, 2**16 - 1),
    'dataset.memory_gib': (0.001, 2**20),
    'image_size': (8, 4096),
    'batch_size': (1, 2**24),
    'accumulate_steps': (1, 2**16),
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
    'model.layer_decay': (0.001, 1),
    'distill.alpha': (0, 1),
    'distill.temperature': (0.01, 1000),
    'augment.translate': (0, 1),
    'augment.rotate': (0, 1),
    'augment.zoom': (0, 0.999),
    'augment.repeats': (1, 64),
    'augment.policy.num_ops': (1, 16),
    'augment.policy.magnitude': (0, 30),
    'augment.policy.rate': (0, 1),
    'augment.color_jitter': (0, 1),
    'augment.random_erasing': (0, 1),
    'augment.mixup': (0, None),
    'augment.cutmix': (0, None),
    'progressive.stages': (1, 64),
    'progressive.image_size': (8, 4096),
    'progressive.strength': (0, 1),
    'eval_crop': (0.05, 1),
    'virtual_devices': (0, 64),
    'steps_per_loop': (1, 2**31 - 1),
    'keep_checkpoints': (1, None),
    'max_skipped_updates': (0, None),
}
UNITS = {
    'train_for': ('epochs', 'steps', 'examples'),
    'schedule.warmup': ('epochs', 'steps', 'examples', '%'),
    'schedule.hold': ('epochs', 'steps', 'examples', '%'),
    'log_every': ('epochs', 'steps', 'examples', '%'),
    'eval_every': ('epochs', 'steps', 'examples', '%'),
    'checkpoint_every': ('epochs', 'steps', 'examples', '%', 'minutes'),
    'patience': ('epochs', 'steps', 'examples', '%'),  # or ''
}


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
            raise ConfigError(f'config.{key}={value!r} must be a number, true or false{did_you_mean(key, reference, cutoff=0.9)}')
    for key in reference:
        if key not in values:
            raise ConfigError(f'config.{key} is missing: start from configs/default.py and change values, do not remove them')
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            raise ConfigError(f'config.{key}={values[key]!r} is not one of {", ".join(map(repr, choices))}{did_you_mean(values[key], choices)}')
    for key, (low, high) in RANGES.items():
        if not math.isfinite(values[key]) or values[key] < low or (high is not None and values[key] > high):
            bounds = f'from {low} to {high:,}' if high is not None else f'at least {low}'
            raise ConfigError(f'config.{key}={values[key]} is impossible: it must be {bounds}')
    for key, units in UNITS.items():
        if values[key] or key != 'patience':
            parse_duration(key, values[key], units)
    curve_arguments = schedules.CURVES[config.schedule.name].__kwdefaults__ or {}
    for key in config.schedule:
        if f'schedule.{key}' not in reference and key not in curve_arguments:
            known = [name.split('.')[1] for name in reference if name.startswith('schedule.')] + list(curve_arguments)
            raise ConfigError(f'config.schedule.{key} does not exist{did_you_mean(key, known)}; {config.schedule.name} has {", ".join(known)}')
    low, high = _crop_area(values['augment.crop_area'])
    if values['progressive.stages'] > 1 and values['progressive.image_size'] > values['image_size']:
        raise ConfigError(f"config.progressive.image_size={values['progressive.image_size']} is larger than config.image_size={values['image_size']}: pictures grow")
    if not re.fullmatch(r'([^,:\s]+:[0-9]+(,[^,:\s]+:[0-9]+)*)?', values['dataset.service']):
        raise ConfigError(f"config.dataset.service={values['dataset.service']!r} is no address: write HOST:PORT, and a comma between several")
    for key in ('dataset.image_key', 'dataset.label_key'):
        if values[key] and values['dataset.name'] == 'folder':
            raise ConfigError(
                f'config.{key}={values[key]!r} names a feature of a TFDS data set, '
                'and a folder has none: leave it out')
    if values['progressive.stages'] > 1 and values['progressive.image_size'] % 32:
        raise ConfigError(f"config.progressive.image_size={values['progressive.image_size']} is impossible: the sizes of stages are multiples of 32")
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
    if (key.endswith('_every') or key == 'patience') and not amount:
        raise ConfigError(f'config.{key}={text!r} is impossible: write at least 1 step, or 100% for once, at the end')
    return amount, unit


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
