"""Runs the program in a child process, so that the loss of another process ends it with one line.

JAX's coordination service ends a process with abort() and a stack trace when another one of the run
is lost, and hands Python no chance to say so.
"""

import ctypes
import os
import re
import signal
import sys
from collections.abc import Iterator

from common import console

PR_SET_PDEATHSIG = 1  # of Linux' prctl
# What the service writes: a list of numbers, one a line; or that process 0, where it runs, is lost.
UNHEALTHY = r'stopped sending heartbeats\):\n((?:[^\n]*\d+\n)+)'
PROCESS_0_LOST = 'Failed to send RPC to coordination service'
# How the lines that lead to the end begin.
FATAL_LINE = r'[EF]\d{4} [^\]]*(coordination_service|client\.h)'


def run_as_child() -> None:
    """Returns in a child process; the caller's process waits for it, and exits with its status."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.setpgid(0, 0)  # the terminal's Ctrl-C reaches the parent, which passes it on
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.dup2(writing, sys.stderr.fileno())
        os.close(writing)
        return
    os.close(writing)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(child, number))
    last_words = ''.join(_pass_on(reading))
    _, status = os.waitpid(child, 0)
    lost = lost_process(last_words)
    if lost is not None:
        fix = 'restart all processes; they continue at the last checkpoint'
        console.error(f'process {lost} no longer responds', fix)
        os._exit(1)
    sys.stderr.write(last_words)
    sys.stderr.flush()
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        reason = ', perhaps for lack of memory' if -code == signal.SIGKILL else ''
        problem = f'this process was ended by {signal.Signals(-code).name}{reason}'
        console.error(problem, 'the same command continues from the last checkpoint')
    os._exit(code if code >= 0 else 128 - code)


def lost_process(last_words: str) -> str | None:
    """Returns the number of the process whose loss the service reports, or None."""
    unhealthy = re.search(UNHEALTHY, last_words)
    if unhealthy:
        return ', '.join(re.findall(r'(\d+)\n', unhealthy[1]))
    return '0' if PROCESS_0_LOST in last_words else None


def _pass_on(reading: int) -> Iterator[str]:
    """Passes on what the child writes, line by line; yields the service's last words instead."""
    ends = False
    with open(reading, errors='replace', newline='') as lines:
        for line in lines:
            ends = ends or re.match(FATAL_LINE, line) is not None
            if ends:
                yield line
            else:
                sys.stderr.write(line)
                sys.stderr.flush()
