"""Runs training from start to finish: session, resume, loop, export, report."""

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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf
from ml_collections import ConfigDict

import evaluate
import export
from common import console, storage
from common.errors import RunError
from devices import preemption
from devices.strategy import runs_as_chief
from experiment import planning, resume
from experiment.config_diff import ConfigChange
from experiment.session import Session, open_session
from inputs import augment, pipeline, service
from modeling import loops, models, steps
from outputs import plots, report, workdir_lock
from outputs.metrics_logger import MetricsLogger, read_metrics
from outputs.train_progress import Progress

# Seconds: half of the 30 that a cloud gives between its notice and the shutdown, because writing
# the checkpoint takes time too.
LONG_LOOP_SECONDS = 15.0


def run(config: ConfigDict, workdir: str, resume_mode: str = 'same') -> int:
    """Trains, evaluates, exports and reports; continues the run in `workdir`.

    Args:
        resume_mode: 'same' continues a run with the same config, 'changed' also one with a
            different config; 'never' moves the old run aside.

    Returns: the exit status: 0, also after Ctrl-C; 143 after SIGTERM.
    """
    is_chief = runs_as_chief(config)
    with workdir_lock.hold(workdir) if is_chief else contextlib.nullcontext() as held:
        changes: list[ConfigChange] = []
        if resume_mode != 'never':
            changes = resume.missing_config_change(workdir) or resume.config_changes(
                config, workdir
            )
            if changes and resume_mode == 'same':
                raise resume.changed_config_error(workdir, config, changes)
            resume.require_compatible(workdir, config, changes)
            if not changes and resume.is_finished(workdir):
                console.line(f'{workdir} is finished: see {os.path.join(workdir, "report.md")}')
                return 0
        elif is_chief:
            resume.archive_run(workdir)
        session = open_session(config, workdir)
        if held:
            return run_chief(session, workdir, changes, held)
    # Only the chief writes files and prints.
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        return run_worker(session, scratch, changes)


def run_chief(
    session: Session,
    workdir: str,
    changes: Sequence[ConfigChange],
    held: workdir_lock.Held,
) -> int:
    """Runs the process that writes the files, the chief or the only one; returns the status."""

    def before_commit() -> None:
        """Checks that the folder is still this run's and puts the metrics on the disk."""
        held.check_ownership()
        storage.fsync(os.path.join(workdir, 'metrics.jsonl'))

    session.checkpoints.before_commit = before_commit
    with preemption.watch() as stop:
        progress = resume.restore(session, workdir, changes)
        session.print_description()
        resumed_from, notes = resume.record_start(session, workdir, progress, changes)
        stop_signal = train_until_stopped(session, workdir, progress, stop)
    if stop_signal is not None:
        console.line(describe_stop(session, stop_signal, progress.step))
        return preemption.exit_status(stop_signal)

    if progress.step < session.plan.total_steps:
        notes.append(describe_early_stop(session, progress))
        console.row('patience', notes[-1])
    last_weights = weights_digest(session)
    exported_metrics = load_weights_to_export(session, progress)
    if exported_metrics['export/step'] != progress.step:
        weights = export.describe(session.config, exported_metrics['export/step'], progress.step)
        console.row('exports', weights)
    exported = {**exported_metrics, **export.write(session, os.path.join(workdir, 'export'))}
    rows = read_metrics(workdir)
    plot(session, workdir, rows)
    summary = summarize(session, progress, rows, exported, resumed_from, last_weights)
    data_notes = (*session.source.notes, *session.data_changes)
    report.write_report(workdir, summary, session.describe(), data_notes, notes)
    # Written last: its presence marks the run as finished.
    storage.write_json(os.path.join(workdir, resume.SUMMARY), summary)
    console.line(f'{report.headline(summary)}; report in {os.path.join(workdir, "report.md")}')
    session.wait_for_all()  # releases the other workers
    return 0


