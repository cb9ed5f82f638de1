"""Learning-rate schedules: warmup, an optional hold, then a curve down to `end_lr`.

Let `W = warmup_steps`, `H = hold`, `T = total_steps`, and `t` the 0-based index of the update:

    t < W              start_lr + (target_lr - start_lr) * t / W
    W <= t <= W + H    target_lr
    W + H < t < T      the curve; the cosine is
                       end_lr + (target_lr - end_lr) * (1 + cos(pi * (t - W - H) / (T - W - H))) / 2
    t >= T             end_lr; but target_lr on the constant curve, and at t = T = W + H

`CURVES` maps names to curve functions, whose docstrings give their formulas and arguments. Each
formula is written once, in terms of `xp`: `numpy` (float64) or `keras.ops` (float32 regardless of
`keras.config.floatx()`, also inside a compiled step). The schedules come in three forms:
`learning_rate`, a function; `WarmupDecay`, for an optimizer; and `WarmupDecayCallback`, for
`model.fit`.
"""

import difflib
import itertools
import math
import reprlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import keras
import numpy as np


def learning_rate(
    step: Any,
    *,
    curve: str = 'cosine',
    warmup_steps: Any,
    total_steps: Any,
    hold: Any = 0,
    start_lr: Any = 0.0,
    target_lr: Any,
    end_lr: Any = 0.0,
    **curve_arguments: Any,
) -> Any:
    """Returns the learning rate of update `step`.

    Args:
        step: 0-based index of the update: a whole number, an array or list of whole numbers, or an
            integer tensor or variable (of any shape, also inside a `tf.function` with
            `jit_compile=True`).
        curve: what follows warmup and hold, a name in `CURVES`; `curve_arguments` are that curve's
            own arguments.
        warmup_steps, hold, total_steps: in updates; `total_steps` includes warmup and hold. All
            numbers may also be scalar arrays, tensors or variables, such as `ds.cardinality()`,
            whose value is read once.
        start_lr, target_lr, end_lr: the rate of update 0, the peak, and the rate past the last
            update.

    Returns: a float for a number, a float64 array for an array, a float32 tensor for a tensor; with
        the shape of `step`.

    Raises:
        ValueError: an argument or step is out of range. Values of a tensor cannot be checked: a
            negative step counts as 0 and a fraction is truncated.
    """
    arguments = _checked_arguments(
        curve, warmup_steps, total_steps, hold, start_lr, target_lr, end_lr, curve_arguments
    )
    if _is_tensor(step):
        return _rate(keras.ops, keras.ops.cast(step, 'int64'), arguments)
    rates = _rate(np, _checked_steps(step), arguments)
    return float(rates) if rates.ndim == 0 else rates


def lr_warmup_cosine_decay(
    global_step: Any,
    warmup_steps: Any,
    hold: Any,
    total_steps: Any,
    start_lr: Any = 0.0,
    target_lr: Any = 1e-3,
    end_lr: Any = 0.0,
) -> Any:
    """Returns the rate of linear warmup, hold and cosine decay.

    The same as `learning_rate`, with the arguments in their customary order.
    """
    return learning_rate(
        global_step,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        hold=hold,
        start_lr=start_lr,
        target_lr=target_lr,
        end_lr=end_lr,
    )


