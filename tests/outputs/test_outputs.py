"""What is written down: rows without doubles, images that can be opened, and runs side by
side.
"""

import json
import os

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing import event_accumulator

import compare
from common import storage
from common.storage import write_json
from outputs import plots, report
from outputs.metrics_logger import MetricsLogger, read_metrics, rewrite_tensorboard


def write_run(folder, rows, dataset=None, **schedule):
    os.makedirs(folder)
    write_json(
        os.path.join(folder, 'config.json'),
        {
            'model': {'name': 'tiny'},
            'batch_size': 64,
            'schedule': {'name': 'cosine', 'peak_lr': 0.1, 'warmup': '5%', **schedule},
            'dataset': dataset or {},
        },
    )
    with open(os.path.join(folder, 'metrics.jsonl'), 'w') as file:
        file.writelines(json.dumps(row) + '\n' for row in rows)


def test_no_step_appears_twice_also_after_a_restart(tmp_path):
    folder = str(tmp_path)
    logbook = MetricsLogger(folder, 0, 100)
    for step in (10, 20, 30):
        logbook.write(step, {'train/loss': 1.0 / step})
    logbook.write(30, {'eval/loss': 0.5})
    logbook.close()
    assert [row['step'] for row in read_metrics(folder)] == [10, 20, 30]
    assert read_metrics(folder)[-1]['eval/loss'] == 0.5 and 'train/loss' in read_metrics(folder)[-1]

    logbook = MetricsLogger(folder, 20, 100)  # the checkpoint was older than the last row
    assert [row['step'] for row in read_metrics(folder)] == [10, 20]
    logbook.write(30, {'train/loss': 0.25})
    logbook.close()
    assert [row['step'] for row in read_metrics(folder)] == [10, 20, 30] and read_metrics(folder)[
        -1
    ]['train/loss'] == 0.25


def test_an_accuracy_is_printed_in_percent(tmp_path, capsys):
    logbook = MetricsLogger(str(tmp_path), 0, 100)
    logbook.write(10, {'eval/accuracy': 0.09722, 'eval/loss': 0.09722})
    logbook.close()
    assert capsys.readouterr().out == 'step 10/100  accuracy 9.72%\n'


def test_pictures_can_be_opened(tmp_path):
    rows = [
        {'step': step, 'train/loss': 1 / step, 'train/learning_rate': 0.1, 'eval/accuracy': 0.5}
        for step in range(1, 50)
    ]
    plots.plot_learning_rate(
        str(tmp_path / 'a' / 'rate.png'), range(50), np.linspace(0, 1, 50), rows, 5, 10
    )
    plots.plot_curves(str(tmp_path / 'curves.png'), {'one': rows, 'two': rows[:10]})
    plots.plot_curves(str(tmp_path / 'empty.png'), {'none': []})
    for name in ('a/rate.png', 'curves.png', 'empty.png'):
        picture = tf.io.decode_png(tf.io.read_file(str(tmp_path / name)), channels=3).numpy()
        assert picture.shape[0] > 300 and picture.std() > 5


