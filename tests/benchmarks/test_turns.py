"""Programs that take turns: benchmarks/turns.py."""

import os
import sys

import pytest

from benchmarks import turns

PROGRAM = """
import sys, time
sys.path.insert(0, {root!r})
from benchmarks import turns

def work():
    held = bytearray({megabytes} << 20)
    while True:
        time.sleep({seconds})
        yield 3

turns.take(work())
"""


def command(seconds, megabytes=1):
    root = os.path.dirname(os.path.dirname(os.path.abspath(turns.__file__)))
    return [
        sys.executable,
        '-c',
        PROGRAM.format(root=root, seconds=seconds, megabytes=megabytes),
    ]


@pytest.fixture(scope='module')
def measured():
    programs = {'quick': command(0.01), 'slow': command(0.1, megabytes=200)}
    return turns.measure(programs, rounds=2, seconds=0.5)


def test_a_speed_is_what_was_done_in_a_second(measured):
    # A sleep never ends early; how late it ends is the machine's.
    assert all(0 < speed <= 3 / 0.01 for speed in measured['quick'].speeds)
    assert all(0 < speed <= 3 / 0.1 for speed in measured['slow'].speeds)


def test_the_first_round_does_not_count(measured):
    assert [len(program.speeds) for program in measured.values()] == [2, 2]


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='/proc tells the memory')
def test_the_largest_memory_of_a_program_is_known(measured):
    more = measured['slow'].peak_bytes - measured['quick'].peak_bytes
    assert 190 << 20 < more < 220 << 20


def test_a_program_that_fails_ends_all_with_what_it_said():
    failing = [sys.executable, '-c', 'import sys; sys.exit("no such model")']
    with pytest.raises(SystemExit, match='no such model\nerror: broken ended with status 1'):
        turns.measure({'broken': failing}, rounds=1, seconds=0.1)


def test_a_ratio_is_taken_within_each_round():
    assert turns.ratio([2, 30, 8], [1, 10, 2]) == (3, 2, 4)
