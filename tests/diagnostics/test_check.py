"""The doctor: what is broken is named, with the command that mends it; what is well is left
alone.
"""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import textwrap
import time

import keras
import numpy
import pytest

from common import machine, tpu_environment
from common.commands import ROOT
from common.errors import ConfigError
from configs import default
from diagnostics import check, packages, tensorflow_checks, tpu_lock, tpu_probe, worker_process
from inputs import dataset_status
from tests.conftest import refused


def call(*arguments, **environ):
    return subprocess.run(
        [sys.executable, os.path.join(ROOT, 'main.py'), *arguments, '--mode=check'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
    )


def assert_mended(result, status, found, mend):
    assert result.status == status, result
    assert found in result.message and mend in result.fix, result
    assert '\n' not in result.message + result.fix


def installed(folder, **versions):
    """A folder of installed packages that have metadata and nothing else, to look for distributions
    in.
    """
    for name, version in versions.items():
        info = folder / f'{name}-{version}.dist-info'
        info.mkdir(parents=True)
        (info / 'METADATA').write_text(
            f'Metadata-Version: 2.1\nName: {name.replace("_", "-")}\nVersion: {version}\n'
        )
    return [str(folder)]


def fake_machine(folder, **devices):
    """A /sys with PCI devices: name=(vendor, device, class)."""
    for name, values in devices.items():
        place = folder / 'sys' / 'bus' / 'pci' / 'devices' / name
        place.mkdir(parents=True)
        for file, value in zip(('vendor', 'device', 'class'), values, strict=False):
            (place / file).write_text(f'{value}\n')
    return str(folder)


def fake_tensorflow(folder, text):
    """A folder whose `tensorflow` is this text; returns an environment that takes it from there."""
    (folder / 'fake' / 'tensorflow').mkdir(parents=True)
    (folder / 'fake' / 'tensorflow' / '__init__.py').write_text(textwrap.dedent(text))
    environ = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(('TPU_', 'PJRT_', 'TF_CONFIG'))
    }
    return {**environ, 'PYTHONPATH': str(folder / 'fake')}


def program(folder, monkeypatch, name, text):
    """A shell script on the PATH."""
    (folder / 'bin').mkdir(exist_ok=True)
    (folder / 'bin' / name).write_text(f'#!/bin/sh\n{text}\n')
    (folder / 'bin' / name).chmod(0o755)
    monkeypatch.setenv('PATH', f'{folder / "bin"}{os.pathsep}{os.environ["PATH"]}')


V5E = {'chip0': ('0x1ae0', '0x0063', '0x088000')}
NVIDIA = {'card': ('0x10de', '0x2330', '0x030200')}


# What is installed.


def test_a_python_that_is_too_old_or_too_new_is_named():
    for version in ((3, 9, 1), (3, 14, 0)):
        assert_mended(packages.check_python(version), 'FAIL', '3.10 to 3.13', 'make train PYTHON=')
    assert (
        packages.check_python((3, 10, 0)).status == packages.check_python((3, 13, 5)).status == 'ok'
    )


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
            'tpu',
            {'tensorflow_cpu': '2.21.0'},
            'FAIL',
            'cannot use the TPU',
            "requirements/tpu.txt '.[tpu]'",
        ),
        ('tpu', {'tensorflow': '2.21.0'}, 'FAIL', 'cannot use the TPU', "'.[tpu]'"),
        (
            'gpu',
            {'tensorflow_cpu': '2.21.0'},
            'warn',
            'cannot use the GPU',
            "requirements/gpu.txt '.[gpu]'",
        ),
        ('cpu', {'tensorflow_tpu': '2.20.0'}, 'warn', 'this machine has no TPU', "'.[cpu]'"),
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
        ('tpu', {'tensorflow_tpu': '2.19.1'}),
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


# The TPU.


@contextlib.contextmanager
def holding(lock):
    """A process that holds the lock as TensorFlow does."""
    script = (
        f'import fcntl, time; file = open({str(lock)!r}, "w"); fcntl.lockf(file, '
        'fcntl.LOCK_EX); print("held", flush=True); time.sleep(60)'
    )
    with subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            yield process
        finally:
            process.kill()


