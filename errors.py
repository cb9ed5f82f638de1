"""The two kinds of mistake that `main.py` turns into one clear line instead of a stack trace."""


class UserError(Exception):
    """What went wrong and what to do about it, in one line. `exit_status` is what the process returns."""

    exit_status = 1


class ConfigError(UserError):
    """Wrong usage or an impossible config: nothing was started."""

    exit_status = 2


class RunError(UserError):
    """The run failed: missing data, absent hardware, a checkpoint of another model, an export that differs."""
