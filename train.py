"""A training run, in the order in which it happens: session, resume, loop, export, report."""

import contextlib
import dataclasses
import hashlib
import io
import math
import os
import signal
import statistics
import tempfile
import time

import tensorflow as tf

import evaluate
import export
from common import storage
from common.errors import RunError
from devices import preemption
from devices.strategy import runs_as_chief
from experiment import planning, resume
from experiment.session import open_session
from inputs import augment, pipeline, service
from modeling import loops, models, steps
from outputs import plots, report, workdir_lock
from outputs.metrics_logger import Logbook, read_metrics
from outputs.train_progress import Progress

LONG_LOOP = 15.0  # seconds: half of the 30 that a cloud gives between its notice and the end; the checkpoint takes its time too


def run(config, workdir, continues='same'):
    """Trains, evaluates, exports and reports; continues what `workdir` holds.

    Args:
        continues: 'same' goes on with a run of the same config, 'changed' also with one of another; 'never' moves it aside.

    Returns: the exit status: 0, or 143 after SIGTERM.
    """
    is_chief = runs_as_chief(config)
    with workdir_lock.hold(workdir) if is_chief else contextlib.nullcontext() as held:
        changes = []
        if continues != 'never':
            changes = resume.unknown_config(workdir) or resume.config_changes(config, workdir)
            if changes and continues == 'same':
                raise resume.refusal(workdir, config, changes)
            resume.require_fit(workdir, config, changes)
            if not changes and resume.is_finished(workdir):
                print(f'{workdir} is finished: see {os.path.join(workdir, "report.md")}')
                return 0
        elif is_chief:
            resume.set_aside(workdir)
        session = open_session(config, workdir)
        if is_chief:
            return lead(session, workdir, changes, held)
    with (
        tempfile.TemporaryDirectory() as scratch,
        contextlib.redirect_stdout(io.StringIO()),
    ):  # one worker writes and speaks for all
        return follow(session, scratch, changes)


def lead(session, workdir, changes, held):
    """The run as the only process, or as the one of several workers that writes; returns the exit status."""

    def before_commit():  # what a checkpoint will be continued with must be there, and the folder this run's
        held.require()
        storage.force(os.path.join(workdir, 'metrics.jsonl'))

    session.checkpoints.before_commit = before_commit
    with preemption.watch() as stop:
        progress = resume.restore(session, workdir, changes)
        print(session.describe(), flush=True)
        resumed_from, notes = resume.record_start(session, workdir, progress, changes)
        stop_signal = train_until_stopped(session, workdir, progress, stop)
    if stop_signal is not None:
        saved = session.checkpoints.latest_step()
        print(
            f'{signal.Signals(stop_signal).name}: stopped at step {progress.step:,}; '
            + (
                f'the same command continues at step {saved:,}, which is saved'
                if saved
                else 'nothing is saved yet'
            ),
            flush=True,
        )
        return preemption.exit_status(stop_signal)

    if progress.step < session.plan.total_steps:
        notes.append(why_it_ended(session, progress))
        print(f'patience  {notes[-1]}', flush=True)
    last_weights = weights_digest(session)
    of_exported = load_exported(session, progress)
    if of_exported['export/step'] != progress.step:
        weights = export.describe(session.config, of_exported['export/step'], progress.step)
        print(f'exports   {weights}', flush=True)
    exported = {**of_exported, **export.write(session, os.path.join(workdir, 'export'))}
    rows = read_metrics(workdir)
    plots.plot_learning_rate(
        os.path.join(workdir, 'plots', 'learning_rate.png'),
        *planning.planned_rates(session.config, session.plan),
        rows,
        session.plan.warmup_steps,
        session.plan.hold_steps,
        begin=-session.plan.ahead.updates,
    )
    plots.plot_curves(
        os.path.join(workdir, 'plots', 'curves.png'), {os.path.basename(workdir): rows}
    )
    summary = summarize(session, progress, rows, exported, resumed_from, last_weights)
    data_notes = (*session.source.notes, *session.data_changes)
    report.write_report(workdir, summary, session.describe(), data_notes, notes)
    storage.write_json(
        os.path.join(workdir, resume.SUMMARY), summary
    )  # the last file: it says that all is done
    print(f'{report.headline(summary)}; report in {os.path.join(workdir, "report.md")}')
    session.agree([1])  # the others may go
    return 0


