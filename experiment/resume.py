"""What a folder holds of an earlier start, and whether this start goes on with it: never with another learning-rate curve without a word."""

import json
import os
import shlex
from collections.abc import Collection, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from common import storage
from common.errors import ConfigError, RunError
from common.storage import flatten, read_json, write_json
from configs import default
from devices.environment import describe_environment
from experiment import planning
from outputs.checkpoints import steps_in
from outputs.metrics_logger import read_metrics
from outputs.train_progress import ANY_KEY, Progress, changes_evaluation

# Keys that may differ between the starts of one run: they change where and how fast it goes and when it looks, not what is computed
# (except that without model.sync_batch_norm each replica has statistics of its own).
FREE_KEYS = (
    'dataset.data_dir',
    'dataset.service',
    'dataset.max_broken',
    'eval_batch_size',
    'jit_compile',
    'strategy',
    'virtual_devices',
    'tpu',
    'steps_per_loop',
    'log_every',
    'eval_every',
    'checkpoint_every',
    'keep_checkpoints',
    'max_skipped_updates',
)
# Optimizers that keep the same two averages of each variable. Those of others mean something else,
# even where they have the same shapes.
SAME_AVERAGES = ('adam', 'adamw', 'lamb')
# Keys with which averages are there or not.
SWITCHES = ('ema_decay', 'optimizer.momentum', 'optimizer.centered', 'optimizer.amsgrad')
# Keys that say which variables Muon leaves to AdamW, which has other averages.
MUONS_CHOICE = ('optimizer.exclude_layers', 'optimizer.exclude_embeddings')
CONFIG, ENVIRONMENT, SUMMARY, SKIPPED = (
    'config.json',
    'environment.json',
    'summary.json',
    'skipped.json',
)
FILES = (
    CONFIG,
    ENVIRONMENT,
    SUMMARY,
    SKIPPED,
    'metrics.jsonl',
    'tensorboard',
    'checkpoints',
    'plots',
    'preview',
    'export',
    'export.part',
    'report.md',
    'evaluation.json',
)


class ConfigChange(NamedTuple):
    """A key of the config whose value is another than that of the run that goes on."""

    key: str
    before: object
    after: object

    def __str__(self):
        if self.key == ANY_KEY:
            return f'{CONFIG} is missing'
        return f'{self.key} was {self.before!r}, is {self.after!r}'


def begun(workdir):
    """Whether `workdir` holds a run: a start that failed before its first checkpoint is none."""
    has_config = storage.exists(os.path.join(workdir, CONFIG))
    return has_config and (is_finished(workdir) or has_checkpoints(workdir))


def has_checkpoints(workdir) -> bool:
    return bool(steps_in(os.path.join(workdir, 'checkpoints')))


def is_finished(workdir):
    path = os.path.join(workdir, SUMMARY)
    return storage.exists(path) and bool(storage.read(path).strip())


def config_changes(config, workdir, free_keys=FREE_KEYS):
    """How `config` differs from that of the run in `workdir`, a list of `ConfigChange`.

    Keys in `free_keys` may differ.
    """
    if not begun(workdir):
        return []
    if free_keys is FREE_KEYS:
        free_keys = _free_keys(config)
    before, now = flatten(_config_before(workdir)), _as_read(config)
    return [change for change in _differences(before, now) if change.key not in free_keys]


def require_same_config(config, workdir, free_keys=FREE_KEYS):
    """Raises ConfigError, with the differences, if `workdir` holds a run of another config; `free_keys` may differ."""
    changes = config_changes(config, workdir, free_keys)
    if changes:
        raise refusal(workdir, config, changes)


def refusal(workdir, config, changes):
    """The ConfigError of a config that has changed: it says whether --resume=changed would do."""
    if any(change.key == ANY_KEY for change in changes):
        return ConfigError(
            f'{workdir} holds checkpoints but no {CONFIG}, so nobody knows what they were trained with: bring it back from a copy, '
            'or give this config its own --workdir. On purpose, --resume=changed trains on with this config, and --resume=never '
            'moves that run aside'
        )
    held = f'{workdir} holds a run of another config ({_listed(changes)})'
    unfit = misfits(config, changes)
    if not unfit:
        return ConfigError(
            f'{held}: use that config, or give this one its own --workdir. On purpose, '
            '--resume=changed trains on with the new config, and --resume=never moves that run aside'
        )
    keys = ' or '.join(change.key for change in unfit)
    reason = f'{held}, whose checkpoints do not fit another {keys}'
    if any(change.key == 'model.name' for change in unfit):
        return ConfigError(f'{reason}: use that config, or give this one its own --workdir')
    return ConfigError(
        f'{reason}: use that config, or begin a new run with its weights, '
        f'--workdir=NEW --config.model.weights={shlex.quote(workdir)}'
    )


