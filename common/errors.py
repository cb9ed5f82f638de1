"""Mistakes that `main.py` turns into one clear line in place of a stack trace."""

import difflib
import re


class UserError(Exception):
    """A mistake that the user can mend. Its text is one line.

    Attributes:
        problem: what went wrong.
        fix: what to do about it, or ''.
        key: of the config whose value it is, or None.
        exit_status: what the process returns.
    """

    exit_status = 1

    def __init__(self, problem: str, fix: str = '', key: str | None = None):
        super().__init__(f'{problem}: {fix}' if fix else problem)
        self.problem = problem
        self.fix = fix
        self.key = key


class ConfigError(UserError):
    """Wrong usage or an impossible config: nothing was started."""

    exit_status = 2


class RunError(UserError):
    """The run failed: no data, no such hardware, a checkpoint of another model."""


def one_line(text, limit=300):
    """Returns text, or what an exception says, on one line of at most `limit` characters."""
    if type(text).__module__ == 'tensorflow.python.framework.errors_impl':
        text = _own_words(str(text))
    return ' '.join(str(text).split())[:limit]


def counted(number, noun, nouns=None):
    """Returns '1 file', '2 files' or '1,000 files'; `nouns` is a plural that is not made with s."""
    if number == 1:
        return f'1 {noun}'
    return f'{number:,} {nouns or noun + "s"}'


def _own_words(message):
    """Returns what an error of TensorFlow says itself, without where in its graph it was."""
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
    message = re.sub(several, r'\1', message, flags=re.DOTALL)  # the first of them
    asserted = re.search(r'assertion failed: \[(.*)\]', message, re.DOTALL)  # each word in brackets
    return asserted[1].replace('] [', ' ') if asserted else message


def did_you_mean(word, words, cutoff=0.6):
    """Returns '; did you mean X?' with the nearest of `words`, or ''."""
    known = [str(other) for other in words]
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=cutoff)
    return f'; did you mean {close[0]}?' if close else ''