def why_it_ended(session, progress: Progress) -> str:
    """Returns a line about a run that is out of patience."""
    config = session.config
    than, since = '', f'since step {progress.patience_from:,}, '
    if progress.best_step is not None:
        than = f'than that of step {progress.best_step:,} '
        since = since if progress.best_step < progress.patience_from else ''
    return (
        f'ended at step {progress.step:,} of {session.plan.total_steps:,}: '
        f'no {config.best_metric} was better {than}{since}for {config.patience}, '
        "config.patience; to train on, raise it or set it to '', and add --resume=changed"
    )


def load_exported(session, progress: Progress) -> dict:
    """Gives the session the weights that are to be exported: with `config.patience` the best.

    Otherwise they are the last. All workers call it together.

    Returns: {'export/step', 'export/eval_accuracy', 'export/eval_loss', 'export/eval_top5'}: after
        which update that was, and what its evaluation gave over the whole split.
    """
    step, restored = progress.step, dataclasses.asdict(progress)
    if export.exports_best(session.config) and progress.best_step not in (None, step):
        session.agree([1])  # the last checkpoint, which names the best, is written
        step, restored, _ = export.restore(session)
    return {'export/step': step, **export.evaluation(restored, step)}


def follow(session, scratch, changes):
    """The run as one of several workers that does not write, except into a folder of its own; returns the exit status."""
    with preemption.watch() as stop:
        progress = resume.restore(session, scratch, changes)
        stop_signal = train_until_stopped(session, scratch, progress, stop)
    if stop_signal is not None:
        return preemption.exit_status(stop_signal)
    load_exported(session, progress)
    session.agree([1])  # waits for the report: a worker that leaves takes the connection with it
    return 0


def train_until_stopped(session, workdir, progress, stop):
    """`train` with a logbook in `workdir`; returns None, or the signal that stopped it before the end."""
    logbook = Logbook(workdir, progress.step, session.plan.total_steps)
    with service.watch(session.config.dataset.service), contextlib.closing(logbook):
        try:
            return train(session, logbook, progress, stop)
        except tf.errors.OpError as error:
            damage = session.source.damage()
            if damage:
                raise RunError(
                    f'pictures cannot be read any more: {damage}. The same command leaves them out and continues at the last checkpoint'
                ) from error
            raise
        finally:
            session.checkpoints.wait()  # also when something else went wrong: what was saved shall count


def train(session, logbook, progress, stop):
    """Runs updates from `progress.step` to the last, with logging, evaluation and checkpoints at their intervals.

    Returns: None, or the signal that stopped it before the end; `progress` says how far it came.
    """
    config, plan, checkpoints = session.config, session.plan, session.checkpoints
    evaluation = evaluate.make_evaluation(session)
    stages = [stage for stage in planning.stages(config, plan) if stage[0] > progress.step]
    stage_end, saved_at, warned = progress.step, time.monotonic(), False
    while True:
        step, best = progress.step, False
        at_end = step == plan.total_steps
        if (at_end or (step and step % plan.eval_every == 0)) and progress.evaluated_at != step:
            metrics = evaluation(lambda: asked(session, stop) is not None)
            if metrics:
                logbook.write(step, metrics)
                best = progress.evaluated(metrics, config.best_metric)
        done = progress.evaluated_at == step and (at_end or progress.out_of_patience(plan.patience))
        stop_signal = None if done else asked(session, stop)  # what is left at the end is short
        is_due = due(session, step, saved_at)
        if step and (
            done or ((is_due or best or stop_signal) and not progress.skipped_in_a_row)
        ):  # a diverging run would save over something better
            session.synchronize()
            checkpoints.save(step, dataclasses.asdict(progress), progress.best_step)
            saved_at = time.monotonic()
        if done or stop_signal:
            return stop_signal
        if step == stage_end:
            stage_begin, (stage_end, stage_config) = step, stages.pop(0)
            train_loop, iterator = begin_stage(session, stage_config, step, stage_end)
        until = min(
            stage_end,
            step + config.steps_per_loop,
            *(next_multiple(step, every) for every in plan.intervals),
        )
        began = time.monotonic()
        results = {
            key: float(value)
            for key, value in train_loop(iterator, tf.constant(until - step)).items()
        }  # waits for the devices
        seconds = time.monotonic() - began
        progress.add(until, results, seconds, plan.batch_size, config.augment.repeats)
        logbook.advance(until)
        if (
            seconds > LONG_LOOP and step > stage_begin and not warned
        ):  # the first one of a stage is traced and compiled as well
            logbook.say(
                f'note      a loop takes {seconds:.0f} s, and a machine that is taken back gives about 30: lower config.steps_per_loop to stop in time'
            )
            warned = True
        require_numbers(session, progress, os.path.dirname(logbook.path))
        if until % plan.log_every == 0 or until == plan.total_steps:
            logbook.write(until, progress.close_window(plan.batch_size))


