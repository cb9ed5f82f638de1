"""Converts class names to and from labels.txt beside a SavedModel: one per line, as in the head.

A name that would not be read back unchanged is written as a JSON string: one with a line break of
any kind, an empty one, and one that could itself be taken for such a string. All others are written
as they are, so that `cat labels.txt` and a loop over its lines give the names.
"""

import json
from collections.abc import Iterable

NAME = 'labels.txt'


def to_text(names: Iterable[str]) -> str:
    """Returns the content of labels.txt for these names, in this order."""
    return ''.join(f'{_to_line(name)}\n' for name in names)


def from_text(text: str) -> list[str]:
    """Returns the names in the content of labels.txt.

    Line ends may be those of Windows, and the last one may be missing.
    """
    lines = text.replace('\r\n', '\n').removesuffix('\n').split('\n')
    return [_from_line(line) for line in lines] if text else []


def _to_line(name: str) -> str:
    is_one_line = name.splitlines() == [name]  # other programs may split it like this
    return name if is_one_line and _from_line(name) == name else json.dumps(name)


def _from_line(line: str) -> str:
    try:
        name = json.loads(line) if line.startswith('"') else line
    except ValueError:
        return line
    # A class may really be called "cat", with the quotes: only what `_to_line` writes as a JSON
    # string is read as one.
    return name if name == line or _to_line(name) == line else line
