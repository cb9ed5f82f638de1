"""Checks `--config.KEY=VALUE` on the command line against the keys of configs/default.py.

absl and ml_collections would reject the same arguments, but with long stack traces. Needs no
TensorFlow.
"""

import ast
from collections.abc import Iterator, Sequence

from absl import flags
from ml_collections import ConfigDict

from common.errors import ConfigError, did_you_mean
from configs import default

LITERAL = 'a number, true or false, or several values in brackets'
KINDS = {
    bool: 'true or false',
    int: 'a whole number',
    float: 'a number',
    tuple: 'several values in brackets',
}
PARSERS = {
    bool: flags.BooleanParser().parse,
    int: flags.IntegerParser().parse,
    float: flags.FloatParser().parse,
    tuple: ast.literal_eval,
}


def check_overrides(arguments: Sequence[str]) -> None:
    """Raises ConfigError if a section does not exist or a value has the wrong type.

    Unknown keys are reported later, by `config_schema.check_config`.
    """
    for key, value in _overrides(arguments):
        _check(key, value, default.get_config())


def _overrides(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields (key, value) for each --config.KEY=VALUE or --config.KEY VALUE."""
    for argument, following in zip(arguments, [*arguments[1:], ''], strict=True):
        name, equals, value = argument.partition('=')
        for prefix in ('--config.', '-config.'):
            if name.startswith(prefix):
                yield name.removeprefix(prefix), value if equals else following


def _check(key: str, value: str, defaults: ConfigDict) -> None:
    sections = [name for name, inner in defaults.items() if isinstance(inner, ConfigDict)]
    section, _, name = key.partition('.')
    if name and section not in sections:
        hint = did_you_mean(section, sections)
        listed = f'sections are {", ".join(sections)}{hint}'
        raise ConfigError(f'config.{section} has no keys', listed, section)
    known = defaults[section] if name and section in sections else defaults
    is_argument = section in ('optimizer', 'schedule') and name not in known
    if not is_argument and (name or section) not in known:
        return
    if is_argument and name:
        _check_argument(key, value)
        return
    default_value = known[name or section]
    if isinstance(default_value, ConfigDict):
        keys = ', '.join(default_value.keys())
        fix = f'--config.{key}.KEY=VALUE, KEY being one of {keys}'
        raise ConfigError(f'config.{key} has keys of its own', fix, key)
    kind = type(default_value)
    if kind is str or not value:
        return
    try:
        PARSERS[kind](value)
    except (TypeError, ValueError, SyntaxError) as error:
        fix = f'write {KINDS[kind]}, as in --config.{key}={default_value!r}'
        raise ConfigError(f'config.{key}={value!r} cannot be read', fix, key) from error


def _check_argument(key: str, value: str) -> None:
    """Raises ConfigError unless the value could be an argument of an optimizer or a curve."""
    if value in ('true', 'false'):
        return
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError) as error:
        raise ConfigError(
            f'config.{key}={value!r} cannot be read', f'write {LITERAL}', key
        ) from error
