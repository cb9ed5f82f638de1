"""Defines and checks a config's keys, types, choices, bounds and durations.

Needs no data or device. A mistake is reported immediately, in one line that says what to write
instead.
"""

import math
import re
from collections.abc import Collection, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from common.errors import ConfigError, closest_match, did_you_mean
from common.storage import flatten
from configs import default

DURATION = ('epochs', 'steps', 'examples')
RUN_UNITS = (*DURATION, '%')
AMOUNT_AND_UNIT = (
    r'\s*((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9][0-9_]*)(?:\.[0-9]+)?)'  # 90, 1_000, 1,000 or 2.5
    r'\s*(%|[A-Za-z]+)\s*'
)
ADDRESSES = r'([^,:\s]+:[0-9]+(,[^,:\s]+:[0-9]+)*)?'
TYPES = {
    bool: 'true or false',
    int: 'a whole number',
    float: 'a number',
    str: 'text',
    tuple: 'several values in brackets',
}


class Key(NamedTuple):
    """The meaning and the allowed values of a config key.

    The type is that of the default in configs/default.py.

    Attributes:
        doc: its description, in Markdown.
        low, high: inclusive bounds; None means no bound on that side.
        choices: the allowed values; () means any.
        units: the units allowed for a duration; () means that it is not a duration.
        optional: whether a duration may be ''.
        word: what may stand instead of a number; '' if nothing may.
    """

    doc: str
    low: float | None = None
    high: float | None = None
    choices: Collection[str] = ()
    units: tuple[str, ...] = ()
    optional: bool = False
    word: str = ''


