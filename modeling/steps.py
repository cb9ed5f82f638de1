"""One training step and one evaluation step, as one replica sees them; modeling/loops.py runs them.

Everything that trains, traces, compiles or measures the step uses the functions of this file.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from ml_collections import ConfigDict
from tensorflow.compiler.tf2xla.python import xla

from modeling import optimizers
from modeling.fused_layers import use_kernels
from modeling.models import float_variables, layer_lr_multipliers, micro_batch

LOSS_SCALE_START = 2.0**15  # float16's largest number is 65,504
LOSS_SCALE_WINDOW = 2000  # finite updates before the scale doubles (Micikevicius et al. 2018)
# The fewest vectors of one length for which a shared condition pays: it costs one more operation.
MIN_SHARED = 8
# Activations of more do not fit into the 128 MiB that a TPU core of v5e or v6e has on the chip: see
# docs/tpu.md for what the compiler says of other sizes.
MICRO_BATCH_PIXELS = 128 * 224**2

Tensors = list[tf.Tensor]
Draws = dict[str, tf.Tensor]
Select = Callable[[Tensors, Tensors], Tensors]  # (new, old) -> those to keep


@dataclasses.dataclass
class TrainState:
    """Everything that training changes. All variables are created in the strategy's scope.

    Attributes:
        model: keras.Model, images -> logits.
        optimizer: Keras optimizer, built; None where nothing is trained.
        average: float variables, one for each of `float_variables(model)`, or empty without EMA.
        skipped_updates: int64 [], updates left out so far because a loss or gradient was not
            finite; None where nothing is trained.
        skipped_in_a_row: int64 [], how many of the latest updates in a row were skipped.
        loss_scale: float32 [], or None: dynamic loss scaling of float16.
        finite_updates: int64 [] since the scale last changed, or None.
    """

    model: keras.Model
    optimizer: keras.optimizers.Optimizer | None
    average: list[tf.Variable]
    skipped_updates: tf.Variable | None
    skipped_in_a_row: tf.Variable | None
    loss_scale: tf.Variable | None
    finite_updates: tf.Variable | None

    @classmethod
    def create(
        cls,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer | None,
        ema_decay: float,
        scale_loss: bool,
    ) -> 'TrainState':
        def counter(value: tf.Tensor | float) -> tf.Variable:
            return tf.Variable(
                value, trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA
            )

        values = [variable.value for variable in float_variables(model)] if ema_decay else []
        average = [tf.Variable(value, trainable=False, dtype=value.dtype) for value in values]
        zero = tf.constant(0, tf.int64)
        skipped = [counter(zero), counter(zero)] if optimizer is not None else [None] * 2
        scaling = [counter(LOSS_SCALE_START), counter(zero)] if scale_loss else [None] * 2
        return cls(model, optimizer, average, *skipped, *scaling)

    def variables(self) -> dict[str, list[tf.Variable]]:
        """Returns all variables by name, in an order that depends only on the config.

        This is what a checkpoint holds.
        """
        parts = {
            'model': [variable.value for variable in float_variables(self.model)],
            'average': list(self.average),
        }
        if self.optimizer is not None:
            parts['optimizer'] = [variable.value for variable in self.optimizer.variables]
            parts['skipped'] = [self.skipped_updates, self.skipped_in_a_row]
        if self.loss_scale is not None:
            parts['loss_scale'] = [self.loss_scale, self.finite_updates]
        return parts


def evaluated_weights(state: TrainState) -> list[tf.Variable]:
    """Returns the weights to evaluate and export, ordered as `float_variables(model)`.

    They are the averages if there are any. EMA averages batch normalisation's statistics too.
    """
    return state.average or [variable.value for variable in float_variables(state.model)]


def make_train_step(
    state: TrainState,
    config: ConfigDict,
    augment: Callable[[tf.Tensor, tf.Tensor, Draws], tuple[tf.Tensor, tf.Tensor]],
    *,
    num_classes: int,
    num_replicas: int,
    jit_compile: bool,
    on_tpu: bool = False,
    on_cpu: bool = False,
    teacher: Callable[[tf.Tensor], tf.Tensor] | None = None,
) -> Callable[[tf.Tensor, tf.Tensor, Draws], dict[str, tf.Tensor]]:
    """Returns the training step of one replica.

    The loss is the mean over the global batch; gradients are summed over the micro-batches, then
    over the replicas, once, then regularised, clipped by their global norm, and applied. Batch
    normalisation sees a micro-batch at a time.

    An update whose loss or gradient is not finite on any replica is skipped: nothing changes but
    the counters, the loss scale and `optimizer.iterations`, so the learning rate stays in step. The
    device decides this without the host. With max_skipped_updates=0 this is not checked, except in
    float16, whose scale depends on it.

    With a teacher the loss is (1 - alpha) x cross-entropy + alpha x T^2 x KL(teacher, model), of
    probabilities at temperature T (Hinton et al. 2015); the teacher sees the same images as the
    model (Beyer et al. 2022).

    Args:
        state: TrainState.
        config: uses batch_size, accumulate_steps, label_smoothing, l2_regularization,
            grad_clip_norm, ema_decay, max_skipped_updates, model.layer_decay and distill.
        augment: a function of images, labels and draws as they come in, that returns images float32
            [batch, size, size, 3] in 0..255 and labels float32 [batch, num_classes]:
            `inputs.augment.make_device_augment`.
        num_classes: width of the logits.
        num_replicas: how many replicas share the batch.
        jit_compile: whether XLA compiles forward and backward. The sum over replicas stays outside
            of it: XLA has no all-reduce for CPU devices (and none inside a function that each GPU
            compiles for itself).
        on_tpu: whether the step is for a TPU, for which XLA compiles all of it.
        on_cpu: whether the step is for a single replica on a CPU, where copies and passes over the
            data cost most: a branch leaves out an update that is not finite, in place of a
            selection between old and new values, and without `jit_compile` TensorFlow's kernels
            normalise batches.
        teacher: None, or a function from such images to logits float32 [batch, num_classes]:
            `distillation.make_teacher`.

    Returns: a function of images uint8 [batch, size, size, 3], labels int64 [batch] and draws, a
        dict of float32 [batch, n], that updates the state and returns this replica's part of the
        sums over replicas, float32 []: {'loss', 'correct', 'grad_norm'}, 0 for a skipped update;
        the 'learning_rate' that was used; 'skipped', 1 or 0; and 'skipped_in_a_row'.
    """
    model, optimizer = state.model, state.optimizer
    assert optimizer is not None
    trained = model.trainable_variables
    accumulate = num_micro_batches(config, num_replicas, on_tpu)
    guarded = config.max_skipped_updates > 0 or state.loss_scale is not None
    synchronizes = any(getattr(layer, 'synchronized', False) for layer in model._flatten_layers())
    statistics = statistics_of(model)
    update = _make_update(state, config, guarded, on_cpu, on_tpu)
    use_kernels(model, on_cpu and not jit_compile)

    def loss_and_gradients(images: tf.Tensor, labels: tf.Tensor, draws: Draws) -> tuple:
        batch = images, labels, draws
        if accumulate == 1 or not on_tpu:
            augmented = augment(*batch)
            return sum_in_sequence(
                lambda index: of_micro_batch(index, *every_nth(augmented, index, accumulate)),
                accumulate,
            )
        mixes = bool(config.augment.mixup or config.augment.cutmix)
        parts = augmented_parts(augment, batch, accumulate, mixes)
        zeros = tf.zeros([], model.outputs[0].dtype), tf.zeros([])
        no_gradients = [tf.zeros(variable.shape, variable.dtype) for variable in trained]
        return sum_in_loop(
            lambda index: of_micro_batch(index, *parts(index)), accumulate, (*zeros, no_gradients)
        )

    def of_micro_batch(index: int | tf.Tensor, images: tf.Tensor, targets: tf.Tensor) -> tuple:
        teacher_logits = teacher(images) if teacher else None
        with tf.GradientTape() as tape:
            with micro_batch(index, accumulate):
                logits = model(images, training=True)  # [batch, num_classes], float32 or float64
            targets = tf.cast(targets, logits.dtype)
            smoothed = targets * (1 - config.label_smoothing) + config.label_smoothing / num_classes
            losses = tf.nn.softmax_cross_entropy_with_logits(smoothed, logits)  # [batch]
            if teacher:
                alpha, temperature = config.distill.alpha, config.distill.temperature
                from_labels = (1 - alpha) * losses
                distance = distillation_loss(
                    tf.cast(teacher_logits, logits.dtype), logits, temperature
                )
                losses = from_labels + alpha * distance
            loss = tf.reduce_sum(losses) / config.batch_size
            scaled = loss if state.loss_scale is None else loss * state.loss_scale
        hits = tf.equal(tf.argmax(logits, -1), tf.argmax(targets, -1))
        correct = tf.reduce_sum(tf.cast(hits, tf.float32))
        return loss, correct, tape.gradient(scaled, [variable.value for variable in trained])

    def train_step(images: tf.Tensor, labels: tf.Tensor, draws: Draws) -> dict[str, tf.Tensor]:
        statistics_before = [tf.identity(variable) for variable in statistics]
        compiled = _compiled(loss_and_gradients, jit_compile, synchronizes and num_replicas > 1)
        loss, correct, gradients = compiled(images, labels, draws)
        if guarded:
            # Added to a gradient, so that the sum of the gradients tells all replicas.
            nan_if_invalid = tf.where(tf.math.is_finite(loss), 0.0, float('nan'))
            last = gradients[-1] + tf.cast(nan_if_invalid, gradients[-1].dtype)
            gradients = [*gradients[:-1], last]
        if num_replicas > 1:
            gradients = tf.distribute.get_replica_context().all_reduce(
                tf.distribute.ReduceOp.SUM, gradients
            )
        gradients = _unscaled(gradients, state.loss_scale)
        if config.l2_regularization:
            gradients = _with_l2(gradients, trained, config.l2_regularization)
        norm = _global_norm(gradients)
        finite = tf.math.is_finite(norm) if guarded else tf.constant(True)
        if config.grad_clip_norm:
            gradients, _ = tf.clip_by_global_norm(gradients, config.grad_clip_norm, use_norm=norm)
        # Computed once, before the update increments `iterations`.
        learning_rate = tf.cast(optimizer.learning_rate, tf.float32)

        update(gradients, learning_rate, finite, statistics_before)
        _count_skipped(finite, state)
        results = {'loss': loss, 'correct': correct, 'grad_norm': norm / num_replicas}
        results = {
            key: tf.where(finite, tf.cast(value, tf.float32), 0.0) for key, value in results.items()
        }
        same_on_all_replicas = {
            'learning_rate': learning_rate,
            'skipped': ~finite,
            'skipped_in_a_row': state.skipped_in_a_row,
        }
        return results | {
            key: tf.cast(value, tf.float32) / num_replicas
            for key, value in same_on_all_replicas.items()
        }

    return train_step


def num_micro_batches(config: ConfigDict, num_replicas: int, on_tpu: bool) -> int:
    """Returns into how many micro-batches a replica's batch is split.

    `config.accumulate_steps` says it. 'auto' is the fewest that keep a micro-batch within
    `MICRO_BATCH_PIXELS` on a TPU, and 1 elsewhere.
    """
    if config.accumulate_steps != 'auto':
        return config.accumulate_steps
    per_replica = config.batch_size // num_replicas
    pixels = per_replica * config.image_size**2
    if not on_tpu or pixels <= MICRO_BATCH_PIXELS:
        return 1
    counts = range(1, per_replica + 1)
    fit = (n for n in counts if per_replica % n == 0 and pixels <= n * MICRO_BATCH_PIXELS)
    return next(fit, per_replica)


def every_nth(batch: Any, index: int | tf.Tensor, count: int) -> Any:
    """Returns examples `index`, `index + count`, and so on, of a nest of tensors [batch, ...].

    A global micro-batch of them is the same for any number of replicas.
    """

    def chosen(tensor: tf.Tensor) -> tf.Tensor:
        return tf.reshape(tensor, [-1, count, *tensor.shape[1:]])[:, index]

    return tf.nest.map_structure(chosen, batch)


def augmented_parts(
    augment: Callable[..., Any], batch: Any, count: int, mixes: bool
) -> Callable[[tf.Tensor], Any]:
    """Returns a function of an index, int32 [], that augments that micro-batch of `batch`.

    So only one is in memory as floats. The results are those of augmenting the whole batch.

    Args:
        mixes: whether `augment` mixes neighbours, images 0 and 1, 2 and 3, and so on.
    """

    def with_neighbours(index: tf.Tensor) -> Any:
        pairs = tf.nest.map_structure(lambda t: tf.reshape(t, [-1, 2, *t.shape[1:]]), batch)
        chosen = every_nth(pairs, index // 2, count // 2)
        both = tf.nest.map_structure(lambda t: tf.reshape(t, [-1, *t.shape[2:]]), chosen)
        return every_nth(augment(*both), index % 2, 2)

    if not mixes:
        return lambda index: augment(*every_nth(batch, index, count))
    if count % 2 == 0:
        return with_neighbours
    augmented = augment(*batch)  # neighbours are nowhere the same distance apart
    return lambda index: every_nth(augmented, index, count)


def sum_in_sequence(part: Callable[[int], Any], count: int) -> Any:
    """Returns the sum of part(0) to part(count - 1), nests of tensors.

    Each is computed after the one before, so that only one takes memory at a time.
    """
    sums = part(0)
    for index in range(1, count):
        with tf.control_dependencies(tf.nest.flatten(sums)):
            sums = tf.nest.map_structure(tf.add, sums, part(index))
    return sums


def sum_in_loop(part: Callable[[tf.Tensor], Any], count: int, zeros: Any) -> Any:
    """Does the same with a program that has `part` once: it takes an index, int32 [].

    Such a program is compiled in the time of one part, and the compiler keeps more of it in the
    memory of the chip.
    """

    def body(index: tf.Tensor, sums: Any) -> tuple:
        return index + 1, tf.nest.map_structure(tf.add, sums, part(index))

    start = (tf.constant(0), zeros)
    return tf.while_loop(lambda index, _: index < count, body, start, parallel_iterations=1)[1]


def make_eval_step(
    state: TrainState, *, num_classes: int
) -> Callable[[tf.Tensor, tf.Tensor, tf.Tensor], dict[str, tf.Tensor]]:
    """Returns the evaluation step of one replica, with the averaged weights where there are any.

    Returns: a function of images uint8 [batch, size, size, 3], labels int64 [batch] and mask
        float32 [batch] that returns sums over the examples with mask 1: {'loss', 'correct', 'top5',
        'examples'}, float32 [].
    """
    predict = make_predict(state)

    def eval_step(images: tf.Tensor, labels: tf.Tensor, mask: tf.Tensor) -> dict[str, tf.Tensor]:
        logits = predict(images)  # [batch, num_classes]
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)  # [batch]
        rank = label_rank(logits, labels)  # [batch]
        return {
            'loss': tf.reduce_sum(losses * mask),
            'correct': tf.reduce_sum(tf.cast(rank < 1, tf.float32) * mask),
            'top5': tf.reduce_sum(tf.cast(rank < min(5, num_classes), tf.float32) * mask),
            'examples': tf.reduce_sum(mask),
        }

    return eval_step


def make_predict(state: TrainState) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns a function from images to logits, with the evaluated weights.

    Images are uint8 [batch, size, size, 3], logits float32 [batch, num_classes].
    """
    model = state.model
    paths = [variable.path for variable in float_variables(model)]
    evaluated = dict(zip(paths, evaluated_weights(state), strict=True))

    def current(variables: Sequence[keras.Variable]) -> list[tf.Variable]:
        return [evaluated.get(variable.path, variable.value) for variable in variables]

    def predict(images: tf.Tensor) -> tf.Tensor:
        logits, _ = model.stateless_call(
            current(model.trainable_variables),
            current(model.non_trainable_variables),
            tf.cast(images, tf.float32),
            training=False,
        )
        return tf.cast(logits, tf.float32)

    return predict


