"""docs/config.md, the table of all keys of a config, made from config_schema.KEYS and the defaults.

python -m experiment.config_docs > docs/config.md
"""

from typing import Any

from common import console
from common.storage import flatten
from configs import default
from experiment.config_schema import KEYS, Key

TYPES = {bool: 'bool', int: 'int', float: 'float', str: 'str', tuple: 'tuple'}
INTRODUCTION = """\
# Every key of a config

[configs/default.py](../configs/default.py) has the defaults, with their reasons. On the command
line a key is `--config.KEY=VALUE`. A duration is a number with a unit: `'90 epochs'`,
`'500 steps'`, `'1_281_167 examples'`, `'5%'` of the run.

`python -m experiment.config_docs > docs/config.md` makes this page.
"""


def as_markdown() -> str:
    """Returns the text of docs/config.md: a table for each group of keys."""
    defaults = flatten(default.get_config())
    groups: dict[str, list[str]] = {}
    for key, allowed in KEYS.items():
        group = key.split('.')[0] if '.' in key else ''
        groups.setdefault(group, []).append(_row(key, defaults[key], allowed))
    parts = [INTRODUCTION]
    for group, rows in groups.items():
        heading = f'## {group}\n\n' if group else '## The run\n\n'
        head = '| key | default | type | values | |\n| --- | --- | --- | --- | --- |\n'
        parts.append(heading + head + ''.join(rows))
    return '\n'.join(parts)


def _row(key: str, value: Any, allowed: Key) -> str:
    kind = 'duration' if allowed.units else TYPES[type(value)]
    return f'| `{key}` | `{value!r}` | {kind} | {_values(allowed)} | {allowed.doc} |\n'


def _values(allowed: Key) -> str:
    """Returns which values a key may have, '' if all of its type."""
    if allowed.choices:
        return ', '.join(f'`{choice!r}`' for choice in allowed.choices)
    if allowed.units:
        return ', '.join(allowed.units)
    if allowed.low is None:
        return ''
    if allowed.high is None:
        return f'{allowed.low} and more'
    return f'{allowed.low} to {allowed.high:,}'


if __name__ == '__main__':
    console.line(as_markdown().rstrip('\n'))
