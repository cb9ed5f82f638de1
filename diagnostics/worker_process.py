"""Runs what may hang, or end the process that does it, in a process of its own."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading

from common.commands import ROOT

BOILERPLATE = r'Graph execution error:|Detected at node|<stack traces|\[\[\{\{node|Original stack trace'  # around TensorFlow's messages


class Apart:
    """A Python process that calls `function(say, hear)` of one of our modules; iterate over it for what it says.

    There, `say(dict)` sends a message to this process, and `hear()` waits for what `tell` sends from here. Its own output is not shown.

    Args:
        module, function: names.
        seconds: it is ended, with all that it started, when it takes longer.
        environ: its environment; by default this one's.

    After the last message `end` says why the process ended before its time, in one line, or is '' when it did not.
    """

    def __init__(self, module, function, seconds, environ=None):
        begin = (
            f'import sys; sys.path.insert(0, {ROOT!r}); from diagnostics.worker_process import answer; '
            f'answer({module!r}, {function!r}, int(sys.argv[1]))'
        )
        read, write = os.pipe()
        self._seconds, self._late, self.end = seconds, False, ''
        self._errors = tempfile.TemporaryFile()
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

    def tell(self, value):
        try:
            pickle.dump(value, self._process.stdin)
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):  # it has ended: the iteration says why
            pass

    def __iter__(self):
        for line in self._messages:
            yield json.loads(line)
        status = self._process.wait()
        self._clock.cancel()
        self._errors.seek(0)
        said = last_words(self._errors.read().decode(errors='replace'))
        if self._late:
            self.end = f'did not end in {self._seconds:g} s, and was stopped' + (
                f' (it said: {said})' if said else ''
            )
        elif status < 0:
            self.end = f'ended by {signal.Signals(-status).name}' + (f': {said}' if said else '')
        elif status:
            self.end = said or f'ended with status {status}'

    def close(self):
        """Ends the process if it is still there."""
        self._clock.cancel()
        self._kill()
        self._process.wait()
        self._messages.close()
        self._errors.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _stop_late(self):
        self._late = True
        self._kill()

    def _kill(self):
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)


def answer(module, function, descriptor):
    """The other side of `Apart`."""
    import importlib

    messages = os.fdopen(descriptor, 'w')

    def say(message):
        messages.write(json.dumps(message) + '\n')
        messages.flush()

    try:
        getattr(importlib.import_module(module), function)(
            say, lambda: pickle.load(sys.stdin.buffer)
        )
    except Exception as error:
        lines = [
            line for line in str(error).splitlines() if not re.match(BOILERPLATE, line.strip())
        ]
        sys.exit(f'{type(error).__name__}: {" ".join(" ".join(lines).split())}')


def last_words(errors, limit=300):
    """The line of a standard error that says what went wrong, at most `limit` characters; '' for none."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    telling = [
        line
        for line in lines
        if re.match(
            r'([\w.]+(Error|Exception|Interrupt)\b|F[0-9]{4} )|.*(Check failed|Fatal|undefined symbol)',
            line,
        )
    ]
    return ' '.join((telling or lines or [''])[-1].split())[:limit]
