"""Everything that the program prints: one place that knows how wide a terminal is and its colors.

A line begins with a name in a column of its own and goes on with text, which is wrapped where
standard output is a terminal. Files and pipes get each line whole and without colors.
"""

import contextlib
import importlib
import os
import shutil
import sys
import tempfile
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator
from typing import TextIO

NAME_WIDTH = 10
NARROWEST = 60  # columns; below that, wrapped text is harder to read than a terminal's own wrapping
UNLIMITED = 100_000  # columns, of what is no terminal
BOLD, RED, GREEN, YELLOW = 1, 31, 32, 33  # of ANSI's "select graphic rendition"
STATUS_COLORS = {'ok': GREEN, 'warn': YELLOW, 'FAIL': RED}
STATUS_WIDTH, CHECK_NAME_WIDTH = 6, 14
# Unicode Standard Annex 9, 2.1 to 2.5.
EMBEDDINGS = (
    'LRE',
    'RLE',
    'LRO',
    'RLO',
    'PDF',
    'LRI',
    'RLI',
    'FSI',
    'PDI',
)
UNSEEN = '\ufeff\u00ad'  # the mark of an encoding, and a soft hyphen: no name needs them


def row(name: str, text: str) -> None:
    """Prints `text` after `name`; an empty name continues the row above."""
    print(format_row(name, text, terminal_width(), has_colors()), flush=True)


def note(text: str) -> None:
    """Prints what the user should know, and need not do anything about."""
    row('note', text)


def line(text: str = '') -> None:
    """Prints a line as it is: a path, JSON, a table."""
    print(text, flush=True)


def error(problem: str, fix: str = '') -> None:
    """Prints why the program stops, and what to do about it, on standard error."""
    prefix = paint('error:', RED, has_colors(sys.stderr))
    print(f'{prefix} {problem}: {fix}' if fix else f'{prefix} {problem}', file=sys.stderr)


def warning(text: str) -> None:
    """Prints a line beside the program's output, on standard error."""
    print(text, file=sys.stderr, flush=True)


def check_row(status: str, name: str, message: str, fix: str = '') -> None:
    """Prints a result of `--mode=check`.

    The command that fixes it has a line of its own and is never wrapped, so that it can be copied.
    """
    print(format_check_row(status, name, message, fix, terminal_width(), has_colors()), flush=True)


def format_row(name: str, text: str, width: int, colors: bool = False) -> str:
    """Returns a row of at most `width` columns a line."""
    head = f'{name:<{NAME_WIDTH}}'
    body = _wrap(head + text, width, indent=NAME_WIDTH)
    return body.replace(name, paint(name, BOLD, colors), 1) if name else body


def format_rows(rows: Iterable[tuple[str, str]]) -> str:
    """Returns rows of (name, text) as they stand in a file, a line each."""
    return '\n'.join(format_row(name, text, UNLIMITED) for name, text in rows)


def format_check_row(
    status: str, name: str, message: str, fix: str, width: int, colors: bool = False
) -> str:
    """Returns a result of `--mode=check`, its fix on a line of its own."""
    indent = STATUS_WIDTH + CHECK_NAME_WIDTH
    head = f'{status:{STATUS_WIDTH}}{name:{CHECK_NAME_WIDTH}}'
    body = _wrap(head + message, width, indent)
    body = body.replace(status, paint(status, STATUS_COLORS[status], colors), 1)
    return f'{body}\n{" " * indent}-> {fix}' if fix else body


def _wrap(text: str, width: int, indent: int) -> str:
    return textwrap.fill(
        text,
        width,
        subsequent_indent=' ' * indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        expand_tabs=False,
    )


def paint(text: str, color: int, colors: bool) -> str:
    return f'\033[{color}m{text}\033[0m' if colors else text


def terminal_width(stream: TextIO | None = None) -> int:
    """Returns the columns of the terminal, or many where standard output is none."""
    stream = stream or sys.stdout
    return max(NARROWEST, shutil.get_terminal_size().columns) if stream.isatty() else UNLIMITED


def has_colors(stream: TextIO | None = None) -> bool:
    """Returns whether to color: on a terminal, unless NO_COLOR is set (https://no-color.org)."""
    stream = stream or sys.stdout
    is_dumb = os.environ.get('TERM') == 'dumb'
    return stream.isatty() and not is_dumb and not os.environ.get('NO_COLOR')


def import_tensorflow_quietly() -> None:
    """Imports TensorFlow without the greetings of its libraries, unless the import fails.

    They go to standard error whatever the log level is.
    """
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    with tempfile.TemporaryFile() as greetings, _standard_error_into(greetings.fileno()) as usual:
        try:
            importlib.import_module('tensorflow')
        except BaseException:
            greetings.seek(0)
            os.write(usual, greetings.read())
            raise


@contextlib.contextmanager
def _standard_error_into(descriptor: int) -> Iterator[int]:
    """Redirects file descriptor 2 in the block; yields a descriptor of what it was."""
    usual = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        yield usual
    finally:
        os.dup2(usual, 2)
        os.close(usual)


def tolerate_any_terminal() -> None:
    """Escapes letters that a terminal cannot show, and survives standard streams being closed."""
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115 - for as long as the program runs
        getattr(sys, name).reconfigure(errors='backslashreplace')


def discard_output() -> int:
    """Sends what is still to be written to standard output nowhere; returns the exit status.

    For a pipe whose reader has gone.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def printable(name: str) -> str:
    """Returns the name of a file as it can be printed, on one line."""
    return ascii(name) if any(_disturbs(letter) for letter in name) else name


def _disturbs(letter: str) -> bool:
    """Returns whether a letter ends a line, reorders what follows it, or is invisible."""
    is_control = unicodedata.category(letter) in ('Cc', 'Cs', 'Zl', 'Zp')
    return is_control or letter in UNSEEN or unicodedata.bidirectional(letter) in EMBEDDINGS