def test_the_holder_of_the_tpu_is_named_with_how_to_end_it(tmp_path):
    with holding(tmp_path / 'lock') as process:
        result = tpu_lock.check_lock(str(tmp_path / 'lock'))
        assert_mended(
            result,
            'FAIL',
            f'held by process {process.pid}, {sys.executable} -c import fcntl',
            f'kill {process.pid}',
        )
        assert tpu_lock.is_held(tmp_path / 'lock')
    # The process is gone, its file is not.
    assert_mended(
        tpu_lock.check_lock(str(tmp_path / 'lock')),
        'warn',
        'nobody holds it',
        f'rm -f {tmp_path / "lock"}',
    )


def test_a_jax_notebook_that_holds_the_tpu_is_named(tmp_path):
    (tmp_path / 'proc' / '4711' / 'fd').mkdir(parents=True)
    os.symlink('/dev/accel0', tmp_path / 'proc' / '4711' / 'fd' / '9')
    (tmp_path / 'proc' / '4711' / 'cmdline').write_bytes(b'python\0-m\0ipykernel_launcher\0')
    (tmp_path / 'proc' / '4711' / 'maps').write_text('7f0 r-xp /usr/lib/jaxlib/libjax_common.so\n')
    result = tpu_lock.check_lock(str(tmp_path / 'lock'), str(tmp_path))
    assert_mended(
        result,
        'FAIL',
        'process 4711, python -m ipykernel_launcher (it has loaded JAX)',
        'Runtime > Restart session',
    )
    (tmp_path / 'proc' / '4711' / 'cmdline').write_bytes(b'python\0serve.py\0')
    assert_mended(
        tpu_lock.check_lock(str(tmp_path / 'lock'), str(tmp_path)),
        'FAIL',
        'serve.py (it has loaded JAX)',
        'kill 4711',
    )


