"""Prints everything that the program prints, and is the only code that knows the terminal.

A row is a name in its own column followed by text, wrapped if standard output is a terminal. Files
and pipes get unwrapped, uncoloured lines.
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
UNLIMITED = 100_000  # columns when the output is not a terminal
BOLD, RED, GREEN, YELLOW = 1, 31, 32, 33  # of ANSI's "select graphic rendition"
STATUS_COLORS = {'ok': GREEN, 'warn': YELLOW, 'FAIL': RED}
STATUS_WIDTH, CHECK_NAME_WIDTH = 6, 14
# Bidirectional control characters: Unicode Standard Annex 9, sections 2.1 to 2.5.
BIDI_CONTROLS = (
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
INVISIBLE = '\ufeff\u00ad'  # byte order mark and soft hyphen


def row(name: str, text: str) -> None:
    """Prints `text` after `name`; an empty name continues the row above."""
    print(format_row(name, text, terminal_width(), has_colors()), flush=True)


def note(text: str) -> None:
    """Prints information that requires no action."""
    row('note', text)


def line(text: str = '') -> None:
    """Prints a line as it is: a path, JSON, a table."""
    print(text, flush=True)


def error(problem: str, fix: str = '') -> None:
    """Prints why the program stops, and what to do about it, on standard error."""
    prefix = paint('error:', RED, has_colors(sys.stderr))
    print(f'{prefix} {problem}: {fix}' if fix else f'{prefix} {problem}', file=sys.stderr)


def warning(text: str) -> None:
    """Prints a line to standard error, separate from the program's output."""
    print(text, file=sys.stderr, flush=True)


def check_row(status: str, name: str, message: str, fix: str = '') -> None:
    """Prints a result of `--mode=check`.

    The fix is on a line of its own and never wrapped, so that it can be copied.
    """
    print(format_check_row(status, name, message, fix, terminal_width(), has_colors()), flush=True)


def format_row(name: str, text: str, width: int, colors: bool = False) -> str:
    """Returns a row wrapped to `width` columns."""
    head = f'{name:<{NAME_WIDTH}}'
    body = _wrap(head + text, width, indent=NAME_WIDTH)
    return body.replace(name, paint(name, BOLD, colors), 1) if name else body


def format_rows(rows: Iterable[tuple[str, str]]) -> str:
    """Returns (name, text) rows as written to a file: one line each, not wrapped."""
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
    """Returns the terminal's width, or UNLIMITED if the stream is not a terminal."""
    stream = stream or sys.stdout
    return max(NARROWEST, shutil.get_terminal_size().columns) if stream.isatty() else UNLIMITED


def has_colors(stream: TextIO | None = None) -> bool:
    """Returns whether to use colors: on a terminal, unless TERM is dumb or NO_COLOR is set.

    Source: https://no-color.org
    """
    stream = stream or sys.stdout
    is_dumb = os.environ.get('TERM') == 'dumb'
    return stream.isatty() and not is_dumb and not os.environ.get('NO_COLOR')


def import_tensorflow_quietly() -> None:
    """Imports TensorFlow while hiding its libraries' startup messages, unless the import fails.

    They go to standard error regardless of the log level. What TensorFlow and Keras would import
    for features that are not used here is left out, which saves a third of the time.
    """
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    with tempfile.TemporaryFile() as greetings, _standard_error_into(greetings.fileno()) as usual:
        try:
            with _not_installed('IPython', 'jax', 'matplotlib', 'sklearn'):
                importlib.import_module('tensorflow')
        except BaseException:
            greetings.seek(0)
            os.write(usual, greetings.read())
            raise


@contextlib.contextmanager
def _not_installed(*packages: str) -> Iterator[None]:
    """Makes imports of `packages` fail during the block, unless they have been imported before."""
    hidden = [name for name in packages if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment] # so `import` raises ModuleNotFoundError
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextlib.contextmanager
def _standard_error_into(descriptor: int) -> Iterator[int]:
    """Redirects file descriptor 2 during the block; yields a duplicate of the original."""
    usual = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        yield usual
    finally:
        os.dup2(usual, 2)
        os.close(usual)


def tolerate_any_terminal() -> None:
    """Escapes characters that the terminal cannot encode, and tolerates closed standard streams."""
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115 - for as long as the program runs
        getattr(sys, name).reconfigure(errors='backslashreplace')


def discard_output() -> int:
    """Discards further output after the pipe's reader has exited; returns the exit status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def printable(name: str) -> str:
    """Returns a file name escaped if needed, so that it prints visibly on one line."""
    return ascii(name) if any(_needs_escaping(character) for character in name) else name


def _needs_escaping(character: str) -> bool:
    """Returns whether a character breaks the line, reorders the text after it or is invisible."""
    is_control = unicodedata.category(character) in ('Cc', 'Cs', 'Zl', 'Zp')
    return (
        is_control
        or character in INVISIBLE
        or unicodedata.bidirectional(character) in BIDI_CONTROLS
    )
