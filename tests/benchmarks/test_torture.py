"""A run that is killed again and again is, to the bit, the run that was left alone:
benchmarks/torture.py in small.
"""

import os
import shutil

import pytest

from benchmarks import torture


@pytest.mark.slow
def test_kills_change_nothing(tmp_path):
    result = torture.torture(str(tmp_path), kills=2, seed=1, steps=80)
    assert len(result['kills']) == 2 and result['resumed_from'] == sorted(result['resumed_from'])
    alone, killed = str(tmp_path / 'alone'), str(tmp_path / 'killed')
    assert torture.compare(alone, killed) == []

    # And it is a comparison: each of these would have been seen.
    with open(os.path.join(killed, 'metrics.jsonl')) as file:
        lines = file.readlines()
    other_loss = lines[0].replace('train/loss": 2', 'train/loss": 3')
    for changed, says in (
        (lines[:-1], 'is None'),
        ([*lines[:2], *lines[1:]], 'twice'),
        ([other_loss, *lines[1:]], 'metrics.jsonl: 7'),
    ):
        with open(os.path.join(killed, 'metrics.jsonl'), 'w') as file:
            file.writelines(changed)
        assert says in ' '.join(torture.compare(alone, killed)), says
    with open(os.path.join(killed, 'metrics.jsonl'), 'w') as file:
        file.writelines(lines)
    folders = torture.checkpoints(killed)[0]
    last, other = sorted(folders)[-1], sorted(folders)[0]
    for name in os.listdir(folders[other]):
        if name.startswith('variables.'):
            shutil.copy(os.path.join(folders[other], name), folders[last])
    assert f'model/0000 in the checkpoint of step {last}' in ' '.join(
        torture.compare(alone, killed)
    )
