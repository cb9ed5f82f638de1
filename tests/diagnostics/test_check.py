"""The doctor: what is broken is named, with the command that mends it; what is well is left
alone.
"""

import json
import os
import subprocess
import sys

import keras
import numpy
import pytest

from common import machine, tpu_environment
from common.commands import ROOT
from common.errors import ConfigError
from configs import default
from diagnostics import check, packages, tensorflow_checks, worker_process
from inputs import dataset_status
from tests.conftest import refused
from tests.diagnostics.machines import assert_mended, fake_tensorflow, installed


def call(*arguments, **environ):
    return subprocess.run(
        [sys.executable, os.path.join(ROOT, 'main.py'), *arguments, '--mode=check'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
    )


# What is installed.


def test_a_python_that_is_too_old_or_too_new_is_named():
    for version in ((3, 9, 1), (3, 14, 0)):
        result = packages.check_python('cpu', version)
        assert_mended(result, 'FAIL', '3.10 to 3.13', 'make train PYTHON=')


@pytest.mark.parametrize(
    'extra, version, status',
    [
        ('cpu', (3, 10, 0), 'ok'),
        ('cpu', (3, 13, 5), 'ok'),
        ('tpu', (3, 10, 4), 'FAIL'),
        ('tpu', (3, 13, 5), 'ok'),
        ('gpu-jax', (3, 10, 4), 'FAIL'),
        ('tpu-tf', (3, 10, 4), 'ok'),
        ('tpu-tf', (3, 13, 5), 'FAIL'),
    ],
)
def test_each_set_has_its_own_pythons(extra, version, status):
    assert packages.check_python(extra, version).status == status


def test_two_builds_in_one_folder_are_named_and_removed(tmp_path):
    result, name, _ = packages.check_tensorflow(
        'cpu', installed(tmp_path, tensorflow='2.21.0', tensorflow_cpu='2.20.0')
    )
    assert_mended(
        result,
        'FAIL',
        'tensorflow 2.21.0 and tensorflow-cpu 2.20.0',
        'pip uninstall -y tensorflow tensorflow-cpu && ',
    )
    assert "-m pip install -c requirements/cpu.txt '.[cpu]'" in result.fix and name == ''


@pytest.mark.parametrize(
    'accelerator, versions, status, found, mend',
    [
        ('cpu', {}, 'FAIL', 'not installed', "'.[cpu]'"),
        (
            'cpu',
            {'tensorflow_cpu': '2.18.1'},
            'FAIL',
            'too old',
            'pip uninstall -y tensorflow-cpu && ',
        ),
        ('cpu', {'tensorflow': '2.19.0'}, 'FAIL', 'too old', 'pip uninstall'),
        (
            'tpu-tf',
            {'tensorflow_cpu': '2.21.0'},
            'FAIL',
            'cannot use the TPU',
            "requirements/tpu-tf.txt '.[tpu-tf]'",
        ),
        ('tpu-tf', {'tensorflow': '2.21.0'}, 'FAIL', 'cannot use the TPU', "'.[tpu-tf]'"),
        (
            'gpu',
            {'tensorflow_cpu': '2.21.0'},
            'warn',
            'cannot use the GPU',
            "requirements/gpu.txt '.[gpu]'",
        ),
        ('cpu', {'tensorflow_tpu': '2.20.0'}, 'warn', 'this run uses no TPU', "'.[cpu]'"),
        ('cpu', {'tensorflow_cpu': '2.23.0'}, 'warn', '2.23.0', "'.[cpu]'"),
    ],
)
def test_a_build_that_does_not_fit_is_named(tmp_path, accelerator, versions, status, found, mend):
    assert_mended(
        packages.check_tensorflow(accelerator, installed(tmp_path, **versions))[0],
        status,
        found,
        mend,
    )


@pytest.mark.parametrize(
    'accelerator, versions',
    [
        ('cpu', {'tensorflow_cpu': '2.21.0'}),
        ('cpu', {'tensorflow': '2.19.1'}),
        ('gpu', {'tensorflow': '2.20.0'}),
        ('tpu', {'tensorflow_cpu': '2.21.0'}),
        ('tpu-tf', {'tensorflow_tpu': '2.19.1'}),
    ],
)
def test_a_build_that_fits_is_ok(tmp_path, accelerator, versions):
    assert packages.check_tensorflow(accelerator, installed(tmp_path, **versions))[0].status == 'ok'


def test_an_old_or_missing_keras_is_named(tmp_path):
    assert_mended(
        packages.check_keras((3, 11), installed(tmp_path / 'old', keras='3.12.4')),
        'FAIL',
        '3.12.4 is too old',
        'pip install keras==3.15.1',
    )
    assert_mended(
        packages.check_keras((3, 10), installed(tmp_path / 'older', keras='2.15.0')),
        'FAIL',
        'too old',
        'pip install keras==3.12.4',
    )
    assert_mended(packages.check_keras((3, 12), []), 'FAIL', 'not installed', 'pip install keras==')
    assert packages.check_keras((3, 10), installed(tmp_path / 'new', keras='3.12.4')).status == 'ok'


def test_missing_packages_are_named(tmp_path):
    present = {
        name.replace('-', '_'): '1.0'
        for name in packages.PACKAGES
        if name not in ('tqdm', 'psutil')
    }
    assert_mended(
        packages.check_packages('gpu', installed(tmp_path, **present)),
        'FAIL',
        'not installed: psutil, tqdm',
        "'.[gpu]'",
    )


def test_an_unfit_libtpu_is_named_with_a_version_that_fits(tmp_path):
    stand_in = (
        numpy._core._multiarray_umath.__file__
    )  # a library of other functions, for one of which the functions have gone
    (tmp_path / 'libtensorflow_cc.so.2').write_bytes(b'\0TpuExecutor_Init\0TfTpu_Initialize\0')
    assert_mended(
        packages.check_libtpu('2.20.0', str(tmp_path), stand_in),
        'FAIL',
        'lacks 2 of 2 functions',
        'pip install libtpu==0.0.21.1',
    )
    assert_mended(
        packages.check_libtpu('2.19.1', str(tmp_path), stand_in),
        'FAIL',
        'such as TfTpu_Initialize',
        'pip install libtpu==0.0.10',
    )
    (tmp_path / 'broken.so').write_text('half a download')
    assert_mended(
        packages.check_libtpu('2.20.0', str(tmp_path), str(tmp_path / 'broken.so')),
        'FAIL',
        'cannot be read',
        'pip install libtpu==',
    )
    (tmp_path / 'libtensorflow_cc.so.2').write_bytes(b'\0nothing\0')
    assert packages.check_libtpu('2.20.0', str(tmp_path), stand_in).status == 'ok'


def test_a_missing_libtpu_is_named(monkeypatch):
    monkeypatch.setattr(tpu_environment, 'libtpu_path', lambda: None)
    assert_mended(
        packages.check_libtpu('2.20.0'), 'FAIL', 'not installed', 'pip install libtpu==0.0.21.1'
    )


# A TensorFlow that cannot be imported.


@pytest.mark.parametrize(
    'text, found',
    [
        (
            "raise ImportError('libcudart.so.12: cannot open shared object file')",
            'ImportError: libcudart.so.12: cannot open',
        ),
        (
            'import os, sys\nsys.stderr.write("F0000 tpu_library.cc:1] Check failed: '
            'TpuExecutor_Init not found\\n*** stack trace: ***\\n@ 0x1\\n")\n'
            'sys.stderr.flush()\nos.abort()',
            'ended by SIGABRT: F0000 tpu_library.cc:1] Check failed: TpuExecutor_Init not found',
        ),
        ('import time\ntime.sleep(60)', 'did not end in 1 s'),
        ('import os\nos._exit(0)', 'ended without a message'),
    ],
)
def test_an_import_that_raises_dies_or_hangs_is_survived(tmp_path, monkeypatch, text, found):
    monkeypatch.setattr(check, 'CHECK_SECONDS', 1.0 if 'sleep' in text else 30.0)
    rows = list(
        check.results(
            default.get_config(),
            str(tmp_path / 'run'),
            environ=fake_tensorflow(tmp_path, text),
            probe_seconds=0,
        )
    )
    (broken,) = [row for row in rows if row.name == 'import']
    assert_mended(broken, 'FAIL', found, 'pip uninstall -y tensorflow')
    assert [row.name for row in rows][
        -1
    ] == 'workdir'  # and the rest that needs no TensorFlow has been looked at
    assert not os.path.exists(tmp_path / 'run')


def test_what_is_broken_behind_tensorflow_is_named(tmp_path):
    environ = fake_tensorflow(
        tmp_path,
        """
        class sysconfig: get_build_info = staticmethod(dict)
        class config: list_physical_devices = staticmethod(lambda kind: [])
        __version__ = '2.21.0'
    """,
    )
    (broken,) = [
        row
        for row in check.results(default.get_config(), str(tmp_path), environ=environ)
        if row.name == 'import'
    ]
    assert_mended(
        broken, 'FAIL', 'TensorFlow can be imported, but not what is used with it', 'pip install'
    )


def test_a_broken_environment_is_status_1_without_stack_trace(tmp_path):
    environ = fake_tensorflow(tmp_path, "raise ImportError('broken for the test')")
    done = call(
        '--config=configs/digits.py',
        f'--workdir={tmp_path / "run"}',
        PYTHONPATH=environ['PYTHONPATH'],
    )
    assert done.returncode == 1 and done.stderr == ''
    assert (
        'FAIL  import        import tensorflow fails: ImportError: broken for the test\n'
        in done.stdout
    )
    assert (
        '-> ' in done.stdout and 'pip uninstall' in done.stdout and 'Traceback' not in done.stdout
    )


def test_the_doctor_itself_imports_no_tensorflow():
    look = (
        'import sys; from diagnostics import check; print(sorted({"tensorflow", "keras", '
        '"numpy", "tensorflow_datasets", "psutil"} & set(sys.modules)))'
    )
    assert (
        subprocess.run(
            [sys.executable, '-c', look], cwd=ROOT, capture_output=True, text=True
        ).stdout
        == '[]\n'
    )


# The machine.


@pytest.mark.parametrize(
    'environ, name',
    [
        ({'COLAB_RELEASE_TAG': 'release'}, 'Colab'),
        ({'KAGGLE_KERNEL_RUN_TYPE': 'Batch'}, 'Kaggle'),
        ({'SLURM_JOB_ID': '7'}, 'Slurm, job 7'),
        ({}, 'plain machine'),
    ],
)
def test_the_platform_is_told(tmp_path, environ, name):
    assert machine.describe_platform(environ, str(tmp_path)).startswith(f'{name}, ')


def test_a_google_machine_is_told(tmp_path):
    (tmp_path / 'sys' / 'class' / 'dmi' / 'id').mkdir(parents=True)
    (tmp_path / 'sys' / 'class' / 'dmi' / 'id' / 'product_name').write_text(
        'Google Compute Engine\n'
    )
    assert machine.describe_platform({}, str(tmp_path)).startswith('Google Compute Engine, ')


def memory(folder, available, version=2, limit=None, used=0, inactive=0):
    """A machine with so many GiB available, and a control group of version 1 or 2 with a limit
    above this process.
    """
    (folder / 'proc' / 'self').mkdir(parents=True)
    (folder / 'proc' / 'meminfo').write_text(
        f'MemTotal: 99999999 kB\nMemAvailable: {available * 2**20:.0f} kB\n'
    )
    (folder / 'proc' / 'self' / 'cgroup').write_text(
        '0::/job/step\n' if version == 2 else '4:memory:/job/step\n'
    )
    if limit:
        group = folder / 'sys' / 'fs' / 'cgroup' / ('' if version == 2 else 'memory') / 'job'
        names = (
            ('memory.max', 'memory.current', 'inactive_file')
            if version == 2
            else ('memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_inactive_file')
        )
        group.mkdir(parents=True)
        (group / names[0]).write_text(f'{int(limit * 2**30)}\n')
        (group / names[1]).write_text(f'{int(used * 2**30)}\n')
        (group / 'memory.stat').write_text(f'anon 5\n{names[2]} {int(inactive * 2**30)}\n')
    return str(folder)


def data(**changes):
    return dataset_status.DatasetStatus(
        **{
            'state': 'ready',
            'place': '/data',
            'class_names': tuple('0123456789'),
            'num_train': 1437,
            'num_eval': 360,
            'num_bytes': 2**40,
            **changes,
        }
    )


@pytest.mark.parametrize('version', [1, 2])
def test_memory_is_what_the_container_leaves(tmp_path, version):
    root = memory(tmp_path / 'limited', 64, version, limit=4, used=3, inactive=0.5)
    free, where = machine.free_memory(root)
    assert free == 1.5 * 2**30 and 'container' in where
    result = tensorflow_checks.check_memory(default.get_config(), data(), root)
    assert_mended(
        result,
        'FAIL',
        '1.5 GiB free on this container or job; 4.0 GiB for images',
        '--config.dataset.memory_gib=0.75',
    )
    config = default.get_config()
    config.dataset.memory_gib = 0.75
    assert (
        tensorflow_checks.check_memory(config, data(), root).status != 'FAIL'
    )  # the remedy mends it
    assert machine.free_memory(memory(tmp_path / 'free', 64, version)) == (
        64 * 2**30,
        'this machine',
    )


def test_little_memory_for_the_model_is_a_warning(tmp_path):
    root = memory(tmp_path, 5)
    assert_mended(
        tensorflow_checks.check_memory(default.get_config(), data(), root),
        'warn',
        'leaves little',
        '--config.dataset.memory_gib=2.5',
    )
    assert (
        tensorflow_checks.check_memory(default.get_config(), data(num_bytes=2**20), root).status
        == 'ok'
    )


def test_batches_beyond_memory_are_named_with_one_that_fits(tmp_path):
    root, config = memory(tmp_path, 5), default.get_config()
    config.batch_size, config.image_size = 4096, 1024
    found = tensorflow_checks.check_memory(config, data(num_bytes=2**20), root)
    assert_mended(
        found, 'FAIL', 'one batch of 4,096 images takes 12.0 GiB', '--config.batch_size='
    )  # 4,096 x 1,024 x 1,024 x 3 bytes
    config.batch_size = int(found.fix.partition('=')[2])
    assert tensorflow_checks.check_memory(config, data(num_bytes=2**20), root).status != 'FAIL'


def test_cores_are_the_containers_and_too_few_are_a_warning(tmp_path):
    (tmp_path / 'proc' / 'self').mkdir(parents=True)
    (tmp_path / 'proc' / 'self' / 'cgroup').write_text('0::/\n')
    (tmp_path / 'sys' / 'fs' / 'cgroup').mkdir(parents=True)
    (tmp_path / 'sys' / 'fs' / 'cgroup' / 'cpu.max').write_text('50000 100000\n')
    assert machine.cores(str(tmp_path)) == 0.5
    assert_mended(check.check_cores(4, 8), 'warn', '4 for 8 accelerators', '-m inputs.service')
    assert check.check_cores(16, 8).status == check.check_cores(1, 0).status == 'ok'


def test_a_disk_that_is_too_small_is_named(tmp_path, monkeypatch):
    config = default.get_config()

    def space(free):
        return monkeypatch.setattr(
            machine.shutil, 'disk_usage', lambda path: type('Usage', (), {'free': free})
        )  # noqa: E731

    space(3 * 2**30)
    result = tensorflow_checks.check_disk(config, str(tmp_path / 'run'), data(), 2**30)
    assert_mended(
        result, 'FAIL', '3.0 GiB free for 4.0 GiB of checkpoints', '--workdir=DIR'
    )  # 2 that are kept, the best, one that is written
    missing = data(state='missing', place=str(tmp_path / 'data'), room_bytes=100 * 2**30)
    assert_mended(
        tensorflow_checks.check_disk(config, str(tmp_path / 'run'), missing, 2**20),
        'FAIL',
        '100.0 GiB of digits',
        '--config.dataset.data_dir=DIR',
    )
    download = data(state='to_download', place=str(tmp_path / 'data'), room_bytes=100 * 2**30)
    assert_mended(
        tensorflow_checks.check_disk(config, str(tmp_path / 'run'), download, 2**20),
        'warn',
        'at most',
        '--config.dataset.data_dir=DIR',
    )
    space(5 * 2**30)
    assert tensorflow_checks.check_disk(config, str(tmp_path / 'run'), data(), 2**30).status == 'ok'


@pytest.mark.parametrize(
    'text, found',
    [
        ('{"cluster": ', 'JSONDecodeError'),
        ('{"cluster": {"worker": ["a:1", "b:1"]}}', "KeyError: 'task'"),
        (
            '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}',
            'IndexError',
        ),
        (
            '{"cluster": {"worker": ["a:1"]}, "task": {"type": "chief", "index": 0}}',
            "KeyError: 'chief'",
        ),
        (
            '{"cluster": {"worker": ["a:1", "b"]}, "task": {"type": "worker", "index": 0}}',
            "'b' is not an address HOST:PORT",
        ),
        (
            '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": -1}}',
            'IndexError',
        ),
        ('[]', 'TypeError'),
    ],
)
def test_a_broken_tf_config_is_named(text, found):
    assert_mended(check.check_cluster(text), 'FAIL', found, 'unset TF_CONFIG')


def test_a_sane_tf_config_is_ok():
    row = check.check_cluster(
        json.dumps(
            {
                'cluster': {'chief': ['a:1'], 'worker': ['b:1']},
                'task': {'type': 'worker', 'index': 0},
            }
        )
    )
    assert row.status == 'ok' and row.message == '2 workers; this is worker 0'
    assert check.check_cluster('{}').status == 'ok'  # TensorFlow's own word for no cluster


@pytest.mark.parametrize('place', ['file/run', 'file'])
def test_a_workdir_that_cannot_be_written_to_is_named(tmp_path, place):
    (tmp_path / 'file').write_text('in the way')
    assert_mended(
        check.check_writable(str(tmp_path / place)),
        'FAIL',
        f'{place} cannot be written to',
        '--workdir=',
    )
    assert_mended(check.check_writable('/proc/run'), 'FAIL', 'cannot be written to', '--workdir=')
    assert check.check_writable(
        str(tmp_path / 'new' / 'run')
    ).status == 'ok' and not os.path.exists(tmp_path / 'new')


# Data, config, model.


def test_a_place_that_cannot_be_read_is_named_with_what_to_write(tmp_path, tiny):
    assert_mended(
        rows_of(tiny, 's3://bucket/run')['run'],
        'FAIL',
        's3://bucket/run/config.json cannot be read',
        '--workdir=DIR',
    )


def test_a_workdir_with_a_run_of_another_config_is_named(tmp_path, tiny):
    (tmp_path / 'checkpoints' / 'step-10').mkdir(parents=True)
    (tmp_path / 'checkpoints' / 'step-10' / 'manifest.json').touch()
    (tmp_path / 'config.json').write_text(tiny.to_json())
    assert tensorflow_checks.check_workdir(tiny, str(tmp_path)).status == 'ok'
    tiny.batch_size = 48
    assert_mended(
        tensorflow_checks.check_workdir(tiny, str(tmp_path)),
        'FAIL',
        'batch_size was 32, is now 48',
        '--workdir',
    )


def test_unprepared_digits_are_ok_with_their_numbers(tmp_path, tiny):
    tiny.dataset.data_dir = str(tmp_path / 'data')
    found = dataset_status.find_status(tiny.dataset)
    assert (found.state, found.num_classes, found.num_train, found.num_eval) == (
        'to_generate',
        10,
        1437,
        360,
    )
    tiny.dataset.train_split = 'train[:10%]'
    assert dataset_status.find_status(tiny.dataset).num_train == 144
    assert tensorflow_checks.check_data(tiny, found).status == 'ok' and not os.path.exists(
        tmp_path / 'data'
    )


def test_imagenet_that_is_missing_is_named_with_how_to_get_it(tmp_path):
    config = default.get_config()
    config.dataset.name = 'imagenet2012'
    config.dataset.eval_split = 'validation'
    config.dataset.data_dir = str(tmp_path)
    found = dataset_status.find_status(config.dataset)
    assert (found.num_classes, found.num_train, found.num_eval) == (1000, 1_281_167, 50_000)
    assert_mended(
        tensorflow_checks.check_data(config, found),
        'FAIL',
        'imagenet2012 is not prepared',
        'ILSVRC2012_img_train.tar',
    )
    manual = tmp_path / 'downloads' / 'manual'
    manual.mkdir(parents=True)
    (manual / 'ILSVRC2012_img_train.tar').write_text('')  # one of the two
    assert dataset_status.find_status(config.dataset).state == 'missing'
    (manual / 'ILSVRC2012_img_val.tar').write_text('')
    assert_mended(
        tensorflow_checks.check_data(config, dataset_status.find_status(config.dataset)),
        'warn',
        'its archives are here',
        'build imagenet2012 --data_dir=',
    )


def test_a_data_set_to_download_is_a_warning(tmp_path):
    config = default.get_config()
    config.dataset.name, config.dataset.data_dir = 'cifar10', str(tmp_path)
    assert_mended(
        tensorflow_checks.check_data(config, dataset_status.find_status(config.dataset)),
        'warn',
        'the first start downloads at most 162 MiB',
        f'build cifar10 --data_dir={tmp_path}',
    )


def test_a_data_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / 'file').write_text('in the way')
    config = default.get_config()
    config.dataset.data_dir = str(tmp_path / 'file' / 'data')
    assert_mended(
        tensorflow_checks.check_data(config, dataset_status.find_status(config.dataset)),
        'FAIL',
        f'{tmp_path / "file"} is not a folder',
        'TFDS_DATA_DIR',
    )


