"""One training step and one evaluation step, as one replica sees them; modeling/loops.py runs them.

Everything that trains, traces, compiles or measures the step uses the functions of this file.
"""

import collections
import dataclasses

import keras
import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla

from modeling.models import float_variables, layer_lr_multipliers, micro_batch
from modeling.optimizers import decays

LOSS_SCALE_START = 2.0**15  # float16's largest number is 65,504
LOSS_SCALE_WINDOW = 2000  # finite updates before the scale doubles (Micikevicius et al. 2018)
SHARED = 8  # so many vectors of one length, at least, are chosen together: what they are chosen by is one operation more


@dataclasses.dataclass
class TrainState:
    """Everything that training changes. All variables are created in the strategy's scope.

    Attributes:
        model: keras.Model, pictures -> logits.
        optimizer: Keras optimizer, built; None where nothing is trained.
        average: float variables, one for each of `float_variables(model)`, or empty without EMA.
        skipped_updates: int64 [], updates left out so far because a loss or gradient was not finite; of these
        skipped_in_a_row: int64 [] came last, one after the other. None where nothing is trained.
        loss_scale: float32 [] and finite_updates: int64 [], or None: dynamic loss scaling of float16.
    """

    model: keras.Model
    optimizer: keras.optimizers.Optimizer | None
    average: list
    skipped_updates: tf.Variable | None
    skipped_in_a_row: tf.Variable | None
    loss_scale: tf.Variable | None
    finite_updates: tf.Variable | None

    @classmethod
    def create(cls, model, optimizer, ema_decay, scale_loss):
        def counter(value):
            return tf.Variable(
                value, trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA
            )

        average = (
            [
                tf.Variable(variable.value, trainable=False, dtype=variable.value.dtype)
                for variable in float_variables(model)
            ]
            if ema_decay
            else []
        )
        none = tf.constant(0, tf.int64)
        skipped = [counter(none), counter(none)] if optimizer is not None else [None] * 2
        scaling = [counter(LOSS_SCALE_START), counter(none)] if scale_loss else [None] * 2
        return cls(model, optimizer, average, *skipped, *scaling)

    def variables(self):
        """All of it, by name, in an order that depends on the config only: what a checkpoint holds."""
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


def evaluated_weights(state):
    """What is evaluated and exported: the averages where there are any, else the weights; ordered as `float_variables(model)`.

    EMA averages the statistics of batch normalisation together with the weights.
    """
    return state.average or [variable.value for variable in float_variables(state.model)]


