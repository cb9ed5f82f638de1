"""One case of benchmarks/bench.py, and what it makes of speeds."""

import pytest

from benchmarks import bench


def test_ours_is_divided_by_each_of_the_others():
    found = bench.compared({'ours': [4.0, 9.0, 2.0], 'fit': [2.0, 3.0, 2.0]}, 'steps a second')
    assert found['ours']['ours_divided_by_it'] == 1
    assert found['fit'] == {
        'steps_a_second': 2,
        'ours_divided_by_it': 2,
        'from': 1,
        'to': 3,
    }


@pytest.mark.slow
def test_a_case_measures_ours_and_the_others():
    found = bench.run('step of a tiny model', 1, 0.2, torch_python=None)
    assert found['ours, tiny']['examples_a_second'] > 0
    assert found['fit, tiny']['ours_divided_by_it'] > 0
    assert found['fit, tiny']['peak_mib'] > 100