@keras.saving.register_keras_serializable(package='warmstart')
class WarmupDecay(keras.optimizers.schedules.LearningRateSchedule):
    """`learning_rate` for an optimizer, as in `keras.optimizers.SGD(WarmupDecay(...))`.

    It has the same arguments.

    Set `gradient_accumulation_steps` to the optimizer's argument of that name. Such an optimizer
    calls its schedule with the number of batches seen, which is divided by it, so that steps count
    updates.

    A saved model holds the schedule with all its arguments. Loading the model restores exactly that
    curve, however long the run that continues; for another curve, compile the model with a new
    schedule.

    A schedule knows only the optimizer's step count. If weights are restored with a new optimizer,
    warmup starts over; past `total_steps` the rate is `end_lr`. The callback warns about both; a
    schedule cannot.

    The rate is float32, and an optimizer casts it to the dtype of each variable. With float16
    variables, as created under `keras.config.set_floatx('float16')`, rates below 3e-8 become 0. The
    policy 'mixed_float16' keeps variables in float32.
    """

    def __init__(
        self,
        *,
        curve: str = 'cosine',
        warmup_steps: Any,
        total_steps: Any,
        hold: Any = 0,
        start_lr: Any = 0.0,
        target_lr: Any,
        end_lr: Any = 0.0,
        gradient_accumulation_steps: Any = 1,
        **curve_arguments: Any,
    ):
        super().__init__()
        self.arguments = _checked_arguments(
            curve, warmup_steps, total_steps, hold, start_lr, target_lr, end_lr, curve_arguments
        )
        # Keras optimizers use None for no accumulation.
        batches = 1 if gradient_accumulation_steps is None else gradient_accumulation_steps
        self.gradient_accumulation_steps = _whole('gradient_accumulation_steps', batches, low=1)

    def __call__(self, step: Any) -> Any:
        """Returns the rate at `step`, an integer tensor, variable or number, in float32."""
        return _rate(
            keras.ops,
            keras.ops.cast(step, 'int64') // self.gradient_accumulation_steps,
            self.arguments,
        )

    def get_config(self) -> dict[str, Any]:
        config = self.arguments._asdict()
        curve_arguments = config.pop('curve_arguments')
        return {
            **config,
            'gradient_accumulation_steps': self.gradient_accumulation_steps,
            **curve_arguments,
        }


@keras.saving.register_keras_serializable(package='warmstart')
class WarmupCosineDecay(WarmupDecay):
    """`WarmupDecay` with the cosine, and its arguments in the customary order."""

    def __init__(
        self,
        start_lr: Any,
        target_lr: Any,
        warmup_steps: Any,
        total_steps: Any,
        hold: Any = 0,
        end_lr: Any = 0.0,
        gradient_accumulation_steps: Any = 1,
    ):
        super().__init__(
            start_lr=start_lr,
            target_lr=target_lr,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
            hold=hold,
            end_lr=end_lr,
            gradient_accumulation_steps=gradient_accumulation_steps,
        )

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config['curve']
        return config


