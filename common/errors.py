"""Errors that `main.py` reports in one line instead of a stack trace."""

import difflib
import re
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix. Its message is one line.

    Attributes:
        problem: what went wrong.
        fix: what to do about it, or ''.
        key: the config key at fault, or None.
        exit_status: exit status of the process.
    """

    exit_status = 1

    def __init__(self, problem: str, fix: str = '', key: str | None = None) -> None:
        super().__init__(f'{problem}: {fix}' if fix else problem)
        self.problem = problem
        self.fix = fix
        self.key = key


class ConfigError(UserError):
    """Wrong usage or an invalid config, found before anything was started."""

    exit_status = 2


class RunError(UserError):
    """A run failed, for example for lack of data or hardware, or a checkpoint of another model."""


def one_line(text: object, limit: int = 300) -> str:
    """Returns text, or the message of an exception, on one line of at most `limit` characters."""
    is_of_tensorflow = type(text).__module__ == 'tensorflow.python.framework.errors_impl'
    if is_of_tensorflow and isinstance(text, Exception):
        text = assertion_message(text) or _without_graph(str(text))
    return ' '.join(str(text).split())[:limit]


def counted(number: int, noun: str, nouns: str | None = None) -> str:
    """Returns '1 file', '2 files' or '1,000 files'; `nouns` is an irregular plural."""
    if number == 1:
        return f'1 {noun}'
    return f'{number:,} {nouns or noun + "s"}'


def assertion_message(error: Exception) -> str | None:
    """Returns the message of an assertion that failed in a TensorFlow graph, or None."""
    words = _without_graph(str(error))
    asserted = re.search(r'assertion failed: \[(.*)\]', words, re.DOTALL)  # each word in brackets
    return ' '.join(asserted[1].replace('] [', ' ').split()) if asserted else None


def _without_graph(message: str) -> str:
    """Returns the message of a TensorFlow error without the graph nodes and traces around it."""
    unwanted = (
        # [[{{node cond/Assert}}]] and [[IteratorGetNext]]
        r'\s*\[\[(\{\{.*?\}\}|[A-Za-z_][\w/]*)\]\]',
        r'\{\{.*?\}\}\s*',
        r'\[Op:.*',
        r'\s*Stack trace for op definition:.*',
        r'Graph execution error:\s+Detected at node .*?'
        r'(<stack traces unavailable>\n|\n\n(?! *File))',
        r'Error in user-defined function passed to \S+ transformation with iterator: \S+:? ',
    )
    for pattern in unwanted:
        message = re.sub(pattern, '', message, flags=re.DOTALL)
    several = r'[0-9]+ root error\(s\) found\.\s+\(0\) \w+: (.*?)\s+\(1\) .*'
    return re.sub(several, r'\1', message, flags=re.DOTALL)  # the first of them


def closest_match(word: object, words: Iterable[object], cutoff: float = 0.6) -> str | None:
    """Returns the closest match to `word` in `words`, or None."""
    close = difflib.get_close_matches(str(word), list(map(str, words)), n=1, cutoff=cutoff)
    return close[0] if close else None


def did_you_mean(word: object, words: Iterable[object], cutoff: float = 0.6) -> str:
    """Returns '; did you mean X?' with the closest match in `words`, or ''."""
    other = closest_match(word, words, cutoff)
    return f'; did you mean {other}?' if other else ''