def make_train_step(
    state, config, augment, *, num_classes, num_replicas, jit_compile, on_tpu=False, teacher=None
):
    """The training step of one replica.

    The loss is the mean over the global batch; gradients are summed over the micro-batches, then over the replicas, once,
    then regularised, clipped by their global norm, and applied. Batch normalisation sees a micro-batch at a time.

    An update whose loss or gradient is not finite on any replica is skipped: nothing changes but the counters, the loss scale
    and `optimizer.iterations`, so that the learning rate stays that of the step. No host is asked. With max_skipped_updates=0 that is
    not looked at, except in float16, whose scale depends on it.

    With a teacher the loss is (1 - alpha) x cross-entropy + alpha x T^2 x KL(teacher, model), of probabilities at temperature T
    (Hinton et al. 2015); it is shown the very pictures that the model sees (Beyer et al. 2022).

    Args:
        state: TrainState.
        config: uses batch_size, accumulate_steps, label_smoothing, l2_regularization, grad_clip_norm, ema_decay,
            max_skipped_updates, model.layer_decay and distill.
        augment: a function of images, labels and draws as they come in, that returns images float32 [batch, size, size, 3]
            in 0..255 and labels float32 [batch, num_classes]: `inputs.augment.on_device`.
        num_classes, num_replicas: ints.
        jit_compile: whether XLA compiles forward and backward. The sum over replicas stays outside of it: XLA has no
            all-reduce for CPU devices (and none inside a function that each GPU compiles for itself).
        on_tpu: whether XLA compiles all of it, as it does for a TPU.
        teacher: None, or a function from such images to logits float32 [batch, num_classes]: `distillation.make_teacher`.

    Returns: a function of images uint8 [batch, size, size, 3], labels int64 [batch] and draws, a dict of float32 [batch, n],
        that updates the state and returns this replica's part of the sums over replicas, float32 []: {'loss', 'correct',
        'grad_norm'}, 0 of a skipped update; the 'learning_rate' that was used; 'skipped', 1 or 0; and 'skipped_in_a_row'.
    """
    model, optimizer = state.model, state.optimizer
    trained, accumulate = model.trainable_variables, config.accumulate_steps
    guarded = config.max_skipped_updates > 0 or state.loss_scale is not None
    synchronizes = any(getattr(layer, 'synchronized', False) for layer in model._flatten_layers())
    statistics = [
        variable.value
        for variable in float_variables(model)
        if not any(variable is other for other in trained)
    ]  # of batch normalisation
    layer_decayed = [
        (variable.value, factor)
        for variable, factor in zip(trained, layer_lr_multipliers(model, config.model.layer_decay))
        if factor != 1
    ]

    def loss_and_gradients(images, labels, draws):
        images, targets = augment(images, labels, draws)
        sums = ()
        for index in range(
            accumulate
        ):  # in turn, so that one micro-batch's activations are gone before the next
            with tf.control_dependencies(tf.nest.flatten(sums)), micro_batch(index, accumulate):
                # Every n-th example: whatever the number of replicas, a micro-batch of all of them is the same.
                part = of_micro_batch(
                    tf.identity(images[index::accumulate]), targets[index::accumulate]
                )
                sums = tf.nest.map_structure(tf.add, sums, part) if sums else part
        return sums

    def of_micro_batch(images, targets):
        taught = teacher(images) if teacher else None
        with tf.GradientTape() as tape:
            logits = model(images, training=True)  # [batch, num_classes], float32 or float64
            targets = tf.cast(targets, logits.dtype)
            smoothed = targets * (1 - config.label_smoothing) + config.label_smoothing / num_classes
            losses = tf.nn.softmax_cross_entropy_with_logits(smoothed, logits)  # [batch]
            if teacher:
                losses = (
                    1 - config.distill.alpha
                ) * losses + config.distill.alpha * distillation_loss(
                    tf.cast(taught, logits.dtype), logits, config.distill.temperature
                )
            loss = tf.reduce_sum(losses) / config.batch_size
            scaled = loss if state.loss_scale is None else loss * state.loss_scale
        hits = tf.equal(tf.argmax(logits, -1), tf.argmax(targets, -1))
        return (
            loss,
            tf.reduce_sum(tf.cast(hits, tf.float32)),
            tape.gradient(scaled, [variable.value for variable in trained]),
        )

    def train_step(images, labels, draws):
        statistics_before = [tf.identity(variable) for variable in statistics]
        loss, correct, gradients = _compiled(
            loss_and_gradients, jit_compile, synchronizes and num_replicas > 1
        )(images, labels, draws)
        if guarded:
            nan_if_invalid = tf.where(
                tf.math.is_finite(loss), 0.0, float('nan')
            )  # so that the sum of the gradients tells it to all replicas
            gradients = [
                *gradients[:-1],
                gradients[-1] + tf.cast(nan_if_invalid, gradients[-1].dtype),
            ]
        if num_replicas > 1:
            gradients = tf.distribute.get_replica_context().all_reduce(
                tf.distribute.ReduceOp.SUM, gradients
            )
        if state.loss_scale is not None:
            gradients = [
                gradient / tf.cast(state.loss_scale, gradient.dtype) for gradient in gradients
            ]
        if config.l2_regularization:
            gradients = [
                gradient + config.l2_regularization * variable if decays(variable) else gradient
                for gradient, variable in zip(gradients, trained)
            ]
        norm = _global_norm(gradients)
        finite = tf.math.is_finite(norm) if guarded else tf.constant(True)
        if config.grad_clip_norm:
            gradients, _ = tf.clip_by_global_norm(gradients, config.grad_clip_norm, use_norm=norm)
        learning_rate = tf.cast(
            optimizer.learning_rate, tf.float32
        )  # before the update counts itself

        select = make_select(finite, on_tpu) if guarded else lambda new, old: new
        changed = [
            variable.value
            for variable in (*trained, *optimizer.variables)
            if variable is not optimizer.iterations
        ] * guarded
        before, layer_decayed_before = (
            [tf.identity(variable) for variable in variables]
            for variables in (changed, [variable for variable, _ in layer_decayed])
        )
        optimizer.apply(gradients, trained)
        _assign(
            [variable for variable, _ in layer_decayed],
            [
                old + factor * (variable - old)
                for (variable, factor), old in zip(layer_decayed, layer_decayed_before)
            ],
        )
        if guarded:  # takes back what the optimizer and the forward pass have changed; a conditional could not hold the merging of replicas
            changed, before = changed + statistics, before + statistics_before
            _assign(changed, select(changed, before))
        _update_average(state, config.ema_decay, select)
        _count(finite, state)
        results = {'loss': loss, 'correct': correct, 'grad_norm': norm / num_replicas}
        results = {
            key: tf.where(finite, tf.cast(value, tf.float32), 0.0) for key, value in results.items()
        }
        everywhere = {
            'learning_rate': learning_rate,
            'skipped': ~finite,
            'skipped_in_a_row': state.skipped_in_a_row,
        }
        return results | {
            key: tf.cast(value, tf.float32) / num_replicas for key, value in everywhere.items()
        }

    return train_step


