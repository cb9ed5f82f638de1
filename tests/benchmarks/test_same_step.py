"""Every optimizer means the same wherever it runs: a part of the table of
benchmarks/same_step.py.
"""

import pytest

from benchmarks import same_step
from modeling import optimizers


@pytest.mark.slow
def test_ten_updates_match_everywhere_for_every_optimizer():
    names = sorted(optimizers.OPTIMIZERS)
    report = same_step.compare(names, ['clip'], places=('2',), jit=(False,))
    assert not same_step.beyond_tolerance(report) and list(report) == [
        (name, 'clip') for name in names
    ]


@pytest.mark.slow
def test_ten_updates_match_with_every_feature_and_xla():
    # tests/test_workers.py is about workers, tests/devices/test_pjrt.py about JAX.
    report = same_step.compare(['adamw'], ['all'], places=('2',), jit=(True,))
    assert not same_step.beyond_tolerance(report) and all(
        row['weights'] > 0 for row in report.values()
    )