def rows_of(config, workdir):
    return {row.name: row for row in tensorflow_checks.results(config, str(workdir), 0)}


def test_prepared_data_of_which_a_file_is_lost_are_named(tmp_path, tiny):
    from inputs import datasets

    tiny.dataset.data_dir = str(tmp_path / 'data')
    datasets.load(tiny.dataset)
    (lost,) = (tmp_path / 'data').glob('digits/*/*-train.tfrecord*')
    lost.unlink()
    assert_mended(
        rows_of(tiny, tmp_path / 'run')['data set'],
        'FAIL',
        f'1 files of digits are missing, such as {lost}',
        f'rm -r {lost.parent}',
    )


def test_prepared_data_that_were_cut_short_are_named(tmp_path, tiny):
    from inputs import datasets

    tiny.dataset.data_dir = str(tmp_path / 'data')
    datasets.load(tiny.dataset)
    assert rows_of(tiny, tmp_path / 'run')['data set'].status == 'ok'
    (file,) = (tmp_path / 'data').glob('digits/*/*-train.tfrecord*')
    os.truncate(file, 3000)
    assert_mended(
        rows_of(tiny, tmp_path / 'run')['data set'],
        'FAIL',
        'split train',
        f'rm -r {file.parent}',
    )


@pytest.mark.parametrize(
    'key, value, row, found, mend',
    [
        (
            'dataset.name',
            'cifra10',
            'data set',
            "config.dataset.name='cifra10' is not a TFDS data set",
            '--config.dataset.name=cifar10',
        ),
        (
            'dataset.eval_split',
            'validation',
            'data set',
            "'validation' is not a split of digits",
            'test',
        ),
        (
            'dataset.name',
            'folder',
            'data set',
            'needs a folder',
            '--config.dataset.data_dir=DIR',
        ),
        (
            'batch_size',
            30,
            'config',
            'cannot be split evenly over 4 replicas',
            '--config.batch_size=28',
        ),
        ('train_for', '0.001 epochs', 'config', 'less than one step', 'train longer'),
        (
            'model.name',
            'EfficientNetV3B0',
            'model',
            'is not a model of keras.applications',
            '--config.model.name=EfficientNetV2B0',
        ),
        (
            'optimizer.name',
            'adma',
            'model',
            "config.optimizer.name='adma' is not one of",
            '--config.optimizer.name=adam',
        ),
    ],
)
def test_a_config_that_cannot_work_here_is_named(tmp_path, tiny, key, value, row, found, mend):
    tiny.update_from_flattened_dict({key: value})
    tiny.virtual_devices = 4
    assert_mended(rows_of(tiny, tmp_path)[row], 'FAIL', found, mend)