class WarmupDecayCallback(keras.callbacks.Callback):
    """Sets the optimizer's rate before each batch of `model.fit`: `learning_rate` as a callback.

    The arguments are those of `WarmupDecay`. With `total_steps=None` there is no decay: after
    warmup and hold the callback leaves the rate alone. The step is the optimizer's count of
    updates, so a run with a restored optimizer continues along the curve, and batches accumulated
    into one update share a step. At the end of an epoch `logs['learning_rate']` is the rate in use,
    for `History` and other callbacks.

    Attributes:
        lrs: the rates used, one per call before a batch. With `steps_per_execution=n` that is every
            n batches, and the rate changes only then.
        factor: how other callbacks, such as `ReduceLROnPlateau`, have scaled the planned rate; 1.0
            at first. Their changes to the rate persist as a factor on the rest of the curve, except
            where the planned rate is 0, because no factor can be inferred there. It can be read at
            any time and reflects all changes so far. Neither a saved model nor
            `keras.callbacks.BackupAndRestore` stores it: to continue in a new process, save it at
            the end of each epoch, after the callbacks that change the rate, and set it before
            `fit`.

    If the optimizer has made no update by the first batch of a `fit`, a new run begins, with empty
    `lrs` and a factor of 1.0. By then every callback has restored its state, whatever the order of
    the callbacks.

    Raises ValueError as `learning_rate` does, and when training begins with an optimizer whose
    learning rate is a schedule.

    Warns once per `fit`, with advice, when
        - `fit` begins in a later epoch but the optimizer has made no update: the schedule starts
          over;
        - `fit` begins past `total_steps`, or reaches it and `end_lr` is 0;
        - the optimizer's rate differs from the planned one, as when `factor` was not carried over:
          the planned rate replaces it;
        - the optimizer's rate is a float16 variable, which cannot hold the planned rate.
    """

    def __init__(
        self,
        *,
        curve: str = 'cosine',
        warmup_steps: Any,
        total_steps: Any = None,
        hold: Any = 0,
        start_lr: Any = 0.0,
        target_lr: Any,
        end_lr: Any = 0.0,
        **curve_arguments: Any,
    ):
        super().__init__()
        self._decays = total_steps is not None
        if not self._decays:
            if curve != 'cosine' or curve_arguments:
                raise ValueError(
                    f'without total_steps there is no decay, so curve={curve!r} would not be used: '
                    'write total_steps'
                )
            total_steps = max(1, _whole('warmup_steps', warmup_steps) + _whole('hold', hold))
        self._arguments = _checked_arguments(
            curve if self._decays else 'constant',
            warmup_steps,
            total_steps,
            hold,
            start_lr,
            target_lr,
            end_lr,
            curve_arguments,
        )
        self.lrs: list[float] = []
        self._factor = 1.0
        # The last planned rate, the last rate set, and the optimizer it was set on.
        self._last_planned_lr: float | None = None
        self._last_set_lr: float | None = None
        self._optimizer: keras.optimizers.Optimizer | None = None
        self._first_epoch: int | None = 0
        self._at_first_batch = True
        self._warned: set[str] = set()

    @property
    def factor(self) -> float:
        self._absorb_rate_change()
        return self._factor

    @factor.setter
    def factor(self, factor: float) -> None:
        self._absorb_rate_change()
        self._factor = factor

    def on_train_begin(self, logs: dict | None = None) -> None:
        # A settable rate is a variable; a schedule yields a tensor.
        if not isinstance(self.model.optimizer.learning_rate, keras.Variable):
            raise ValueError(
                "the optimizer's learning rate is a schedule, which this callback cannot set: "
                'compile with a number, as in learning_rate=0.1, or leave the callback out'
            )
        # Changes between two calls of `fit` were not made by callbacks.
        self._last_planned_lr = self._last_set_lr = None
        self._first_epoch, self._at_first_batch = None, True
        self._warned = set()

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        if self._first_epoch is None:
            self._first_epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        self._absorb_rate_change()
        self._optimizer = optimizer = self.model.optimizer
        step = int(_to_numpy(optimizer.iterations))
        if self._at_first_batch:
            self._begin_fit(optimizer, step)
        if self._decays or step <= self._arguments.decay_begins:
            self._last_planned_lr = float(_rate(np, np.int64(step), self._arguments))
            optimizer.learning_rate = self._last_planned_lr * self._factor
        else:
            self._last_planned_lr = None
        # Read back: the variable holds the float32 nearest to what was written.
        self._last_set_lr = float(_to_numpy(optimizer.learning_rate))
        self.lrs.append(self._last_set_lr)
        self._warn_of_rounding(optimizer)
        self._warn_of_end(step)
        self._at_first_batch = False

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if logs is not None:
            logs['learning_rate'] = float(_to_numpy(self.model.optimizer.learning_rate))

    def on_train_end(self, logs: dict | None = None) -> None:
        # Other callbacks may have changed the rate at the end of the last epoch.
        self._absorb_rate_change()
        self._last_planned_lr = None

    def _begin_fit(self, optimizer: keras.optimizers.Optimizer, step: int) -> None:
        """Decides, before the first batch of a `fit`, whether a run begins or continues."""
        if step > 0 or _has_seen_batches(optimizer):
            self._warn_of_lost_factor(optimizer, step)
            return
        self.lrs, self._factor = [], 1.0
        if self._first_epoch:
            self._warn_of_start_over(optimizer)

    def _warn_of_start_over(self, optimizer: keras.optimizers.Optimizer) -> None:
        remedy = 'restore the optimizer too, as keras.models.load_model does'
        if isinstance(optimizer.iterations, keras.Variable):
            remedy += ', or before fit set model.optimizer.iterations.assign(UPDATES)'
        self._warn(
            'start',
            f'training begins with initial_epoch={self._first_epoch}, but the optimizer has made '
            f'no update, so the schedule starts over at update 0: {remedy}',
        )

    def _warn_of_lost_factor(self, optimizer: keras.optimizers.Optimizer, step: int) -> None:
        """Warns if the restored rate implies a factor that was not carried over."""
        is_planned = self._decays or step <= self._arguments.decay_begins
        if self._factor != 1.0 or step == 0 or not is_planned:
            return
        # The rate was last set before one of these steps, or before `step` itself if gradients are
        # accumulated.
        steps_per_execution = getattr(self.model, 'steps_per_execution', 1)
        steps = np.arange(max(0, step - steps_per_execution), step + 1)
        planned = _rate(np, steps, self._arguments)
        rate = float(_to_numpy(optimizer.learning_rate))
        if planned[-2] == 0.0 or np.isclose(rate, planned, rtol=0.01, atol=0.0).any():
            return
        factor = rate / planned[-2]
        self._warn(
            'factor',
            f'before update {step} the optimizer has a learning rate of {rate:.4g}, {factor:.4g} '
            'times the planned one, which replaces it: if another callback changed the rate, set '
            f'{type(self).__name__}.factor = {factor:.4g} before fit',
        )

    def _warn_of_rounding(self, optimizer: keras.optimizers.Optimizer) -> None:
        wanted = None if self._last_planned_lr is None else self._last_planned_lr * self._factor
        if (
            wanted is None
            or self._last_set_lr is None
            or math.isclose(self._last_set_lr, wanted, rel_tol=0.01)
        ):
            return
        dtype = keras.backend.standardize_dtype(optimizer.learning_rate.dtype)
        self._warn(
            'rounding',
            f'the optimizer keeps its learning rate in {dtype}, which turns {wanted:.4g} into '
            f'{self._last_set_lr:.4g}: create the optimizer with keras.config.floatx() at '
            "'float32'; for computing in float16 there is "
            "keras.config.set_dtype_policy('mixed_float16')",
        )

    def _warn_of_end(self, step: int) -> None:
        a = self._arguments
        is_past = self._decays and step >= a.total_steps and self._last_planned_lr == a.end_lr
        if is_past and (self._at_first_batch or a.end_lr == 0.0):
            self._warn(
                'end',
                f'{step} updates are done and total_steps={a.total_steps}, so the learning rate '
                f'stays at end_lr={a.end_lr:g}: write a larger total_steps, or train no further',
            )

    def _warn(self, subject: str, message: str) -> None:
        """Warns about each subject once per `fit`."""
        if subject not in self._warned:
            self._warned.add(subject)
            warnings.warn(message, stacklevel=2)

    def _absorb_rate_change(self) -> None:
        if not self._last_planned_lr or self.model.optimizer is not self._optimizer:
            return
        rate = float(_to_numpy(self._optimizer.learning_rate))
        if rate != self._last_set_lr:
            # The change is relative to the rate that was set, which in float16 differs from the
            # planned one.
            if self._last_set_lr:
                self._factor *= rate / self._last_set_lr
            else:
                self._factor = rate / self._last_planned_lr
            self._last_set_lr = rate