def misfits(config, changes: Sequence[ConfigChange]) -> list[ConfigChange]:
    """Returns the changes to `config` with which the variables of the checkpoints do not fit.

    What is not in the config, such as the number of classes, shows when the checkpoint is read.
    """
    stateless = config.optimizer.name == 'sgd' and not config.optimizer.get('momentum')

    def fits(change: ConfigChange) -> bool:
        key, before, after = change
        if key == 'model.name':
            return False
        if key == 'model.freeze':  # an optimizer has averages of the variables that are trained
            return stateless
        if key == 'optimizer.name':
            return before in SAME_AVERAGES and after in SAME_AVERAGES
        if key == 'optimizer.momentum' and config.optimizer.name == 'muon':
            return True
        if key in SWITCHES:
            return bool(before) == bool(after)
        if key in MUONS_CHOICE:
            return False
        if key == 'precision':
            return not {before, after} & {'float16', 'float64'}
        return True

    return [change for change in changes if not fits(change)]


def require_fit(workdir, config, changes: Sequence[ConfigChange]) -> None:
    """Raises ConfigError if the run cannot go on with these changes. Needs no data and no model."""
    if misfits(config, changes):
        raise refusal(workdir, config, changes)


def unknown_config(workdir):
    """What is to be said of checkpoints without a config.json, as `config_changes` does; none where there are none."""
    missing = not storage.exists(os.path.join(workdir, CONFIG)) and has_checkpoints(workdir)
    return [ConfigChange(ANY_KEY, None, None)] if missing else []


def set_aside(workdir):
    """Moves what a run has left in `workdir` into a folder of its own there, `before-1`, and says so; nothing is deleted."""
    left = [name for name in storage.list_folder(workdir) if name in FILES]
    if not left:
        return
    aside = next(
        path
        for path in (os.path.join(workdir, f'before-{number}') for number in range(1, 10**6))
        if not storage.exists(path)
    )
    storage.make_folder(aside)
    for name in left:
        storage.move(os.path.join(workdir, name), os.path.join(aside, name))
    print(f'begins    anew; the run before is in {aside}', flush=True)


def compare_data(source, workdir, trains):
    """What the run in `workdir` was begun with, beside the data as they are now.

    Returns: (training examples that its durations count, or None for a new run; lines about data that have changed since).

    Raises: RunError if it knows other classes, or in another order: its answers would be misread.
    """
    path = os.path.join(workdir, ENVIRONMENT)
    if not (begun(workdir) or has_checkpoints(workdir)) or not storage.exists(path):
        return None, ()
    before = read_json(path)
    known = before.get('class_names', list(source.class_names))
    if list(source.class_names) != known:
        first = next(
            (
                f'{old!r} is now {new!r}'
                for old, new in zip(known, source.class_names)
                if old != new
            ),
            'the first of them are the same',
        )
        raise RunError(
            f'the run in {workdir} has {len(known)} classes and this data set {len(source.class_names)}, which differ ({first}): '
            'take the data it was trained on, or give these a --workdir of their own'
        )
    examples, changes = before.get('train_examples'), tuple(before.get('data_changes', ()))
    if trains and source.identity != before.get('training_data', source.identity):
        changes += (
            f'the training pictures have changed during the run, which began with {examples:,}: now there are {source.num_train:,}. '
            'The schedule stays, the order is another',
        )
    return examples, changes