def run_worker(session: Session, scratch: str, changes: Sequence[ConfigChange]) -> int:
    """Runs a worker that is not the chief and writes only to `scratch`; returns the exit status."""
    with preemption.watch() as stop:
        progress = resume.restore(session, scratch, changes)
        stop_signal = train_until_stopped(session, scratch, progress, stop)
    if stop_signal is not None:
        return preemption.exit_status(stop_signal)
    load_weights_to_export(session, progress)
    # Waits until the chief has written its report: a worker that exits early breaks the connection.
    session.wait_for_all()
    return 0


def train_until_stopped(
    session: Session, workdir: str, progress: Progress, stop: preemption.Stop
) -> int | None:
    """Trains and logs metrics to `workdir`; returns the signal that stopped training, or None."""
    logger = MetricsLogger(workdir, progress.step, session.plan.total_steps)
    with service.watch(session.config.dataset.service), contextlib.closing(logger):
        try:
            return train(session, logger, progress, stop)
        except tf.errors.OpError as error:
            missing = session.source.find_missing_files()
            if not missing:
                raise
            fix = 'the same command skips them and continues from the last checkpoint'
            raise RunError(f'images can no longer be read: {missing}', fix) from error
        finally:
            # Also after an error, so that a checkpoint that is being written is completed.
            session.checkpoints.wait()


def train(
    session: Session, logger: MetricsLogger, progress: Progress, stop: preemption.Stop
) -> int | None:
    """Runs updates from `progress.step` to the last; logs, evaluates and saves at their intervals.

    Returns: the signal that stopped it early, or None; `progress` says how far it got.
    """
    config, plan, checkpoints = session.config, session.plan, session.checkpoints
    evaluation = evaluate.make_evaluation(session)
    stages = [stage for stage in planning.stages(config, plan) if stage[0] > progress.step]
    stage_end, saved_at, has_warned = progress.step, time.monotonic(), False
    while True:
        step, is_best = progress.step, False
        at_end = step == plan.total_steps
        is_evaluation_due = at_end or (step and step % plan.eval_every == 0)
        if is_evaluation_due and progress.evaluated_at != step:
            metrics = evaluation(lambda: agreed_stop_signal(session, stop) is not None)
            if metrics:
                logger.write(step, metrics)
                is_best = progress.record_evaluation(metrics, config.best_metric)
        is_last = at_end or progress.is_out_of_patience(plan.patience)
        finished = is_last and progress.evaluated_at == step
        # The next two calls may be collectives, so all workers must make them in the same order. A
        # finished run ignores signals, because little is left to do.
        stop_signal = None if finished else agreed_stop_signal(session, stop)
        checkpoint_due = is_checkpoint_due(session, step, saved_at)
        # A diverging run must not overwrite a good checkpoint, unless it has finished.
        is_healthy = not progress.skipped_in_a_row
        should_save = finished or (is_healthy and (checkpoint_due or is_best or stop_signal))
        if step and should_save:
            session.synchronize()
            checkpoints.save(step, dataclasses.asdict(progress), progress.best_step)
            saved_at = time.monotonic()
        if finished or stop_signal:
            return stop_signal
        if step == stage_end:
            stage_begin, (stage_end, stage_config) = step, stages.pop(0)
            train_loop, iterator = begin_stage(session, stage_config, step, stage_end)
        next_due = [next_multiple(step, every) for every in plan.intervals]
        until = min(stage_end, step + config.steps_per_loop, *next_due)
        began = time.monotonic()
        tensors = train_loop(iterator, tf.constant(until - step))
        # float() waits for the devices.
        results = {key: float(value) for key, value in tensors.items()}
        seconds = time.monotonic() - began
        progress.record_loop(until, results, seconds, plan.batch_size, config.augment.repeats)
        logger.advance(until)
        # The first loop of a stage is also traced and compiled.
        is_compiled = step > stage_begin
        if seconds > LONG_LOOP_SECONDS and is_compiled and not has_warned:
            logger.note(
                f'a loop takes {seconds:.0f} s, and a preempted machine has only about 30: lower '
                'config.steps_per_loop to stop in time'
            )
            has_warned = True
        check_finite(session, progress, os.path.dirname(logger.path))
        if until % plan.log_every == 0 or until == plan.total_steps:
            logger.write(until, progress.close_window(plan.batch_size))


