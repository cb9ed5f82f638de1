"""A line of the doctor's table: see check.py."""
import os
import sys
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Finding(NamedTuple):
    """What was looked at and what was found; where that is not well also what mends it, a command if there is one."""

    status: str  # 'ok', 'warn' or 'FAIL'
    what: str
    found: str
    mend: str = ''


def ok(what, found):
    return Finding('ok', what, found)


def warn(what, found, mend):
    return Finding('warn', what, found, mend)


def fail(what, found, mend):
    return Finding('FAIL', what, found, mend)


def python_command():
    """This interpreter as one types it from here."""
    relative = os.path.relpath(sys.executable)
    return sys.executable if relative.startswith('..') else relative


def install_command(accelerator):
    """The command that installs the pinned set of 'cpu', 'gpu', 'tpu' or 'tpu220' from wherever one is."""
    here = os.path.relpath(ROOT) if os.path.realpath(os.getcwd()) == os.path.realpath(ROOT) else ROOT
    return f"{python_command()} -m pip install -c {os.path.join('' if here == '.' else here, 'requirements', accelerator)}.txt '{here}[{accelerator}]'"
