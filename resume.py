"""What a folder holds of an earlier start, and whether this start goes on with it: never with another learning-rate curve without a word."""
import json
import os

from ml_collections import ConfigDict

import plan as planning
from configs import default
from devices.environment import describe_environment
from errors import ConfigError, RunError
from outputs import files
from outputs.checkpoints import steps_in
from outputs.files import read_json, write_json
from outputs.logbook import read_metrics
from outputs.progress import Progress
from settings import flatten

# Keys that may differ between the starts of one run: they change where and how fast it goes and when it looks, not what is computed
# (except that without model.sync_batch_norm each replica has statistics of its own).
FREE_KEYS = ('dataset.data_dir', 'dataset.service', 'dataset.max_broken', 'eval_batch_size', 'jit_compile', 'strategy', 'virtual_devices', 'tpu',
             'steps_per_loop', 'log_every', 'eval_every', 'checkpoint_every', 'keep_checkpoints', 'max_skipped_updates')
CONFIG, ENVIRONMENT, SUMMARY, SKIPPED = 'config.json', 'environment.json', 'summary.json', 'skipped.json'
FILES = (CONFIG, ENVIRONMENT, SUMMARY, SKIPPED, 'metrics.jsonl', 'tensorboard', 'checkpoints', 'plots', 'preview', 'export', 'export.part', 'report.md', 'evaluation.json')


def begun(workdir):
    """Whether `workdir` holds a run: a start that failed before its first checkpoint is none."""
    return files.exists(os.path.join(workdir, CONFIG)) and (is_finished(workdir) or bool(steps_in(os.path.join(workdir, 'checkpoints'))))


def is_finished(workdir):
    path = os.path.join(workdir, SUMMARY)
    return files.exists(path) and bool(files.read(path).strip())


def config_changes(config, workdir, free_keys=FREE_KEYS):
    """How `config` differs from that of the run in `workdir`: texts such as 'seed was 0, is 1'. Keys in `free_keys` may differ."""
    if not begun(workdir):
        return []
    if config.dataset.name == 'folder' and free_keys is FREE_KEYS:
        free_keys = [key for key in free_keys if key != 'dataset.data_dir']  # of a folder it is what the pictures are
    before, now = flatten(_config_before(workdir)), flatten(json.loads(config.to_json()))
    return [f'{key} was {before.get(key)!r}, is {now.get(key)!r}' for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and key not in free_keys]


def require_same_config(config, workdir, free_keys=FREE_KEYS):
    """Raises ConfigError, with the differences, if `workdir` holds a run of another config; `free_keys` may differ."""
    changes = config_changes(config, workdir, free_keys)
    if changes:
        raise refusal(workdir, changes)


def refusal(workdir, changes):
    """The ConfigError of a config that has changed."""
    return ConfigError(f'{workdir} holds a run of another config ({"; ".join(changes)}): use that config, or give this one its own --workdir. '
                       'On purpose, --resume=changed trains on with the new config, and --resume=never moves that run aside')


def unknown_config(workdir):
    """What is to be said of checkpoints without a config.json, as `config_changes` does; none where there are none."""
    missing = not files.exists(os.path.join(workdir, CONFIG)) and steps_in(os.path.join(workdir, 'checkpoints'))
    return [f'{CONFIG} is missing, so nobody knows which'] if missing else []


def set_aside(workdir):
    """Moves what a run has left in `workdir` into a folder of its own there, `before-1`, and says so; nothing is deleted."""
    left = [name for name in files.list_folder(workdir) if name in FILES]
    if not left:
        return
    aside = next(path for path in (os.path.join(workdir, f'before-{number}') for number in range(1, 10**6)) if not files.exists(path))
    files.make_folder(aside)
    for name in left:
        files.move(os.path.join(workdir, name), os.path.join(aside, name))
    print(f'begins    anew; the run before is in {aside}', flush=True)


def compare_data(source, workdir, trains):
    """What the run in `workdir` was begun with, beside the data as they are now.

    Returns: (training examples that its durations count, or None for a new run; lines about data that have changed since).

    Raises: RunError if it knows other classes, or in another order: its answers would be misread.
    """
    path = os.path.join(workdir, ENVIRONMENT)
    if not begun(workdir) or not files.exists(path):
        return None, ()
    before = read_json(path)
    known = before.get('class_names', list(source.class_names))
    if list(source.class_names) != known:
        first = next((f'{old!r} is now {new!r}' for old, new in zip(known, source.class_names) if old != new), 'the first of them are the same')
        raise RunError(f'the run in {workdir} has {len(known)} classes and this data set {len(source.class_names)}, which differ ({first}): '
                       'take the data it was trained on, or give these a --workdir of their own')
    examples, changes = before.get('train_examples'), tuple(before.get('data_changes', ()))
    if trains and source.identity != before.get('training_data', source.identity):
        changes += (f'the training pictures have changed during the run, which began with {examples:,}: now there are {source.num_train:,}. '
                    'The schedule stays, the order is another',)
    return examples, changes


