"""What keeps a TPU or GPU from computing is named, with the command that mends it."""

import contextlib
import fcntl
import os
import subprocess
import sys
import textwrap
import time

import pytest

from common import machine, tpu_environment
from common.commands import ROOT
from configs import default
from devices import jax_packages
from diagnostics import accelerator_checks, check, tpu_lock, tpu_probe
from tests.devices.test_jax_packages import NEEDS_JAX, PACKAGES
from tests.diagnostics.machines import (
    NVIDIA,
    V5E,
    assert_mended,
    fake_machine,
    fake_tensorflow,
    installed,
    program,
)


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
        'start_tensorflow',
        'local',
        seconds=2,
        environ=tpu(tmp_path, **broken),
        lock=str(tmp_path / 'lock'),
    )
    assert (outcome.cores, outcome.step) == (0, step) and reason in outcome.reason
    assert time.monotonic() - began < 20


def test_a_working_tpu_is_ok_and_a_stale_probe_lock_removed(tmp_path):
    start, lock = ('start_tensorflow', 'local'), tmp_path / 'lock'
    works = tpu_probe.probe(*start, seconds=20, environ=tpu(tmp_path / 'well'), lock=str(lock))
    assert works == tpu_probe.Outcome(4)
    hangs = tpu(tmp_path / 'hangs', at_import=f'open({str(lock)!r}, "w"); time.sleep(60)')
    outcome = tpu_probe.probe(*start, seconds=1, environ=hangs, lock=str(lock))
    assert 'did not end' in outcome.reason
    assert not lock.exists()


@pytest.mark.parametrize('is_held, stays', [(True, True), (None, True), (False, False)])
def test_only_a_lock_that_nobody_holds_is_removed(tmp_path, monkeypatch, is_held, stays):
    lock = tmp_path / 'lock'
    monkeypatch.setattr(tpu_lock, 'is_held', lambda path: is_held)
    dies = tpu(tmp_path, at_import=f'open({str(lock)!r}, "w"); os.abort()')
    tpu_probe.probe('start_tensorflow', 'local', seconds=20, environ=dies, lock=str(lock))
    assert lock.exists() == stays


def collected(rows):
    """(FAIL and warn rows, what the generator returns)."""
    found = []
    while True:
        try:
            found.append(next(rows))
        except StopIteration as end:
            return [row for row in found if row.status != 'ok'], end.value


def tpu_rows(folder, version, environ, config=None):
    """(FAIL and warn rows, cores) of a host with a v5e chip."""
    rows = accelerator_checks.check_tpu(
        config or default.get_config(),
        version,
        environ,
        fake_machine(folder / 'host', **V5E),
        5,
        str(folder / 'lock'),
        __file__,
    )
    return collected(rows)


def test_a_tpu_that_tensorflow_never_starts_is_left_to_jax(tmp_path):
    broken = tpu(tmp_path, initialise='raise RuntimeError("no device")')
    (row,), cores = tpu_rows(tmp_path, '2.19.1', broken)
    assert cores == 0
    assert_mended(
        row,
        'FAIL',
        'through PJRT it fails at step initialise: RuntimeError: no device; through StreamExecutor '
        'it fails at step initialise',
        'pip uninstall -y tensorflow-tpu libtpu && ',
    )
    assert "'.[tpu]'" in row.fix and '--config.strategy=auto' in row.fix


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
    (row,) = accelerator_checks.check_tpu(config, '2.20.0', {}, str(tmp_path), 5)
    assert_mended(row, 'FAIL', 'no TPU is attached', '--config.strategy=auto')