def label_rank(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Counts the classes that rank before the label, int32 [batch].

    Of equal logits the class with the lower number ranks first, as in top_k. A NaN ranks before the
    label, and all classes before a label whose logit is NaN: a broken model is right about nothing.
    """
    own = tf.gather(logits, labels[:, None], batch_dims=1)  # [batch, 1]
    classes = tf.range(tf.shape(logits)[1], dtype=labels.dtype)[None]
    earlier, others = classes < labels[:, None], tf.not_equal(classes, labels[:, None])
    # Not the negation of "less": TensorFlow turns that into "greater or equal" in a graph, which is
    # wrong for NaN. Hence is_nan.
    before = (logits > own) | (tf.equal(logits, own) & earlier) | tf.math.is_nan(logits)
    before = (before & others) | tf.math.is_nan(own)
    return tf.reduce_sum(tf.cast(before, tf.int32), axis=1)


def statistics_of(model: keras.Model) -> list[tf.Variable]:
    """Returns what the forward pass changes: the statistics of batch normalisation."""
    trained = {id(variable) for variable in model.trainable_variables}
    return [variable.value for variable in float_variables(model) if id(variable) not in trained]


def _make_update(
    state: TrainState, config: ConfigDict, guarded: bool, on_cpu: bool, on_tpu: bool
) -> Callable[[Tensors, tf.Tensor, tf.Tensor, Tensors], None]:
    """Returns a function that updates the weights and their averages, unless it is to be skipped.

    It takes gradients, the learning rate, whether all is finite, bool [], and the statistics before
    the forward pass. If it is `guarded` and not all is finite, it restores these and only counts
    the update in `optimizer.iterations`.
    """
    optimizer = state.optimizer
    assert optimizer is not None
    statistics = statistics_of(state.model)
    apply_gradients = _make_apply(state, config.model.layer_decay, on_cpu)
    variables = (*state.model.trainable_variables, *optimizer.variables)
    changed = [variable.value for variable in variables if variable is not optimizer.iterations]

    def update(gradients: Tensors, learning_rate: tf.Tensor) -> None:
        apply_gradients(gradients, learning_rate)
        if on_cpu:
            _update_average_alone(state, config.ema_decay)
        else:
            _update_average(state, config.ema_decay, lambda new, old: new)

    def skip(statistics_before: Tensors) -> None:
        _assign(statistics, statistics_before)
        optimizer.iterations.assign_add(1)

    def branch(
        gradients: Tensors, learning_rate: tf.Tensor, finite: tf.Tensor, statistics_before: Tensors
    ) -> None:
        if guarded:
            tf.cond(
                finite, lambda: update(gradients, learning_rate), lambda: skip(statistics_before)
            )
        else:
            update(gradients, learning_rate)

    def select(
        gradients: Tensors, learning_rate: tf.Tensor, finite: tf.Tensor, statistics_before: Tensors
    ) -> None:
        before = [*map(tf.identity, changed), *statistics_before]
        apply_gradients(gradients, learning_rate)
        chosen = make_select(finite, on_tpu)
        _assign([*changed, *statistics], chosen([*changed, *statistics], before))
        _update_average(state, config.ema_decay, chosen)

    # A branch cannot contain the merging of replicas.
    return branch if on_cpu or not guarded else select


def _make_apply(
    state: TrainState, layer_decay: float, is_alone: bool
) -> Callable[[Tensors, tf.Tensor], None]:
    """Returns a function of gradients and a rate that updates what is trained.

    A layer's rate is the rate times its multiplier. `is_alone` is for a single replica.
    """
    optimizer = state.optimizer
    assert optimizer is not None
    trained, schedule = state.model.trainable_variables, optimizer._learning_rate
    multipliers = layer_lr_multipliers(state.model, layer_decay)
    layer_decayed = [
        (variable.value, multiplier)
        for variable, multiplier in zip(trained, multipliers, strict=True)
        if multiplier != 1
    ]
    variables = [variable for variable, _ in layer_decayed]
    has_constraints = any(variable.constraint for variable in trained)
    is_fused = isinstance(optimizer, optimizers.Fused) and optimizer.is_fused
    if is_alone and is_fused and not layer_decayed and not has_constraints:
        return lambda gradients, rate: optimizer.apply_alone(gradients, trained, rate)

    def apply_gradients(gradients: Tensors, learning_rate: tf.Tensor) -> None:
        before = [tf.identity(variable) for variable in variables]
        with optimizers.fixed_rate(optimizer, learning_rate, schedule):
            optimizer.apply(gradients, trained)
        after = [
            old + multiplier * (variable - old)
            for (variable, multiplier), old in zip(layer_decayed, before, strict=True)
        ]
        _assign(variables, after)

    return apply_gradients


def _compiled(function: Callable, jit_compile: bool, has_collectives: bool) -> Callable:
    """Returns `function`, compiled by XLA if `jit_compile`.

    It is created at each trace, because each replica captures its own variables.
    """
    if not jit_compile:
        return function
    if not has_collectives:
        return tf.function(function, jit_compile=True, autograph=False)

    def clustered(*arguments: tf.Tensor) -> tuple:
        # Synchronized batch normalisation sums over replicas inside the model, which a function
        # with jit_compile=True cannot contain. TensorFlow compiles the operations between these
        # sums if they have this attribute. tf.xla.experimental.jit_scope sets it too, but its state
        # is shared by the threads of all replicas, which take turns, so it would spread to the
        # optimizer.
        graph = tf.compat.v1.get_default_graph()
        first = len(graph.get_operations())
        results = function(*arguments)
        for operation in graph.get_operations()[first:]:
            operation._set_attr('_XlaCompile', tf.compat.v1.AttrValue(b=True))
        return results

    return clustered


def _unscaled(gradients: Tensors, loss_scale: tf.Variable | None) -> Tensors:
    """Undoes the scaling of the loss."""
    if loss_scale is None:
        return gradients
    return [gradient / tf.cast(loss_scale, gradient.dtype) for gradient in gradients]


def _with_l2(gradients: Tensors, variables: Sequence[keras.Variable], weight: float) -> Tensors:
    """Adds the gradient of L2, `weight` times the variable, where decay applies."""
    return [
        gradient + weight * variable if optimizers.decays(variable) else gradient
        for gradient, variable in zip(gradients, variables, strict=True)
    ]


def _global_norm(gradients: Tensors) -> tf.Tensor:
    """Returns the root of the sum of all squares, [].

    Vectors, which are most of the gradients, are joined first: one small operation instead of many.
    """
    vectors = [gradient for gradient in gradients if gradient.shape.rank == 1]
    others = [gradient for gradient in gradients if gradient.shape.rank != 1]
    return tf.linalg.global_norm([*others, tf.concat(vectors, 0)] if vectors else others)


def make_select(finite: tf.Tensor, on_tpu: bool) -> Select:
    """Returns a function that chooses between two lists of tensors, new and old.

    It returns the new ones if `finite`, bool [], is true, else the old ones.

    On a TPU, vectors of one length share a condition vector behind an optimization barrier: the
    compiler then fuses the small operations that read it, which are most of a step's operations.
    """

    def choose(new: Tensors, old: Tensors) -> Tensors:
        lengths = collections.Counter(value.shape[0] for value in new if value.shape.rank == 1)
        conditions = {
            length: xla.optimization_barrier(tf.fill([length], finite))[0]
            for length, count in lengths.items()
            if on_tpu and count >= MIN_SHARED
        }

        def condition(value: tf.Tensor) -> tf.Tensor:
            return conditions.get(value.shape[0], finite) if value.shape.rank == 1 else finite

        pairs = zip(new, old, strict=True)
        return [tf.where(condition(value), value, other) for value, other in pairs]

    return choose


def _count_skipped(finite: tf.Tensor, state: TrainState) -> None:
    """Counts skipped updates, and adapts the loss scale where there is one."""
    assert state.skipped_updates is not None and state.skipped_in_a_row is not None
    state.skipped_updates.assign_add(tf.cast(~finite, tf.int64))
    state.skipped_in_a_row.assign(
        tf.where(finite, tf.constant(0, tf.int64), state.skipped_in_a_row + 1)
    )
    if state.loss_scale is None or state.finite_updates is None:
        return
    streak = tf.where(finite, state.finite_updates + 1, 0)
    grows = streak >= LOSS_SCALE_WINDOW
    factor = tf.where(finite, tf.where(grows, 2.0, 1.0), 0.5)
    state.loss_scale.assign(tf.maximum(state.loss_scale * factor, 1.0))
    state.finite_updates.assign(tf.where(grows, tf.constant(0, tf.int64), streak))


def distillation_loss(
    teacher_logits: tf.Tensor, logits: tf.Tensor, temperature: float
) -> tf.Tensor:
    """Returns T^2 x KL(softmax(teacher_logits / T), softmax(logits / T)), [batch].

    T^2 keeps the gradient as large as that of the labels.
    """
    wanted = tf.nn.softmax(teacher_logits / temperature)
    cross_entropy = tf.nn.softmax_cross_entropy_with_logits(wanted, logits / temperature)
    entropy = tf.nn.softmax_cross_entropy_with_logits(wanted, teacher_logits / temperature)
    return temperature**2 * (cross_entropy - entropy)


def _assign(variables: Sequence[tf.Variable], values: Tensors) -> None:
    """Assigns values that are the same on every replica.

    Keras' variables would average over the replicas: one more sum each.
    """

    def in_each(strategy: tf.distribute.Strategy, values: Tensors) -> None:
        for variable, value in zip(variables, values, strict=True):
            strategy.extended.update(variable, lambda own, new: own.assign(new), args=(value,))

    if variables:
        tf.distribute.get_replica_context().merge_call(in_each, args=(values,))


def _update_average(state: TrainState, decay: float, select: Select) -> None:
    """Updates the EMA, with a decay that starts low: min(decay, (1 + n) / (10 + n)).

    `n` is the number of updates, as in tf.train.ExponentialMovingAverage. `select` chooses between
    the new and the old averages.
    """
    if not state.average:
        return
    decay, pairs = _average_decay(state, decay), _averaged_pairs(state)
    old = [tf.identity(average) for average, _ in pairs]
    new = [
        average * tf.cast(decay, average.dtype) + variable * (1 - tf.cast(decay, average.dtype))
        for average, (_, variable) in zip(old, pairs, strict=True)
    ]
    for (average, _), value in zip(pairs, select(new, old), strict=True):
        average.assign(value)


def _update_average_alone(state: TrainState, decay: float) -> None:
    """Does the same for a single replica, unless an update is skipped, in fewer operations."""
    if not state.average:
        return
    decay, pairs = _average_decay(state, decay), _averaged_pairs(state)
    dtypes = {average.dtype for average, _ in pairs}
    rest = {dtype: 1 - tf.cast(decay, dtype) for dtype in dtypes}
    for average, variable in pairs:
        optimizers.subtract(average, rest[average.dtype], average - variable)


def _average_decay(state: TrainState, decay: float) -> tf.Tensor:
    assert state.optimizer is not None
    updates = tf.cast(state.optimizer.iterations, tf.float32)
    return tf.minimum(decay, (1 + updates) / (10 + updates))


def _averaged_pairs(state: TrainState) -> list[tuple[tf.Variable, tf.Variable]]:
    """Returns (average, variable) of all that is not frozen.

    Rounding would make the averages of what is frozen drift.
    """
    frozen = {
        variable.path
        for layer in state.model._flatten_layers()
        if not layer.trainable
        for variable in layer.variables
    }
    pairs = zip(state.average, float_variables(state.model), strict=True)
    return [(average, variable.value) for average, variable in pairs if variable.path not in frozen]
