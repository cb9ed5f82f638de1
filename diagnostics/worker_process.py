"""Runs code that may hang or crash in a process of its own."""

import importlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from common.commands import ROOT

# Lines around TensorFlow's messages.
BOILERPLATE = (
    r'Graph execution error:|Detected at node|<stack traces|\[\[\{\{node|Original stack trace'
)
# Lines that name the error.
ERROR_LINE = (
    r'([\w.]+(Error|Exception|Interrupt)\b|F[0-9]{4} )|.*(Check failed|Fatal|undefined symbol)'
)


class WorkerProcess:
    """A Python process that calls a function of one of our modules; iterate over its messages.

    In that process, `function(send, receive)` sends dicts to this one with `send`, and waits with
    `receive` for what `WorkerProcess.send` sends. Its output is not shown.

    Args:
        module, function: names.
        seconds: the process is ended, with everything it started, when it takes longer.
        environ: its environment; by default that of this process.

    Attributes:
        end: set after the last message: one line on why the process ended early, or ''.
    """

    def __init__(
        self,
        module: str,
        function: str,
        seconds: float,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        begin = (
            f'import sys; sys.path.insert(0, {ROOT!r}); '
            'from diagnostics.worker_process import serve; '
            f'serve({module!r}, {function!r}, int(sys.argv[1]))'
        )
        read, write = os.pipe()
        self._seconds, self._is_late, self.end = seconds, False, ''
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        self._process = subprocess.Popen(
            [sys.executable, '-c', begin, str(write)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env=environ,
            pass_fds=(write,),
            start_new_session=True,
        )
        os.close(write)
        self._messages = os.fdopen(read)
        self._clock = threading.Timer(seconds, self._stop_late)
        self._clock.daemon = True
        self._clock.start()

    def send(self, value: Any) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump(value, self._process.stdin)
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):  # it has ended: the iteration says why
            pass

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for line in self._messages:
            yield json.loads(line)
        status = self._process.wait()
        self._clock.cancel()
        self._errors.seek(0)
        self.end = self._explain(status, last_words(self._errors.read().decode(errors='replace')))

    def _explain(self, status: int, error: str) -> str:
        """Returns why the process ended with `status`, '' for 0; `error` is its own last line."""
        if self._is_late:
            reason = f'did not end in {self._seconds:g} s, and was stopped'
            return f'{reason} (it said: {error})' if error else reason
        if status < 0:
            reason = f'ended by {signal.Signals(-status).name}'
            return f'{reason}: {error}' if error else reason
        return (error or f'ended with status {status}') if status else ''

    def close(self) -> None:
        """Ends the process if it is still running."""
        self._clock.cancel()
        self._kill()
        self._process.wait()
        self._messages.close()
        self._errors.close()

    def __enter__(self) -> 'WorkerProcess':
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _stop_late(self) -> None:
        self._is_late = True
        self._kill()

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)


def serve(module: str, function: str, descriptor: int) -> None:
    """Runs the other side of `WorkerProcess`, and writes its messages to `descriptor`."""
    messages = os.fdopen(descriptor, 'w')

    def send(message: dict[str, Any]) -> None:
        messages.write(json.dumps(message) + '\n')
        messages.flush()

    def receive() -> Any:
        return pickle.load(sys.stdin.buffer)

    try:
        getattr(importlib.import_module(module), function)(send, receive)
    except Exception as error:
        lines = str(error).splitlines()
        error_lines = ' '.join(line for line in lines if not re.match(BOILERPLATE, line.strip()))
        sys.exit(f'{type(error).__name__}: {" ".join(error_lines.split())}')


def last_words(errors: str, limit: int = 300) -> str:
    """Returns the line of standard error that says what went wrong; '' if it is empty.

    It has at most `limit` characters.
    """
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    error_lines = [line for line in lines if re.match(ERROR_LINE, line)]
    last = (error_lines or lines or [''])[-1]
    return ' '.join(last.split())[:limit]
