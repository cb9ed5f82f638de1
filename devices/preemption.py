"""Stops a run on SIGINT, on SIGTERM (Slurm, Kubernetes) and on a notice of Google Cloud.

It imports no TensorFlow.

TensorFlow computes for seconds or minutes within one call, and a signal handler in Python would
have to wait until it returns. So the signals are read by a thread, from the pipe into which
Python's own handler, in C, writes their numbers (`signal.set_wakeup_fd`).

What Google documents:
- Spot and preemptible machines: the metadata `instance/preempted` becomes TRUE, and about 30 s
  remain, as a best effort; 120 s where the machine was made with --preemption-notice-duration=120s.
  docs.cloud.google.com/compute/docs/instances/create-use-spot
- `instance/maintenance-event` is NONE, MIGRATE_ON_HOST_MAINTENANCE (the machine moves while it
  runs: nothing to do) or TERMINATE_ON_HOST_MAINTENANCE: an hour remains on machines with GPUs, else
      60 s, and those only if the value has been queried since the previous event.
  docs.cloud.google.com/compute/docs/metadata/getting-live-migration-notice,
  docs.cloud.google.com/compute/docs/gpus/gpu-host-maintenance
- TPU VMs are machines of Compute Engine and cannot move while they run; a host that is stopped
  interrupts its whole slice.
  docs.cloud.google.com/kubernetes-engine/docs/concepts/handle-disruption-gpu-tpu,
  docs.cloud.google.com/tpu/docs/spot
- `?wait_for_change=true` would make the server answer only when the value changes. Two requests
  every two seconds cost less than two that hang for days.
"""

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

from common import console
from devices import google_metadata

# Seconds between requests to the metadata server, after whose notice 30 remain; at most, if it
# does not answer.
POLL_SECONDS = 2
MAX_POLL_SECONDS = 60
NOTICES = {  # key: (the value that announces a stop, message)
    'preempted': ('TRUE', 'Google Cloud is reclaiming this machine'),
    'maintenance-event': (
        'TERMINATE_ON_HOST_MAINTENANCE',
        'Google Cloud is stopping this machine for maintenance',
    ),
}
END = 0  # no signal has this number


@dataclasses.dataclass
class Stop:
    """The signal that asked this process to stop, and why; a notice counts as SIGTERM."""

    signal: int | None = None
    why: str = ''


@contextlib.contextmanager
def watch(on_google_cloud: bool | None = None) -> Iterator[Stop]:
    """Yields a `Stop` that a signal or a preemption notice sets at once, with a printed line.

    A second SIGINT, or one after something else, ends the process immediately with status 130, even
    while TensorFlow computes. Further SIGTERMs change nothing: Slurm and Kubernetes send several.
    Outside the main thread, where Python allows no handlers, only a notice sets the `Stop`.

    Args:
        on_google_cloud: whether to poll the metadata server; None detects it.
    """
    stop, ended = Stop(), threading.Event()
    heard: list[int] = []

    def notify(number: int, why: str) -> None:
        if not ended.is_set() and _note(stop, heard, number, why):
            once_more = '; interrupt again to stop at once' if number == signal.SIGINT else ''
            # The reader of the output may be gone, which is no reason to stop listening.
            with contextlib.suppress(OSError, ValueError):
                console.line(f'\n{why}: finishing the loop, then saving{once_more}')

    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            stack.enter_context(_signals(stop, notify, ended))
        if _on_google_cloud() if on_google_cloud is None else on_google_cloud:
            threading.Thread(
                target=_ask_google,
                args=(notify, ended),
                name='notices of Google Cloud',
                daemon=True,
            ).start()
        stack.callback(ended.set)  # runs first on exit
        yield stop


def exit_status(stop_signal: int) -> int:
    """Returns 0 after SIGINT, which the user meant; else 128 + signal, as shells do."""
    return 0 if stop_signal == signal.SIGINT else 128 + stop_signal


