"""A training run, in the order in which it happens: session, resume, loop, export, report."""
import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import signal
import statistics
import tempfile
import time

import tensorflow as tf

import evaluate
import export
import plan as planning
from devices.environment import describe_environment
from errors import RunError
from inputs import augment, pipeline, service
from modeling import loops, models, steps
from outputs import plots, report
from outputs.logbook import Logbook, read_json, read_metrics, write_json
from session import open_session, require_same_config

@dataclasses.dataclass
class Stop:
    """The signal that asked this process to stop, if one did, and the one that all workers agreed to stop for."""

    asked: int | None = None
    signal_number: int | None = None


def run(config, workdir):
    """Trains, evaluates, exports and reports; continues what `workdir` holds of the same config.

    Returns: the exit status: 0, or 143 after SIGTERM.
    """
    if is_finished(config, workdir):
        print(f'{workdir} is finished: see {os.path.join(workdir, "report.md")}')
        return 0
    session = open_session(config, workdir)
    if session.is_chief:
        return lead(session, workdir)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):  # one worker writes and speaks for all
        return follow(session, scratch)


def lead(session, workdir):
    """The run as the only process, or as the one of several workers that writes; returns the exit status."""
    print(session.describe(), flush=True)
    start_step = resume(session)
    resumed_from = record_start(session, workdir, start_step)
    metrics, signal_number = train_until_stopped(session, workdir, start_step)
    if signal_number is not None:
        name = signal.Signals(signal_number).name
        print(f'{name}: stopped at step {session.checkpoints.latest_step():,}, saved; the same command continues', flush=True)
        return 0 if signal_number == signal.SIGINT else 128 + signal_number

    exported = export.write(session, os.path.join(workdir, 'export'))
    rows = read_metrics(workdir)
    plots.plot_learning_rate(os.path.join(workdir, 'plots', 'learning_rate.png'), *planning.planned_rates(session.config, session.plan), rows,
                             session.plan.warmup_steps, session.plan.hold_steps)
    plots.plot_curves(os.path.join(workdir, 'plots', 'curves.png'), {os.path.basename(workdir): rows})
    summary = summarize(session, metrics, rows, exported, resumed_from)
    report.write_report(workdir, summary, session.describe(), (*session.source.notes, *session.data_changes))
    write_json(os.path.join(workdir, 'summary.json'), summary)  # the last file: it says that all is done
    print(f'{summary["eval/accuracy"]:.2%} of {summary["eval/examples"]:,} evaluation examples; report in {os.path.join(workdir, "report.md")}')
    session.agree([1])  # the others may go
    return 0


def follow(session, scratch):
    """The run as one of several workers that does not write, except into a folder of its own; returns the exit status."""
    _, signal_number = train_until_stopped(session, scratch, resume(session))
    if signal_number is not None:
        return 0 if signal_number == signal.SIGINT else 128 + signal_number
    session.agree([1])  # waits for the report: a worker that leaves takes the connection with it
    return 0


def train_until_stopped(session, workdir, start_step):
    """`train` with a logbook in `workdir`; returns (metrics of the last evaluation, signal that stopped it before or None)."""
    logbook = Logbook(workdir, start_step, session.plan.total_steps)
    with stop_on_signal() as stop, service.watch(session.config.dataset.service), contextlib.closing(logbook):
        try:
            return train(session, logbook, start_step, stop), stop.signal_number
        except tf.errors.OpError as error:
            damage = session.source.damage()
            if damage:
                raise RunError(f'pictures cannot be read any more: {damage}. The same command leaves them out and continues at the last checkpoint') from error
            raise