def test_a_lock_of_an_invisible_process_is_named(tmp_path):
    lock = tmp_path / 'lock'
    with open(lock, 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # by this process, which is left out
        assert_mended(
            tpu_lock.check_lock(str(lock), str(tmp_path)),
            'FAIL',
            'cannot see',
            f'sudo fuser -k {lock}',
        )
    (tmp_path / 'closed').mkdir()  # to root every file opens, but no folder does
    assert_mended(
        tpu_lock.check_lock(str(tmp_path / 'closed'), str(tmp_path)),
        'FAIL',
        'another user',
        f'sudo rm -f {tmp_path / "closed"}',
    )
    assert tpu_lock.check_lock(str(tmp_path / 'none'), str(tmp_path)).status == 'ok'


def test_jax_in_this_process_is_named():
    assert_mended(tpu_lock.check_jax({'jax': None}), 'warn', 'imported in this process', 'restart')
    assert tpu_lock.check_jax({}).status == 'ok'


def test_a_tpu_held_by_this_process_is_named_and_kept(tmp_path):
    with open(tmp_path / 'lock', 'w') as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        assert_mended(
            tpu_lock.check_lock(str(tmp_path / 'lock')),
            'FAIL',
            'held by this very process',
            'restart the notebook',
        )
        look = 'import sys; from diagnostics import tpu_lock; print(tpu_lock.is_held(sys.argv[1]))'
        done = subprocess.run(
            [sys.executable, '-c', look, str(tmp_path / 'lock')],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.stdout == 'True\n', done.stderr


# A TensorFlow with a TPU of 4 cores, of which one step can be made to fail. What it computes are
# plain numbers.
TPU = """
    import os, time
    {at_import}
    class Resolver:
        def __init__(self, tpu):
            {resolve}
    class Strategy:
        num_replicas_in_sync = 4
        def __init__(self, resolver): pass
        def run(self, function): return [function()] * 4
        def experimental_local_results(self, values): return values
    class cluster_resolver: TPUClusterResolver = Resolver
    class Context:
        def all_reduce(self, operation, value): return {total}
    class distribute:
        cluster_resolver, TPUStrategy = cluster_resolver, Strategy
        ReduceOp = type('ReduceOp', (), {{'SUM': 0}})
        get_replica_context = Context
    class config: experimental_connect_to_cluster = staticmethod(lambda resolver: None)
    def initialize(resolver):
        {initialise}
    class tpu:
        class experimental: initialize_tpu_system = staticmethod(initialize)
    class linalg: matmul = staticmethod(lambda a, b: a * b * 128)
    ones, reduce_max = (lambda shape: 1.0), (lambda value: value)
    function = lambda function, autograph: function
"""


def tpu(folder, at_import='pass', resolve='pass', initialise='pass', total='value * 4'):
    return fake_tensorflow(
        folder, TPU.format(at_import=at_import, resolve=resolve, initialise=initialise, total=total)
    )


@pytest.mark.parametrize(
    'broken, step, reason',
    [
        ({'at_import': 'os.abort()'}, 'import', 'ended by SIGABRT'),
        (
            {'resolve': 'raise ValueError("no TPU at local")'},
            'resolve',
            'ValueError: no TPU at local',
        ),
        ({'initialise': 'time.sleep(60)'}, 'initialise', 'did not end in 2 s, and was stopped'),
        ({'total': 'value'}, 'all-reduce', 'computed [1.0, 1.0, 1.0, 1.0]'),
        ({'initialise': 'os._exit(0)'}, 'initialise', 'it ended without a message'),
    ],
)
def test_a_tpu_that_fails_or_hangs_is_named_with_the_step(tmp_path, broken, step, reason):
    began = time.monotonic()
    outcome = tpu_probe.probe(
        tpu_probe.start_methods('2.20.0', {})[0],
        seconds=2,
        environ=tpu(tmp_path, **broken),
        lock=str(tmp_path / 'lock'),
    )
    assert (outcome.cores, outcome.step) == (0, step) and reason in outcome.reason
    assert time.monotonic() - began < 20


def test_a_working_tpu_is_ok_and_a_stale_probe_lock_removed(tmp_path):
    method, lock = tpu_probe.StartMethod('any', {}), tmp_path / 'lock'
    assert tpu_probe.probe(
        method, seconds=20, environ=tpu(tmp_path / 'well'), lock=str(lock)
    ) == tpu_probe.Outcome(4)
    hangs = tpu(tmp_path / 'hangs', at_import=f'open({str(lock)!r}, "w"); time.sleep(60)')
    assert 'did not end' in tpu_probe.probe(method, seconds=1, environ=hangs, lock=str(lock)).reason
    assert not lock.exists()


def tpu_rows(folder, version, environ, config=None):
    """(FAIL and warn rows, cores) of a host with a v5e chip."""
    rows = check.check_tpu(
        config or default.get_config(),
        version,
        environ,
        fake_machine(folder / 'host', **V5E),
        5,
        str(folder / 'lock'),
        __file__,
    )
    found = []
    while True:
        try:
            found.append(next(rows))
        except StopIteration as end:
            return [
                row for row in found if row.status != 'ok' and row.name != 'JAX'
            ], end.value  # which these tests have loaded, or not


def test_a_tpu_that_never_starts_fails_naming_the_other_build(tmp_path):
    (row,), cores = tpu_rows(
        tmp_path, '2.19.1', tpu(tmp_path, initialise='raise RuntimeError("no device")')
    )
    assert cores == 0
    assert_mended(
        row,
        'FAIL',
        'through PJRT it fails at step initialise: RuntimeError: no device; through StreamExecutor '
        'it fails at step initialise',
        'tpu220',
    )
    assert 'pip uninstall -y tensorflow-tpu libtpu' in check.other_build(
        '2.20.0', (3, 11)
    ) and "'.[tpu]'" in check.other_build('2.20.0', (3, 11))
    assert 'PYTHON=python3.12 ACCELERATOR=tpu ' in check.other_build(
        '2.20.0', (3, 13)
    )  # for which 2.19.1 is not made
    assert 'PYTHON=python3.12 ACCELERATOR=tpu220 ' in check.other_build('2.19.1', (3, 10))


def test_a_tpu_that_needs_a_variable_fails_naming_it(
    tmp_path,
):
    environ = tpu(
        tmp_path,
        initialise='assert os.environ["NEXT_PLUGGABLE_DEVICE_USE_C_API"] == "false", "PJRT is '
        'broken"',
    )
    (row,), cores = tpu_rows(tmp_path, '2.19.1', environ)
    assert cores == 4
    assert_mended(
        row,
        'FAIL',
        'but 4 cores computed through StreamExecutor',
        'export NEXT_PLUGGABLE_DEVICE_USE_C_API=false',
    )


def test_a_tpu_that_starts_with_mains_variables_is_ok(tmp_path):
    environ = tpu(
        tmp_path,
        initialise='assert os.environ["PJRT_DEVICE"] == "TPU" and '
        'os.environ["TF_PLUGGABLE_DEVICE_LIBRARY_PATH"]',
    )
    assert tpu_rows(tmp_path, '2.19.1', environ) == ([], 4)


def test_obstacles_to_the_tpu_are_named_before_trying(tmp_path):
    (row,), _ = tpu_rows(tmp_path / 'library', '2.20.0', {'TPU_LOAD_LIBRARY': '0'})
    assert_mended(row, 'FAIL', 'TPU_LOAD_LIBRARY=0', 'unset TPU_LOAD_LIBRARY')
    os.makedirs(tmp_path / 'held' / 'host')
    os.symlink('/proc', tmp_path / 'held' / 'host' / 'proc')
    with holding(tmp_path / 'held' / 'lock') as process:
        (row,), _ = tpu_rows(tmp_path / 'held', '2.20.0', {})
        assert_mended(row, 'FAIL', 'is held by process', f'kill {process.pid}')


def test_a_tpu_that_is_asked_for_and_not_there_is_named(tmp_path):
    config = default.get_config()
    config.strategy = 'tpu'
    (row,) = check.check_tpu(config, '2.20.0', {}, str(tmp_path), 5)
    assert_mended(row, 'FAIL', 'no TPU is attached', '--config.strategy=auto')


def test_a_tpu_host_with_a_build_for_processors_is_never_ok(tmp_path):
    environ = fake_tensorflow(tmp_path, "raise ImportError('not needed here')")
    rows = list(
        check.results(
            default.get_config(), str(tmp_path / 'run'), fake_machine(tmp_path, **V5E), environ
        )
    )
    (build,) = [row for row in rows if row.name == 'TensorFlow']
    if 'tensorflow-tpu' not in build.message:  # unless these tests run with that build
        assert_mended(build, 'FAIL', 'cannot use the TPU', "'.[tpu]'")
    assert any('TPU VM' in row.message and '1 TPU chip (v5e)' in row.message for row in rows)


@pytest.mark.parametrize(
    'version, device, sets',
    [
        ('2.19.1', '0x0063', True),
        ('2.19.1', '0x0062', True),
        ('2.19.1', '0x006f', True),
        ('2.19.1', '0x005e', False),
        ('2.19.1', '0x0027', False),
        ('2.20.0', '0x0063', False),
        (None, '0x0063', False),
    ],
)
def test_pjrt_variables_are_set_for_matching_builds_and_chips(tmp_path, version, device, sets):
    root = fake_machine(tmp_path, chip=('0x1ae0', device))
    wanted = {
        'PJRT_DEVICE': 'TPU',
        'NEXT_PLUGGABLE_DEVICE_USE_C_API': 'true',
        'TF_PLUGGABLE_DEVICE_LIBRARY_PATH': '/lib/libtpu.so',
    }
    assert tpu_environment.pjrt_variables(version, {}, root, '/lib/libtpu.so') == (
        wanted if sets else {}
    )
    assert (
        tpu_environment.pjrt_variables(version, {'PJRT_DEVICE': 'CPU'}, root, '/lib/libtpu.so')
        == {}
    )  # the user has decided


def test_main_sets_them_before_import_on_such_a_host_only(monkeypatch, tmp_path):
    config = default.get_config()
    monkeypatch.setattr(tpu_environment, 'build_version', lambda: '2.19.1')
    monkeypatch.setenv('TPU_LIBRARY_PATH', __file__)
    for name in (*tpu_environment.PJRT_VARIABLES, 'TPU_NAME', 'TPU_ACCELERATOR_TYPE'):
        monkeypatch.delenv(name, raising=False)
    tpu_environment.set_pjrt_variables(config)
    assert 'PJRT_DEVICE' not in os.environ
    monkeypatch.setenv('TPU_ACCELERATOR_TYPE', 'v6e-4')
    config.strategy = 'one_device'
    tpu_environment.set_pjrt_variables(config)
    assert 'PJRT_DEVICE' not in os.environ
    config.strategy = 'auto'
    tpu_environment.set_pjrt_variables(config)
    set_by_prepare = {name: os.environ.pop(name) for name in tpu_environment.PJRT_VARIABLES}
    assert (
        set_by_prepare['PJRT_DEVICE'] == 'TPU'
        and set_by_prepare['TF_PLUGGABLE_DEVICE_LIBRARY_PATH'] == __file__
    )
    with open(os.path.join(ROOT, 'main.py')) as file:
        text = file.read()
    assert text.index('tpu_environment.set_pjrt_variables(') < text.index(
        'import_tensorflow_quietly()'
    )


def test_a_tpu_is_expected_by_its_chips_its_files_or_its_name(tmp_path):
    assert not tpu_environment.is_tpu_expected('local', {}, str(tmp_path))
    assert tpu_environment.is_tpu_expected(
        'mine', {}, str(tmp_path)
    ) and tpu_environment.is_tpu_expected('local', {'TPU_NAME': 'x'}, str(tmp_path))
    assert tpu_environment.is_tpu_expected('local', {}, fake_machine(tmp_path / 'chips', **V5E))
    assert not tpu_environment.is_tpu_expected(
        'local', {}, fake_machine(tmp_path / 'network', nic=('0x1ae0', '0x0042'), **NVIDIA)
    )
    (tmp_path / 'files' / 'dev').mkdir(parents=True)
    (tmp_path / 'files' / 'dev' / 'accel0').write_text('')
    assert tpu_environment.is_tpu_expected('local', {}, str(tmp_path / 'files'))


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


SEES = {'gpus': ['/physical_device:GPU:0'], 'cuda': '12.5.1', 'cudnn': '9'}


def test_gpus_are_listed_and_an_unseen_one_is_a_failure(tmp_path, monkeypatch):
    program(
        tmp_path,
        monkeypatch,
        'nvidia-smi',
        'echo "NVIDIA H100, 550.54.15, 81559 MiB"; echo "NVIDIA H100, 550.54.15, 81559 MiB"',
    )
    gpus, problem = machine.nvidia_smi()
    assert len(gpus) == 2 and not problem
    (row,) = check.check_gpu(gpus, '', SEES, 'tensorflow', {}, str(tmp_path))
    assert (
        row.status == 'ok'
        and row.message
        == '2 x NVIDIA H100 (81559 MiB), driver 550.54.15, CUDA 12.5.1, cuDNN 9; TensorFlow sees 1'
    )
    (row,) = check.check_gpu(gpus, '', {**SEES, 'gpus': []}, 'tensorflow', {}, str(tmp_path))
    assert_mended(row, 'FAIL', 'TensorFlow sees none', 'pip uninstall -y tensorflow && ')
    assert "'.[gpu]'" in row.fix
    (row,) = check.check_gpu(
        [gpus[0]._replace(driver='470.82')], '', SEES, 'tensorflow', {}, str(tmp_path)
    )
    assert_mended(row, 'FAIL', 'driver 470.82 is too old', 'install && sudo reboot')
    (row,) = check.check_gpu(
        gpus, '', {**SEES, 'gpus': []}, 'tensorflow', {'CUDA_VISIBLE_DEVICES': '-1'}, str(tmp_path)
    )
    assert row.status == 'ok' and 'hidden by CUDA_VISIBLE_DEVICES' in row.message
    (row,) = check.check_gpu(gpus, '', {**SEES, 'cuda': ''}, 'tensorflow', {}, str(tmp_path))
    assert_mended(row, 'warn', 'has no CUDA', "'.[gpu]'")
    (row,) = check.check_gpu(gpus, '', SEES, 'tensorflow-cpu', {}, str(tmp_path))
    assert row.status == 'ok'  # the row of TensorFlow has said it


def test_a_gpu_without_a_driver_that_works_is_named(tmp_path, monkeypatch):
    program(tmp_path, monkeypatch, 'nvidia-smi', 'echo "NVIDIA-SMI has failed: no driver"; exit 9')
    gpus, problem = machine.nvidia_smi()
    root = fake_machine(tmp_path / 'host', **NVIDIA)
    (row,) = check.check_gpu(gpus, problem, SEES, 'tensorflow', {}, root)
    assert_mended(row, 'FAIL', 'NVIDIA-SMI has failed: no driver', 'CUDA_VISIBLE_DEVICES=-1')
    (row,) = check.check_gpu([], '', SEES, 'tensorflow-cpu', {}, root)
    assert_mended(row, 'warn', 'its driver is missing', 'sudo ubuntu-drivers install')
    (row,) = check.check_gpu(
        [], problem, SEES, 'tensorflow', {}, str(tmp_path)
    )  # perhaps the program alone is there
    assert_mended(
        row,
        'warn',
        'nvidia-smi is installed, but fails: NVIDIA-SMI has failed: no driver',
        'nvidia-smi',
    )
    program(tmp_path, monkeypatch, 'nvidia-smi', "printf '\\377\\376'; exit 9")
    assert machine.nvidia_smi() == ([], '\ufffd\ufffd')
    monkeypatch.setenv('PATH', str(tmp_path))
    assert machine.nvidia_smi() == ([], '')


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
    tiny.jit_compile = 'true'
    rows = {row.name: row for row in tensorflow_checks.results(tiny, str(tmp_path), tpu_cores=1)}
    assert_mended(
        rows['strategy'], 'FAIL', 'would compile for the host', '--config.jit_compile=auto'
    )


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