def restore(session, workdir):
    """Reads the last good checkpoint if there is one, and says so; returns the Progress to go on from."""
    saved = session.checkpoints.latest_step() or 0
    everywhere, workers = session.agree([saved, 1])
    if everywhere != saved * workers:
        raise RunError(f'this worker found step {saved:,} in its workdir, and others another one: all workers need one --workdir, on a disk that they share')
    rows = read_metrics(workdir)
    if saved and not rows and session.is_chief:
        print(f'note      no row of metrics.jsonl is left: what was measured up to step {saved:,} is lost', flush=True)
    if saved:
        _, progress = session.checkpoints.restore()
        lost = f'; what came after it, up to step {rows[-1]["step"]:,}, is done again' if rows and rows[-1]['step'] > saved else ''
        print(f'resumes   at step {saved:,}{lost}', flush=True)
        if saved > session.plan.total_steps:
            raise ConfigError(f'the run is at step {saved:,}, after the end of this config at step {session.plan.total_steps:,}: raise config.train_for')
        return Progress(**progress)
    if rows:
        print(f'begins    at step 0: metrics.jsonl reaches step {rows[-1]["step"]:,}, but no checkpoint is there', flush=True)
    return Progress()


def record_start(session, workdir, step, changes):
    """Writes config.json and environment.json; returns (the steps at which the run was resumed so far, lines about what has changed since it began)."""
    path, config = os.path.join(workdir, ENVIRONMENT), session.config
    before = read_json(path) if step and files.exists(path) else {}
    environment = describe_environment()
    notes = list(before.get('changes', ()))
    if changes and files.exists(os.path.join(workdir, CONFIG)):
        old = ConfigDict(_config_before(workdir))
        plan = session.plan
        rates = [float(planning.learning_rate_of(config, plan)([step])[0]) for config, plan in (
            (old, planning.make_plan(old, plan.train_examples, plan.eval_examples, plan.num_classes, plan.num_replicas)), (config, plan))]
        rate = f'the learning rate goes on from {rates[0]:.4g} to {rates[1]:.4g}' if rates[0] != rates[1] else f'the learning rate stays {rates[0]:.4g}'
        notes.append(f'changed at step {step:,}: {"; ".join(changes)}; {rate}')
    versions = [f'{name} was {old}, is {environment["packages"].get(name)}' for name, old in before.get('packages', {}).items()
                if old != environment['packages'].get(name)]
    if versions:
        notes.append(f'changed at step {step:,}: {"; ".join(versions)}: the same run, but not to the bit')
    for note in notes[len(before.get('changes', ())):]:
        print(f'note      {note}', flush=True)
    resumed_from = before.get('resumed_from', []) + [step] * (0 < step < session.plan.total_steps)
    files.make_folder(session.checkpoints.directory)  # now, and not hours later, it shows that something is in the way
    for name in (SUMMARY, SKIPPED):  # of a run that goes on, perhaps with another config
        files.delete(os.path.join(workdir, name))
    write_json(os.path.join(workdir, CONFIG), json.loads(config.to_json()))
    write_json(path, {**environment, 'strategy': session.strategy_reason, 'replicas': session.plan.num_replicas,
                      'dtype_policy': session.dtype_policy, 'jit_compile': session.jit_compile, 'weights': session.loaded, 'resumed_from': resumed_from,
                      'class_names': list(session.source.class_names), 'train_examples': session.plan.train_examples,
                      'training_data': session.source.identity, 'data_changes': session.data_changes, 'changes': notes})
    return resumed_from, notes


def _config_before(workdir):
    """The config of the run in `workdir`, nested dicts; a key that is newer than the run had its default then."""
    return _merged(json.loads(default.get_config().to_json()), read_json(os.path.join(workdir, CONFIG)))


def _merged(defaults, values):
    return {**defaults, **{key: _merged(defaults.get(key, {}), value) if isinstance(value, dict) else value for key, value in values.items()}}