def test_a_tpu_host_without_what_a_tpu_needs_is_never_ok(tmp_path):
    environ = fake_tensorflow(tmp_path, "raise ImportError('not needed here')")
    root = fake_machine(tmp_path, **V5E)
    config = default.get_config()
    rows = {row.name: row for row in check.results(config, str(tmp_path / 'run'), root, environ)}
    assert 'TPU VM' in rows['platform'].message
    assert '1 TPU chip (v5e)' in rows['platform'].message
    if not machine.installed(['libtpu', 'tensorflow-tpu']):  # as where these tests usually run
        assert_mended(rows['JAX'], 'FAIL', '', "requirements/tpu.txt '.[tpu]'")
    config.strategy = 'tpu'
    rows = {row.name: row for row in check.results(config, str(tmp_path / 'run'), root, environ)}
    if not machine.installed(['tensorflow-tpu']):
        assert_mended(rows['TensorFlow'], 'FAIL', 'cannot use the TPU', "'.[tpu-tf]'")
        assert '--config.strategy=auto' in rows['TensorFlow'].message


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


# GPUs.


BY_TENSORFLOW = accelerator_checks.Runtime(is_jax=False, platform='cuda')
BY_JAX = accelerator_checks.Runtime(is_jax=True, platform='cuda')
SEES = {'gpus': ['/physical_device:GPU:0'], 'cuda': '12.5.1', 'cudnn': '9'}


def gpu_rows(found, folder, problem='', build='tensorflow', environ=None, **seen):
    return list(
        accelerator_checks.check_gpu(
            found, problem, SEES | seen, build, BY_TENSORFLOW, environ or {}, str(folder)
        )
    )


def test_gpus_are_listed_and_an_unseen_one_is_a_failure(tmp_path, monkeypatch):
    listed = 'echo "NVIDIA H100, 550.54.15, 81559 MiB"'
    program(tmp_path, monkeypatch, 'nvidia-smi', f'{listed}; {listed}')
    gpus, problem = machine.nvidia_smi()
    assert len(gpus) == 2 and not problem
    (row,) = gpu_rows(gpus, tmp_path)
    assert row.status == 'ok'
    found = '2 x NVIDIA H100 (81559 MiB), driver 550.54.15, CUDA 12.5.1, cuDNN 9'
    assert row.message == f'{found}; TensorFlow sees 1'
    (row,) = gpu_rows(gpus, tmp_path, gpus=[])
    assert_mended(row, 'FAIL', 'TensorFlow sees none', 'pip uninstall -y tensorflow && ')
    assert "'.[gpu]'" in row.fix
    (row,) = gpu_rows([gpus[0]._replace(driver='470.82')], tmp_path)
    assert_mended(row, 'FAIL', 'driver 470.82 is too old', 'install && sudo reboot')
    (row,) = gpu_rows(gpus, tmp_path, environ={'CUDA_VISIBLE_DEVICES': '-1'}, gpus=[])
    assert row.status == 'ok' and 'hidden by CUDA_VISIBLE_DEVICES' in row.message
    (row,) = gpu_rows(gpus, tmp_path, cuda='')
    assert_mended(row, 'warn', 'has no CUDA', "'.[gpu]'")
    (row,) = gpu_rows(gpus, tmp_path, build='tensorflow-cpu')
    assert row.status == 'ok'  # the row of TensorFlow has said it


def test_a_gpu_without_a_driver_that_works_is_named(tmp_path, monkeypatch):
    program(tmp_path, monkeypatch, 'nvidia-smi', 'echo "NVIDIA-SMI has failed: no driver"; exit 9')
    gpus, problem = machine.nvidia_smi()
    host = fake_machine(tmp_path / 'host', **NVIDIA)
    failed = 'NVIDIA-SMI has failed: no driver'
    (row,) = gpu_rows(gpus, host, problem)
    assert_mended(row, 'FAIL', failed, 'CUDA_VISIBLE_DEVICES=-1')
    (row,) = gpu_rows([], host, build='tensorflow-cpu')
    assert_mended(row, 'warn', 'its driver is missing', 'sudo ubuntu-drivers install')
    (row,) = gpu_rows([], tmp_path, problem)  # perhaps the program alone is there
    assert_mended(row, 'warn', f'nvidia-smi is installed, but fails: {failed}', 'nvidia-smi')
    program(tmp_path, monkeypatch, 'nvidia-smi', "printf '\\377\\376'; exit 9")
    assert machine.nvidia_smi() == ([], '\ufffd\ufffd')
    monkeypatch.setenv('PATH', str(tmp_path))
    assert machine.nvidia_smi() == ([], '')