class WarmupCosineDecayCallback(WarmupDecayCallback):
    """`WarmupDecayCallback` with the cosine, and its arguments in the customary order."""

    def __init__(
        self,
        start_lr: Any,
        target_lr: Any,
        warmup_steps: Any,
        total_steps: Any = None,
        hold: Any = 0,
        end_lr: Any = 0.0,
    ):
        super().__init__(
            start_lr=start_lr,
            target_lr=target_lr,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
            hold=hold,
            end_lr=end_lr,
        )


class _Arguments(NamedTuple):
    """Validated arguments: steps as int, rates as float, and all arguments of the curve."""

    curve: str
    warmup_steps: int
    total_steps: int
    hold: int
    start_lr: float
    target_lr: float
    end_lr: float
    curve_arguments: dict

    @property
    def decay_begins(self) -> int:
        return self.warmup_steps + self.hold

    @property
    def decay_steps(self) -> int:
        return self.total_steps - self.decay_begins


def _rate(xp: Any, step: Any, a: _Arguments) -> Any:
    """Returns the rate of an int64 `step`; `xp` is `numpy` or `keras.ops`."""
    step = xp.maximum(step, 0)
    warming = a.start_lr + (a.target_lr - a.start_lr) * _ratio(xp, step, a.warmup_steps)
    target_lr, end_lr = _float(xp, a.target_lr), _float(xp, a.end_lr)
    decaying = end_lr
    if a.decay_steps > 0:
        # Clipped because `where` evaluates both branches for every step.
        s = xp.clip(step - a.decay_begins, 0, a.decay_steps)
        decaying = CURVES[a.curve](xp, s, a, **a.curve_arguments)
    decaying = xp.where(step < a.total_steps, decaying, end_lr)
    after_warmup = xp.where(step <= a.decay_begins, target_lr, decaying)
    return xp.where(step < a.warmup_steps, warming, after_warmup)


