"""Each recipe of CONTRIBUTING.md applies as it is, and together they train."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.test_layout import ROOT

MAX_LINES = 30  # of a recipe
CHOICES = (
    '--config.dataset.name=stripes',
    '--config.model.name=patches',
    '--config.schedule.name=root',
    '--config.schedule.degree=3.0',
    '--config.augment.grey=0.5',
    '--config.optimizer.name=nadam',
)


def read(*path):
    with open(os.path.join(ROOT, *path)) as file:
        return file.read()


RECIPES = re.findall(r'^### ([\w ]+)\n.*?^```diff\n(.*?)^```', read('CONTRIBUTING.md'), re.M | re.S)


def copy_of_repository(folder):
    """Copies what git tracks, or would track."""
    command = ['git', 'ls-files', '--cached', '--others', '--exclude-standard']
    names = subprocess.check_output(command, cwd=ROOT, text=True).splitlines()
    for name in names:
        if os.path.exists(os.path.join(ROOT, name)):
            os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
            shutil.copy(os.path.join(ROOT, name), os.path.join(folder, name))


def apply(diff, folder, *options):
    # Without the repository around it, git would take paths relative to its root.
    environment = {**os.environ, 'GIT_CEILING_DIRECTORIES': os.path.dirname(folder)}
    command = ['git', 'apply', *options]
    done = subprocess.run(
        command, cwd=folder, input=diff, text=True, capture_output=True, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_there_are_recipes_for_what_people_add():
    names = [name for name, _ in RECIPES]
    assert names == ['A data set', 'A model', 'A schedule', 'An augmentation', 'An optimizer']


@pytest.mark.parametrize('diff', [diff for _, diff in RECIPES], ids=[name for name, _ in RECIPES])
def test_a_recipe_is_short_and_applies_by_itself(diff, tmp_path):
    assert len(diff.splitlines()) <= MAX_LINES
    copy_of_repository(str(tmp_path))
    apply(diff, str(tmp_path), '--check')


@pytest.mark.slow
def test_a_run_trains_with_all_recipes_at_once(tmp_path):
    folder = str(tmp_path / 'fork')
    copy_of_repository(folder)
    for _, diff in RECIPES:
        apply(diff, folder)
    command = [
        *(sys.executable, 'main.py', '--config=configs/debug.py', '--workdir=run', *CHOICES),
        *('--config.train_for=2 steps', '--config.batch_size=16', '--config.eval_batch_size=32'),
        f'--config.dataset.data_dir={tmp_path}/data',
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / 'fork' / 'run' / 'summary.json').read_text())
    assert summary['steps'] == 2 and summary['eval/examples'] == 64


def test_the_versions_of_the_linters_are_the_same_everywhere():
    pins = dict(line.split('==') for line in read('requirements', 'lint.txt').splitlines())
    hooks = yaml.safe_load(read('.pre-commit-config.yaml'))['repos']
    revisions = {hook['repo'].rsplit('/', 1)[1]: hook['rev'].removeprefix('v') for hook in hooks}
    assert revisions == {'ruff-pre-commit': pins['ruff'], 'mirrors-mypy': pins['mypy']}


def test_the_workflow_runs_lint_and_tests_on_each_python():
    jobs = yaml.safe_load(read('.github', 'workflows', 'test.yml'))['jobs']
    low, high = re.search(
        r'requires-python = ">=3\.(\d+),<3\.(\d+)"', read('pyproject.toml')
    ).groups()
    pythons = [f'3.{minor}' for minor in range(int(low), int(high))]
    for name in ('lint', 'test'):
        assert jobs[name]['strategy']['matrix']['python'] == pythons
        assert f'make {name}' in jobs[name]['steps'][-1]['run']
