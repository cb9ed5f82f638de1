"""Rows fit the terminal, and colors are there for a terminal alone."""

import importlib
import json
import os
import pty
import subprocess
import sys

import pytest

from common import console
from tests.test_layout import ROOT

ROW = 'steps     673 = 29.97 epochs x 22.4531 steps'
PROGRAM = (
    "from common import console; console.row('steps', '673 = 29.97 epochs'); console.note('x')"
)


def on_terminal(program, **environ):
    """What a program writes to a terminal."""
    terminal, process_side = pty.openpty()
    environment = {**os.environ, 'TERM': 'xterm', 'PYTHONPATH': ROOT, **environ}
    command = [sys.executable, '-c', program]
    subprocess.run(command, stdout=process_side, stderr=process_side, env=environment, check=True)
    os.close(process_side)
    written = os.read(terminal, 10_000).decode().replace('\r\n', '\n')
    os.close(terminal)
    return written


def test_a_row_has_its_name_in_a_column_of_its_own():
    assert console.format_row('steps', '673 = 29.97 epochs x 22.4531 steps', 100) == ROW
    assert console.format_row('', 'more', 100) == '          more'
    assert console.format_rows([('a', 'x'), ('b', 'y')]) == 'a         x\nb         y'


@pytest.mark.parametrize('width', [60, 80, 100])
def test_a_long_row_is_wrapped_below_its_text(width):
    text = ' '.join(f'word{number}' for number in range(40))
    lines = console.format_row('note', text, width).split('\n')
    assert len(lines) >= 3 and max(map(len, lines)) <= width
    assert lines[0].startswith('note      word0')
    assert all(line.startswith(' ' * 10 + 'word') for line in lines[1:])
    assert ' '.join(line[10:] for line in lines) == text


def test_what_fixes_a_failure_is_never_wrapped():
    fix = 'pip install ' + ' '.join(f'package{number}' for number in range(20))
    lines = console.format_check_row('FAIL', 'packages', 'missing ' * 20, fix, 60).split('\n')
    assert lines[-1] == ' ' * 20 + '-> ' + fix
    assert max(map(len, lines[:-1])) <= 60


def test_a_terminal_gets_colors_and_a_file_does_not():
    assert on_terminal(PROGRAM).startswith('\033[1msteps\033[0m     673')
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == 'steps     673 = 29.97 epochs\nnote      x\n'


@pytest.mark.parametrize('environ', [{'NO_COLOR': '1'}, {'TERM': 'dumb'}])
def test_colors_can_be_refused(environ):
    assert on_terminal(PROGRAM, **environ) == 'steps     673 = 29.97 epochs\nnote      x\n'


def test_an_error_has_its_fix_behind_it():
    program = "from common import console; console.error('no room', 'free some')"
    assert on_terminal(program, NO_COLOR='1') == 'error: no room: free some\n'
    assert on_terminal(program) == '\033[31merror:\033[0m no room: free some\n'


def test_packages_that_are_not_needed_are_hidden_for_a_while(monkeypatch):
    monkeypatch.delitem(sys.modules, 'colorsys', raising=False)
    with console._not_installed('colorsys', 'json'):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module('colorsys')
        assert importlib.import_module('json') is json  # it had been imported before
    assert importlib.import_module('colorsys').rgb_to_hsv(0, 0, 0) == (0, 0, 0)
