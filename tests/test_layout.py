"""The house stands as docs/architecture.md describes it, and speaks of itself alone."""
import ast
import glob
import os
import subprocess

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NOUNS = ('inputs', 'modeling', 'devices', 'outputs')
FILES = sorted(os.path.relpath(path, ROOT) for pattern in ('*.py', '*/*.py') for path in glob.glob(os.path.join(ROOT, pattern)))
CODE = [name for name in FILES if not name.startswith('tests')]


def imported(name):
    """Names of the repository's own modules that a file imports."""
    with open(os.path.join(ROOT, name)) as file:
        tree = ast.parse(file.read())
    own = {os.path.dirname(path) or path[:-3] for path in CODE}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
        yield from (module.split('.')[0] for module in names if module.split('.')[0] in own)


@pytest.mark.parametrize('name', [name for name in CODE if name.split('/')[0] in NOUNS])
def test_a_noun_imports_no_other_noun(name):
    noun = name.split('/')[0]
    allowed = {noun, 'errors'} | ({'schedules'} if noun == 'modeling' else set())
    assert set(imported(name)) <= allowed


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
    script = open(os.path.join(ROOT, '.ci', 'run')).read()
    (tmp_path / '.ci').mkdir()
    (tmp_path / '.ci' / 'run').write_text(script)
    targets, passes = ('test', 'test-slow', 'test-tpu'), 'echo "3 passed in 1s"'

    def succeeds(**recipes):
        rules = [f'{target}:\n\t@{recipes.get(target, passes)}\n' for target in targets]
        (tmp_path / 'Makefile').write_text(''.join(rules))
        return subprocess.run(['bash', '.ci/run'], cwd=tmp_path, capture_output=True).returncode == 0

    assert succeeds()
    for target in targets:
        for recipe in ('echo "no tests ran in 1s"', 'echo "3 passed"; false', 'echo "0 passed"'):
            assert not succeeds(**{target: recipe}), (target, recipe)
