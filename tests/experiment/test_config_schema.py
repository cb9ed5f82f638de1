"""The table of keys says of each key of the defaults what it is, and docs/config.md says it too."""

import os
import pickle

import pytest

from common.commands import ROOT
from common.errors import ConfigError
from common.storage import flatten
from configs import default
from experiment import config_docs, config_schema
from experiment.config_schema import KEYS


def test_the_table_has_the_keys_of_the_defaults():
    assert KEYS.keys() == flatten(default.get_config()).keys()


@pytest.mark.parametrize('key', KEYS)
def test_a_key_is_explained_in_a_sentence(key):
    doc = KEYS[key].doc
    assert doc.endswith('.') or ': ' in doc
    assert doc[0].isupper() or doc[0] in '`(' or doc.startswith('alpha')


def test_only_numbers_have_bounds_only_strings_choices_or_units():
    for key, value in flatten(default.get_config()).items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        assert is_number == (KEYS[key].low is not None)
        if KEYS[key].choices or KEYS[key].units:
            assert isinstance(value, str)


def test_the_page_of_all_keys_is_the_one_that_the_table_makes():
    with open(os.path.join(ROOT, 'docs', 'config.md')) as file:
        assert file.read() == config_docs.as_markdown()


@pytest.mark.parametrize('key', [key for key, allowed in KEYS.items() if allowed.low is not None])
def test_the_bounds_themselves_are_allowed_and_nothing_beyond(key):
    allowed = KEYS[key]
    config_schema._check_value(key, allowed.low, allowed)
    beyond = [allowed.low - 1, float('nan'), float('inf')]
    if allowed.high is not None:
        config_schema._check_value(key, allowed.high, allowed)
        beyond.append(allowed.high + 1)
    for value in beyond:
        with pytest.raises(ConfigError) as error:
            config_schema._check_value(key, value, allowed)
        assert error.value.key == key
        assert error.value.fix.startswith('it must be ')


def test_an_error_says_problem_and_fix_in_one_line():
    error = ConfigError('config.seed=-1 is impossible', 'it must be at least 0', 'seed')
    assert str(error) == 'config.seed=-1 is impossible: it must be at least 0'
    assert str(ConfigError('no data')) == 'no data'


def test_an_error_keeps_its_fields_on_the_way_between_processes():
    error = pickle.loads(pickle.dumps(ConfigError('a', 'b', 'seed')))
    assert (error.problem, error.fix, error.key, str(error)) == ('a', 'b', 'seed', 'a: b')
