"""What `train`, `evaluate` and `export` have in common: from a config to strategy, data, plan and state."""
import dataclasses
import json
import math
import os
import random

import keras
import tensorflow as tf

import plan as planning
from configs import default
from devices import strategy as devices
from errors import ConfigError, RunError
from inputs import datasets
from modeling import loops, models, optimizers, steps, transfer
from outputs.checkpoints import Checkpoints
from outputs.logbook import read_json
from settings import flatten

# Keys that may differ between the starts of one run: they change where and how fast it goes, not what is computed
# (except that without model.sync_batch_norm each replica has statistics of its own).
FREE_KEYS = ('dataset.data_dir', 'dataset.service', 'dataset.max_broken', 'eval_batch_size', 'jit_compile', 'strategy', 'virtual_devices', 'tpu',
             'steps_per_loop', 'log_every', 'eval_every', 'checkpoint_every', 'keep_checkpoints')


@dataclasses.dataclass
class Session:
    """Everything a verb works with."""

    config: object
    strategy: tf.distribute.Strategy
    strategy_reason: str
    kind: str  # 'TPU', 'GPU' or 'CPU'
    dtype_policy: str
    jit_compile: bool
    source: datasets.Source
    data_changes: tuple[str, ...]  # since the run began, a line each
    plan: planning.Plan
    state: steps.TrainState
    checkpoints: Checkpoints
    synchronize: object  # call it before reading the variables: makes unsynchronized statistics the same on all replicas
    is_chief: bool  # whether this process writes; of several workers one does
    agree: object  # sums of numbers over all workers: see devices.make_agreement
    loaded: str  # what was taken from config.model.weights, in words; '' for random weights
    teacher: object  # a function, or None: see transfer.make_teacher
    teacher_name: str

    def describe(self):
        """What was chosen and what the durations came to, as a few lines of text."""
        lines = [f'strategy  {self.strategy_reason}', f'compute   {self.dtype_policy}, jit_compile {"on" if self.jit_compile else "off"}',
                 self.plan.describe(), planning.describe_stages(self.config, self.plan), *self._describe_transfer(),
                 *(f'note      {change}' for change in self.data_changes)]
        return '\n'.join(filter(None, lines))

    def _describe_transfer(self):
        config, model = self.config, self.state.model
        if self.loaded:
            yield f'weights   {self.loaded}'
        if config.model.freeze:
            trained, all_weights = (sum(math.prod(variable.shape) for variable in variables) for variables in (model.trainable_variables, models.weights(model)))
            frozen = 'the backbone' if config.model.freeze == 'backbone' else f'all up to {config.model.freeze}'
            yield f'frozen    {frozen}: {trained:,} of {all_weights:,} numbers are trained'
        if config.model.layer_decay < 1:
            yield f'rates     x 1 at the head, down to x {min(models.rate_factors(model, config.model.layer_decay)):.3g} at the first layers that are trained'
        if self.teacher:
            yield f'teacher   {self.teacher_name}; {config.distill.alpha:.0%} of the loss, temperature {config.distill.temperature:g}'


def open_session(config, workdir, trains=True):
    """Builds what a checked config describes, in the order of the data's way.

    Without `trains` there is no optimizer, and the data set needs no training split.

    Raises: ConfigError, RunError: see the functions called here.
    """
    strategy, reason = devices.make_strategy(config)
    kind = devices.device_kind(strategy)
    dtype_policy = devices.resolve_precision(config.precision, kind)
    jit_compile = devices.resolve_jit_compile(config.jit_compile, kind)
    is_chief, agree = devices.is_chief(strategy), devices.make_agreement(strategy)
    if not is_chief:
        agree([1])  # the chief prepares the data first: on a disk that they share it is there then
    source = datasets.load(config.dataset, needs_training=trains)
    if is_chief:
        agree([1])
    train_examples, data_changes = compare_data(source, workdir, trains)
    train_examples = (train_examples or source.num_train) if trains else 0
    plan = planning.make_plan(config, train_examples, source.num_eval, len(source.class_names), strategy.num_replicas_in_sync)
    random.seed(config.seed)  # Keras draws the seeds of its initializers from it; all else is seeded where it is drawn
    keras.config.set_dtype_policy(dtype_policy)
    with strategy.scope():
        model = models.build_model(config, plan.num_classes)
        loaded = load_weights(model, config, workdir, source.class_names) if trains else ''
        state = build_state(model, config, plan, dtype_policy)
        teacher, teacher_name = transfer.make_teacher(config, source.class_names) if trains else (None, '')
    checkpoints = Checkpoints(os.path.join(workdir, 'checkpoints'), state.variables(), config.keep_checkpoints, writes=is_chief)
    local_statistics = plan.num_replicas > 1 and not config.model.sync_batch_norm
    synchronize = loops.make_average_statistics(strategy, state) if local_statistics else lambda: None
    return Session(config, strategy, reason, kind, dtype_policy, jit_compile, source, data_changes, plan, state, checkpoints, synchronize,
                   is_chief, agree, loaded, teacher, teacher_name)


