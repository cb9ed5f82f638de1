"""The notebook runs from top to bottom, with what is installed and no more, and shows what it
promises.
"""

import base64
import glob
import json
import os
import re
import shutil
import sys

import nbformat
import numpy as np
import pytest
import tensorflow as tf

import predict
from benchmarks import notebook
from colab import runtime
from common.errors import ConfigError
from diagnostics import installation
from tests.conftest import refused

TINY = (
    '--config.model.name=tiny --config.image_size=16 --config.batch_size=32 '
    '--config.eval_batch_size=128 --config.steps_per_loop=4 '
    '--config.eval_every="10 steps" --config.log_every="5 steps" --config.checkpoint_every="10 '
    'steps"'
)


def installed():
    """The set that this Python has, whatever hardware is here."""
    return next(name for name in installation.ACCELERATORS if not installation.missing(name))


@pytest.fixture(scope='module')
def executed(tmp_path_factory):
    """(the notebook with its outputs, the folder that STORAGE named)."""
    storage = str(tmp_path_factory.mktemp('storage'))
    settings = {
        'STORAGE': storage,
        'TRAIN_FOR': '30 steps',
        'CHANGES': TINY,
        'ACCELERATOR': installed(),
    }
    nowhere = {'PIP_INDEX_URL': 'file:///nowhere', 'PIP_NO_INPUT': '1'}  # nothing can be installed
    return notebook.execute(settings, environment=nowhere), storage


@pytest.mark.slow
@pytest.mark.slow
def test_every_cell_runs_and_says_what_it_should(executed):
    notebook_, storage = executed
    cells = [cell for cell in notebook_.cells if cell.cell_type == 'code']
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [
        output for cell in cells for output in cell.outputs if output.output_type == 'error'
    ]
    assert 'installing' not in notebook.text_of(notebook_, 'install')
    check = notebook.text_of(notebook_, 'check')
    assert 'ok    strategy' in check and 'FAIL' not in check
    assert re.search(r'\d+\.\d+% of 360 evaluation examples', notebook.text_of(notebook_, 'train'))
    evaluated = json.loads(notebook.text_of(notebook_, 'evaluate').splitlines()[-1])
    assert evaluated['step'] == 30 and evaluated['eval/examples'] == 360
    exported = json.loads(notebook.text_of(notebook_, 'export').splitlines()[-1])
    assert exported['export/accuracy'] == pytest.approx(evaluated['eval/accuracy'], abs=1e-9)
    assert notebook.text_of(notebook_, 'predict').count('evaluation example ') == 3
    assert os.path.exists(os.path.join(storage, 'runs', 'digits-first', 'export', 'saved_model.pb'))
    assert os.path.isdir(os.path.join(storage, 'tensorflow_datasets', 'digits'))


@pytest.mark.slow
@pytest.mark.parametrize('cell, count', [('preview', 2), ('curves', 2), ('predict', 1)])
def test_pictures_are_shown(executed, cell, count):
    outputs = next(each for each in executed[0].cells if each.id == cell).outputs
    pictures = [
        base64.b64decode(output.data['image/png'])
        for output in outputs
        if output.output_type == 'display_data'
    ]
    assert len(pictures) == count
    for picture in pictures:
        assert tf.io.decode_png(picture, channels=3).numpy().std() > 5  # something is drawn


@pytest.fixture
def own_environment(monkeypatch):
    """What `predict` sets for its process goes with the test."""
    for name in (
        'TPU_LOAD_LIBRARY',
        'TPU_SKIP_MDS_QUERY',
        'CUDA_VISIBLE_DEVICES',
        'TF_CPP_MIN_LOG_LEVEL',
    ):
        monkeypatch.setenv(name, os.environ.get(name, '0'))


@pytest.mark.slow
def test_an_own_image_is_classified_as_the_export_does(executed, tmp_path, capsys, own_environment):
    (run,) = glob.glob(os.path.join(executed[1], 'runs', '*'))
    picture = np.random.default_rng(0).integers(0, 256, [30, 40, 3], np.uint8)
    (tmp_path / 'mine.png').write_bytes(tf.io.encode_png(picture).numpy())
    assert predict.main([run, str(tmp_path / 'mine.png'), f'--output={tmp_path}/drawn.png']) == 0
    model = tf.saved_model.load(os.path.join(run, 'export'))
    answer = model.signatures['serving_default'](images=tf.constant(picture[None]))
    label = answer['label'][0].numpy().decode()
    probability = float(tf.reduce_max(answer['probabilities']))
    assert capsys.readouterr().out.startswith(f'{tmp_path}/mine.png: {label} {probability:.1%}, ')
    assert (tmp_path / 'drawn.png').stat().st_size > 5_000


