"""Keras' optimizers by name, with their arguments from the config."""
import difflib
import inspect

import keras

import schedules
from errors import ConfigError

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
FRACTIONS = ('momentum', 'rho', 'beta_1', 'beta_2')
SET_ELSEWHERE = {
    'learning_rate': 'config.schedule.peak_lr',
    'weight_decay': 'config.weight_decay',
    'global_clipnorm': 'config.grad_clip_norm',
    'clipnorm': 'config.grad_clip_norm',
    'use_ema': 'config.ema_decay',
    'ema_momentum': 'config.ema_decay',
}


def build_optimizer(config, schedule_arguments, variables):
    """The optimizer of `config.optimizer`, built for `variables` (call it in the strategy's scope).

    The step sums the gradients over the replicas itself, because clipping must come after the sum and Keras clips
    before it; so the sum inside Keras' `apply` is taken out here.

    Raises: ConfigError for an unknown optimizer or argument.
    """
    arguments = {key: value for key, value in config.optimizer.items() if key != 'name'}
    optimizer_class = _find(config.optimizer.name)
    _check(config.optimizer.name, optimizer_class, arguments)
    try:
        optimizer = optimizer_class(
            learning_rate=schedules.WarmupDecay(**schedule_arguments),
            weight_decay=config.weight_decay,
            **arguments,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f'config.optimizer: {" ".join(str(error).split())}') from error
    if not config.weight_decay:
        optimizer.weight_decay = None  # AdamW takes no None, and 0 would be multiplied out for every variable
    undecayed = [variable for variable in variables if not decays(variable)]
    if undecayed:
        optimizer.exclude_from_weight_decay(var_list=undecayed)
    optimizer.build(variables)
    optimizer._all_reduce_sum_gradients = lambda gradients_and_variables: gradients_and_variables
    return optimizer


def decays(variable):
    """Whether weight decay and L2 apply: to kernels, not to biases and the scales of normalisation layers."""
    return len(variable.shape) > 1


def _find(name):
    if name not in OPTIMIZERS:
        close = difflib.get_close_matches(name, OPTIMIZERS, n=1)
        raise ConfigError(f'config.optimizer.name={name!r} is not one of {", ".join(OPTIMIZERS)}' + (f'; did you mean {close[0]}?' if close else ''))
    return OPTIMIZERS[name]


def _check(name, optimizer_class, arguments):
    known = [key for key in inspect.signature(optimizer_class).parameters if key not in ('name', 'kwargs', *SET_ELSEWHERE)]
    for key, value in arguments.items():
        if key in FRACTIONS and not 0 <= value < 1:
            raise ConfigError(f'config.optimizer.{key}={value} is impossible: it must be from 0 to below 1')
        if key in SET_ELSEWHERE:
            raise ConfigError(f'config.optimizer.{key} is set by {SET_ELSEWHERE[key]}')
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(f'config.optimizer.{key} is no argument of {name}; ' + (f'did you mean {close[0]}?' if close else f'it has {", ".join(known)}'))
