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

# Seconds: half of the 30 that a cloud gives between its notice and the end; the checkpoint takes
# its time too.
LONG_LOOP = 15.0


def run(config: ConfigDict, workdir: str, continues: str = 'same') -> int:
    """Trains, evaluates, exports and reports; continues the run in `workdir`.

    Args:
        continues: 'same' continues a run of the same config, 'changed' also one of another config;
            'never' moves it aside.

    Returns: the exit status: 0, or 143 after SIGTERM.
    """
    is_chief = runs_as_chief(config)
    with workdir_lock.hold(workdir) if is_chief else contextlib.nullcontext() as held:
        changes: list[ConfigChange] = []
        if continues != 'never':
            changes = resume.unknown_config(workdir) or resume.config_changes(config, workdir)
            if changes and continues == 'same':
                raise resume.refusal(workdir, config, changes)
            resume.require_fit(workdir, config, changes)
            if not changes and resume.is_finished(workdir):
                console.line(f'{workdir} is finished: see {os.path.join(workdir, "report.md")}')
                return 0
        elif is_chief:
            resume.archive_run(workdir)
        session = open_session(config, workdir)
        if held:
            return run_chief(session, workdir, changes, held)
    # One worker writes and speaks for all.
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        return run_worker(session, scratch, changes)


def run_chief(
    session: Session,
    workdir: str,
    changes: Sequence[ConfigChange],
    held: workdir_lock.Held,
) -> int:
    """Runs the only process, or the one of several workers that writes; returns the exit status."""

    def before_commit() -> None:
        """Makes sure that a run can continue with a checkpoint, and that the folder is its own."""
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
        notes.append(describe_end(session, progress))
        console.row('patience', notes[-1])
    last_weights = weights_digest(session)
    of_exported = load_exported(session, progress)
    if of_exported['export/step'] != progress.step:
        weights = export.describe(session.config, of_exported['export/step'], progress.step)
        console.row('exports', weights)
    exported = {**of_exported, **export.write(session, os.path.join(workdir, 'export'))}
    rows = read_metrics(workdir)
    plot(session, workdir, rows)
    summary = summarize(session, progress, rows, exported, resumed_from, last_weights)
    data_notes = (*session.source.notes, *session.data_changes)
    report.write_report(workdir, summary, session.describe(), data_notes, notes)
    # The last file: it says that all is done.
    storage.write_json(os.path.join(workdir, resume.SUMMARY), summary)
    console.line(f'{report.headline(summary)}; report in {os.path.join(workdir, "report.md")}')
    session.wait_for_all()  # the others may go
    return 0


def run_worker(session: Session, scratch: str, changes: Sequence[ConfigChange]) -> int:
    """Runs a worker that writes into a folder of its own only; returns the exit status."""
    with preemption.watch() as stop:
        progress = resume.restore(session, scratch, changes)
        stop_signal = train_until_stopped(session, scratch, progress, stop)
    if stop_signal is not None:
        return preemption.exit_status(stop_signal)
    load_exported(session, progress)
    session.wait_for_all()  # for the report: a worker that leaves takes the connection with it
    return 0


def train_until_stopped(
    session: Session, workdir: str, progress: Progress, stop: preemption.Stop
) -> int | None:
    """Trains with a log in `workdir`; returns None, or the signal that stopped it."""
    logger = MetricsLogger(workdir, progress.step, session.plan.total_steps)
    with service.watch(session.config.dataset.service), contextlib.closing(logger):
        try:
            return train(session, logger, progress, stop)
        except tf.errors.OpError as error:
            missing = session.source.find_missing_files()
            if not missing:
                raise
            fix = 'the same command leaves them out and continues at the last checkpoint'
            raise RunError(f'images cannot be read any more: {missing}', fix) from error
        finally:
            session.checkpoints.wait()  # also after an error: what was saved shall count


