"""Keras' optimizers by name, with their arguments from the config."""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from ml_collections import ConfigDict

import schedules
from common.errors import ConfigError, closest_match, did_you_mean, one_line


class Fused:
    """Updates a variable with one of TensorFlow's operations, where Keras' optimizers take several.

    A subclass says in `update` which, and in `numbers` what it needs besides, tensors [] that are
    the same for all variables of a dtype.
    """

    weight_decay: float | None
    iterations: keras.Variable

    @property
    def is_fused(self) -> bool:
        """Whether there is such an operation for these settings."""
        return True

    def numbers(self, dtype: str, learning_rate: tf.Tensor) -> dict[str, tf.Tensor]:
        raise NotImplementedError

    def update(self, gradient: tf.Tensor, variable: Any, numbers: dict[str, tf.Tensor]) -> None:
        raise NotImplementedError

    def update_step(self, gradient: tf.Tensor, variable: Any, learning_rate: tf.Tensor) -> None:
        if not self.is_fused:
            super().update_step(gradient, variable, learning_rate)  # type: ignore[misc]
            return
        numbers = self.numbers(variable.dtype, tf.cast(learning_rate, variable.dtype))
        self.update(tf.cast(gradient, variable.dtype), variable, numbers)

    def apply_alone(
        self, gradients: Sequence[tf.Tensor], variables: Sequence[Any], learning_rate: tf.Tensor
    ) -> None:
        """Does what `apply` does for a single replica, in far fewer operations."""
        dtypes = {variable.dtype for variable in variables}
        numbers = {d: self.numbers(d, tf.cast(learning_rate, d)) for d in dtypes}
        decay = self.weight_decay or 0.0
        shrinking = {d: numbers[d]['lr'] * keras.ops.cast(decay, d) for d in dtypes}
        for gradient, variable in zip(gradients, variables, strict=True):
            if self.weight_decay and self._use_weight_decay(variable):  # type: ignore[attr-defined]
                subtract(variable, shrinking[variable.dtype], tf.convert_to_tensor(variable))
            self.update(tf.cast(gradient, variable.dtype), variable, numbers[variable.dtype])
        self.iterations.assign_add(1)


class FusedSGD(Fused, keras.optimizers.SGD):
    def numbers(self, dtype: str, learning_rate: tf.Tensor) -> dict[str, tf.Tensor]:
        return {'lr': learning_rate, 'momentum': keras.ops.cast(self.momentum, dtype)}

    def update(self, gradient: tf.Tensor, variable: Any, numbers: dict[str, tf.Tensor]) -> None:
        if not self.momentum:
            subtract(variable, numbers['lr'], gradient)
            return
        tf.raw_ops.ResourceApplyKerasMomentum(
            var=_handle(variable),
            accum=_handle(self.momentums[self._get_variable_index(variable)]),
            grad=gradient,
            use_nesterov=self.nesterov,
            **numbers,
        )


class FusedRMSprop(Fused, keras.optimizers.RMSprop):
    @property
    def is_fused(self) -> bool:
        return bool(self.momentum) and not self.centered

    def numbers(self, dtype: str, learning_rate: tf.Tensor) -> dict[str, tf.Tensor]:
        settings = {'rho': self.rho, 'momentum': self.momentum, 'epsilon': self.epsilon}
        constants = {name: tf.constant(value, dtype) for name, value in settings.items()}
        return {'lr': learning_rate, **constants}

    def update(self, gradient: tf.Tensor, variable: Any, numbers: dict[str, tf.Tensor]) -> None:
        index = self._get_variable_index(variable)
        tf.raw_ops.ResourceApplyRMSProp(
            var=_handle(variable),
            ms=_handle(self._velocities[index]),
            mom=_handle(self._momentums[index]),
            grad=gradient,
            **numbers,
        )