KEYS = {
    'seed': Key(
        'Seed of the initial weights, the order of the examples, augmentation and dropout.',
        0,
        2**31 - 1,
    ),
    'dataset.name': Key("A TFDS name, `'digits'` (built in), or `'folder'` for your own images."),
    'dataset.data_dir': Key("Folder of the data; empty: TFDS's default."),
    'dataset.train_split': Key("A TFDS split, such as `'train[:90%]'`; for a folder, a subfolder."),
    'dataset.eval_split': Key('The same for evaluation.'),
    'dataset.image_key': Key('The TFDS feature that is the image; empty: found automatically.'),
    'dataset.label_key': Key('The feature that is the class label; empty: found.'),
    'dataset.eval_share': Key(
        'Fraction of each class held out for evaluation if a folder has no evaluation split.',
        0.001,
        0.999,
    ),
    'dataset.split_seed': Key('Seed that decides which images are held out.', 0, 2**31 - 1),
    'dataset.max_broken': Key(
        'Largest fraction of unusable files in a folder; more stop the run.', 0, 1
    ),
    'dataset.white_level': Key(
        'The value of white in 16-bit images: 4095 for a 12-bit camera.',
        255,
        2**16 - 1,
    ),
    'dataset.memory_gib': Key(
        'Host memory, in GiB, for encoded images and prefetched batches.', 0.001, 2**20
    ),
    'dataset.service': Key(
        "`'HOST:PORT,HOST:PORT'` of tf.data services that prepare the training images."
    ),
    'image_size': Key('Height and width of the model input, in pixels.', 8, 4096),
    'batch_size': Key('Examples per update, over all replicas of all hosts.', 1, 2**24),
    'accumulate_steps': Key(
        "Micro-batches per update (gradient accumulation); `'auto'` takes as many as keep a "
        "micro-batch within a TPU's on-chip memory, and 1 elsewhere.",
        1,
        2**16,
        word='auto',
    ),
    'eval_batch_size': Key('Examples per evaluation batch, over all replicas.', 1, 2**24),
    'train_for': Key('The length of the run.', units=DURATION),
    'schedule.name': Key(
        'The curve of the learning rate after warmup and hold. '
        'Further keys of `schedule` are its arguments.',
    ),
    'schedule.peak_lr': Key('The peak learning rate, between warmup and decay.', 0),
    'schedule.start_lr': Key('The learning rate of the first update.', 0),
    'schedule.end_lr': Key('The learning rate at the end.', 0),
    'schedule.warmup': Key('How long the rate rises.', units=RUN_UNITS),
    'schedule.hold': Key('How long it then stays at its peak.', units=RUN_UNITS),
    'optimizer.name': Key(
        'See modeling/optimizers.py. '
        'Further keys of `optimizer` are arguments of the Keras optimizer.'
    ),
    'weight_decay': Key(
        'Decoupled weight decay, scaled by the learning rate; never applied to biases and '
        'normalisation.',
        0,
    ),
    'l2_regularization': Key(
        'L2 coefficient: this times the weight is added to the gradient, for the same variables '
        'as weight_decay.',
        0,
    ),
    'label_smoothing': Key('Fraction of each label that is spread over all classes.', 0, 0.999),
    'ema_decay': Key(
        'Above 0 an average of the weights with this decay is kept, evaluated and exported.',
        0,
        0.999999,
    ),
    'grad_clip_norm': Key('Above 0 the norm of the whole gradient is clipped to it.', 0),
    'model.name': Key("A model of `keras.applications`, or `'tiny'`."),
    'model.weights': Key(
        "Empty: random; `'imagenet'`; or a run, checkpoint or SavedModel of yours."
    ),
    'model.freeze': Key(
        "`'backbone'`, or the last layer or block to freeze, such as `'block4'`; empty: nothing "
        'is frozen.'
    ),
    'model.layer_decay': Key(
        "Each block's learning rate is this times that of the block after it; 1 means no decay.",
        0.001,
        1,
    ),
    'model.dropout': Key('Rate of dropout before the head.', 0, 0.999),
    'model.drop_path': Key(
        'Rate of stochastic depth in the last block; it grows linearly from 0 in the first.',
        0,
        0.999,
    ),
    'model.sync_batch_norm': Key(
        'Whether batch normalisation takes its statistics from all replicas.'
    ),
    'distill.teacher': Key(
        'A run or SavedModel that knows the same classes, or, on ImageNet, a model of '
        '`keras.applications`; empty: none.'
    ),
    'distill.weights': Key(
        "Weights of a `keras.applications` teacher: `'imagenet'` or a weights file."
    ),
    'distill.alpha': Key("Weight of the teacher's loss; 1: labels are ignored.", 0, 1),
    'distill.temperature': Key(
        "Divides the logits: above 1 the teacher's small probabilities count for more.", 0.01, 1000
    ),
    'augment.crop': Key(
        "`'center'` as evaluation does, or a random resized crop.", choices=('center', 'random')
    ),
    'augment.crop_area': Key('(low, high) fraction of the image area that a random crop covers.'),
    'augment.flip': Key('Whether half of the images are flipped left to right.'),
    'augment.translate': Key(
        'Largest shift, as a fraction of the image size, in both directions.', 0, 1
    ),
    'augment.rotate': Key(
        'Largest rotation, as a fraction of a full turn, in both directions.', 0, 1
    ),
    'augment.zoom': Key('Largest zoom, as a fraction, in and out.', 0, 0.999),
    'augment.repeats': Key(
        'Copies of each example in its batch, each augmented differently.', 1, 64
    ),
    'augment.policy.name': Key(
        'RandAugment or TrivialAugment; empty: neither.',
        choices=('', 'rand_augment', 'trivial_augment'),
    ),
    'augment.policy.num_ops': Key('Operations that RandAugment applies to an image.', 1, 16),
    'augment.policy.magnitude': Key('Their strength.', 0, 30),
    'augment.policy.rate': Key('Probability that the policy changes an image at all.', 0, 1),
    'augment.color_jitter': Key(
        'Largest change in brightness, contrast and saturation, as a fraction, up and down.', 0, 1
    ),
    'augment.random_erasing': Key('Probability that a rectangle of an image is erased.', 0, 1),
    'augment.mixup': Key('Alpha of the Beta(alpha, alpha) distribution for mixup; 0: off.', 0),
    'augment.cutmix': Key(
        'The same for CutMix; with both, each pair of images gets one of the two.', 0
    ),
    'eval_crop': Key(
        'Side of the central square used for evaluation, as a fraction of the shorter side.',
        0.05,
        1,
    ),
    'progressive.stages': Key(
        'Number of equal stages over which image size and augmentation grow; 1: no growth.', 1, 64
    ),
    'progressive.image_size': Key(
        'Image size of the first stage, in pixels, a multiple of 32.', 8, 4096
    ),
    'progressive.strength': Key(
        'Fraction of dropout, magnitude, color_jitter, mixup and cutmix applied in the first '
        'stage.',
        0,
        1,
    ),
    'precision': Key(
        'Compute dtype.', choices=('auto', 'float32', 'bfloat16', 'float16', 'float64')
    ),
    'jit_compile': Key('Whether XLA compiles the step.', choices=('auto', 'true', 'false')),
    'strategy': Key(
        'Distribution strategy: which devices to use.',
        choices=('auto', 'tpu', 'pjrt', 'multi_worker', 'mirrored', 'one_device'),
    ),
    'virtual_devices': Key(
        'If above 0, splits the CPU into this many devices, to try a strategy.', 0, 64
    ),
    'tpu': Key("`'local'` (Colab, Kaggle, a TPU VM), or the name of a TPU."),
    'steps_per_loop': Key('Updates per call from Python.', 1, 2**31 - 1),
    'log_every': Key('How often a row of metrics is written.', units=RUN_UNITS),
    'eval_every': Key('How often the model is evaluated.', units=RUN_UNITS),
    'checkpoint_every': Key('How often a checkpoint is written.', units=(*RUN_UNITS, 'minutes')),
    'keep_checkpoints': Key(
        'How many of the latest checkpoints are kept, in addition to the best.', 1
    ),
    'best_metric': Key(
        'Metric that decides which checkpoint is the best.',
        choices=('eval/accuracy', 'eval/top5', 'eval/loss'),
    ),
    'patience': Key(
        'Ends the run after this long without a better evaluation; empty: never.',
        units=RUN_UNITS,
        optional=True,
    ),
    'max_skipped_updates': Key(
        'Ends the run after this many consecutive updates with a loss or gradient that is not '
        'finite; 0: at the first.',
        0,
    ),
}


