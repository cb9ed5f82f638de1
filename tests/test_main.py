"""The command line: a mistake is one clear line and status 2, a failed run one line and status 1,
and no stack trace.
"""

import os
import re
import signal
import subprocess
import sys

import pytest
import tensorflow as tf

import main
from common.commands import ROOT
from common.errors import one_line as one_line_of
from tests.conftest import slow


def call(*arguments, cwd=ROOT, **environ):
    return subprocess.run(
        [sys.executable, os.path.join(ROOT, 'main.py'), *arguments],
        cwd=cwd,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
    )


def one_line(done, status):
    """The error line; asserts that there is nothing else."""
    assert done.returncode == status, done.stderr
    assert (
        done.stdout == ''
        and done.stderr.startswith('error: ')
        and len(done.stderr.splitlines()) == 1
    )
    return done.stderr


@pytest.mark.parametrize(
    'arguments, says',
    [
        ([], '--config is missing: write --config=FILE, one of configs/'),
        (
            ['--config=configs/digit.py'],
            'configs/digit.py does not exist: --config=configs/digits.py',
        ),
        (['--config=configs/digits.py', '--wordir=x'], 'workdir'),
        (['--config=configs/digits.py', '--mode=tarin'], 'train|evaluate|export'),
        (['--config=configs/digits.py', '--json'], '--json is for --mode=check'),
        (['--config=configs/digits.py', 'train'], "'train' is not a valid flag"),
        (
            ['--config=configs/digits.py', '--config.batch_size=many'],
            "config.batch_size='many' cannot be read: write a whole number, as in "
            '--config.batch_size=',
        ),
        (['--config=configs/digits.py', '--config.augment.flip=maybe'], 'write true or false'),
        (['--config.seed=3', '--config=configs/digits.py'], '--config.seed=3'),
        (['--config=README.md'], 'README.md'),
        (['--config', 'configs/nope.py'], 'configs/nope.py does not exist'),
        (['--config.batch_size=3'], '--config is missing'),
        (
            ['--config=configs/digits.py', '--config.schedule=cosine'],
            '--config.schedule.KEY=VALUE',
        ),
        (['--config=configs/digits.py', '--config.modle.name=tiny'], 'did you mean model'),
        (
            ['--config=configs/imagenet.py', '--config.optimizer.rho=abc'],
            "config.optimizer.rho='abc' cannot be read: write a number",
        ),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(arguments, says):
    assert says in one_line(call(*arguments), 2)


def test_a_python_without_the_packages_is_told_what_to_install():
    done = subprocess.run(
        [sys.executable, '-S', 'main.py', '--config=configs/digits.py'],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert 'No module named' in one_line(done, 1) and "requirements/cpu.txt '.[cpu]'" in done.stderr


@pytest.mark.slow
def test_a_workdir_in_the_home_folder_is_there(tmp_path):
    (tmp_path / 'old').mkdir()
    done = call(
        '--config=configs/digits.py',
        '--config.model.name=tiny',
        '--mode=evaluate',
        '--workdir=~/old',
        HOME=str(tmp_path),
    )
    (line,) = done.stderr.splitlines()  # a data set that is new to this machine is prepared before
    assert (
        done.returncode == 1
        and f'{tmp_path}/old' in line
        and not os.path.exists(os.path.join(ROOT, '~'))
    )


def test_a_broken_config_file_is_named_with_its_line(tmp_path):
    start = (
        'from configs import default\n\n\ndef get_config():\n    config = default.get_config()\n'
    )
    (tmp_path / 'mine.py').write_text(f'{start}    config.batch_size = 8 / 0\n    return config\n')
    assert 'mine.py is broken: ZeroDivisionError: division by zero (mine.py, line 6)' in one_line(
        call(f'--config={tmp_path / "mine.py"}'), 2
    )
    (tmp_path / 'type.py').write_text(f'{start}    config.train_for = 5\n    return config\n')
    line = one_line(call(f'--config={tmp_path / "type.py"}'), 2)
    assert 'type.py is broken: TypeError: ' in line and '(type.py, line 6)' in line
    (tmp_path / 'none.py').write_text('def get_config():\n    pass\n')
    assert 'must return the config' in one_line(call(f'--config={tmp_path / "none.py"}'), 2)
    (tmp_path / 'typo.py').write_text(f'{start}    config.batch_sise = 8\n    return config\n')
    assert 'config.batch_sise does not exist; did you mean batch_size' in one_line(
        call(f'--config={tmp_path / "typo.py"}'), 2
    )


def test_an_unknown_key_and_a_duration_without_unit_are_status_2(tmp_path):
    assert "'20 steps'" in one_line(
        call('--config=configs/debug.py', '--config.train_for=20', f'--workdir={tmp_path}'), 2
    )
    assert os.listdir(tmp_path) == []


def test_a_wrong_value_is_reported_before_tensorflow_is_imported():
    program = (
        "import sys; sys.modules['tensorflow'] = None; import main; sys.exit(main.main(sys.argv))"
    )
    arguments = ['--config=configs/debug.py', '--config.batch_size=0']
    done = subprocess.run(
        [sys.executable, '-c', program, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert 'config.batch_size=0 is impossible' in one_line(done, 2)


def test_imagenet_without_imagenet_is_one_line_and_status_1(tmp_path):
    text = one_line(
        call(
            '--config=configs/imagenet.py',
            f'--config.dataset.data_dir={tmp_path}/data',
            f'--workdir={tmp_path}/run',
        ),
        1,
    )
    assert (
        f'{tmp_path}/data/downloads/manual' in text
        and 'ILSVRC2012_img_train.tar' in text
        and 'image-net.org' in text
    )
    assert not os.path.exists(tmp_path / 'run')


@pytest.mark.parametrize('name, status', [('SIGINT', 0), ('SIGTERM', 143)])
def test_a_signal_before_training_is_one_line_and_usual_status(tmp_path, name, status):
    (tmp_path / 'mine.py').write_text(f"""
import os
import signal


def get_config():
    os.kill(os.getpid(), signal.{name})
""")
    done = call(f'--config={tmp_path / "mine.py"}')
    assert (
        done.returncode == status
        and done.stderr.startswith('stopped; the same command continues')
        and len(done.stderr.splitlines()) == 1
    )


@pytest.mark.parametrize('name, status', [('SIGINT', 130), slow('SIGTERM', 143)])
def test_a_check_that_is_stopped_does_not_say_that_all_is_well(name, status):
    process = subprocess.Popen(
        [sys.executable, '-u', 'main.py', '--config=configs/debug.py', '--mode=check'],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert 'Python' in process.stdout.readline()
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status and errors == 'stopped: nothing was changed\n'


def test_a_stack_trace_is_there_for_who_asks_for_it(tmp_path):
    done = call('--config=configs/debug.py', '--config.train_for=20', '--verbosity=1')
    assert (
        done.returncode == 2
        and 'Traceback' in done.stderr
        and done.stderr.splitlines()[-1].startswith('error: ')
    )


def test_help_names_the_flags_and_the_configs():
    done = call('--help')
    assert done.returncode == 0
    for word in ('--config', '--workdir', '--mode', '--checkpoint', 'configs/digits.py'):
        assert word in done.stdout


@pytest.mark.slow
def test_the_command_line_trains_evaluates_and_exports(tmp_path):
    arguments = [
        f'--config={ROOT}/configs/debug.py',
        '--config.train_for=12 steps',
        '--config.optimizer.beta_2=0.99',
        '--config.schedule.name=polynomial',
        '--config.schedule.power=2.0',
    ]
    done = call(*arguments, cwd=tmp_path)  # another folder, and the workdir that is the default
    assert done.returncode == 0, done.stderr
    assert os.path.exists(tmp_path / 'runs' / 'debug' / 'export' / 'saved_model.pb')
    assert (
        'OneDeviceStrategy on one CPU' in done.stdout and 'of 64 evaluation examples' in done.stdout
    )
    assert 'Traceback' not in done.stderr and 'oneDNN' not in done.stderr
    done = call(*arguments, '--mode=evaluate', '--checkpoint=best', cwd=tmp_path)
    assert done.returncode == 0 and '"eval/examples": 64' in done.stdout


@pytest.mark.slow
def test_a_file_as_workdir_or_broken_images_exit_with_status_1(tmp_path):
    (tmp_path / 'file').write_text('')
    done = call('--config=configs/debug.py', f'--workdir={tmp_path}/file')
    assert (
        done.returncode == 1
        and done.stderr.splitlines()[-1].startswith('error: ')
        and 'Traceback' not in done.stderr
    )
    for split in ('train', 'test'):
        for name in ('cat', 'dog'):
            (tmp_path / 'data' / split / name).mkdir(parents=True)
            (tmp_path / 'data' / split / name / 'broken.jpg').write_text('no image')
    done = call(
        '--config=configs/debug.py',
        f'--workdir={tmp_path}/run',
        '--config.dataset.name=folder',
        f'--config.dataset.data_dir={tmp_path}/data',
        '--config.dataset.train_split=train',
        '--config.dataset.eval_split=test',
        '--config.batch_size=2',
    )
    assert (
        done.returncode == 1 and '4 of 4 files in' in done.stderr and 'Traceback' not in done.stderr
    )


def _failing(function):
    with pytest.raises(tf.errors.OpError) as raised:
        function()
    return str(main.as_user_error(raised.value))


def test_tensorflow_messages_come_first_without_graph_names():
    def required(number):
        check = tf.debugging.Assert(number < 1, ['the reason', number, 'what to do'])
        with tf.control_dependencies([check]):
            return number

    @tf.function(autograph=False)
    def compiled(number):
        return required(number)

    @tf.function(autograph=False)
    def next_of(iterator):
        return next(iterator)

    numbers = tf.data.Dataset.range(4).map(required)
    for function in (
        lambda: compiled(tf.constant(3)),
        lambda: list(numbers.skip(2)),
        lambda: next_of(iter(numbers.skip(3))),
    ):
        line = _failing(function)
        assert re.fullmatch('the reason [123] what to do', line)
    files = tf.data.Dataset.from_tensors(b'abc').map(tf.io.decode_jpeg)
    assert _failing(lambda: list(files)).startswith(
        'TensorFlow stopped with InvalidArgumentError: Unknown image file format.'
    )
    with pytest.raises(tf.errors.OpError) as raised:
        tf.debugging.assert_equal([5, 7], [5, 6], message='not so')
    assert 'first 1 different values: [[1]]' in str(main.as_user_error(raised.value))


@pytest.mark.parametrize(
    'kind, begins',
    [
        (
            tf.errors.DataLossError,
            'a file of the data set is damaged or truncated (corrupted record at 7)',
        ),
        (
            tf.errors.ResourceExhaustedError,
            'out of memory (corrupted record at 7): lower config.batch_size, ',
        ),
        (tf.errors.UnknownError, 'TensorFlow stopped with UnknownError: corrupted record at 7;'),
    ],
)
def test_every_error_of_tensorflow_says_its_own_words_first(kind, begins):
    where = (
        'Graph execution error:\n\nDetected at node IteratorGetNext defined at (most recent '
        'call last):\n'
    )
    frames = ''.join(f'  File "/a/long/path/{number}.py", line 1, in f\n\n' for number in range(20))
    message = (
        f'{where}{frames}corrupted record at 7\n\t [[{{{{node IteratorGetNext}}}}]] '
        '[Op:__inference_loop_26]'
    )
    error = kind(None, None, message)
    assert str(main.as_user_error(error)).startswith(begins)
    assert one_line_of(error, 100) == 'corrupted record at 7'  # as the other modules quote it