class FusedAdam(Fused, keras.optimizers.Adam):
    @property
    def is_fused(self) -> bool:
        return not self.amsgrad

    def numbers(self, dtype: str, learning_rate: tf.Tensor) -> dict[str, tf.Tensor]:
        settings = {'beta1': self.beta_1, 'beta2': self.beta_2, 'epsilon': self.epsilon}
        constants = {name: tf.constant(value, dtype) for name, value in settings.items()}
        step = tf.cast(self.iterations + 1, dtype)
        return {
            'lr': learning_rate,
            'beta1_power': keras.ops.cast(self.beta_1, dtype) ** step,
            'beta2_power': keras.ops.cast(self.beta_2, dtype) ** step,
            **constants,
        }

    def update(self, gradient: tf.Tensor, variable: Any, numbers: dict[str, tf.Tensor]) -> None:
        index = self._get_variable_index(variable)
        tf.raw_ops.ResourceApplyAdam(
            var=_handle(variable),
            m=_handle(self._momentums[index]),
            v=_handle(self._velocities[index]),
            grad=gradient,
            **numbers,
        )


class FusedAdamW(FusedAdam, keras.optimizers.AdamW):
    pass


def subtract(variable: Any, factor: tf.Tensor, value: tf.Tensor) -> None:
    """Subtracts factor [] times `value` from a variable, in one pass."""
    tf.raw_ops.ResourceApplyGradientDescent(var=_handle(variable), alpha=factor, delta=value)


def _handle(variable: Any) -> tf.Tensor:
    """Returns the resource of a Keras or TensorFlow variable, on the device of this update."""
    value = variable.value if isinstance(variable, keras.Variable) else variable
    graph = tf.compat.v1.get_default_graph()
    is_in_graph = not tf.executing_eagerly()
    if is_in_graph and not isinstance(value, tf.distribute.DistributedValues):
        graph.watch_variable(value)  # as a read does: a function lists its variables by that
    return value.handle


OPTIMIZERS = {
    'sgd': FusedSGD,
    'rmsprop': FusedRMSprop,
    'adam': FusedAdam,
    'adamw': FusedAdamW,
    'lamb': keras.optimizers.Lamb,
    'lion': keras.optimizers.Lion,
    'adafactor': keras.optimizers.Adafactor,
    'muon': keras.optimizers.Muon,
}
if tuple(map(int, keras.__version__.split('.')[:2])) < (
    3,
    13,
):  # 3.12 is the newest for Python 3.10
    # Muon fails there: it reads the path of plain TensorFlow variables, which have none.
    del OPTIMIZERS['muon']
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
UNSUPPORTED = {  # name: (why, what to do)
    'clipvalue': (
        'clips before the gradients of the replicas are summed',
        'use config.grad_clip_norm',
    ),
    'gradient_accumulation_steps': (
        'makes the schedule count micro-batches as updates',
        'use config.accumulate_steps',
    ),
}


def build_optimizer(
    config: ConfigDict, schedule_arguments: dict[str, Any], variables: Sequence[keras.Variable]
) -> keras.optimizers.Optimizer:
    """Builds the optimizer of `config.optimizer` for `variables`, in the strategy's scope.

    The step sums the gradients over the replicas itself, because clipping must come after the sum
    and Keras clips before it; so the sum inside Keras' `apply` is disabled here.

    Raises: ConfigError for an unknown optimizer or argument.
    """
    name = config.optimizer.name
    arguments = {key: value for key, value in config.optimizer.items() if key != 'name'}
    check_optimizer(name, arguments)
    if name == 'muon':
        if keras.config.dtype_policy().variable_dtype == 'float64':
            raise ConfigError(
                "config.optimizer.name='muon' cannot compute in float64, as Keras converts to "
                'float32 inside it',
                'write another config.precision',
                'precision',
            )
        # For what Muon leaves to AdamW: all but the dense kernels.
        arguments['adam_weight_decay'] = config.weight_decay or None
    try:
        optimizer = OPTIMIZERS[name](
            learning_rate=schedules.WarmupDecay(**schedule_arguments),
            weight_decay=config.weight_decay,
            **arguments,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f'config.optimizer: {one_line(error)}', key='optimizer') from error
    if not config.weight_decay:
        # AdamW does not accept None, and 0 would still cost a multiplication per variable.
        optimizer.weight_decay = None
    undecayed = [variable for variable in variables if not decays(variable)]
    if undecayed:
        optimizer.exclude_from_weight_decay(var_list=undecayed)
    optimizer.build(variables)
    optimizer._all_reduce_sum_gradients = lambda gradients_and_variables: gradients_and_variables
    return optimizer