def test_folders_without_classes_are_named_classes_are_counted(tmp_path, tiny):
    tiny.dataset.name, tiny.dataset.data_dir = 'folder', str(tmp_path / 'missing')
    assert_mended(rows_of(tiny, tmp_path)['data set'], 'FAIL', 'is not a folder', 'it should hold')
    for name in ('cat', 'dog'):
        (tmp_path / 'pictures' / name).mkdir(parents=True)
        for number in range(10):
            (tmp_path / 'pictures' / name / f'{number}.jpg').write_bytes(b'12345')
    tiny.dataset.data_dir = str(tmp_path / 'pictures')
    found = dataset_status.find_status(tiny.dataset)
    assert (found.state, found.num_classes, found.num_train, found.num_eval, found.num_bytes) == (
        'ready',
        2,
        16,
        4,
        100,
    )


def test_a_strategy_that_is_asked_for_and_not_there_is_named(tmp_path, tiny):
    tiny.strategy = 'mirrored'
    assert_mended(
        rows_of(tiny, tmp_path)['strategy'],
        'FAIL',
        'needs several devices',
        '--config.strategy=auto',
    )


@pytest.mark.parametrize(
    'key, value, found, mend',
    [
        (
            'model.weights',
            'runs/missing',
            "config.model.weights='runs/missing' is not there",
            "'imagenet'",
        ),
        (
            'distill.teacher',
            'runs/missing',
            'neither a SavedModel nor a run that has exported one',
            'train the teacher first',
        ),
    ],
)
def test_weights_and_a_teacher_that_are_not_there_are_named(
    tmp_path, tiny, key, value, found, mend
):
    tiny.update_from_flattened_dict({key: value})
    assert_mended(rows_of(tiny, tmp_path)['model'], 'FAIL', found, mend)