def _float(xp: Any, values: Any) -> Any:
    """Converts to float64 or float32; `keras.ops` alone would use `keras.config.floatx()`."""
    return xp.array(values, dtype='float64' if xp is np else 'float32')


def _ratio(xp: Any, steps: Any, of: int) -> Any:
    """Returns `steps / of` as a float.

    Callers subtract steps first, as integers, so that nothing is lost to rounding.
    """
    return _float(xp, steps) / float(max(of, 1))


def _interpolate(a: _Arguments, share: Any) -> Any:
    """Interpolates linearly: fraction 1 gives target_lr, 0 gives end_lr."""
    return a.end_lr + (a.target_lr - a.end_lr) * share


# The curves. `s` counts the steps since warmup and hold, up to n = a.decay_steps; after that the
# rate is end_lr. In the docstrings, between(x) means end_lr + (target_lr - end_lr) * x. An argument
# in steps that is below 1 is a fraction of total_steps.


def _cosine(xp: Any, s: Any, a: _Arguments) -> Any:
    """between((1 + cos(pi * s / n)) / 2), one cycle.

    Loshchilov and Hutter, SGDR, arXiv:1608.03983.
    """
    return _interpolate(a, 0.5 * (1.0 + xp.cos(math.pi * _ratio(xp, s, a.decay_steps))))


def _constant(xp: Any, s: Any, a: _Arguments) -> Any:
    """Returns target_lr, even past the last step."""
    return _float(xp, a.target_lr)


def _linear(xp: Any, s: Any, a: _Arguments) -> Any:
    """between((n - s) / n)."""
    return _interpolate(a, _ratio(xp, a.decay_steps - s, a.decay_steps))


def _polynomial(xp: Any, s: Any, a: _Arguments, *, power: float = 2.0) -> Any:
    """between(((n - s) / n) ** power); the default is LARS' (You et al., arXiv:1708.03888)."""
    return _interpolate(
        a, xp.power(_ratio(xp, a.decay_steps - s, a.decay_steps), _number('power', power))
    )


def _exponential(xp: Any, s: Any, a: _Arguments, *, decay: float = 0.01) -> Any:
    """max(end_lr, target_lr * decay ** (s / n)).

    `decay` is the fraction of target_lr that is left at the end. With end_lr = 0 this equals Keras'
    ExponentialDecay(target_lr, decay_steps=n, decay_rate=decay).
    """
    decay = _number('decay', decay, high=1.0)
    return xp.maximum(a.target_lr * xp.power(decay, _ratio(xp, s, a.decay_steps)), a.end_lr)