@contextlib.contextmanager
def _signals(
    stop: Stop, notify: Callable[[int, str], None], ended: threading.Event
) -> Iterator[None]:
    """Calls `notify` in a thread for each SIGINT and SIGTERM; restores the previous handlers."""
    handled: dict[int, Any] = {}
    heard: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        # Without a handler the default action would end the process. It runs when TensorFlow
        # returns, mostly after the thread, and sets `stop` even if the thread has not run yet, is
        # blocked on a terminal, or something else has taken the wakeup descriptor.
        _note(stop, heard, number, signal.Signals(number).name)

    def in_forked_process() -> None:
        if not ended.is_set():
            signal.set_wakeup_fd(-1)
            for number, usual in handled.items():
                signal.signal(number, usual)

    with contextlib.ExitStack() as stack:
        reading, writing = os.pipe()
        os.set_blocking(writing, False)  # a handler must not wait
        reader = threading.Thread(target=_read, args=(reading, notify), name='signals', daemon=True)
        reader.start()
        stack.callback(_end, writing, reader)
        stack.callback(
            signal.set_wakeup_fd, signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        )
        os.register_at_fork(after_in_child=in_forked_process)  # for good: it cannot be undone
        for number in (signal.SIGINT, signal.SIGTERM):
            usual = signal.getsignal(number)
            # A script without job control starts its background jobs with SIGINT ignored: Ctrl-C is
            # meant for the foreground. Python leaves it ignored, and so do we. (nohup ignores
            # SIGHUP alone.)
            if usual != signal.SIG_IGN:
                # None is a handler of a C library, which Python cannot restore.
                handled[number] = usual or signal.SIG_DFL
                signal.signal(number, handle)
                stack.callback(signal.signal, number, handled[number])
        yield


def _note(stop: Stop, heard: list[int], number: int, why: str) -> bool:
    """Sets `stop` unless it is set; returns whether this is the first signal of its source.

    `heard` holds what came before from the same source.
    """
    if heard and number == signal.SIGINT:
        try:
            console.warning('stopped at once; the same command continues from the last checkpoint')
        finally:
            os._exit(128 + signal.SIGINT)  # an exception would wait for TensorFlow
    first = not heard
    heard.append(number)
    if stop.signal is None:
        stop.why, stop.signal = why, number
    return first


def _read(reading: int, notify: Callable[[int, str], None]) -> None:
    """Runs the thread of the signals: each byte is a signal's number.

    Other signals arrive too, such as SIGCHLD and SIGWINCH.
    """
    numbers = b''
    while END not in numbers:
        numbers = os.read(reading, 4096)
        for number in numbers:
            if number in (signal.SIGINT, signal.SIGTERM):
                notify(number, signal.Signals(number).name)
    os.close(reading)


def _end(writing: int, reader: threading.Thread) -> None:
    with contextlib.suppress(BlockingIOError):  # full: the reader has stopped reading
        os.write(writing, bytes([END]))
    reader.join(1)  # not forever: it may be blocked on a terminal
    os.close(writing)


def _on_google_cloud(environ: Mapping[str, str] = os.environ, root: str = '/') -> bool:
    """Returns whether this is a Google Compute Engine machine, such as a TPU VM.

    By google-auth's rule, without using the network.
    """
    if environ.get('GCE_METADATA_HOST'):
        return True
    try:
        with open(os.path.join(root, 'sys/class/dmi/id/product_name')) as file:
            return file.read().startswith('Google')
    except (OSError, ValueError):
        return False


def _ask_google(notify: Callable[[int, str], None], ended: threading.Event) -> None:
    """Runs the thread of the notices: polls the metadata server until a notice comes.

    A server that does not answer, or answers with errors (Colab, containers), is polled less and
    less.
    """
    pause = POLL_SECONDS
    earlier_event = None
    while not ended.is_set():
        answers = {key: google_metadata.get(f'instance/{key}', 100) for key in NOTICES}
        if earlier_event is None:  # one that an earlier start stopped for, up to an hour ago
            earlier_event = answers['maintenance-event']
        for key, (value, why) in NOTICES.items():
            if answers[key] == value and (key, value) != ('maintenance-event', earlier_event):
                notify(signal.SIGTERM, why)
                return
        pause = POLL_SECONDS if any(answers.values()) else min(2 * pause, MAX_POLL_SECONDS)
        ended.wait(pause)