def restore(session, workdir, changes: Sequence[ConfigChange] = ()) -> Progress:
    """Reads the last good checkpoint if there is one, and says so.

    Args:
        session: its plan and learning rate are put where the run stands.
        workdir: where this process writes.
        changes: of the config since the last start.

    Returns: what is known of the run, as far as it holds under the config of the session.
    """
    saved = session.checkpoints.latest_step() or 0
    everywhere, workers = session.agree([saved, 1])
    if everywhere != saved * workers:
        raise RunError(
            f'this worker found step {saved:,} in its workdir, and others another one: all workers need one --workdir, on a disk that they share'
        )
    rows = read_metrics(workdir)
    if saved and not rows and session.is_chief:
        print(
            f'note      no row of metrics.jsonl is left: what was measured up to step {saved:,} is lost',
            flush=True,
        )
    if saved:
        _, saved_progress = session.checkpoints.restore()
        progress = _progress_of(saved_progress, session, changes)
        lost = (
            f'; what came after it, up to step {rows[-1]["step"]:,}, is done again'
            if rows and rows[-1]['step'] > saved
            else ''
        )
        print(f'resumes   at step {saved:,}{lost}', flush=True)
        session.continue_from(progress)
        if session.plan.ahead.updates or session.plan.ahead.examples:
            print(
                f'          after {progress.examples_seen:,} examples, in batches of several sizes: '
                f'the run has {session.plan.total_steps:,} updates, and its schedule, in batches of today, is at '
                f'step {saved + session.plan.ahead.updates:,} of {session.plan.schedule_steps:,}',
                flush=True,
            )
        if saved > session.plan.total_steps:
            raise ConfigError(
                f'the run is at step {saved:,}, after the end of this config at step {session.plan.total_steps:,}: raise config.train_for'
            )
        return progress
    if rows:
        print(
            f'begins    at step 0: metrics.jsonl reaches step {rows[-1]["step"]:,}, but no checkpoint is there',
            flush=True,
        )
    return Progress(config=_measured_under(session.config))