def begin_stage(
    session: Session, config: ConfigDict, first_step: int, end_step: int
) -> tuple[Callable[..., dict[str, tf.Tensor]], Iterator]:
    """Returns the (not yet traced) training loop of a stage and an iterator over its batches."""
    plan = session.plan
    is_alone = isinstance(session.strategy, tf.distribute.OneDeviceStrategy)
    models.set_dropout(session.state.model, config.model.dropout)
    train_step = steps.make_train_step(
        session.state,
        config,
        augment.make_device_augment(config.augment, plan.num_classes),
        num_classes=plan.num_classes,
        num_replicas=plan.num_replicas,
        jit_compile=session.jit_compile,
        on_tpu=session.kind == 'TPU',
        on_cpu=session.kind == 'CPU' and is_alone,
        teacher=session.teacher.predict if session.teacher else None,
    )
    batches = pipeline.training_batches(
        session.source, config, plan, first_step, end_step, session.strategy
    )
    return loops.make_train_loop(session.strategy, train_step), iter(batches)


def check_finite(session: Session, progress: Progress, workdir: str) -> None:
    """Raises RunError if the run diverges, after writing skipped.json for `--mode=preview`.

    It diverges when the last `config.max_skipped_updates` updates were all skipped or, with 0, when
    the loss of the logging window is not finite.
    """
    max_skipped = session.config.max_skipped_updates
    if max_skipped:
        is_diverging = progress.skipped_in_a_row >= max_skipped
        first = progress.step - progress.skipped_in_a_row
    else:  # skipping is off; the loss covers the whole logging window
        is_diverging = not math.isfinite(progress.window['loss'])
        first = progress.window_start
    if not is_diverging:
        return
    session.checkpoints.wait()
    last = progress.step - 1
    skipped = {'first_update': first, 'last_update': last, 'ahead': session.plan.offset}
    storage.write_json(os.path.join(workdir, resume.SKIPPED), skipped)
    raise divergence_error(session, first, last, were_skipped=bool(max_skipped))


def divergence_error(session: Session, first: int, last: int, were_skipped: bool) -> RunError:
    """Returns the error to raise when updates `first` to `last` were not finite."""
    updates = f'update {first:,}' if first == last else f'updates {first:,} to {last:,}'
    if were_skipped:
        updates += ', which was skipped' if first == last else ', which were skipped'
    elif first < last:
        updates = f'one of the {updates}'
    remedies = [
        'look at the first batch with --mode=preview',
        'lower config.schedule.peak_lr, lengthen config.schedule.warmup '
        'or set config.grad_clip_norm',
    ]
    if session.teacher:
        remedies.insert(
            0, f'see whether the outputs of the teacher {session.teacher.name} are finite'
        )
    saved = session.checkpoints.latest_step()
    if saved:
        remedies[-1] += f', and continue from step {saved:,} with --resume=changed'
    else:
        remedies[-1] += ', and start again: no checkpoint has been saved yet'
    return RunError(f'the loss or its gradient was not finite in {updates}', '; '.join(remedies))


def is_checkpoint_due(session: Session, step: int, saved_at: float) -> bool:
    """Returns whether a checkpoint is due, by steps or by time.

    With a time interval it is a collective, and true only where a row of metrics is due too.
    """
    plan = session.plan
    if plan.checkpoint_every:
        return step % plan.checkpoint_every == 0
    is_late = time.monotonic() - saved_at > (plan.checkpoint_seconds or 0.0)
    by_clock = step % plan.log_every == 0 and is_late
    return session.sum_over_workers([by_clock])[0] > 0  # clocks differ