def require_same_config(config, workdir, free_keys=FREE_KEYS):
    """Raises ConfigError, with the differences, if `workdir` holds a run of another config; `free_keys` may differ."""
    path = os.path.join(workdir, 'config.json')
    if not os.path.exists(path) or not os.path.isdir(os.path.join(workdir, 'checkpoints')):  # a start that failed keeps nothing
        return
    if config.dataset.name == 'folder' and free_keys is FREE_KEYS:
        free_keys = [key for key in free_keys if key != 'dataset.data_dir']  # of a folder it is what the pictures are
    before, now, reference = (flatten(values) for values in (read_json(path), json.loads(config.to_json()), json.loads(default.get_config().to_json())))
    before = reference | before  # a key that is newer than the run had its default then
    changed = [f'{key} was {before.get(key)!r}, is {now.get(key)!r}' for key in sorted(before.keys() | now.keys())
               if before.get(key) != now.get(key) and key not in free_keys]
    if changed:
        raise ConfigError(f'{workdir} holds a run of another config ({"; ".join(changed)}): use that config, or give this one its own --workdir')


def compare_data(source, workdir, trains):
    """What the run in `workdir` was begun with, beside the data as they are now.

    Returns: (training examples that its durations count, or None for a new run; lines about data that have changed since).

    Raises: RunError if it knows other classes, or in another order: its answers would be misread.
    """
    path = os.path.join(workdir, 'environment.json')
    if not os.path.exists(path) or not os.path.isdir(os.path.join(workdir, 'checkpoints')):
        return None, ()
    begun = read_json(path)
    known = begun.get('class_names', list(source.class_names))
    if list(source.class_names) != known:
        first = next((f'{old!r} is now {new!r}' for old, new in zip(known, source.class_names) if old != new), 'the first of them are the same')
        raise RunError(f'the run in {workdir} has {len(known)} classes and this data set {len(source.class_names)}, which differ ({first}): '
                       'take the data it was trained on, or give these a --workdir of their own')
    examples, changes = begun.get('train_examples'), tuple(begun.get('data_changes', ()))
    if trains and source.identity != begun.get('training_data', source.identity):
        changes += (f'the training pictures have changed during the run, which began with {examples:,}: now there are {source.num_train:,}. '
                    'The schedule stays, the order is another',)
    return examples, changes


def load_weights(model, config, workdir, class_names):
    """What `config.model.weights` names goes into the model of a new run; returns what was loaded, in words.

    A run that goes on takes its own, and repeats what it said at its start.
    """
    if not config.model.weights:
        return ''
    if tf.train.latest_checkpoint(os.path.join(workdir, 'checkpoints')):
        return read_json(os.path.join(workdir, 'environment.json')).get('weights', '')
    return transfer.load_weights(model, config, class_names)


def build_state(model, config, plan, dtype_policy):
    """The model with an optimizer, if the plan has updates, and what else training changes; call it in the strategy's scope."""
    if not plan.total_steps:
        return steps.TrainState.create(model, None, config.ema_decay, scale_loss=False)
    optimizer = optimizers.build_optimizer(config, planning.schedule_arguments(config, plan), model.trainable_variables)
    models.derive_dropout_seeds(model, config.seed, optimizer.iterations)
    return steps.TrainState.create(model, optimizer, config.ema_decay, scale_loss=dtype_policy == 'mixed_float16')