def test_runs_with_and_without_warmup_stand_side_by_side(tmp_path, capsys):
    rows = [
        {'step': 50, 'eval/accuracy': 0.91, 'eval/loss': 0.3},
        {'step': 100, 'eval/accuracy': 0.9, 'eval/loss': 0.25, 'train/examples_per_second': 1234.0},
    ]
    write_run(tmp_path / 'with', rows)
    write_run(tmp_path / 'without', rows[:1], warmup='0%')
    assert (
        compare.main(
            [str(tmp_path / 'with'), str(tmp_path / 'without'), f'--output={tmp_path}/both.png']
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in lines[2].split('|')][1:-1] == [
        'with',
        'tiny',
        'cosine',
        '0.1',
        '5%',
        '64',
        '100',
        '90.00%',
        '91.00%',
        '0.2500',
        '1,234',
    ]
    assert [cell.strip() for cell in lines[3].split('|')][1:-1] == [
        'without',
        'tiny',
        'cosine',
        '0.1',
        '0%',
        '64',
        '50',
        '91.00%',
        '91.00%',
        '0.3000',
        '-',
    ]
    assert os.path.getsize(tmp_path / 'both.png') > 10_000


def test_only_what_was_evaluated_alike_is_compared(tmp_path, capsys):
    rows = [
        {'step': 50, 'eval/accuracy': 0.95, 'eval/loss': 0.1},
        {'step': 100, 'eval/accuracy': 0.6, 'eval/loss': 0.9},
    ]
    write_run(tmp_path / 'one', rows)
    write_run(tmp_path / 'two', rows)
    (tmp_path / 'two' / 'environment.json').write_text(json.dumps({'evaluation_from': 51}))
    config = json.loads((tmp_path / 'two' / 'config.json').read_text())
    config['dataset'] = {'eval_split': 'validation'}
    (tmp_path / 'two' / 'config.json').write_text(json.dumps(config))
    assert (
        compare.main(
            [str(tmp_path / 'one'), str(tmp_path / 'two'), f'--output={tmp_path}/both.png']
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    best = [[cell.strip() for cell in line.split('|')][9] for line in lines[2:4]]
    assert best == ['95.00%', '60.00%']
    assert lines[4:6] == [
        "not evaluated on the same terms: dataset.eval_split is 'test' in one, 'validation' in two",
        'two was evaluated under another config before step 51: the curves include those values, '
        'the table does not',
    ]
    (tmp_path / 'two' / 'environment.json').write_text('{"evaluation_from": 101}')
    assert compare.main([str(tmp_path / 'two'), f'--output={tmp_path}/both.png']) == 0
    assert [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split('|')][8:11] == [
        '-',
        '-',
        '-',
    ]


@pytest.mark.parametrize(
    'name, changed, is_said',
    [
        ('digits', {'data_dir': '/elsewhere'}, False),
        ('digits', {'split_seed': 1}, False),
        ('folder', {'data_dir': '/elsewhere'}, True),
        ('folder', {'split_seed': 1}, True),
        ('folder', {'train_split': 'more'}, False),
        ('folder', {'white_level': 4095}, True),
    ],
)
def test_keys_that_say_what_is_evaluated_are_named(tmp_path, capsys, name, changed, is_said):
    rows = [{'step': 50, 'eval/accuracy': 0.95, 'eval/loss': 0.1, 'eval/examples': 100}]
    write_run(tmp_path / 'one', rows, dataset={'name': name})  # of before the key was there
    write_run(tmp_path / 'two', rows, dataset={'name': name, **changed})
    runs = [str(tmp_path / run) for run in ('one', 'two')]
    assert compare.main([*runs, f'--output={tmp_path}/both.png']) == 0
    found = [
        line
        for line in capsys.readouterr().out.splitlines()
        if 'not evaluated on the same terms' in line
    ]
    assert [f'dataset.{key}' in line for key in changed for line in found] == [True] * is_said


def test_another_number_of_evaluation_examples_is_named(tmp_path, capsys):
    for name, number in (('one', 100), ('two', 101), ('three', 100)):
        write_run(tmp_path / name, [{'step': 50, 'eval/loss': 0.1, 'eval/examples': number}])
    runs = [str(tmp_path / name) for name in ('one', 'two', 'three')]
    assert compare.main([*runs, f'--output={tmp_path}/both.png']) == 0
    said = (
        'not evaluated on the same terms: the number of evaluation examples is 100 in one, 101 in '
        'two, 100 in three'
    )
    assert said in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    'best, shown',
    [
        ({'best/accuracy': 0.75}, '75.00%'),
        ({'best/accuracy': None}, '-'),
        ({'best/loss': 0.1}, '95.00%'),
    ],
)
def test_the_best_of_a_finished_run_is_that_of_its_report(tmp_path, capsys, best, shown):
    write_run(
        tmp_path / 'one', [{'step': 50, 'eval/accuracy': 0.95}, {'step': 60, 'eval/accuracy': 0.7}]
    )
    write_json(str(tmp_path / 'one' / 'summary.json'), best)
    assert compare.main([str(tmp_path / 'one'), f'--output={tmp_path}/both.png']) == 0
    assert capsys.readouterr().out.splitlines()[2].split('|')[9].strip() == shown


def test_runs_are_compared_from_any_folder_without_output(tmp_path, capsys, monkeypatch):
    for name in ('one', 'two'):
        write_run(tmp_path / name, [{'step': 50, 'eval/accuracy': 0.91}])
    monkeypatch.chdir(tmp_path)
    assert compare.main(['one', 'two']) == 0
    assert (
        capsys.readouterr().out.endswith('curves in comparison.png\n')
        and os.path.getsize('comparison.png') > 10_000
    )
    assert (
        compare.main(['one', '--output=other.png']) == 0
        and compare.main(['one', '--output=new/other.png']) == 0
    )
    assert sorted(os.listdir()) == ['comparison.png', 'new', 'one', 'other.png', 'two']


def test_a_bare_file_name_is_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage.make_folder('')
    storage.make_folder('run')
    storage.write('a.txt', 'a')
    storage.append('a.txt', 'b')
    storage.write_json('a.json', {'a': 1})
    storage.move('a.txt', 'b.txt')
    storage.fsync('')
    with storage.atomic_directory('export') as partial:
        storage.write(os.path.join(partial, 'c'), 'c')
    assert (
        storage.read('b.txt') == b'ab'
        and storage.read_json('a.json') == {'a': 1}
        and storage.list_folder('export') == ['c']
    )
    plots.plot_predictions(
        'answers.png', [np.zeros((4, 4, 3), np.uint8)], ['title'], [[('cat', 0.9)]]
    )  # as predict.py --output does
    storage.delete('export')
    assert sorted(os.listdir()) == ['a.json', 'answers.png', 'b.txt', 'run']


def test_json_has_null_for_what_is_not_finite():
    nan = float('nan')
    value = {
        'nan': nan,
        'inf': [np.float32('inf'), -np.inf, (np.float64(nan),)],
        'half': np.float16(0.5),
        'seven': np.int64(7),
        'true': True,
        'text': 'NaN',
        'path': Exception,
    }
    text = storage.as_json(value)
    assert json.loads(text, parse_constant=pytest.fail) == {
        'nan': None,
        'inf': [None, None, [None]],
        'half': 0.5,
        'seven': 7,
        'true': True,
        'text': 'NaN',
        'path': "<class 'Exception'>",
    }
    assert str(storage.nan_for_null({'a': None, 'b': 1})) == "{'a': nan, 'b': 1}"


def test_rows_that_are_not_numbers_are_json_and_can_be_read(tmp_path, capsys):
    write_run(
        tmp_path / 'run', [{'step': 10, 'eval/accuracy': 0.9, 'train/examples_per_second': 5.0}]
    )
    logbook = MetricsLogger(str(tmp_path / 'run'), 10, 100)
    logbook.write(
        20,
        {
            'train/loss': float('nan'),
            'eval/loss': np.float32('inf'),
            'eval/accuracy': float('nan'),
            'train/examples_per_second': 7.0,
        },
    )
    logbook.close()
    logbook = MetricsLogger(str(tmp_path / 'run'), 20, 100)  # reads and writes them once more
    logbook.close()
    rows = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
    ]
    assert rows[1]['train/loss'] is rows[1]['eval/loss'] is None
    assert np.isnan(read_metrics(str(tmp_path / 'run'))[1]['eval/loss'])
    assert compare.main([str(tmp_path / 'run'), f'--output={tmp_path}/curves.png']) == 0
    line = capsys.readouterr().out.splitlines()[-2]
    assert [cell.strip() for cell in line.split('|')][-5:-1] == [
        'not finite',
        '90.00%',
        'not finite',
        '7',
    ]


def test_rows_match_what_tensorboard_writes_itself(tmp_path):
    def events(folder):
        found = []
        for name in sorted(os.listdir(folder)):
            for event in tf.compat.v1.train.summary_iterator(str(folder / name)):
                found += [
                    (event.step, value.tag, tf.make_ndarray(value.tensor), value.metadata)
                    for value in event.summary.value
                ]
        return found

    board = tf.summary.create_file_writer(str(tmp_path / 'theirs'))
    with board.as_default(5):
        tf.summary.scalar('train/loss', 0.1)
        tf.summary.scalar('eval/accuracy', 1.0)
    board.close()
    rewrite_tensorboard(
        str(tmp_path / 'ours'),
        [{'step': 5, 'wall_time': 1.5e9, 'train/loss': 0.1, 'eval/accuracy': 1}],
    )
    assert events(tmp_path / 'ours') == events(tmp_path / 'theirs')
    accumulator = event_accumulator.EventAccumulator(str(tmp_path / 'ours')).Reload()
    assert [(event.step, event.wall_time) for event in accumulator.Tensors('train/loss')] == [
        (5, 1.5e9)
    ]
    rewrite_tensorboard(str(tmp_path / 'ours'), [])
    assert os.listdir(tmp_path / 'ours') == []


@pytest.fixture
def summary(tmp_path):
    """A summary of a run that exported its last weights, beside the files that a report needs."""
    write_json(
        str(tmp_path / 'config.json'),
        {
            'model': {'name': 'tiny'},
            'dataset': {'name': 'digits'},
            'best_metric': 'eval/accuracy',
            'ema_decay': 0.9,
        },
    )
    write_json(
        str(tmp_path / 'environment.json'),
        {
            'packages': {'keras': '3'},
            'git_commit': '',
            'git_changed_files': [],
            'platform': 'Linux',
            'cpu_cores': 2,
            'devices': ['CPU'],
            'python': '3.12',
        },
    )
    evaluated = {'accuracy': 0.5925, 'loss': 1.25, 'top5': 0.9}
    return {
        **{f'eval/{name}': value for name, value in evaluated.items()},
        **{f'export/eval_{name}': value for name, value in evaluated.items()},
        'eval/examples': 2000,
        'steps': 300,
        'export/step': 300,
        'export/accuracy': 0.568,
        'export/examples': 1000,
        'export/model_accuracy': 0.568,
        'export/max_difference': 1e-6,
        'best/step': 200,
        'best/accuracy': 0.6,
        'examples_seen': 9600,
        'skipped_updates': 0,
        'train_seconds': 10,
        'examples_per_second': 960,
        'input_wait_fraction': 0.1,
        'resumed_from': [],
        'weights_sha256': 'ab',
    }


def report_of(folder, summary, *notes):
    report.write_report(str(folder), summary, [('strategy', 'one device')], *notes)
    return (folder / 'report.md').read_text()


def test_a_report_compares_export_and_model_on_the_same_examples(tmp_path, summary):
    text = report_of(tmp_path, summary)
    assert (
        '**59.25%** of 2,000 evaluation examples are classified correctly\n'
        '(top-5: 90.00%), with the averaged weights after the last of 300 updates.' in text
    )
    assert (
        '| 56.80% of 1,000 examples evenly spaced through the split '
        '(the trained model on the same examples: 56.80%) |' in text
    )
    assert (
        '| best accuracy during the run | 60.00% after update 200; '
        '`--mode=export --checkpoint=best` exports it |' in text
    )
    summary['export/examples'] = 2000
    del summary['export/model_accuracy']
    assert '| 56.80% of 2,000 evaluation examples (all of them) |' in report_of(tmp_path, summary)


def test_a_report_says_which_weights_are_exported(tmp_path, summary):
    summary |= {
        'export/step': 200,
        'export/eval_accuracy': 0.6,
        'export/eval_loss': 1.0,
        'export/eval_top5': 0.95,
    }
    text = report_of(tmp_path, summary)
    assert (
        '**60.00%** of 2,000 evaluation examples are classified correctly\n'
        '(top-5: 95.00%), with the averaged weights after update 200 of 300:\n'
        'the best by eval/accuracy' in text
    )
    assert (
        'After the last update it is 59.25%;\n'
        '`--mode=export --checkpoint=last` exports those weights.' in text
    )
    assert (
        '| loss on the evaluation split | 1.0000 |' in text
        and '| best accuracy during the run | 60.00% after update 200 |' in text
    )
    assert (
        report.headline(summary)
        == '60.00% of 2,000 evaluation examples are classified correctly with the exported '
        'weights (update 200); 59.25% after the last update (300)'
    )


def test_changes_and_notes_on_data_have_headings_of_their_own(tmp_path, summary):
    text = report_of(
        tmp_path, summary, ['3 files are broken'], ['changed at step 5: seed was 0, is 1']
    )
    assert (
        '## Changes during the run\n\n```\nchanged at step 5: seed was 0, is 1\n```\n\n'
        '## What to know about the data\n\n```\n3 files are broken\n```' in text
    )
    text = report_of(tmp_path, summary)
    assert 'Changes during' not in text and 'What to know' not in text


@pytest.mark.parametrize('arguments', [['/no/such/run'], ['/']])
def test_what_is_no_run_is_one_line(arguments, capsys):
    assert compare.main(arguments) == 1
    assert capsys.readouterr().err == f'error: {arguments[0]} is not a run: it has no config.json\n'


@pytest.mark.parametrize('output', ['curves.xyz', 'no/such\0folder/curves.png'])
def test_curves_that_cannot_be_drawn_are_one_line(tmp_path, output, capsys):
    write_run(tmp_path / 'with', [{'step': 50, 'eval/accuracy': 0.91}])
    assert compare.main([str(tmp_path / 'with'), f'--output={tmp_path}/{output}']) == 2
    assert capsys.readouterr().err.startswith(f'error: --output={tmp_path}/')