def _piecewise(
    xp: Any,
    s: Any,
    a: _Arguments,
    *,
    boundaries: Any = (1 / 3, 2 / 3, 8 / 9),
    factors: Any = (0.1, 0.01, 0.001),
) -> Any:
    """max(end_lr, target_lr * factors[i]) from step boundaries[i] of the run on, target_lr before.

    The defaults match epochs 30, 60 and 80 of the 90 in Goyal et al., arXiv:1706.02677.
    """
    boundaries, factors = np.atleast_1d(boundaries).tolist(), np.atleast_1d(factors).tolist()
    steps = [_steps('boundaries', boundary, a.total_steps) for boundary in boundaries]
    if len(boundaries) != len(factors):
        raise ValueError(
            f'there are {len(boundaries)} boundaries but {len(factors)} factors: write one factor '
            'per boundary'
        )
    if sorted(steps) != steps or not all(a.decay_begins < step <= a.total_steps for step in steps):
        raise ValueError(
            f'boundaries={boundaries} are the steps {steps}: write them in increasing order, '
            f'after warmup and hold ({a.decay_begins}) and up to total_steps ({a.total_steps})'
        )
    rate = _float(xp, a.target_lr)
    for step, factor in zip(steps, factors, strict=True):
        lowered = max(a.end_lr, a.target_lr * _number('factors', factor, high=1.0))
        rate = xp.where(s >= step - a.decay_begins, _float(xp, lowered), rate)
    return rate