def make_eval_step(state, *, num_classes):
    """The evaluation step of one replica: with the averaged weights where there are any.

    Returns: a function of images uint8 [batch, size, size, 3], labels int64 [batch] and mask float32 [batch] that
        returns sums over the examples with mask 1: {'loss', 'correct', 'top5', 'examples'}, float32 [].
    """
    predict = make_predict(state)

    def eval_step(images, labels, mask):
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


def make_predict(state):
    """Returns: a function from images uint8 [batch, size, size, 3] to float32 logits, with the evaluated weights."""
    model = state.model
    evaluated = {
        variable.path: value
        for variable, value in zip(float_variables(model), evaluated_weights(state))
    }

    def current(variables):
        return [evaluated.get(variable.path, variable.value) for variable in variables]

    def predict(images):
        logits, _ = model.stateless_call(
            current(model.trainable_variables),
            current(model.non_trainable_variables),
            tf.cast(images, tf.float32),
            training=False,
        )
        return tf.cast(logits, tf.float32)

    return predict


def label_rank(logits, labels):
    """How many classes come before the label, int32 [batch]. Of equal logits the lower class comes first, as in top_k.

    A logit that is not a number counts as before: a broken model is right about nothing.
    """
    own = tf.gather(logits, labels[:, None], batch_dims=1)  # [batch, 1]
    classes = tf.range(tf.shape(logits)[1], dtype=labels.dtype)[None]
    earlier, others = classes < labels[:, None], tf.not_equal(classes, labels[:, None])
    # Not the negation of "less": TensorFlow makes "greater or equal" of that in a graph, which no number but is_nan is right about.
    before = (logits > own) | (tf.equal(logits, own) & earlier) | tf.math.is_nan(logits)
    before = (before & others) | tf.math.is_nan(own)
    return tf.reduce_sum(tf.cast(before, tf.int32), axis=1)


def _compiled(function, jit_compile, has_collectives):
    """`function` as XLA runs it. Made anew at each trace, because each replica captures variables of its own."""
    if not jit_compile:
        return function
    if not has_collectives:
        return tf.function(function, jit_compile=True, autograph=False)

    def clustered(*arguments):
        # Synchronized batch normalisation sums over replicas inside the model, and a function with jit_compile=True cannot
        # hold that. TensorFlow compiles what lies between these sums where operations carry this mark. It is what
        # tf.xla.experimental.jit_scope sets, but that is one state for the threads of all replicas: while they take turns
        # it spreads to the optimizer. Here the replicas have not come further than their gradients.
        graph = tf.compat.v1.get_default_graph()
        first = len(graph.get_operations())
        results = function(*arguments)
        for operation in graph.get_operations()[first:]:
            operation._set_attr('_XlaCompile', tf.compat.v1.AttrValue(b=True))
        return results

    return clustered