def train(session, logbook, start_step, stop):
    """Runs updates `start_step` to the last, with logging, evaluation and checkpoints at their intervals.

    Returns: the metrics of the last evaluation, or None when a signal stopped the run before.
    """
    config, plan, checkpoints = session.config, session.plan, session.checkpoints
    evaluation = evaluate.make_evaluation(session)
    stages = [stage for stage in planning.stages(config, plan) if stage[0] > start_step]

    step, stage_end, metrics, window, saved_at = start_step, start_step, None, Window(start_step), time.monotonic()
    while step < plan.total_steps and stop.signal_number is None:
        if step == stage_end:
            stage_end, stage_config = stages.pop(0)
            train_loop, iterator = begin_stage(session, stage_config, step, stage_end)
        until = min(stage_end, step + config.steps_per_loop, *(next_multiple(step, every) for every in plan.intervals))
        began = time.monotonic()
        results = {key: float(value) for key, value in train_loop(iterator, tf.constant(until - step)).items()}  # waits for the devices
        seconds = time.monotonic() - began
        require_finite(results['loss'], session, step, until)  # before anything is saved
        window.add(results, seconds)
        checkpoints.train_seconds.assign_add(seconds)
        checkpoints.input_seconds.assign_add(results['input_seconds'])
        step = until
        logbook.advance(step)
        ended = step == plan.total_steps
        if step % plan.log_every == 0 or ended:
            logbook.write(step, window.metrics(session, step))
            window = Window(step)
        if step % plan.eval_every == 0 or ended:
            metrics = evaluation()
            logbook.write(step, metrics)
            checkpoints.save_if_best(step, metrics['eval/accuracy'])
        due = agree_on(session, stop, is_due(plan, step, saved_at))
        if due or ended or stop.signal_number is not None:
            session.synchronize()
            checkpoints.save(step)
            saved_at = time.monotonic()
    if step < plan.total_steps:
        return None
    stop.signal_number = None  # it came after the last update: what is left is short, and done
    return metrics or evaluation()


def begin_stage(session, config, first_step, end_step):
    """The training loop, not traced yet, and the batches of steps `first_step` to `end_step` under the config of a stage."""
    plan = session.plan
    models.set_dropout(session.state.model, config.model.dropout)
    train_step = steps.make_train_step(session.state, config, augment.on_device(config.augment, plan.num_classes), num_classes=plan.num_classes,
                                       num_replicas=plan.num_replicas, jit_compile=session.jit_compile, teacher=session.teacher)
    batches = pipeline.training_batches(session.source, config, plan, first_step, end_step, session.strategy)
    return loops.make_train_loop(session.strategy, train_step), iter(batches)


class Window:
    """Sums of the updates since the last row of metrics.jsonl."""

    def __init__(self, first_step):
        self.first_step, self.sums, self.seconds = first_step, collections.Counter(), 0.0

    def add(self, results, seconds):
        """Adds what a train loop returned, as floats, and how long it took."""
        self.seconds += seconds
        self.learning_rate = results['learning_rate']
        self.sums.update(results)

    def metrics(self, session, step):
        """The means over the window as a row of metrics.jsonl."""
        state, num_steps = session.state, step - self.first_step
        row = {
            'train/loss': self.sums['loss'] / num_steps,
            'train/accuracy': self.sums['correct'] / (num_steps * session.plan.batch_size),
            'train/learning_rate': self.learning_rate,  # that the last update used
            'train/grad_norm': self.sums['grad_norm'] / num_steps,
            'train/examples_per_second': num_steps * session.plan.batch_size / self.seconds,
            'train/input_wait_fraction': min(1.0, self.sums['input_seconds'] / self.seconds),
        }
        if state.skipped_updates is not None:
            row['train/skipped_updates'] = int(state.skipped_updates.numpy())
        return row


def require_finite(loss, session, first_step, last_step):
    """Raises RunError when `loss`, the sum over these steps, is not a finite number."""
    if math.isfinite(loss):
        return
    saved = session.checkpoints.latest_step()
    teacher = f'see whether the answers of the teacher {session.teacher_name} are numbers, ' if session.teacher else ''
    raise RunError(f'the loss is {loss} somewhere in steps {first_step:,} to {last_step:,}: {teacher}lower config.schedule.peak_lr, lengthen '
                   'config.schedule.warmup or set config.grad_clip_norm, with a new --workdir; '
                   + (f'step {saved:,} is saved in this one' if saved else 'no step is saved yet'))