def _triangular(
    xp: Any,
    s: Any,
    a: _Arguments,
    *,
    cycles: int = 4,
    cycle_decay: float = 1.0,
) -> Any:
    """between(cycle_decay ** k * |1 - x mod 2|), where x = (2 * cycles - 1) * s / n.

    k = floor((x + 1) / 2). Warmup climbs to the first of `cycles` peaks; straight lines fall to
    end_lr and rise to peak k = 1, 2, ...; the last one falls to end_lr. From Smith,
    arXiv:1506.01186, whose "triangular2" is cycle_decay = 0.5.
    """
    n = a.decay_steps
    travelled = s * (2 * _whole('cycles', cycles, low=1) - 1)
    line, on_line = travelled // n, travelled % n
    height = _ratio(xp, xp.where(line % 2 == 0, n - on_line, on_line), n)
    peak = xp.power(_number('cycle_decay', cycle_decay, high=1.0), _ratio(xp, (line + 1) // 2, 1))
    return _interpolate(a, peak * height)


def _cosine_restarts(
    xp: Any,
    s: Any,
    a: _Arguments,
    *,
    cycles: int = 4,
    cycle_mul: float = 1.0,
    cycle_decay: float = 1.0,
) -> Any:
    """between(cycle_decay ** k * (1 + cos(pi * (s - b[k]) / (b[k + 1] - b[k]))) / 2).

    For b[k] <= s < b[k + 1]. Each cycle is `cycle_mul` times as long as the one before, rounded to
    whole steps; the cycles sum to n steps. Loshchilov and Hutter, SGDR, arXiv:1608.03983.
    """
    cycles, cycle_mul = _whole('cycles', cycles, low=1), _number('cycle_mul', cycle_mul)
    cycle_decay = _number('cycle_decay', cycle_decay, high=1.0)
    with np.errstate(over='ignore', invalid='ignore'):
        ends = np.cumsum(cycle_mul ** np.arange(cycles))
        b = [0, *np.rint(a.decay_steps * (ends / ends[-1])).astype(np.int64).tolist()]
    if not all(begin < end for begin, end in itertools.pairwise(b)):
        raise ValueError(
            f'cycles={cycles} with cycle_mul={cycle_mul:g} leaves a cycle without a step in '
            f'the {a.decay_steps} steps after warmup and hold: write fewer cycles'
        )
    share = 0.0
    for k, (begin, end) in enumerate(itertools.pairwise(b)):
        cosine = 0.5 * (
            1.0 + xp.cos(math.pi * _ratio(xp, xp.clip(s - begin, 0, end - begin), end - begin))
        )
        share = xp.where(s >= begin, cycle_decay**k * cosine, share)
    return _interpolate(a, share)


def _rsqrt(xp: Any, s: Any, a: _Arguments, *, timescale: int | None = None) -> Any:
    """max(end_lr, target_lr * sqrt(timescale / (timescale + s))), `timescale` in steps.

    The default is warmup_steps, which without hold gives target_lr * sqrt(W / t) as in Vaswani et
    al., arXiv:1706.03762; without warmup it is 10_000, as in T5, Raffel et al., arXiv:1910.10683.
    """
    timescale = _whole(
        'timescale', a.warmup_steps or 10_000 if timescale is None else timescale, low=1
    )
    return xp.maximum(a.target_lr / xp.sqrt(_ratio(xp, timescale + s, timescale)), a.end_lr)


def _trapezoid(
    xp: Any,
    s: Any,
    a: _Arguments,
    *,
    cooldown: float = 0.2,
    cooldown_power: float = 0.5,
) -> Any:
    """target_lr, then in the last `cooldown` steps between(1 - (c / cooldown) ** cooldown_power).

    `c` counts those steps. Also called warmup-stable-decay. Power 1 is the linear cooldown of
    Zhai et al., arXiv:2106.04560; the defaults, 20 % of the run and "1 - sqrt", are those of Hägele
    et al., arXiv:2405.18392.
    """
    length = _steps('cooldown', cooldown, a.total_steps, low=0)
    if length > a.decay_steps:
        raise ValueError(
            f'cooldown={cooldown} is {length} steps, but {a.decay_steps} are left after warmup and '
            'hold: write a smaller one'
        )
    done = _ratio(xp, xp.clip(s - (a.decay_steps - length), 0, length), length)
    return _interpolate(a, 1.0 - xp.power(done, _number('cooldown_power', cooldown_power)))


CURVES: dict[str, Callable[..., Any]] = {
    'cosine': _cosine,
    'constant': _constant,
    'linear': _linear,
    'polynomial': _polynomial,
    'exponential': _exponential,
    'piecewise': _piecewise,
    'triangular': _triangular,
    'cosine_restarts': _cosine_restarts,
    'rsqrt': _rsqrt,
    'trapezoid': _trapezoid,
}


def _checked_arguments(
    curve: str,
    warmup_steps: Any,
    total_steps: Any,
    hold: Any,
    start_lr: Any,
    target_lr: Any,
    end_lr: Any,
    curve_arguments: Any = (),
) -> _Arguments:
    """Returns the checked arguments.

    Raises: ValueError with a one-line message that says what is wrong and what to write.
    """
    if curve not in CURVES:
        raise _unknown_error('there is no curve', curve, CURVES)
    defaults = CURVES[curve].__kwdefaults__ or {}
    for name in curve_arguments:
        if name not in defaults:
            raise _unknown_error(
                f'curve {curve!r} has no argument', name, [*defaults, *_Arguments._fields[1:-1]]
            )
    # Lists and Python numbers, the form in which a saved model returns them.
    curve_arguments = {**defaults, **dict(curve_arguments)}
    given = {name: _as_python(name, value) for name, value in curve_arguments.items()}
    a = _Arguments(
        curve,
        _whole('warmup_steps', warmup_steps),
        _whole('total_steps', total_steps, low=1),
        _whole('hold', hold),
        _number('start_lr', start_lr),
        _number('target_lr', target_lr),
        _number('end_lr', end_lr),
        given,
    )
    if a.decay_steps < 0:
        raise ValueError(
            f'warmup_steps={a.warmup_steps} and hold={a.hold} exceed '
            f'total_steps={a.total_steps}: lower them or raise total_steps'
        )
    if a.end_lr > a.target_lr:
        raise ValueError(
            f'end_lr={a.end_lr} is above target_lr={a.target_lr}: write at most target_lr'
        )
    if curve == 'constant':
        if a.end_lr not in (0.0, a.target_lr):
            raise ValueError(
                f'end_lr={a.end_lr} would never be used, because without a decay the rate stays at '
                'target_lr: leave it out, or write a curve that decays'
            )
        a = a._replace(end_lr=a.target_lr)
    _rate(np, np.int64(0), a)  # the curves check their own arguments
    return a


def _checked_steps(step: Any) -> np.ndarray:
    """Returns `step` as an int64 array."""
    steps = np.asarray(step)
    if steps.dtype.kind not in 'iuf' or not np.all(
        (steps >= 0) & (steps == np.floor(steps)) & (steps < 2**63)
    ):
        raise ValueError(
            'a step is negative, a fraction or not a number: write whole numbers, 0 or more'
        )
    return steps.astype(np.int64)


def _is_tensor(value: Any) -> bool:
    return keras.ops.is_tensor(value) or isinstance(value, keras.Variable)


def _to_numpy(tensor: Any) -> np.ndarray:
    """Returns the value of a tensor or variable; `int` and `float` reject mirrored variables."""
    if isinstance(tensor, keras.Variable):
        tensor = tensor.value
    if keras.backend.standardize_dtype(tensor.dtype) == 'bfloat16':
        # bfloat16 scalars cannot be converted to arrays.
        tensor = keras.ops.cast(tensor, 'float32')
    return keras.ops.convert_to_numpy(tensor)


def _has_seen_batches(optimizer: keras.optimizers.Optimizer) -> bool:
    """Returns whether gradients were computed, even if the first update is still accumulating."""
    return any(v.name == 'iteration' and _to_numpy(v) > 0 for v in optimizer.variables)


def _as_python(name: str, value: Any) -> Any:
    """Converts `value` to Python numbers and lists, as a saved model would return them."""
    if isinstance(value, (list, tuple, range)):
        return [_as_python(name, item) for item in value]
    if not hasattr(value, '__array__'):
        return value
    try:
        # numpy reads tensors of another backend, such as those of tf.data, as arrays.
        array = _to_numpy(value) if _is_tensor(value) else np.asarray(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f'{name} is a symbolic tensor, which has no value yet: write a number'
        ) from error
    return array.tolist()


def _whole(name: str, value: Any, low: int = 0) -> int:
    number = _as_python(name, value)
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not is_number or number % 1 or number < low:
        raise ValueError(
            f'{name}={reprlib.repr(number)}: write a whole number, {low} or more'
            + _cardinality_hint(name, number if is_number else 0)
        )
    return int(number)


def _cardinality_hint(name: str, number: float) -> str:
    """Returns advice on a negative number of steps, which may come from `cardinality()`."""
    if name not in ('warmup_steps', 'total_steps', 'hold') or not number < 0:
        return ''
    return (
        '; if it comes from the cardinality() of a tf.data.Dataset, which is -1 for a data '
        'set without end and -2 for an unknown length, write steps_per_epoch * epochs'
    )


def _number(name: str, value: Any, high: float = math.inf) -> float:
    plain = _as_python(name, value)
    try:
        number = math.nan if isinstance(plain, (str, bytes, bool)) else float(plain)
    except (TypeError, ValueError):
        number = math.nan
    if not 0.0 <= number <= high or math.isinf(number):
        raise ValueError(
            f'{name}={reprlib.repr(plain)}: write a number, '
            + ('0 or more' if high == math.inf else f'from 0 to {high}')
        )
    return number


def _steps(name: str, value: Any, total_steps: int, low: int = 1) -> int:
    """Returns a whole number of steps: `value`, or that fraction of the total if it is below 1."""
    if 0.0 < _number(name, value) < 1.0:
        return max(low, round(value * total_steps))
    return _whole(name, value, low)


def _unknown_error(complaint: str, name: Any, known: Iterable[str]) -> ValueError:
    nearest = difflib.get_close_matches(str(name), known, n=1)
    hint = f'did you mean {nearest[0]!r}?' if nearest else 'write one of ' + ', '.join(known)
    return ValueError(f'{complaint} {name!r}: {hint}')
