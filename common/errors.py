"""The two kinds of mistake that `main.py` turns into one clear line instead of a stack trace, and how the line is worded."""
import difflib
import re


class UserError(Exception):
    """What went wrong and what to do about it, in one line. `exit_status` is what the process returns."""

    exit_status = 1


class ConfigError(UserError):
    """Wrong usage or an impossible config: nothing was started."""

    exit_status = 2


class RunError(UserError):
    """The run failed: missing data, absent hardware, a checkpoint of another model, an export that differs."""


def one_line(text, limit=300):
    """Returns text, or what an exception says, on one line of at most `limit` characters."""
    if type(text).__module__ == 'tensorflow.python.framework.errors_impl':
        text = _own_words(str(text))
    return ' '.join(str(text).split())[:limit]


def counted(number, noun, nouns=None):
    """Returns '1 file', '2 files' or '1,000 files'; `nouns` where the plural is not made with an s."""
    return f'{number:,} {noun if number == 1 else nouns or noun + "s"}'


def _own_words(message):
    """Returns what an error of TensorFlow says itself, without where in its graph it was."""
    unwanted = (
        r'\s*\[\[(\{\{.*?\}\}|[A-Za-z_][\w/]*)\]\]',  # [[{{node cond/Assert}}]] and [[IteratorGetNext]]
        r'\{\{.*?\}\}\s*',
        r'\[Op:.*',
        r'\s*Stack trace for op definition:.*',
        r'Graph execution error:\s+Detected at node .*?(<stack traces unavailable>\n|\n\n(?! *File))',
        r'Error in user-defined function passed to \S+ transformation with iterator: \S+:? ',
    )
    for pattern in unwanted:
        message = re.sub(pattern, '', message, flags=re.DOTALL)
    # Several errors: the first of them.
    message = re.sub(r'[0-9]+ root error\(s\) found\.\s+\(0\) \w+: (.*?)\s+\(1\) .*', r'\1', message, flags=re.DOTALL)
    asserted = re.search(r'assertion failed: \[(.*)\]', message, re.DOTALL)  # each word in brackets
    return asserted[1].replace('] [', ' ') if asserted else message


def did_you_mean(word, words, cutoff=0.6):
    """'; did you mean X?' with the nearest of `words`, or nothing."""
    close = difflib.get_close_matches(str(word), [str(known) for known in words], n=1, cutoff=cutoff)
    return f'; did you mean {close[0]}?' if close else ''