def train(
    session: Session, logger: MetricsLogger, progress: Progress, stop: preemption.Stop
) -> int | None:
    """Runs updates from `progress.step` to the last; logs, evaluates and saves at their intervals.

    Returns: None, or the signal that stopped it before the end; `progress` says how far it came.
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
                is_best = progress.evaluated(metrics, config.best_metric)
        is_last = at_end or progress.out_of_patience(plan.patience)
        finished = is_last and progress.evaluated_at == step
        # Collectives: every worker must reach these two calls in the same order. Nothing stops a
        # run that has finished, because what is left to do is short.
        stop_signal = None if finished else agreed_stop_signal(session, stop)
        checkpoint_due = is_checkpoint_due(session, step, saved_at)
        is_healthy = not progress.skipped_in_a_row  # else it would save over something better
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
        results = {key: float(value) for key, value in tensors.items()}  # waits for the devices
        seconds = time.monotonic() - began
        progress.add(until, results, seconds, plan.batch_size, config.augment.repeats)
        logger.advance(until)
        is_compiled = step > stage_begin  # the first loop of a stage is traced and compiled as well
        if seconds > LONG_LOOP and is_compiled and not has_warned:
            logger.note(
                f'a loop takes {seconds:.0f} s, and a machine that is preempted gives about 30: '
                'lower config.steps_per_loop to stop in time'
            )
            has_warned = True
        check_finite(session, progress, os.path.dirname(logger.path))
        if until % plan.log_every == 0 or until == plan.total_steps:
            logger.write(until, progress.close_window(plan.batch_size))


def begin_stage(
    session: Session, config: ConfigDict, first_step: int, end_step: int
) -> tuple[Callable[..., dict[str, tf.Tensor]], Iterator]:
    """Returns the training loop, not traced yet, and the batches of a stage."""
    plan = session.plan
    models.set_dropout(session.state.model, config.model.dropout)
    train_step = steps.make_train_step(
        session.state,
        config,
        augment.make_device_augment(config.augment, plan.num_classes),
        num_classes=plan.num_classes,
        num_replicas=plan.num_replicas,
        jit_compile=session.jit_compile,
        on_tpu=session.kind == 'TPU',
        teacher=session.teacher.predict if session.teacher else None,
    )
    batches = pipeline.training_batches(
        session.source, config, plan, first_step, end_step, session.strategy
    )
    return loops.make_train_loop(session.strategy, train_step), iter(batches)


def check_finite(session: Session, progress: Progress, workdir: str) -> None:
    """Raises RunError when the last `config.max_skipped_updates` updates were all skipped.

    It leaves skipped.json for `preview`.
    """
    most = session.config.max_skipped_updates
    if most:
        is_diverging = progress.skipped_in_a_row >= most
        first = progress.step - progress.skipped_in_a_row
    else:  # nothing is skipped, and the loss is that of the whole window
        is_diverging = not math.isfinite(progress.window['loss'])
        first = progress.window_start
    if not is_diverging:
        return
    session.checkpoints.wait()
    last = progress.step - 1
    skipped = {'first_update': first, 'last_update': last, 'ahead': session.plan.ahead}
    storage.write_json(os.path.join(workdir, resume.SKIPPED), skipped)
    raise diverged(session, first, last, were_skipped=bool(most))


def diverged(session: Session, first: int, last: int, were_skipped: bool) -> RunError:
    """Returns the error of a run whose updates `first` to `last` were not finite."""
    updates = f'update {first:,}' if first == last else f'updates {first:,} to {last:,}'
    if were_skipped:
        updates += ', which was skipped' if first == last else ', which were skipped'
    elif first < last:
        updates = f'one of the {updates}'
    ways = [
        'look at the first batch with --mode=preview',
        'lower config.schedule.peak_lr, lengthen config.schedule.warmup '
        'or set config.grad_clip_norm',
    ]
    if session.teacher:
        ways.insert(0, f'see whether the outputs of the teacher {session.teacher.name} are finite')
    saved = session.checkpoints.latest_step()
    if saved:
        ways[-1] += f', and continue at step {saved:,}, which is saved, with --resume=changed'
    else:
        ways[-1] += ', and start again; no step is saved yet'
    return RunError(f'the loss or its gradient was not finite in {updates}', '; '.join(ways))


def is_checkpoint_due(session: Session, step: int, saved_at: float) -> bool:
    """Returns whether a checkpoint is due: by steps, or by time together with a row of metrics.

    By time it is a collective.
    """
    plan = session.plan
    if plan.checkpoint_every:
        return step % plan.checkpoint_every == 0
    is_late = time.monotonic() - saved_at > (plan.checkpoint_seconds or 0.0)
    by_clock = step % plan.log_every == 0 and is_late
    return session.sum_over_workers([by_clock])[0] > 0  # clocks differ


def agreed_stop_signal(session: Session, stop: preemption.Stop) -> int | None:
    """Returns the signal that some worker got, or None.

    A collective: all workers must call it at the same point. A signal that comes later is
    reported the next time.
    """
    signals = (signal.SIGINT, signal.SIGTERM)
    votes = session.sum_over_workers([stop.asked == number for number in signals])
    for number, count in zip(signals, votes, strict=True):
        if count:
            return number
    return None


def next_multiple(step: int, every: int) -> int:
    return (step // every + 1) * every


def describe_stop(session: Session, stop_signal: int, step: int) -> str:
    """Returns a line about a run that a signal has stopped."""
    saved = session.checkpoints.latest_step()
    resumes = f'the same command continues at step {saved:,}, which is saved'
    name = signal.Signals(stop_signal).name
    return f'{name}: stopped at step {step:,}; {resumes if saved else "nothing is saved yet"}'


def describe_end(session: Session, progress: Progress) -> str:
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


def load_exported(session: Session, progress: Progress) -> dict[str, Any]:
    """Loads the weights to be exported: with `config.patience` the best, else the last.

    All workers call it together.

    Returns: {'export/step', 'export/eval_accuracy', 'export/eval_loss', 'export/eval_top5'}: the
        update of these weights, and their metrics over the whole split.
    """
    step, restored = progress.step, dataclasses.asdict(progress)
    if export.exports_best(session.config) and progress.best_step not in (None, step):
        session.wait_for_all()  # the last checkpoint, which names the best, is written
        step, restored, _ = export.restore(session)
    return {'export/step': step, **export.evaluation(restored, step)}


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
        begin=-plan.ahead.updates,
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
    """Returns summary.json: of the last update, except for best/... and export/..."""
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
        # In the training loop: without evaluation, checkpoints and set-up.
        'train_seconds': progress.train_seconds,
        # Nothing if metrics.jsonl was lost.
        'examples_per_second': statistics.median(speeds) if speeds else 0.0,
        'input_wait_fraction': min(1.0, waiting),
        'resumed_from': resumed_from,
        'weights_sha256': last_weights,
        **exported,
    }
