"""The two kinds of mistake that `main.py` turns into one clear line instead of a stack trace, and how the line is worded."""
import difflib


class UserError(Exception):
    """What went wrong and what to do about it, in one line. `exit_status` is what the process returns."""

    exit_status = 1


class ConfigError(UserError):
    """Wrong usage or an impossible config: nothing was started."""

    exit_status = 2


class RunError(UserError):
    """The run failed: missing data, absent hardware, a checkpoint of another model, an export that differs."""


def one_line(text, limit=300):
    """`text`, or the message of an exception, on one line of at most `limit` characters."""
    return ' '.join(str(text).split())[:limit]


def did_you_mean(word, words, cutoff=0.6):
    """'; did you mean X?' with the nearest of `words`, or nothing."""
    close = difflib.get_close_matches(str(word), [str(known) for known in words], n=1, cutoff=cutoff)
    return f'; did you mean {close[0]}?' if close else ''