def is_finished(config, workdir):
    """Whether `workdir` holds the finished run of this config. Raises ConfigError if it holds a run of another one."""
    require_same_config(config, workdir)
    return os.path.exists(os.path.join(workdir, 'summary.json'))


def resume(session):
    """Restores the last checkpoint if there is one; returns the step to go on from."""
    saved = session.checkpoints.latest_step() or 0
    everywhere, workers = session.agree([saved, 1])
    if everywhere != saved * workers:
        raise RunError(f'this worker found step {saved:,} in its workdir, and others another one: all workers need one --workdir, on a disk that they share')
    if not saved:
        return 0
    step = session.checkpoints.restore()
    print(f'resumes   at step {step:,}', flush=True)
    return step


def record_start(session, workdir, start_step):
    """Writes config.json and environment.json; returns the steps at which the run was resumed so far."""
    path = os.path.join(workdir, 'environment.json')
    resumed_from = []
    if start_step and os.path.exists(path):
        trains_on = start_step < session.plan.total_steps
        resumed_from = read_json(path)['resumed_from'] + [start_step] * trains_on
    os.makedirs(workdir, exist_ok=True)
    write_json(os.path.join(workdir, 'config.json'), json.loads(session.config.to_json()))
    write_json(path, {**describe_environment(), 'strategy': session.strategy_reason, 'replicas': session.plan.num_replicas,
                      'dtype_policy': session.dtype_policy, 'jit_compile': session.jit_compile, 'weights': session.loaded, 'resumed_from': resumed_from,
                      'class_names': list(session.source.class_names), 'train_examples': session.plan.train_examples,
                      'training_data': session.source.identity, 'data_changes': session.data_changes})
    return resumed_from


def summarize(session, metrics, rows, exported, resumed_from):
    """The content of summary.json."""
    plan, checkpoints = session.plan, session.checkpoints
    speeds = [row['train/examples_per_second'] for row in rows if 'train/examples_per_second' in row]
    train_seconds = float(checkpoints.train_seconds)
    digest = hashlib.sha256()
    for variable in models.weights(session.state.model):
        digest.update(variable.numpy().tobytes())
    return {
        'steps': plan.total_steps,
        'examples_seen': plan.total_steps * plan.batch_size,
        **metrics,
        'best/accuracy': float(checkpoints.best_accuracy),
        'train_seconds': train_seconds,  # in the training loop: without evaluation, checkpoints and set-up
        'examples_per_second': statistics.median(speeds) if speeds else 0.0,  # nothing where metrics.jsonl was lost
        'input_wait_fraction': min(1.0, float(checkpoints.input_seconds) / train_seconds) if train_seconds else 0.0,
        'resumed_from': resumed_from,
        'weights_sha256': digest.hexdigest(),
        **exported,
    }


@contextlib.contextmanager
def stop_on_signal():
    """Turns the first SIGINT or SIGTERM into a request to stop after the current loop; a second one acts as usual."""
    stop, usual = Stop(), {}

    def ask(signal_number, frame):
        stop.asked = signal_number
        signal.signal(signal_number, usual[signal_number])
        print(f'\n{signal.Signals(signal_number).name}: finishing the loop, then saving', flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        usual[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def is_due(plan, step, saved_at):
    """Whether a checkpoint is due: by steps, or by time, and then together with a row of metrics.jsonl."""
    if plan.checkpoint_every:
        return step % plan.checkpoint_every == 0
    return step % plan.log_every == 0 and time.monotonic() - saved_at > plan.checkpoint_seconds


def agree_on(session, stop, due):
    """Tells all workers of a signal that one got, and of a checkpoint that is due by one's clock; returns whether one is due.

    A signal that comes in the meantime is told after the next loop.
    """
    signals = (signal.SIGINT, signal.SIGTERM)
    *asked, due = session.agree([*(stop.asked == number for number in signals), due])
    stop.signal_number = next((number for number, votes in zip(signals, asked) if votes), None)
    return due > 0


def next_multiple(step, every):
    return (step // every + 1) * every