def check_config(config: ConfigDict) -> None:
    """Checks that a config has exactly the known keys with allowed values, and locks it.

    Raises: ConfigError if it does not.
    """
    check_values(config)
    _check_curve(config.schedule)
    config.lock()


def check_values(config: ConfigDict) -> None:
    """Checks what can be checked without Keras and TensorFlow, whose import takes seconds.

    Raises: ConfigError.
    """
    defaults = flatten(default.get_config())
    values = flatten(config)
    for key, value in values.items():
        if key in KEYS and KEYS[key].word and value == KEYS[key].word:
            continue
        if key in defaults:
            _check_type(key, value, defaults[key])
        else:
            _check_argument(key, value)
    for key in KEYS:
        if key not in values:
            fix = 'start from configs/default.py and change values, do not remove them'
            raise ConfigError(f'config.{key} is missing', fix, key)
        _check_value(key, values[key], KEYS[key])
    _check_crop_area(values['augment.crop_area'])
    _check_combinations(values)


def _check_argument(key: str, value: Any) -> None:
    """Raises ConfigError unless the key could be an argument of the optimizer or the curve."""
    group, _, name = key.partition('.')
    if group not in ('optimizer', 'schedule') or '.' in name:
        same_name = [known for known in KEYS if known.split('.')[-1] == key.split('.')[-1]]
        hint = did_you_mean(key, KEYS) or did_you_mean(key, same_name, cutoff=0)
        raise ConfigError(
            f'config.{key} does not exist{hint}; configs/default.py lists every key', key=key
        )
    if isinstance(value, str):  # all such arguments are numbers
        hint = did_you_mean(key, KEYS, cutoff=0.9)
        raise ConfigError(f'config.{key}={value!r} must be a number, true or false{hint}', key=key)


def _check_type(key: str, value: Any, default_value: Any) -> None:
    kind = type(default_value)
    if kind is float:
        fits = isinstance(value, (float, int)) and not isinstance(value, bool)
    elif kind is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = isinstance(value, kind)
    if not fits:
        word = KEYS[key].word
        instead = f', or {word!r}' if word else ''
        fix = f'write {TYPES[kind]}, as in {key}={default_value!r}{instead}'
        raise ConfigError(f'config.{key}={value!r} has the wrong type', fix, key)


def _check_value(key: str, value: Any, allowed: Key) -> None:
    if allowed.choices and value not in allowed.choices:
        choices = ', '.join(map(repr, allowed.choices))
        fix = f'--config.{key}={closest_match(value, allowed.choices, cutoff=0)}'
        raise ConfigError(f'config.{key}={value!r} is not one of {choices}', fix, key)
    if allowed.low is not None and not (allowed.word and value == allowed.word):
        _check_bounds(key, value, allowed.low, allowed.high)
    is_absent = allowed.optional and not value
    if allowed.units and not is_absent:
        parse_duration(key, value, allowed.units)