def _global_norm(gradients):
    """The root of the sum of all squares, []. Vectors are joined before, which are most of the gradients: one small operation in place of many."""
    vectors = [gradient for gradient in gradients if gradient.shape.rank == 1]
    others = [gradient for gradient in gradients if gradient.shape.rank != 1]
    return tf.linalg.global_norm([*others, tf.concat(vectors, 0)] if vectors else others)


def make_select(finite, on_tpu):
    """A function of new and old tensors, lists of the same length, that returns the new ones where `finite`, bool [], is true, else the old ones.

    For a TPU vectors of one length are chosen by a vector that the compiler may not take apart: it then joins the small operations that
    read it, which are most of the operations of a step.
    """

    def choose(new, old):
        lengths = collections.Counter(value.shape[0] for value in new if value.shape.rank == 1)
        choices = {
            length: xla.optimization_barrier(tf.fill([length], finite))[0]
            for length, count in lengths.items()
            if on_tpu and count >= SHARED
        }
        return [
            tf.where(
                choices.get(value.shape[0], finite) if value.shape.rank == 1 else finite,
                value,
                other,
            )
            for value, other in zip(new, old)
        ]

    return choose


def _count(finite, state):
    """Counts skipped updates, and adapts the loss scale where there is one."""
    state.skipped_updates.assign_add(tf.cast(~finite, tf.int64))
    state.skipped_in_a_row.assign(
        tf.where(finite, tf.constant(0, tf.int64), state.skipped_in_a_row + 1)
    )
    if state.loss_scale is None:
        return
    streak = tf.where(finite, state.finite_updates + 1, 0)
    grows = streak >= LOSS_SCALE_WINDOW
    factor = tf.where(finite, tf.where(grows, 2.0, 1.0), 0.5)
    state.loss_scale.assign(tf.maximum(state.loss_scale * factor, 1.0))
    state.finite_updates.assign(tf.where(grows, tf.constant(0, tf.int64), streak))


def distillation_loss(taught, logits, temperature):
    """T^2 x KL(softmax(taught / T), softmax(logits / T)), [batch]. T^2 keeps the gradient as large as that of the labels."""
    wanted = tf.nn.softmax(taught / temperature)
    missing = tf.nn.softmax_cross_entropy_with_logits(wanted, logits / temperature)
    return temperature**2 * (
        missing - tf.nn.softmax_cross_entropy_with_logits(wanted, taught / temperature)
    )


def _assign(variables, values):
    """Assigns what every replica has computed alike. Keras' variables would take the mean over the replicas: one more sum for each."""

    def in_each(strategy, values):
        for variable, value in zip(variables, values):
            strategy.extended.update(variable, lambda own, new: own.assign(new), args=(value,))

    if variables:
        tf.distribute.get_replica_context().merge_call(in_each, args=(values,))


def _update_average(state, decay, select):
    """EMA with a decay that starts low, min(decay, (1 + n) / (10 + n)) after n updates (tf.train.ExponentialMovingAverage).

    `select` chooses between the new and the old averages.
    """
    if not state.average:
        return
    updates = tf.cast(state.optimizer.iterations, tf.float32)
    decay = tf.minimum(decay, (1 + updates) / (10 + updates))
    frozen = {
        variable.path
        for layer in state.model._flatten_layers()
        if not layer.trainable
        for variable in layer.variables
    }
    # The average of a constant would drift by its rounding.
    pairs = [
        (average, variable.value)
        for average, variable in zip(state.average, float_variables(state.model))
        if variable.path not in frozen
    ]
    old = [tf.identity(average) for average, _ in pairs]
    new = [
        average * tf.cast(decay, average.dtype) + variable * (1 - tf.cast(decay, average.dtype))
        for average, (_, variable) in zip(old, pairs)
    ]
    for (average, _), value in zip(pairs, select(new, old)):
        average.assign(value)