@pytest.mark.slow
def test_the_run_may_be_in_a_bucket(executed, tmp_path, capsys, own_environment):
    """A folder stands for it: TensorFlow's file system reads and writes there."""
    shutil.copytree(*glob.glob(os.path.join(executed[1], 'runs', '*')), tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'plots')
    assert predict.main([f'file://{tmp_path}/run']) == 0
    assert (
        capsys.readouterr().out.count('evaluation example ') == 3
        and (tmp_path / 'run' / 'plots' / 'predictions.png').stat().st_size > 5_000
    )


@pytest.mark.slow
def test_what_cannot_be_classified_is_one_line(executed, tmp_path, capsys, own_environment):
    (run,) = glob.glob(os.path.join(executed[1], 'runs', '*'))
    (tmp_path / 'broken.png').write_bytes(b'no picture')
    for arguments, line in [
        ([str(tmp_path)], 'has no export'),
        ([run, str(tmp_path / 'broken.png')], 'not a readable image'),
        ([run, 'absent.png'], 'No such file'),
    ]:
        assert predict.main([*arguments, f'--output={tmp_path}/drawn.png']) == 1
        errors = capsys.readouterr().err
        assert errors.startswith('error: ') and line in errors and errors.count('\n') == 1


def test_the_notebook_is_kept_without_outputs_and_opens_on_a_tpu():
    kept = nbformat.read(notebook.NOTEBOOK, as_version=4)
    nbformat.validate(kept)
    assert all(
        cell.execution_count is None and not cell.outputs
        for cell in kept.cells
        if cell.cell_type == 'code'
    )
    assert kept.metadata.accelerator == 'TPU' and kept.metadata.colab.name == os.path.basename(
        notebook.NOTEBOOK
    )
    assert [cell.metadata.get('tags') for cell in kept.cells if cell.cell_type == 'code'].count(
        ['parameters']
    ) == 1


def test_the_badge_opens_the_notebook():
    with open(os.path.join(notebook.ROOT, 'README.md')) as file:
        badge = re.search(
            r'\[!\[Open in '
            r'Colab\]\(\S+\)\]\(https://colab\.research\.google\.com/github/OWNER/REPOSITORY/blob/main/(\S+)\)',
            file.read(),
        )
    assert os.path.samefile(os.path.join(notebook.ROOT, badge[1]), notebook.NOTEBOOK)


@pytest.mark.parametrize('python', ['3.11.9', '3.12.11', '3.13.5'])
@pytest.mark.parametrize('accelerator', ['tpu', 'gpu', 'cpu'])
def test_the_set_of_pins_fits_hardware_and_python(tmp_path, monkeypatch, python, accelerator):
    monkeypatch.setattr(
        installation.machine,
        'nvidia_smi',
        lambda: (['a GPU'], '') if accelerator == 'gpu' else ([], ''),
    )
    if accelerator == 'tpu':
        (tmp_path / 'dev').mkdir()
        (tmp_path / 'dev' / 'accel0').touch()
    assert installation.choose({}, str(tmp_path)) == accelerator
    pins = installation.pins(accelerator, python)
    builds = {
        name: version
        for name, version in pins.items()
        if name in installation.machine.TENSORFLOW_BUILDS
    }
    build = 'tensorflow' if accelerator == 'gpu' else 'tensorflow-cpu'
    assert builds == {build: '2.21.0'}
    assert pins.get('libtpu') == ('0.0.42.1' if accelerator == 'tpu' else None)
    assert pins.get('jax') == ('0.10.2' if accelerator == 'tpu' else None)
    assert any(name.startswith('nvidia-cudnn') for name in pins) == (accelerator == 'gpu')


def environment_with(folder, packages):
    """The site-packages of an environment of Python 3.12 in which these are installed, as far as
    their metadata say so.
    """
    site = folder / 'lib' / 'python3.12' / 'site-packages'
    site.mkdir(parents=True)
    for name, version in packages.items():
        (site / f'{name.replace("-", "_")}-{version}.dist-info').mkdir()
        (site / f'{name.replace("-", "_")}-{version}.dist-info' / 'METADATA').write_text(
            f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n'
        )


