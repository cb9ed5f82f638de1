"""Finds an earlier run in a folder, and decides whether this launch continues it.

A run never continues with a different learning-rate curve unless told to.
"""

import json
import os
import shlex
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from common import console, storage
from common.errors import ConfigError, RunError
from common.storage import read_json, write_json
from configs import default
from devices.environment import describe_environment
from experiment import config_diff, planning
from experiment.config_diff import ConfigChange
from inputs.datasets import Source
from outputs.checkpoints import steps_in
from outputs.metrics_logger import read_metrics
from outputs.train_progress import ANY_KEY, Progress, changes_evaluation

if TYPE_CHECKING:
    from experiment.session import Session

CONFIG, ENVIRONMENT = 'config.json', 'environment.json'
SUMMARY, SKIPPED = 'summary.json', 'skipped.json'
RUN_FILES = (
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


def has_run(workdir: str) -> bool:
    """Returns whether `workdir` holds a finished run or one with a checkpoint."""
    has_config = storage.exists(os.path.join(workdir, CONFIG))
    return has_config and (is_finished(workdir) or has_checkpoints(workdir))


def has_checkpoints(workdir: str) -> bool:
    return bool(steps_in(os.path.join(workdir, 'checkpoints')))


def is_finished(workdir: str) -> bool:
    path = os.path.join(workdir, SUMMARY)
    return storage.exists(path) and bool(storage.read(path).strip())


def config_changes(
    config: ConfigDict, workdir: str, free_keys: Collection[str] | None = None
) -> list[ConfigChange]:
    """Returns how `config` differs from that of the run in `workdir`; `free_keys` may differ."""
    if not has_run(workdir):
        return []
    return config_diff.changes_since(config, os.path.join(workdir, CONFIG), free_keys)


def require_same_config(
    config: ConfigDict, workdir: str, free_keys: Collection[str] | None = None
) -> None:
    """Raises ConfigError, with the differences, if `workdir` holds a run of another config."""
    changes = config_changes(config, workdir, free_keys)
    if changes:
        raise changed_config_error(workdir, config, changes)


def changed_config_error(
    workdir: str, config: ConfigDict, changes: Sequence[ConfigChange]
) -> ConfigError:
    """Returns the error for a changed config, which says whether --resume=changed would help."""
    on_purpose = (
        'If this is intended, --resume=changed continues training with this config, or '
        '--resume=never moves that run aside'
    )
    if any(change.key == ANY_KEY for change in changes):
        return ConfigError(
            f'{workdir} holds checkpoints but no {CONFIG}, so their config is unknown',
            f'restore it from a backup, or give this config its own --workdir. {on_purpose}',
        )
    held = f'{workdir} holds a run of another config ({config_diff.format_changes(changes)})'
    keys = [change.key for change in config_diff.incompatible_changes(config, changes)]
    if not keys:
        fix = f'use that config, or give this one its own --workdir. {on_purpose}'
        return ConfigError(held, fix, changes[0].key)
    problem = f'{held}, and its checkpoints cannot be used with a different {" or ".join(keys)}'
    if 'model.name' in keys:
        fix = 'use that config, or give this one its own --workdir'
        return ConfigError(problem, fix, 'model.name')
    start = f'--workdir=NEW --config.model.weights={shlex.quote(workdir)}'
    fix = f'use that config, or start a new run with its weights, {start}'
    return ConfigError(problem, fix, keys[0])


def require_compatible(workdir: str, config: ConfigDict, changes: Sequence[ConfigChange]) -> None:
    """Raises ConfigError if the run cannot continue with these changes; needs no data or model."""
    if config_diff.incompatible_changes(config, changes):
        raise changed_config_error(workdir, config, changes)


def missing_config_change(workdir: str) -> list[ConfigChange]:
    """Returns a change of `ANY_KEY` if there are checkpoints but no config.json, else []."""
    is_missing = not storage.exists(os.path.join(workdir, CONFIG)) and has_checkpoints(workdir)
    return [ConfigChange(ANY_KEY, None, None)] if is_missing else []


def archive_run(workdir: str) -> None:
    """Moves the files of a run into a folder of its own in `workdir`, `before-1`, and says so."""
    left = [name for name in storage.list_folder(workdir) if name in RUN_FILES]
    if not left:
        return
    number = 1
    while storage.exists(os.path.join(workdir, f'before-{number}')):
        number += 1
    archive = os.path.join(workdir, f'before-{number}')
    storage.make_folder(archive)
    for name in left:
        storage.move(os.path.join(workdir, name), os.path.join(archive, name))
    console.row('begins', f'a new run; the previous one was moved to {archive}')


def compare_data(source: Source, workdir: str, trains: bool) -> tuple[int | None, tuple[str, ...]]:
    """Compares the data with which the run in `workdir` began to the present data.

    Returns: (number of training examples that its durations are based on, None for a new run; notes
    on data that have changed since).

    Raises: RunError if the classes or their order differ, because outputs would be misread.
    """
    path = os.path.join(workdir, ENVIRONMENT)
    is_resumed = has_run(workdir) or has_checkpoints(workdir)
    if not is_resumed or not storage.exists(path):
        return None, ()
    before = read_json(path)
    names = list(source.class_names)
    known = before.get('class_names', names)
    if names != known:
        differing = [pair for pair in zip(known, names, strict=False) if pair[0] != pair[1]]
        first = 'the leading ones are the same'
        if differing:
            first = f'{differing[0][0]!r} is now {differing[0][1]!r}'
        raise RunError(
            f'the run in {workdir} has {len(known)} classes and this data set {len(names)}, which '
            f'differ ({first})',
            'use the data it was trained on, or another --workdir',
        )
    examples, changes = before.get('train_examples'), tuple(before.get('data_changes', ()))
    has_changed = source.identity != before.get('training_data', source.identity)
    if trains and has_changed:
        change = (
            f'the training images have changed during the run: it began with {examples:,}, now '
            f'there are {source.num_train:,}. The schedule stays the same, the order of the images '
            'does not'
        )
        changes = (*changes, change)
    return examples, changes


def restore(session: 'Session', workdir: str, changes: Sequence[ConfigChange] = ()) -> Progress:
    """Restores the last intact checkpoint, if there is one, and says so.

    Args:
        session: its plan and learning rate are moved to the run's position.
        workdir: where this process writes.
        changes: of the config since the last start.

    Returns: the run's progress, without what is not valid under the session's config.
    """
    saved = session.checkpoints.latest_step() or 0
    total, workers = session.sum_over_workers([saved, 1])
    if total != saved * workers:
        raise RunError(
            f'this worker found step {saved:,} in its workdir, other workers found another step',
            'give all workers the same --workdir, on a shared disk',
        )
    rows = read_metrics(workdir)
    last_row = rows[-1]['step'] if rows else 0
    if not saved:
        if rows:
            reaches = f'metrics.jsonl reaches step {last_row:,}, but there is no checkpoint'
            console.row('begins', f'at step 0: {reaches}')
        return Progress(config=config_diff.fixed_values(session.config))
    if not rows and session.is_chief:
        lost = f'the metrics up to step {saved:,} are lost'
        console.note(f'metrics.jsonl is missing or empty: {lost}')
    _, saved_progress = session.checkpoints.restore()
    progress = _progress_of(saved_progress, session, changes)
    redone = f'; later steps, up to {last_row:,}, are repeated'
    console.row('resumes', f'at step {saved:,}{redone if last_row > saved else ""}')
    session.continue_from(progress)
    plan = session.plan
    if plan.offset.updates or plan.offset.examples:
        console.row(
            '',
            f'after {progress.examples_seen:,} examples at several batch sizes: the run has '
            f'{plan.total_steps:,} updates; at the current batch size its schedule is at step '
            f'{saved + plan.offset.updates:,} of {plan.schedule_steps:,}',
        )
    if saved > plan.total_steps:
        raise ConfigError(
            f'the run is at step {saved:,}, but this config ends at step {plan.total_steps:,}',
            'raise config.train_for',
            'train_for',
        )
    return progress


def _progress_of(
    saved: dict[str, Any], session: 'Session', changes: Sequence[ConfigChange]
) -> Progress:
    """Returns a checkpoint's progress, without what is not valid in this session."""
    config, eval_examples = session.config, session.plan.eval_examples
    before = {change.key: change.before for change in changes}
    repeats = before.get('augment.repeats', config.augment.repeats)
    progress = Progress(**{'distinct_seen': saved['examples_seen'] // repeats, **saved})
    progress.metrics = storage.nan_for_null(progress.metrics)
    keys = _keys_changed_since(progress, config, changes)
    evaluated = progress.metrics.get('eval/examples', eval_examples)
    if evaluated != eval_examples and not any(map(changes_evaluation, keys)):
        console.note(
            f'the evaluation split has {eval_examples:,} examples now but had {evaluated:,}: '
            'earlier results are not compared with new ones'
        )
        keys.add('dataset.eval_split')
    progress.reset_for_config_change(keys)
    progress.config = config_diff.fixed_values(config)
    return progress


def _keys_changed_since(
    progress: Progress, config: ConfigDict, changes: Sequence[ConfigChange]
) -> set[str]:
    """Returns the keys whose values have changed since `progress` was saved.

    A checkpoint stores its config, so later launches with other configs do not matter. For
    checkpoints of older versions, which do not, `changes` since the last launch are used.
    """
    changed = {change.key for change in changes}
    if progress.config is None or ANY_KEY in changed:
        return changed
    current = config_diff.fixed_values(config)
    defaults = config_diff.as_read_back(default.get_config())  # of keys newer than the checkpoint
    then = {key: defaults[key] for key in current if key in defaults} | progress.config
    differing = {change.key for change in config_diff.differences(then, current)}
    return differing - set(config_diff.resumable_keys(config))


def record_start(
    session: 'Session', workdir: str, progress: Progress, changes: Sequence[ConfigChange]
) -> tuple[list[int], list[str]]:
    """Writes config.json and environment.json.

    Returns: (the steps at which the run was resumed, notes on what has changed since it began).
    """
    path, config, step = os.path.join(workdir, ENVIRONMENT), session.config, progress.step
    before = read_json(path) if step and storage.exists(path) else {}
    environment = {**describe_environment(), **session.describe_runtime()}
    earlier_notes = list(before.get('changes', ()))
    new_notes = []
    if any(change.key == ANY_KEY for change in changes):
        new_notes.append(f'{CONFIG} was missing, so the config up to this step is unknown')
    elif changes:
        position = _describe_position(session, workdir, progress, changes)
        new_notes.append(f'{config_diff.format_changes(changes)}; {position}')
    packages = environment['packages']
    versions = [
        f'{name} was {old}, is {packages.get(name)}'
        for name, old in before.get('packages', {}).items()
        if old != packages.get(name)
    ]
    if versions:
        new_notes.append(f'{"; ".join(versions)}: results may no longer be bit-identical')
    runtime, earlier_runtime = environment['runtime'], before.get('runtime', 'TensorFlow')
    if before and earlier_runtime != runtime:
        new_notes.append(
            f'the steps ran on {earlier_runtime}, and run on {runtime} now, which rounds '
            'differently: the weights will not be to the bit those of a run on one of them'
        )
    new_notes = [f'changed at step {step:,}: {note}' for note in new_notes]
    for note in new_notes:
        console.note(note)
    notes = earlier_notes + new_notes
    resumed_from = before.get('resumed_from', [])
    if 0 < step < session.plan.total_steps:
        resumed_from = [*resumed_from, step]
    # Created now, so that any obstacle shows up at once and not hours later.
    storage.make_folder(session.checkpoints.directory)
    for name in (SUMMARY, SKIPPED):  # stale if the run continues, perhaps with a changed config
        storage.delete(os.path.join(workdir, name))
    write_json(os.path.join(workdir, CONFIG), json.loads(config.to_json()))
    facts = {
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
    }
    write_json(path, {**environment, **facts})
    return resumed_from, notes


def _evaluation_from(progress: Progress, plan: planning.Plan) -> int:
    """Returns the first step whose evaluation is comparable with those of this launch."""
    if progress.evaluation_from is not None:
        return progress.evaluation_from
    step = progress.step
    is_evaluated_now = step == plan.total_steps or step % plan.eval_every == 0
    return step if is_evaluated_now else step + 1


def _describe_position(
    session: 'Session', workdir: str, progress: Progress, changes: Sequence[ConfigChange]
) -> str:
    """Describes how the learning rate continues, and where a run with another batch size is."""
    config, plan = session.config, session.plan
    before = ConfigDict(config_diff.read_config(os.path.join(workdir, CONFIG)))
    # One replica, because the current number may not divide the old batch size.
    plan_before = planning.make_plan(
        before, plan.train_examples, plan.eval_examples, plan.num_classes, num_replicas=1
    )
    position = progress.step, progress.examples_seen, progress.distinct_seen
    plan_before = planning.resumed_plan(plan_before, before, *position)
    old = float(planning.learning_rate_of(before, plan_before)(progress.step))
    new = float(planning.learning_rate_of(config, plan)(progress.step))
    rate = f'the learning rate goes from {old:.4g} to {new:.4g}'
    if old == new:
        rate = f'the learning rate stays {old:.4g}'
    if not any(change.key == 'batch_size' for change in changes):
        return rate
    epochs = f'{progress.examples_seen / plan.train_examples:.4g} of {plan.epochs:.4g} epochs'
    left = f'{plan.total_steps - progress.step:,} updates of {plan.batch_size:,} examples'
    seen = f'{progress.examples_seen:,} examples'
    return f'the run continues after {seen} ({epochs}); {left} remain; {rate}'