def _progress_of(saved: dict, session, changes: Sequence[ConfigChange]) -> Progress:
    """Returns what a checkpoint says of the run, as far as it holds in this session."""
    config, eval_examples = session.config, session.plan.eval_examples
    before = {change.key: change.before for change in changes}
    repeats = before.get('augment.repeats', config.augment.repeats)
    progress = Progress(**{'distinct_seen': saved['examples_seen'] // repeats, **saved})
    progress.metrics = storage.nan_for_null(progress.metrics)
    keys = _keys_changed_since(progress, config, changes)
    evaluated = progress.metrics.get('eval/examples', eval_examples)
    if evaluated != eval_examples and not any(map(changes_evaluation, keys)):
        print(
            f'note      the evaluation split has {eval_examples:,} examples now and had '
            f'{evaluated:,}: what was measured then is not compared with it',
            flush=True,
        )
        keys.add('dataset.eval_split')
    progress.forget(keys)
    progress.config = _measured_under(config)
    return progress


def _keys_changed_since(progress: Progress, config, changes: Sequence[ConfigChange]) -> set[str]:
    """Returns the keys that have other values than when `progress` was saved.

    A checkpoint knows its config, so it does not matter how often the run was started since, and
    with what. Where an older version wrote it, the changes since the last start have to do.
    """
    changed = {change.key for change in changes}
    if progress.config is None or ANY_KEY in changed:
        return changed
    current = _measured_under(config)
    defaults = _as_read(default.get_config())  # of keys that are newer than the checkpoint
    then = {**{key: defaults[key] for key in current if key in defaults}, **progress.config}
    return {change.key for change in _differences(then, current)} - set(_free_keys(config))


def record_start(session, workdir, progress: Progress, changes: Sequence[ConfigChange]):
    """Writes config.json and environment.json; returns (the steps at which the run was resumed so far, lines about what has changed since it began)."""
    path, config, step = os.path.join(workdir, ENVIRONMENT), session.config, progress.step
    before = read_json(path) if step and storage.exists(path) else {}
    environment = describe_environment()
    notes = list(before.get('changes', ()))
    if any(change.key == ANY_KEY for change in changes):
        notes.append(
            f'changed at step {step:,}: {CONFIG} was missing, so the config up to there is not known'
        )
    elif changes:
        goes_on = _where_it_goes_on(session, workdir, progress, changes)
        notes.append(f'changed at step {step:,}: {_listed(changes)}; {goes_on}')
    versions = [
        f'{name} was {old}, is {environment["packages"].get(name)}'
        for name, old in before.get('packages', {}).items()
        if old != environment['packages'].get(name)
    ]
    if versions:
        notes.append(
            f'changed at step {step:,}: {"; ".join(versions)}: the same run, but not to the bit'
        )
    for note in notes[len(before.get('changes', ())) :]:
        print(f'note      {note}', flush=True)
    resumed_from = before.get('resumed_from', []) + [step] * (0 < step < session.plan.total_steps)
    storage.make_folder(
        session.checkpoints.directory
    )  # now, and not hours later, it shows that something is in the way
    for name in (SUMMARY, SKIPPED):  # of a run that goes on, perhaps with another config
        storage.delete(os.path.join(workdir, name))
    write_json(os.path.join(workdir, CONFIG), json.loads(config.to_json()))
    write_json(
        path,
        {
            **environment,
            'strategy': session.strategy_reason,
            'replicas': session.plan.num_replicas,
            'dtype_policy': session.dtype_policy,
            'jit_compile': session.jit_compile,
            'weights': session.loaded,
            'resumed_from': resumed_from,
            'class_names': list(session.source.class_names),
            'train_examples': session.plan.train_examples,
            'training_data': session.source.identity,
            'data_changes': session.data_changes,
            'changes': notes,
            'evaluation_from': _evaluation_from(progress, session.plan),
        },
    )
    return resumed_from, notes


def _evaluation_from(progress: Progress, plan: planning.Plan) -> int:
    """Returns the first step whose evaluation can be compared with those that this start makes."""
    if progress.evaluation_from is not None:
        return progress.evaluation_from
    step = progress.step
    is_evaluated_now = step == plan.total_steps or step % plan.eval_every == 0
    return step if is_evaluated_now else step + 1


def _where_it_goes_on(session, workdir, progress: Progress, changes: Sequence[ConfigChange]) -> str:
    """Returns in words what becomes of the rate, and where a run with another batch size is."""
    config, plan = session.config, session.plan
    before = ConfigDict(_config_before(workdir))
    # One replica: today's number of them may not divide the batch of that time.
    plan_before = planning.make_plan(
        before, plan.train_examples, plan.eval_examples, plan.num_classes, num_replicas=1
    )
    position = progress.step, progress.examples_seen, progress.distinct_seen
    plan_before = planning.continued(plan_before, before, *position)
    old = float(planning.learning_rate_of(before, plan_before)(progress.step))
    new = float(planning.learning_rate_of(config, plan)(progress.step))
    rate = f'the learning rate goes on from {old:.4g} to {new:.4g}'
    if old == new:
        rate = f'the learning rate stays {old:.4g}'
    if not any(change.key == 'batch_size' for change in changes):
        return rate
    epochs = f'{progress.examples_seen / plan.train_examples:.4g} of {plan.epochs:.4g} epochs'
    left = f'{plan.total_steps - progress.step:,} updates of {plan.batch_size:,} examples'
    seen = f'{progress.examples_seen:,} examples'
    return f'it goes on after {seen}, {epochs}; {left} are left; {rate}'


def _listed(changes: Sequence[ConfigChange]) -> str:
    return '; '.join(map(str, changes))


def _free_keys(config) -> Collection[str]:
    """Returns the keys that may differ between the starts of a run of this config."""
    if config.dataset.name == 'folder':  # whose data_dir is what the pictures are
        return [key for key in FREE_KEYS if key != 'dataset.data_dir']
    return FREE_KEYS


def _measured_under(config) -> dict:
    """Returns {key: value} of the keys that may not differ between the starts of a run."""
    free_keys = _free_keys(config)
    return {key: value for key, value in _as_read(config).items() if key not in free_keys}


def _as_read(config) -> dict:
    """Returns {key: value} of a config as they are once they were written and read again."""
    return flatten(json.loads(storage.as_json(json.loads(config.to_json()))))


def _differences(before: dict, now: dict) -> list[ConfigChange]:
    keys = sorted(before.keys() | now.keys())
    changes = [ConfigChange(key, before.get(key), now.get(key)) for key in keys]
    return [change for change in changes if change.before != change.after]


def _config_before(workdir):
    """The config of the run in `workdir`, nested dicts; a key that is newer than the run had its default then."""
    return _merged(
        json.loads(default.get_config().to_json()), read_json(os.path.join(workdir, CONFIG))
    )


def _merged(defaults, values):
    return {
        **defaults,
        **{
            key: _merged(defaults.get(key, {}), value) if isinstance(value, dict) else value
            for key, value in values.items()
        },
    }
