"""A row of the table that `--mode=check` prints: see diagnostics/check.py."""

from typing import NamedTuple

from common.errors import UserError


class CheckResult(NamedTuple):
    """What was checked, what was found, and, if that is a problem, what fixes it."""

    status: str  # 'ok', 'warn' or 'FAIL'
    name: str
    message: str
    fix: str = ''  # a command or a flag where there is one


def ok(name: str, message: str) -> CheckResult:
    return CheckResult('ok', name, message)


def warn(name: str, message: str, fix: str) -> CheckResult:
    return CheckResult('warn', name, message, fix)


def fail(name: str, message: str, fix: str) -> CheckResult:
    return CheckResult('FAIL', name, message, fix)


def from_error(name: str, error: UserError, fix: str = '') -> CheckResult:
    """Returns the FAIL row for an error; `fix` is used if it has none itself."""
    if not fix:
        fix = f'see docs/config.md on {error.key}' if error.key else 'see docs/config.md'
    return fail(name, error.problem, error.fix or fix)