@contextlib.contextmanager
def fixed_rate(
    optimizer: keras.optimizers.Optimizer,
    learning_rate: Any,
    schedule: keras.optimizers.schedules.LearningRateSchedule,
) -> Iterator[None]:
    """Makes `optimizer` use a tensor during the block, and `schedule` again after it.

    With a schedule Keras computes the rate for each variable that decays, at thirty operations
    each. `schedule` is an argument because replicas take turns inside the block.
    """
    optimizer.learning_rate = lambda: learning_rate
    try:
        yield
    finally:
        optimizer.learning_rate = schedule


def shift_schedule(
    optimizer: keras.optimizers.Optimizer, schedule_arguments: dict, updates: int
) -> None:
    """Moves the schedule of `optimizer` ahead of its `iterations` by `updates`.

    Call it before the step is traced. `iterations` remains the number of updates made: it corrects
    the bias of Adam's averages and seeds dropout masks.
    """
    optimizer.learning_rate = Shifted(schedules.WarmupDecay(**schedule_arguments), updates)


class Shifted(keras.optimizers.schedules.LearningRateSchedule):
    """Returns the rate that `schedule` has `updates` later."""

    def __init__(self, schedule: keras.optimizers.schedules.LearningRateSchedule, updates: int):
        super().__init__()
        self.schedule, self.updates = schedule, updates

    def __call__(self, step: Any) -> Any:
        return self.schedule(keras.ops.cast(step, 'int64') + self.updates)

    def get_config(self) -> dict[str, Any]:
        return {'schedule': self.schedule, 'updates': self.updates}


def decays(variable: keras.Variable) -> bool:
    """Returns whether weight decay and L2 apply.

    They apply to kernels, not to biases or the scales of normalisation layers.
    """
    return len(variable.shape) > 1


def check_optimizer(name: str, arguments: dict[str, Any]) -> None:
    """Raises ConfigError for an unknown optimizer or argument, or one that is set elsewhere."""
    if name not in OPTIMIZERS:
        raise ConfigError(
            f'config.optimizer.name={name!r} is not one of {", ".join(OPTIMIZERS)}',
            f'--config.optimizer.name={closest_match(name, OPTIMIZERS, cutoff=0)}',
            'optimizer.name',
        )
    excluded = ('name', 'kwargs', *SET_ELSEWHERE, *UNSUPPORTED)
    parameters = inspect.signature(OPTIMIZERS[name]).parameters
    known = [key for key in parameters if key not in excluded]
    for argument, value in arguments.items():
        key = f'optimizer.{argument}'
        if argument in SET_ELSEWHERE:
            raise ConfigError(f'config.{key} is set by {SET_ELSEWHERE[argument]}', key=key)
        if argument in UNSUPPORTED:
            reason, fix = UNSUPPORTED[argument]
            raise ConfigError(f'config.{key} {reason}', fix, key)
        if argument not in known:
            hint = did_you_mean(argument, known) or f'; it has {", ".join(known)}'
            raise ConfigError(f'config.{key} is not an argument of {name}{hint}', key=key)
        is_number = isinstance(value, (bool, int, float))
        if not is_number and argument != 'exclude_layers':  # of muon, a list of names
            raise ConfigError(f'config.{key}={value!r} must be a number, true or false', key=key)
        if argument in FRACTIONS and not 0 <= value < 1:
            raise ConfigError(
                f'config.{key}={value} is out of range', 'it must be at least 0 and below 1', key
            )