def agreed_stop_signal(session: Session, stop: preemption.Stop) -> int | None:
    """Returns a stop signal that any worker has received, or None.

    It is a collective: all workers must call it at the same point. A signal that arrives later is
    returned by the next call.
    """
    signals = (signal.SIGINT, signal.SIGTERM)
    votes = session.sum_over_workers([stop.signal == number for number in signals])
    for number, count in zip(signals, votes, strict=True):
        if count:
            return number
    return None


def next_multiple(step: int, every: int) -> int:
    return (step // every + 1) * every


def describe_stop(session: Session, stop_signal: int, step: int) -> str:
    """Describes in one line a run that a signal stopped."""
    saved = session.checkpoints.latest_step()
    next_start = 'nothing has been saved yet'
    if saved:
        next_start = f'the same command continues from step {saved:,}, the last one saved'
    return f'{signal.Signals(stop_signal).name}: stopped at step {step:,}; {next_start}'


def describe_early_stop(session: Session, progress: Progress) -> str:
    """Describes in one line a run that `config.patience` ended early."""
    config = session.config
    since = max(progress.patience_from, progress.best_step or 0)
    return (
        f'stopped at step {progress.step:,} of {session.plan.total_steps:,}: {config.best_metric} '
        f'has not improved since step {since:,}, which is {config.patience} (config.patience); to '
        "continue, raise it or set it to '', and add --resume=changed"
    )


def load_weights_to_export(session: Session, progress: Progress) -> dict[str, Any]:
    """Loads the weights to export: with `config.patience` the best, else the last.

    It is a collective: all workers must call it.

    Returns: {'export/step', 'export/eval_accuracy', 'export/eval_loss', 'export/eval_top5'}: the
        step of these weights, and their metrics on the whole evaluation split.
    """
    step, restored = progress.step, dataclasses.asdict(progress)
    if export.exports_best(session.config) and progress.best_step not in (None, step):
        session.wait_for_all()  # until the last checkpoint, which names the best one, is written
        step, restored, _ = export.restore(session)
    return {'export/step': step, **export.export_metrics(restored, step)}


def plot(session: Session, workdir: str, rows: list[dict[str, Any]]) -> None:
    """Draws the learning rate and the curves of the run."""
    plan = session.plan
    folder = os.path.join(workdir, 'plots')
    plots.plot_learning_rate(
        os.path.join(folder, 'learning_rate.png'),
        *planning.planned_rates(session.config, plan),
        rows,
        plan.warmup_steps,
        plan.hold_steps,
        begin=-plan.offset.updates,
    )
    plots.plot_curves(os.path.join(folder, 'curves.png'), {os.path.basename(workdir): rows})


def weights_digest(session: Session) -> str:
    """Returns the SHA-256 of the current weights, in hexadecimal digits."""
    digest = hashlib.sha256()
    for variable in models.float_variables(session.state.model):
        digest.update(variable.numpy().tobytes())
    return digest.hexdigest()


def summarize(
    session: Session,
    progress: Progress,
    rows: list[dict[str, Any]],
    exported: dict[str, Any],
    resumed_from: list[int],
    last_weights: str,
) -> dict[str, Any]:
    """Returns summary.json's content: values after the last update, but best/... and export/..."""
    speeds = [
        row['train/examples_per_second'] for row in rows if 'train/examples_per_second' in row
    ]
    waiting = progress.input_seconds / progress.train_seconds if progress.train_seconds else 0.0
    return {
        'steps': progress.step,
        'examples_seen': progress.examples_seen,
        'skipped_updates': progress.skipped_updates,
        **progress.metrics,
        'best/step': progress.best_step,
        session.config.best_metric.replace('eval/', 'best/'): progress.best,
        # Time in the training loop only, without evaluation, checkpoints and set-up.
        'train_seconds': progress.train_seconds,
        # 0 if metrics.jsonl was lost.
        'examples_per_second': statistics.median(speeds) if speeds else 0.0,
        'input_wait_fraction': min(1.0, waiting),
        'resumed_from': resumed_from,
        'weights_sha256': last_weights,
        **exported,
    }
