"""The house stands as docs/architecture.md describes it, and speaks of itself alone."""

import ast
import glob
import os
import re
import subprocess

import pytest

from common.commands import ROOT

# Who is built on whom: a floor imports from its own module or folder and from the floors below it.
FLOORS = (
    ('common', 'configs', 'schedules'),
    ('inputs', 'devices', 'modeling', 'outputs'),
    ('experiment', 'compare', 'predict'),
    ('evaluate', 'export', 'diagnostics'),
    ('train',),
    ('main',),
)
FILES = sorted(
    os.path.relpath(path, ROOT)
    for pattern in ('*.py', '*/*.py')
    for path in glob.glob(os.path.join(ROOT, pattern))
)
CODE = [name for name in FILES if not name.startswith('tests')]


def imported(name):
    """Names of the repository's own modules that a file imports."""
    with open(os.path.join(ROOT, name)) as file:
        tree = ast.parse(file.read())
    own = {os.path.dirname(path) or path[:-3] for path in CODE}
    for node in ast.walk(tree):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        yield from (module.split('.')[0] for module in names if module.split('.')[0] in own)


def place_of(name):
    """The folder or root module that a file is or belongs to."""
    return name.split('/')[0].removesuffix('.py')


def floor_of(place):
    return next(number for number, floor in enumerate(FLOORS) if place in floor)


IN_THE_HOUSE = [name for name in CODE if place_of(name) not in ('benchmarks', 'colab')]


@pytest.mark.parametrize('name', IN_THE_HOUSE)
def test_a_file_imports_from_its_own_place_and_the_floors_below(name):
    here = place_of(name)
    for other in imported(name):
        assert other == here or floor_of(other) < floor_of(here), other


def test_nothing_that_trains_imports_the_diagnostics():
    importers = {
        name
        for name in IN_THE_HOUSE
        if 'diagnostics' in imported(name) and place_of(name) != 'diagnostics'
    }
    assert importers == {'main.py'}


def test_only_what_one_runs_lies_at_the_root():
    commands = {'main.py', 'train.py', 'evaluate.py', 'export.py', 'predict.py', 'compare.py'}
    assert {name for name in CODE if '/' not in name} == commands | {'schedules.py'}


@pytest.mark.parametrize('name', [name for name in CODE if name.startswith('configs/')])
def test_a_config_imports_configs_only(name):
    assert set(imported(name)) <= {'configs'}


def test_the_schedule_stands_alone():
    assert list(imported('schedules.py')) == []


@pytest.mark.parametrize('name', CODE)
def test_a_file_says_what_it_is_for(name):
    with open(os.path.join(ROOT, name)) as file:
        text = file.read()
    assert not text or ast.get_docstring(ast.parse(text))


def test_ci_takes_a_run_without_tests_for_a_failure(tmp_path):
    with open(os.path.join(ROOT, '.ci', 'run')) as file:
        script = file.read()
    (tmp_path / '.ci').mkdir()
    (tmp_path / '.ci' / 'run').write_text(script)
    targets, passes = ('test', 'test-slow', 'test-tpu'), 'echo "3 passed in 1s"'

    def succeeds(**recipes):
        recipes.setdefault('lint', 'true')
        rules = [f'{target}:\n\t@{recipes.get(target, passes)}\n' for target in ('lint', *targets)]
        (tmp_path / 'Makefile').write_text(''.join(rules))
        return (
            subprocess.run(['bash', '.ci/run'], cwd=tmp_path, capture_output=True).returncode == 0
        )

    assert succeeds()
    for target in targets:
        for recipe in ('echo "no tests ran in 1s"', 'echo "3 passed"; false', 'echo "0 passed"'):
            assert not succeeds(**{target: recipe}), (target, recipe)
    assert not succeeds(lint='false')


def test_names_of_tests_have_at_most_60_letters():
    names = []
    for folder, _, files in os.walk(os.path.join(ROOT, 'tests')):
        for file in files:
            if file.startswith('test_') and file.endswith('.py'):
                with open(os.path.join(folder, file)) as source:
                    names += re.findall(r'^def (test_\w+)', source.read(), re.MULTILINE)
    assert len(names) > 600
    assert [name for name in names if len(name) > 60] == []
