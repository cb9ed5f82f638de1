"""Being stopped: by SIGINT, by SIGTERM (Slurm, Kubernetes, a machine that is taken back), and by a notice of Google Cloud. Imports no TensorFlow.

TensorFlow computes for seconds or minutes within one call, and a signal handler in Python would wait for its end. So the signals are read
by a thread, from the pipe into which Python's own handler, in C, writes their numbers (`signal.set_wakeup_fd`).

What Google documents:
- Spot and preemptible machines: the metadata `instance/preempted` becomes TRUE, and about 30 s remain, as a best effort; 120 s where the machine
  was made with --preemption-notice-duration=120s. docs.cloud.google.com/compute/docs/instances/create-use-spot
- `instance/maintenance-event` is NONE, MIGRATE_ON_HOST_MAINTENANCE (the machine moves while it runs: nothing to do) or
  TERMINATE_ON_HOST_MAINTENANCE: an hour remains on machines with GPUs, else 60 s, and these only for who has asked since the event before.
  docs.cloud.google.com/compute/docs/metadata/getting-live-migration-notice, docs.cloud.google.com/compute/docs/gpus/gpu-host-maintenance
- TPU VMs are machines of Compute Engine and cannot move while they run; a host that is stopped interrupts its whole slice.
  docs.cloud.google.com/kubernetes-engine/docs/concepts/handle-disruption-gpu-tpu, docs.cloud.google.com/tpu/docs/spot
- `?wait_for_change=true` would let the server answer at the change. Two requests every two seconds cost less than two that hang for days.
"""

import contextlib
import dataclasses
import http.client
import os
import signal
import sys
import threading
import urllib.request

SECONDS, MOST_SECONDS = (
    2,
    60,
)  # between questions to the metadata server: 2 of the 30 that remain; and where nothing answers
TIMEOUT = 3  # seconds for an answer of the metadata server, as google-auth has it
NOTICES = {  # key: (its value when the machine will be stopped, in words)
    'preempted': ('TRUE', 'Google Cloud takes this machine back'),
    'maintenance-event': (
        'TERMINATE_ON_HOST_MAINTENANCE',
        'Google Cloud stops this machine for maintenance',
    ),
}
END = 0  # no signal has this number


@dataclasses.dataclass
class Stop:
    """What asked this process to stop, if something did: SIGINT or SIGTERM (a notice counts as SIGTERM), and in words."""

    asked: int | None = None
    why: str = ''


@contextlib.contextmanager
def watch(on_google_cloud=None):
    """Yields a `Stop` that is set as soon as a signal or a notice comes; prints a line then. The second SIGINT, or one after something else,
    ends the process at once with status 130, also while TensorFlow computes. Further SIGTERM change nothing: Slurm and Kubernetes send several.

    In another thread than the main one, where Python allows no handlers, only a notice sets it.

    Args:
        on_google_cloud: whether to ask the metadata server; None finds out.
    """
    stop, heard, ended = Stop(), [], threading.Event()

    def tell(number, why):
        if not ended.is_set() and _note(stop, heard, number, why):
            once_more = '; once more stops at once' if number == signal.SIGINT else ''
            with contextlib.suppress(
                OSError, ValueError
            ):  # who read the output has gone: no reason to listen no more
                print(f'\n{why}: finishing the loop, then saving{once_more}', flush=True)

    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            stack.enter_context(_signals(stop, tell, ended))
        if _on_google_cloud() if on_google_cloud is None else on_google_cloud:
            threading.Thread(
                target=_ask_google, args=(tell, ended), name='notices of Google Cloud', daemon=True
            ).start()
        stack.callback(ended.set)  # the first thing at the end
        yield stop


def exit_status(stop_signal):
    """0 after SIGINT: it was the user's wish; else what a shell says of who ends by the signal, 143 for SIGTERM."""
    return 0 if stop_signal == signal.SIGINT else 128 + stop_signal


