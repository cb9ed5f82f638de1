"""Keras' optimizers by name, with their arguments from the config."""

import inspect

import keras

import schedules
from common.errors import ConfigError, did_you_mean, one_line

OPTIMIZERS = {
    'sgd': keras.optimizers.SGD,
    'rmsprop': keras.optimizers.RMSprop,
    'adam': keras.optimizers.Adam,
    'adamw': keras.optimizers.AdamW,
    'lamb': keras.optimizers.Lamb,
    'lion': keras.optimizers.Lion,
    'adafactor': keras.optimizers.Adafactor,
    'muon': keras.optimizers.Muon,
}
if tuple(map(int, keras.__version__.split('.')[:2])) < (3, 13):  # all that Python 3.10 gets
    del OPTIMIZERS[
        'muon'
    ]  # fails there: it looks for the path of TensorFlow's own variables, which have none
FRACTIONS = ('momentum', 'rho', 'beta_1', 'beta_2')
SET_ELSEWHERE = {
    'learning_rate': 'config.schedule.peak_lr',
    'weight_decay': 'config.weight_decay',
    'global_clipnorm': 'config.grad_clip_norm',
    'clipnorm': 'config.grad_clip_norm',
    'use_ema': 'config.ema_decay',
    'ema_momentum': 'config.ema_decay',
    'ema_overwrite_frequency': 'config.ema_decay',
    'adam_weight_decay': 'config.weight_decay',
    'loss_scale_factor': "config.precision, whose 'float16' scales the loss",
}
UNSUPPORTED = {
    'clipvalue': 'clips before the gradients of the replicas are summed: use config.grad_clip_norm',
    'gradient_accumulation_steps': 'makes the schedule count parts of updates: use config.accumulate_steps',
}


def build_optimizer(config, schedule_arguments, variables):
    """The optimizer of `config.optimizer`, built for `variables` (call it in the strategy's scope).

    The step sums the gradients over the replicas itself, because clipping must come after the sum and Keras clips
    before it; so the sum inside Keras' `apply` is taken out here.

    Raises: ConfigError for an unknown optimizer or argument.
    """
    arguments = {key: value for key, value in config.optimizer.items() if key != 'name'}
    check_optimizer(config.optimizer.name, arguments)
    optimizer_class = OPTIMIZERS[config.optimizer.name]
    if config.optimizer.name == 'muon' and keras.config.dtype_policy().variable_dtype == 'float64':
        raise ConfigError(
            "config.optimizer.name='muon' cannot compute in float64: Keras multiplies with float32 inside; write another config.precision"
        )
    if config.optimizer.name == 'muon':
        arguments['adam_weight_decay'] = (
            config.weight_decay or None
        )  # what Muon gives to AdamW: all but the dense kernels
    try:
        optimizer = optimizer_class(
            learning_rate=schedules.WarmupDecay(**schedule_arguments),
            weight_decay=config.weight_decay,
            **arguments,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f'config.optimizer: {one_line(error)}') from error
    if not config.weight_decay:
        optimizer.weight_decay = (
            None  # AdamW takes no None, and 0 would be multiplied out for every variable
        )
    undecayed = [variable for variable in variables if not decays(variable)]
    if undecayed:
        optimizer.exclude_from_weight_decay(var_list=undecayed)
    optimizer.build(variables)
    optimizer._all_reduce_sum_gradients = lambda gradients_and_variables: gradients_and_variables
    return optimizer


def shift_schedule(
    optimizer: keras.optimizers.Optimizer, schedule_arguments: dict, updates: int
) -> None:
    """Puts the schedule of `optimizer` so many updates ahead of its `iterations`.

    Call it before the step is traced. `iterations` stay the number of updates that were made: they
    correct the bias of Adam's averages and draw the masks of dropout.
    """
    optimizer.learning_rate = Shifted(schedules.WarmupDecay(**schedule_arguments), updates)


class Shifted(keras.optimizers.schedules.LearningRateSchedule):
    """The rate that `schedule` has `updates` further on."""

    def __init__(self, schedule: keras.optimizers.schedules.LearningRateSchedule, updates: int):
        super().__init__()
        self.schedule, self.updates = schedule, updates

    def __call__(self, step):
        return self.schedule(keras.ops.cast(step, 'int64') + self.updates)

    def get_config(self):
        return {'schedule': self.schedule, 'updates': self.updates}


def decays(variable):
    """Whether weight decay and L2 apply: to kernels, not to biases and the scales of normalisation layers."""
    return len(variable.shape) > 1


def check_optimizer(name, arguments):
    """Raises ConfigError for an optimizer or an argument that is not there, or that the config sets elsewhere."""
    if name not in OPTIMIZERS:
        raise ConfigError(
            f'config.optimizer.name={name!r} is not one of {", ".join(OPTIMIZERS)}{did_you_mean(name, OPTIMIZERS)}'
        )
    known = [
        key
        for key in inspect.signature(OPTIMIZERS[name]).parameters
        if key not in ('name', 'kwargs', *SET_ELSEWHERE, *UNSUPPORTED)
    ]
    for key, value in arguments.items():
        if key in SET_ELSEWHERE:
            raise ConfigError(f'config.optimizer.{key} is set by {SET_ELSEWHERE[key]}')
        if key in UNSUPPORTED:
            raise ConfigError(f'config.optimizer.{key} {UNSUPPORTED[key]}')
        if key not in known:
            raise ConfigError(
                f'config.optimizer.{key} is no argument of {name}'
                + (did_you_mean(key, known) or f'; it has {", ".join(known)}')
            )
        if (
            not isinstance(value, (bool, int, float)) and key != 'exclude_layers'
        ):  # of muon, a list of names
            raise ConfigError(f'config.optimizer.{key}={value!r} must be a number, true or false')
        if key in FRACTIONS and not 0 <= value < 1:
            raise ConfigError(
                f'config.optimizer.{key}={value} is impossible: it must be from 0 to below 1'
            )
