"""What is written down: rows without doubles, pictures that can be opened, and runs side by side."""
import json
import os

import numpy as np
import pytest
import tensorflow as tf

import compare
from outputs import plots
from outputs.files import write_json
from outputs.logbook import Logbook, read_metrics


def write_run(folder, rows, **schedule):
    os.makedirs(folder)
    write_json(os.path.join(folder, 'config.json'), {'model': {'name': 'tiny'}, 'batch_size': 64, 'schedule': {'name': 'cosine', 'peak_lr': 0.1, 'warmup': '5%', **schedule}})
    with open(os.path.join(folder, 'metrics.jsonl'), 'w') as file:
        file.writelines(json.dumps(row) + '\n' for row in rows)


def test_no_step_appears_twice_also_after_a_restart(tmp_path):
    folder = str(tmp_path)
    logbook = Logbook(folder, 0, 100)
    for step in (10, 20, 30):
        logbook.write(step, {'train/loss': 1.0 / step})
    logbook.write(30, {'eval/loss': 0.5})
    logbook.close()
    assert [row['step'] for row in read_metrics(folder)] == [10, 20, 30]
    assert read_metrics(folder)[-1]['eval/loss'] == 0.5 and 'train/loss' in read_metrics(folder)[-1]

    logbook = Logbook(folder, 20, 100)  # the checkpoint was older than the last row
    assert [row['step'] for row in read_metrics(folder)] == [10, 20]
    logbook.write(30, {'train/loss': 0.25})
    logbook.close()
    assert [row['step'] for row in read_metrics(folder)] == [10, 20, 30] and read_metrics(folder)[-1]['train/loss'] == 0.25


def test_pictures_can_be_opened(tmp_path):
    rows = [{'step': step, 'train/loss': 1 / step, 'train/learning_rate': 0.1, 'eval/accuracy': 0.5} for step in range(1, 50)]
    plots.plot_learning_rate(str(tmp_path / 'a' / 'rate.png'), range(50), np.linspace(0, 1, 50), rows, 5, 10)
    plots.plot_curves(str(tmp_path / 'curves.png'), {'one': rows, 'two': rows[:10]})
    plots.plot_curves(str(tmp_path / 'empty.png'), {'none': []})
    for name in ('a/rate.png', 'curves.png', 'empty.png'):
        picture = tf.io.decode_png(tf.io.read_file(str(tmp_path / name)), channels=3).numpy()
        assert picture.shape[0] > 300 and picture.std() > 5


def test_runs_with_and_without_warmup_stand_side_by_side(tmp_path, capsys):
    rows = [{'step': 50, 'eval/accuracy': 0.91, 'eval/loss': 0.3}, {'step': 100, 'eval/accuracy': 0.9, 'eval/loss': 0.25, 'train/examples_per_second': 1234.0}]
    write_run(tmp_path / 'with', rows)
    write_run(tmp_path / 'without', rows[:1], warmup='0%')
    assert compare.main([str(tmp_path / 'with'), str(tmp_path / 'without'), f'--output={tmp_path}/both.png']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in lines[2].split('|')][1:-1] == ['with', 'tiny', 'cosine', '0.1', '5%', '64', '100', '90.00%', '91.00%', '0.2500', '1,234']
    assert [cell.strip() for cell in lines[3].split('|')][1:-1] == ['without', 'tiny', 'cosine', '0.1', '0%', '64', '50', '91.00%', '91.00%', '0.3000', '-']
    assert os.path.getsize(tmp_path / 'both.png') > 10_000


@pytest.mark.parametrize('arguments', [['/no/such/run'], ['/']])
def test_what_is_no_run_is_one_line(arguments, capsys):
    assert compare.main(arguments) == 1
    assert capsys.readouterr().err == f'error: {arguments[0]} is no run: it has no config.json\n'


@pytest.mark.parametrize('output', ['curves.xyz', 'no/such\0folder/curves.png'])
def test_curves_that_cannot_be_drawn_are_one_line(tmp_path, output, capsys):
    write_run(tmp_path / 'with', [{'step': 50, 'eval/accuracy': 0.91}])
    assert compare.main([str(tmp_path / 'with'), f'--output={tmp_path}/{output}']) == 2
    assert capsys.readouterr().err.startswith(f'error: --output={tmp_path}/')