def test_nothing_is_installed_where_the_pinned_set_is(tmp_path):
    environment_with(tmp_path, installation.pins('gpu', '3.12.0'))
    assert installation.commands('gpu', str(tmp_path)) == []
    assert installation.ensure(installed(), str(tmp_path / 'absent')) == sys.executable


def test_another_build_is_taken_away_first(tmp_path):
    environment_with(tmp_path, installation.pins('cpu', '3.12.0'))
    uninstall, install = installation.commands('tpu-tf', str(tmp_path))
    assert uninstall[-3:] == ['uninstall', '--yes', 'tensorflow-cpu']
    assert install[-4:-1] == [
        '-c',
        os.path.join(notebook.ROOT, 'requirements', 'tpu-tf.txt'),
        f'{notebook.ROOT}[tpu-tf]',
    ]


def test_older_pins_are_renewed_and_environments_created(tmp_path):
    environment_with(tmp_path / 'older', installation.pins('cpu', '3.12.0') | {'keras': '3.13.0'})
    assert [
        command[command.index('--python') + 2]
        for command in installation.commands('cpu', str(tmp_path / 'older'))
    ] == ['install']
    make, install = installation.commands('cpu', str(tmp_path / 'none'))
    assert make[1:3] == ['-m', 'venv'] and 'install' in install
    with refused(ConfigError, "'tpu3'"):
        installation.ensure('tpu3')


@pytest.fixture
def this_runtime():
    return runtime.Runtime('digits', 'first', accelerator=installed())


@pytest.mark.parametrize(
    'program, line',
    [
        ('raise SystemExit(3)', 'error: -c ended with status 3: the lines above say why'),
        (
            'import os; os.kill(os.getpid(), 9)',
            'error: -c was ended by SIGKILL, perhaps for lack of memory',
        ),
    ],
)
def test_a_failure_stops_the_notebook_with_its_line(this_runtime, program, line):
    with pytest.raises(SystemExit) as stopped:
        this_runtime.run('-c', program)
    assert stopped.value.code == line


def test_a_failed_check_stops_the_notebook_with_its_fix(monkeypatch, capsys):
    run = runtime.Runtime('digits', 'first', accelerator=installed(), changes='--config.seed=-1')
    with pytest.raises(SystemExit) as stopped:
        run.check()
    assert stopped.value.code.startswith(
        'config: config.seed=-1 is impossible -> it must be from 0'
    )
    assert 'FAIL  config' in capsys.readouterr().out


def test_an_interrupted_cell_lets_the_run_save(this_runtime, capsys):
    program = (
        "import os, signal, time; print('begun')\ntry:\n    os.kill(os.getppid(), "
        'signal.SIGINT); time.sleep(60)\n'
        "except KeyboardInterrupt:\n    time.sleep(0.5); print('saved')"
    )
    with pytest.raises(KeyboardInterrupt):
        this_runtime.run('-c', program)
    assert capsys.readouterr().out.endswith('begun\nsaved\n')


@pytest.mark.parametrize(
    'storage', ['s3://bucket/x', 'gs:/bucket/x', 'gs://', 'gs:///x', 'warmstart']
)
def test_a_storage_that_is_no_place_is_refused(storage):
    with pytest.raises(SystemExit, match='STORAGE='):
        runtime.Runtime('digits', 'first', storage, installed())


def test_a_storage_is_read_as_it_was_meant(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert runtime.resolve_storage('~/kept') == str(tmp_path / 'kept')
    assert (
        runtime.resolve_storage(' /kept ') == '/kept'
        and runtime.resolve_storage(' gs://bucket/kept') == 'gs://bucket/kept'
    )
    assert runtime.resolve_storage(' ') == ''


def test_changes_with_an_open_quote_are_one_line():
    with pytest.raises(SystemExit, match='CHANGES=.*No closing quotation'):
        runtime.Runtime('digits', 'first', '', installed(), '', "--config.seed='1")


def test_with_a_bucket_data_and_the_run_are_there(monkeypatch):
    run = runtime.Runtime(
        'imagenette', 'second', 'gs://bucket/warmstart', installed(), '5 epochs', '--config.seed=1'
    )
    commands = []
    monkeypatch.setattr(run, 'run', lambda *command: commands.append(command))
    run.main('--mode=preview')
    assert ' '.join(commands[0]) == (
        'main.py --config=configs/imagenette.py '
        '--workdir=gs://bucket/warmstart/runs/imagenette-second --config.seed=1 '
        '--config.dataset.data_dir=gs://bucket/warmstart/tensorflow_datasets '
        '--config.train_for=5 epochs --mode=preview'
    )