def test_what_keras_downloads_is_said_and_not_downloaded(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr('keras.src.utils.file_utils.get_file', None)
    monkeypatch.setenv('KERAS_HOME', str(tmp_path))
    tiny.model.name, tiny.model.weights, tiny.image_size = 'MobileNetV2', 'imagenet', 32
    row = rows_of(tiny, tmp_path / 'run')['weights']
    assert (
        row.status == 'ok'
        and f'MobileNetV2 (imagenet): downloaded into {tmp_path}/models at the first start'
        in row.message
    )


def test_a_setting_that_a_tpu_refuses_is_named(tmp_path, tiny):
    tiny.jit_compile, tiny.strategy = 'true', 'tpu'
    fix = '--config.jit_compile=auto'
    rows = {row.name: row for row in tensorflow_checks.results(tiny, str(tmp_path), tpu_cores=1)}
    assert_mended(rows['strategy'], 'FAIL', 'would compile for the host', fix)
    tiny.jit_compile, tiny.strategy = 'false', 'auto'
    rows = {row.name: row for row in tensorflow_checks.results(tiny, str(tmp_path), tpu_cores=1)}
    assert_mended(rows['strategy'], 'FAIL', 'JAX runs compiled steps alone', fix)


def test_the_table_says_what_the_run_will_be(tmp_path, tiny):
    rows = rows_of(tiny, tmp_path / 'run')
    assert {row.status for row in rows.values()} == {'ok'}, rows
    assert (
        rows['steps'].message.startswith('30 = ') and rows['batch'].message == '32 = 32 x 1 replica'
    )
    assert rows['model'].message.startswith(
        'tiny with adamw: 5,562 parameters, 5,466 of them trained'
    )
    assert not os.path.exists(tmp_path / 'run')


def test_a_checkpoint_is_as_large_as_the_table_says(tmp_path, tiny):
    from experiment.session import open_session

    session = open_session(tiny, str(tmp_path))
    session.checkpoints.save(1, {})
    session.checkpoints.wait()
    written = sum(file.stat().st_size for file in (tmp_path / 'checkpoints').glob('step-1/*data*'))
    found = rows_of(tiny, tmp_path)['model'].message
    assert float(found.rsplit(' ', 2)[1]) * 2**20 == pytest.approx(
        written, rel=0.15
    )  # the names of its parts come to it


@pytest.mark.slow
def test_multiply_adds_of_efficientnetv2b0_are_as_published():
    model = keras.applications.EfficientNetV2B0(weights=None)
    assert tensorflow_checks.forward_multiply_adds(model, 224) == pytest.approx(0.72e9, rel=0.02)


def test_multiply_adds_of_convolutions_match_the_closed_form():
    images = keras.Input((16, 16, 3))
    wide = keras.layers.Conv2D(8, 3, padding='same', use_bias=False)(images)
    deep = keras.layers.DepthwiseConv2D(5, strides=2, padding='same', use_bias=False)(wide)
    model = keras.Model(images, keras.layers.Conv2D(4, 1, use_bias=False)(deep))
    exact = 16 * 16 * 8 * 27 + 8 * 8 * 8 * 25 + 8 * 8 * 4 * 8
    assert tensorflow_checks.forward_multiply_adds(model, 16) == exact


def test_an_unforeseen_error_is_a_row_not_a_stack_trace(tmp_path, monkeypatch, tiny):
    def broken(*arguments):
        raise KeyError('nobody\nforesaw')
        yield

    monkeypatch.setattr(tensorflow_checks, 'results', broken)
    said, heard = [], iter([(tiny.to_dict(), str(tmp_path)), 0])
    tensorflow_checks.examine(said.append, lambda: next(heard))
    row = next(message['result'] for message in said if 'result' in message)
    assert_mended(row, 'FAIL', 'KeyError', '--verbosity=1')
    assert said[-1] == {'done': True}


def test_a_process_that_dies_over_the_model_is_named(tmp_path, monkeypatch, tiny):
    class Dies(worker_process.WorkerProcess):
        def __init__(self, module, function, *arguments):
            super().__init__('tests.diagnostics.test_check', 'die_after_the_check', *arguments)

    monkeypatch.setattr(check, 'WorkerProcess', Dies)
    rows = list(
        check.results(
            tiny, str(tmp_path / 'run'), str(tmp_path), {**os.environ, 'TF_CPP_MIN_LOG_LEVEL': '3'}
        )
    )
    assert_mended(rows[-1], 'FAIL', 'ended by SIGKILL', '--verbosity=1')


def die_after_the_check(send, receive):
    """What the process of the test before does in place of `tensorflow_checks.examine`."""
    receive()
    send({'checked': True})
    os.kill(os.getpid(), 9)


# The command.


def test_a_healthy_machine_is_ready_and_nothing_is_left(tmp_path):
    done = call(
        '--config=configs/debug.py',
        f'--workdir={tmp_path}/run',
        f'--config.dataset.data_dir={tmp_path}/data',
    )
    assert done.returncode == 0 and done.stderr == '', done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for what in (
        'Python',
        'platform',
        'TensorFlow',
        'Keras',
        'packages',
        'cores',
        'workdir',
        'strategy',
        'data set',
        'memory',
        'steps',
        'model',
        'cost',
        'disk',
        'run',
    ):
        assert any(line[:20] in (f'ok    {what:14}', f'warn  {what:14}') for line in lines), what
    assert lines[-1].startswith('ready to train') and 'FAIL' not in done.stdout
    assert os.listdir(tmp_path) == []


def test_json_has_the_rows_as_fields(tmp_path):
    arguments = ('--config=configs/debug.py', f'--workdir={tmp_path}/run', '--json')
    done = call(*arguments, f'--config.dataset.data_dir={tmp_path}/data')
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report['status'] in ('ok', 'warn')
    assert all(list(row) == ['status', 'name', 'message', 'fix'] for row in report['results'])
    rows = {row['name']: row for row in report['results']}
    assert rows['steps']['message'].startswith('200 = ') and rows['run']['status'] == 'ok'


def test_a_wrong_config_is_json_too():
    done = call('--config=configs/debug.py', '--config.batch_size=0', '--json')
    (row,) = json.loads(done.stdout)['results']
    assert done.returncode == 2 and row['status'] == 'FAIL'
    assert row['message'] == 'config.batch_size=0 is impossible'
    assert row['fix'].startswith('it must be from 1 to')


def test_a_broken_config_file_is_json_too(tmp_path):
    (tmp_path / 'broken.py').write_text('def get_config(:')
    done = call(f'--config={tmp_path}/broken.py', '--json')
    (row,) = json.loads(done.stdout)['results']
    assert done.returncode == 2
    assert row['status'] == 'FAIL'
    assert 'broken.py' in row['message']


def test_a_wrong_config_is_one_line_and_status_2_in_every_mode():
    done = call('--config=configs/debug.py', '--config.train_for=20')
    assert done.returncode == 2 and done.stdout == ''
    assert (
        done.stderr.startswith("error: config.train_for='20' is not a valid duration")
        and len(done.stderr.splitlines()) == 1
    )


def test_make_train_begins_with_the_doctor(tmp_path):
    with open(os.path.join(ROOT, 'Makefile')) as file:
        recipe = file.read().split('\ntrain:')[1].split('\n\n')[0].splitlines()
    assert (
        recipe[1].endswith('main.py --config=configs/digits.py --workdir=runs/digits --mode=check')
        and 'summary.json ||' in recipe[1]
    )
    assert recipe[2].endswith('main.py --config=configs/digits.py --workdir=runs/digits')


def test_a_failure_is_status_1_and_a_warning_is_not(monkeypatch, capsys):
    rows = [check.ok('cores', '2'), check.warn('disk', 'little', 'df -h .')]
    monkeypatch.setattr(check, 'results', lambda config, workdir: iter(rows))
    assert check.run(None, '') == 0
    assert (
        capsys.readouterr().out
        == 'ok    cores         2\nwarn  disk          little\n                    -> df -h .\n'
        '\nready to train; 1 warn\n'
    )
    rows.append(check.fail('data set', 'gone', 'tfds build it'))
    assert check.run(None, '') == 1
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == '1 FAIL, 1 warn: apply the fixes after ->, then check again'
    )


def test_a_config_error_leaves_the_table_unprinted(capsys):
    config = default.get_config()
    config.batch_size = 0
    with refused(ConfigError, 'config.batch_size=0', key='batch_size'):
        check.run(config, 'runs/none')
    assert capsys.readouterr().out == ''


def test_the_last_words_are_the_line_that_tells_why():
    assert (
        worker_process.last_words('Traceback\n  File "x"\nValueError: why\nsome warning\n')
        == 'ValueError: why'
    )
    assert worker_process.last_words('a\nb\n\n') == 'b' and worker_process.last_words('') == ''