def _check_bounds(key: str, value: float, low: float, high: float | None) -> None:
    is_above = high is not None and value > high
    if math.isfinite(value) and value >= low and not is_above:
        return
    bounds = f'at least {low}' if high is None else f'from {low} to {high:,}'
    raise ConfigError(f'config.{key}={value} is impossible', f'it must be {bounds}', key)


def _check_curve(schedule: ConfigDict) -> None:
    """Raises ConfigError if there is no such curve, or it has no such argument."""
    import schedules  # imports Keras

    _check_value('schedule.name', schedule.name, Key('', choices=schedules.CURVES))
    known = [key.removeprefix('schedule.') for key in KEYS if key.startswith('schedule.')]
    known += schedules.CURVES[schedule.name].__kwdefaults__ or ()
    for name in schedule:
        if name not in known:
            key = f'schedule.{name}'
            hint = did_you_mean(name, known)
            has = f'{schedule.name} has {", ".join(known)}'
            raise ConfigError(f'config.{key} does not exist{hint}; {has}', key=key)


def _check_crop_area(area: Sequence[float]) -> None:
    key = 'augment.crop_area'
    problem = f'config.{key}={tuple(area)!r} is impossible'
    if len(area) != 2 or not all(isinstance(share, (int, float)) for share in area):
        raise ConfigError(problem, 'write two numbers, as in (0.08, 1.0)', key)
    low, high = area
    if not 0 < low <= high <= 1:
        raise ConfigError(problem, 'write two fractions of the image, 0 < low <= high <= 1', key)


def _check_combinations(values: dict) -> None:
    """Raises ConfigError for values that conflict, and for malformed addresses."""
    key = 'progressive.image_size'
    size = values[key]
    if values['progressive.stages'] > 1:
        if size > values['image_size']:
            larger = f'is larger than config.image_size={values["image_size"]}'
            fix = 'write at most config.image_size: images grow from stage to stage'
            raise ConfigError(f'config.{key}={size} {larger}', fix, key)
        if size % 32:
            fix = 'the sizes of stages are multiples of 32'
            raise ConfigError(f'config.{key}={size} is impossible', fix, key)
    key = 'dataset.service'
    if not re.fullmatch(ADDRESSES, values[key]):
        fix = 'write HOST:PORT, and a comma between several'
        raise ConfigError(f'config.{key}={values[key]!r} is not an address', fix, key)
    for key in ('dataset.image_key', 'dataset.label_key'):
        if values[key] and values['dataset.name'] == 'folder':
            problem = f'config.{key}={values[key]!r} names a feature of a TFDS data set'
            raise ConfigError(f'{problem}, and a folder has none', 'leave it empty', key)


def parse_duration(key: str, text: str, units: Collection[str]) -> tuple[Fraction, str]:
    """Parses the value of a key: '90 epochs' is (90, 'epochs').

    Raises: ConfigError if it is not a number with one of `units`, or is not a possible duration.
    """
    match = re.fullmatch(AMOUNT_AND_UNIT, text)
    spelled = {unit: unit for unit in units}
    spelled |= {unit.removesuffix('s'): unit for unit in units}
    if match is None or len(match[1]) > 20 or match[2].lower() not in spelled:
        raise ConfigError(
            f'config.{key}={text!r} is not a valid duration', _how_to_write(text, units), key
        )
    amount, unit = Fraction(re.sub('[_,]', '', match[1])), spelled[match[2].lower()]
    if unit == '%' and amount > 100:
        problem = f'config.{key}={text!r} is more than the whole run'
        raise ConfigError(problem, 'write at most 100%', key)
    impossible = f'config.{key}={text!r} is impossible'
    if unit in ('steps', 'examples') and amount.denominator != 1:
        raise ConfigError(impossible, f'{unit} must be a whole number', key)
    recurs = key.endswith('_every') or key == 'patience'
    if recurs and not amount:
        raise ConfigError(impossible, 'write at least 1 step, or 100% for once at the end', key)
    return amount, unit


def _how_to_write(text: str, units: Collection[str]) -> str:
    """Says how a duration is written, with the number that `text` begins with."""
    number = re.match(r'\s*([0-9][0-9_,.]*)', text)
    amount = number[1].rstrip('.,_') if number else '10'
    *examples, last = (f"'{amount}%'" if unit == '%' else f"'{amount} {unit}'" for unit in units)
    return f'write a number with a unit, {", ".join(examples)} or {last}'