def begin_stage(session, config, first_step, end_step):
    """The training loop, not traced yet, and the batches of steps `first_step` to `end_step` under the config of a stage."""
    plan = session.plan
    models.set_dropout(session.state.model, config.model.dropout)
    train_step = steps.make_train_step(
        session.state,
        config,
        augment.on_device(config.augment, plan.num_classes),
        num_classes=plan.num_classes,
        num_replicas=plan.num_replicas,
        jit_compile=session.jit_compile,
        on_tpu=session.kind == 'TPU',
        teacher=session.teacher,
    )
    batches = pipeline.training_batches(
        session.source, config, plan, first_step, end_step, session.strategy
    )
    return loops.make_train_loop(session.strategy, train_step), iter(batches)


def require_numbers(session, progress, workdir):
    """Raises RunError when the last `config.max_skipped_updates` updates were skipped, one after the other; leaves skipped.json for `preview`."""
    most = session.config.max_skipped_updates
    if (progress.skipped_in_a_row < most) if most else math.isfinite(progress.window['loss']):
        return
    session.checkpoints.wait()
    saved = session.checkpoints.latest_step()
    first, last = (
        progress.step - progress.skipped_in_a_row if most else progress.window_start,
        progress.step - 1,
    )
    teacher = (
        f'see whether the answers of the teacher {session.teacher_name} are numbers, '
        if session.teacher
        else ''
    )
    skipped = {'first_update': first, 'last_update': last, 'ahead': session.plan.ahead}
    storage.write_json(os.path.join(workdir, resume.SKIPPED), skipped)
    updates = f'updates {first:,} to {last:,}' if first < last else f'update {first:,}'
    were_skipped = f', which {"were" if first < last else "was"} skipped' if most else ''
    raise RunError(
        f'the loss or its gradient was not finite {"in" if most or first == last else "somewhere in"} {updates}{were_skipped}: {teacher}'
        'look at the first batch with --mode=preview; lower config.schedule.peak_lr, lengthen config.schedule.warmup or set config.grad_clip_norm, '
        + (
            f'and go on from step {saved:,}, which is saved, with --resume=changed'
            if saved
            else 'and start again; no step is saved yet'
        )
    )


def due(session, step, saved_at):
    """Whether a checkpoint is due: by steps, or by time, and then together with a row of metrics.jsonl."""
    plan = session.plan
    if plan.checkpoint_every:
        return step % plan.checkpoint_every == 0
    by_clock = step % plan.log_every == 0 and time.monotonic() - saved_at > plan.checkpoint_seconds
    return session.agree([by_clock])[0] > 0  # clocks differ


def asked(session, stop):
    """The signal that some worker got, or None. All workers must ask at the same place; what comes meanwhile is told the next time."""
    signals = (signal.SIGINT, signal.SIGTERM)
    votes = session.agree([stop.asked == number for number in signals])
    return next((number for number, count in zip(signals, votes) if count), None)


def next_multiple(step, every):
    return (step // every + 1) * every


def weights_digest(session) -> str:
    """Returns the SHA-256 of the weights as they are, in hexadecimal digits."""
    digest = hashlib.sha256()
    for variable in models.float_variables(session.state.model):
        digest.update(variable.numpy().tobytes())
    return digest.hexdigest()


def summarize(session, progress, rows, exported, resumed_from, last_weights):
    """The content of summary.json: of the last update, except for best/... and export/..."""
    speeds = [
        row['train/examples_per_second'] for row in rows if 'train/examples_per_second' in row
    ]
    return {
        'steps': progress.step,
        'examples_seen': progress.examples_seen,
        'skipped_updates': progress.skipped_updates,
        **progress.metrics,
        'best/step': progress.best_step,
        session.config.best_metric.replace('eval/', 'best/'): progress.best,
        'train_seconds': progress.train_seconds,  # in the training loop: without evaluation, checkpoints and set-up
        'examples_per_second': statistics.median(speeds)
        if speeds
        else 0.0,  # nothing where metrics.jsonl was lost
        'input_wait_fraction': min(1.0, progress.input_seconds / progress.train_seconds)
        if progress.train_seconds
        else 0.0,
        'resumed_from': resumed_from,
        'weights_sha256': last_weights,
        **exported,
    }
