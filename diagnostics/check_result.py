"""A line of the doctor's table: see diagnostics/check.py."""

from typing import NamedTuple


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