@contextlib.contextmanager
def _signals(stop, tell, ended):
    """Calls `tell` in a thread for each SIGINT and SIGTERM, and restores what was before."""
    handled, heard = {}, []

    def cover(number, frame):
        # Without it the default action would end the process. It runs when TensorFlow returns, mostly after the thread, and so that what comes
        # next sees the signal in any case: where the thread has not run yet, waits for a terminal, or something else has taken the wakeup.
        _note(stop, heard, number, signal.Signals(number).name)

    def in_forked_process():  # it has the pipe too: what it is told would count as told to this one
        if not ended.is_set():
            signal.set_wakeup_fd(-1)
            for number, usual in handled.items():
                signal.signal(number, usual)

    with contextlib.ExitStack() as stack:
        reading, writing = os.pipe()
        os.set_blocking(writing, False)  # a handler must not wait
        reader = threading.Thread(target=_read, args=(reading, tell), name='signals', daemon=True)
        reader.start()
        stack.callback(_end, writing, reader)
        stack.callback(
            signal.set_wakeup_fd, signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        )
        os.register_at_fork(
            after_in_child=in_forked_process
        )  # for good, there is no way to take it back
        for number in (signal.SIGINT, signal.SIGTERM):
            usual = signal.getsignal(number)
            # A script without job control starts its background jobs with SIGINT ignored: Ctrl-C is meant for what is in front. Python leaves
            # it so, and so do we. (nohup ignores SIGHUP alone.)
            if usual != signal.SIG_IGN:
                handled[number] = (
                    usual or signal.SIG_DFL
                )  # None: a library's in C, which Python cannot put back
                signal.signal(number, cover)
                stack.callback(signal.signal, number, handled[number])
        yield


def _note(stop, heard, number, why):
    """Sets `stop` if nothing has; `heard` is what came before by the same way. Returns whether this is the first."""
    if heard and number == signal.SIGINT:
        try:
            print(
                'stopped at once; the same command continues at the last checkpoint',
                file=sys.stderr,
                flush=True,
            )
        finally:
            os._exit(128 + signal.SIGINT)  # an exception would wait for TensorFlow
    first = not heard
    heard.append(number)
    if stop.asked is None:
        stop.why, stop.asked = why, number
    return first


def _read(reading, tell):
    """The thread of the signals: each byte is the number of one. There are others too, such as SIGCHLD and SIGWINCH."""
    numbers = b''
    while END not in numbers:
        numbers = os.read(reading, 4096)
        for number in numbers:
            if number in (signal.SIGINT, signal.SIGTERM):
                tell(number, signal.Signals(number).name)
    os.close(reading)


def _end(writing, reader):
    with contextlib.suppress(BlockingIOError):  # full: it does not read any more
        os.write(writing, bytes([END]))
    reader.join(1)  # not for good: it may wait for a terminal that takes nothing
    os.close(writing)


def _on_google_cloud(environ=os.environ, root='/'):
    """Whether this machine is one of Google Compute Engine, TPU VMs among them: by google-auth's rule, without a question to the network."""
    if environ.get('GCE_METADATA_HOST'):
        return True
    try:
        with open(os.path.join(root, 'sys/class/dmi/id/product_name')) as file:
            return file.read().startswith('Google')
    except (OSError, ValueError):
        return False


def _ask_google(tell, ended):
    """The thread of the notices: asks until one comes. What does not answer, or only with errors (Colab, a container), is asked less and less."""
    open_url = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    ).open  # no proxy: the server is the machine's own
    host = (
        os.environ.get('GCE_METADATA_HOST') or '169.254.169.254'
    )  # metadata.google.internal, whose look-up has no time limit
    pause, stood = SECONDS, None
    while not ended.is_set():
        answers = {
            key: _answer(open_url, f'http://{host}/computeMetadata/v1/instance/{key}')
            for key in NOTICES
        }
        stood = (
            answers['maintenance-event'] if stood is None else stood
        )  # of an earlier start, which left for it, up to an hour ago
        for key, (value, why) in NOTICES.items():
            if answers[key] == value and (key, value) != ('maintenance-event', stood):
                return tell(signal.SIGTERM, why)
        pause = SECONDS if any(answers.values()) else min(2 * pause, MOST_SECONDS)
        ended.wait(pause)


def _answer(open_url, url):
    """What the metadata server says, or None."""
    try:
        with open_url(
            urllib.request.Request(url, headers={'Metadata-Flavor': 'Google'}), timeout=TIMEOUT
        ) as response:
            return response.read(100).decode(errors='replace').strip()
    except (
        OSError,
        ValueError,
        http.client.HTTPException,
    ):  # ValueError: GCE_METADATA_HOST is no host
        return None