def test_jax_needs_a_driver_for_its_newer_cuda(tmp_path):
    gpu = machine.Gpu('NVIDIA H100', '550.54.15', '81559 MiB')
    none = {'gpus': [], 'cuda': '', 'cudnn': ''}

    def rows(gpus, problem, folder):
        given = (none, 'tensorflow-cpu', BY_JAX, {}, str(folder))
        return list(accelerator_checks.check_gpu(gpus, problem, *given))

    (row,) = rows([gpu], '', tmp_path)
    assert_mended(row, 'FAIL', 'too old for CUDA 13, which needs 580', 'sudo reboot')
    (row,) = rows([gpu._replace(driver='580.65.06')], '', tmp_path)
    assert row.status == 'ok'
    (row,) = rows([], 'no driver', fake_machine(tmp_path, **NVIDIA))
    assert_mended(row, 'FAIL', 'no driver', 'CUDA_VISIBLE_DEVICES=-1')


# JAX.


FAKE_JAX = """
    import os, time
    __version__ = '{version}'
    def devices():
        {start}
        return [type('Device', (), {{'platform': 'cpu'}})]
    class config: update = staticmethod(lambda key, value: None)
"""


def fake_jax(folder, start='pass', version=jax_packages.VERSION):
    """An environment whose `jax` starts so, and the folder that its metadata are in."""
    path = installed(folder / 'fake', **PACKAGES)
    (folder / 'fake' / 'jax').mkdir()
    text = textwrap.dedent(FAKE_JAX).format(start=start, version=version)
    (folder / 'fake' / 'jax' / '__init__.py').write_text(text)
    return {**os.environ, 'PYTHONPATH': path[0]}, path


def jax_rows(folder, environ, path, seconds=20):
    """(FAIL and warn rows, cores) of a host with a v5e chip on which JAX is asked for."""
    rows = accelerator_checks.check_jax(
        'tpu', environ, str(folder), seconds, str(folder / 'lock'), path
    )
    return collected(rows)


@pytest.mark.parametrize(
    'start, seconds, found',
    [
        (
            'raise RuntimeError("Unable to initialize backend (set JAX_PLATFORMS=)")',
            20,
            'fails at step initialise: RunError: JAX does not start the TPU (Unable to initialize',
        ),
        ('pass', 20, 'fails at step initialise: RunError: JAX finds no TPU'),
        ('time.sleep(60)', 2, 'fails at step initialise: did not end in 2 s, and was stopped'),
        ('os.abort()', 20, 'fails at step initialise: ended by SIGABRT'),
    ],
)
def test_a_tpu_that_jax_does_not_start_is_named(tmp_path, start, seconds, found):
    environ, path = fake_jax(tmp_path, start)
    (row,), cores = jax_rows(tmp_path, environ, path, seconds)
    assert cores == 0 and 'set JAX_PLATFORMS' not in row.message
    assert_mended(row, 'FAIL', found, '--config.strategy=one_device')


def test_a_tpu_that_another_holds_is_not_tried(tmp_path):
    environ, path = fake_jax(tmp_path)
    os.symlink('/proc', tmp_path / 'proc')
    with holding(tmp_path / 'lock') as process:
        (row,), cores = jax_rows(tmp_path, environ, path)
    assert cores == 0
    assert_mended(row, 'FAIL', f'held by process {process.pid}', f'kill {process.pid}')


@NEEDS_JAX
@pytest.mark.parametrize('devices, message', [('1', '1 device computed'), ('4', '4 devices')])
def test_jax_computes_on_all_devices_of_this_machine(tmp_path, devices, message):
    environ = {**os.environ, 'JAX_NUM_CPU_DEVICES': devices}
    jax, computed = accelerator_checks.check_jax('cpu', environ, str(tmp_path), 60)
    assert (jax.status, jax.message) == ('ok', 'JAX 0.10.2')
    assert computed.status == 'ok' and computed.message.startswith(message), computed
