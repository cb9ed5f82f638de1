"""Checks whether this environment, config and data will work, and what fixes them: `--mode=check`.

It trains, downloads and prepares nothing. What can be known without importing TensorFlow is checked
here, the rest in a separate process (diagnostics/tensorflow_checks.py); on a TPU host, further
processes start the TPU. A broken installation crashes or hangs the process that imports it, and the
check reports that.
"""

import json
import os
import re
import sys
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from common import console, machine, tpu_environment
from common.commands import install_command, python_command
from common.errors import ConfigError
from diagnostics import packages, tpu_lock, tpu_probe
from diagnostics.check_result import CheckResult, fail, from_error, ok, warn
from diagnostics.worker_process import WorkerProcess
from experiment import config_schema

# Time limit of the checks with TensorFlow, without the TPU: a cold import over a network disk and a
# large model take minutes.
CHECK_SECONDS = 600.0
# The oldest NVIDIA driver that CUDA 12 runs with. Source: CUDA's table of minor version
# compatibility.
OLDEST_DRIVER = 525
SILENCE = 'it ended without a message'
NO_GPU = ('', '-1')  # values of CUDA_VISIBLE_DEVICES that hide all GPUs
STATUSES = ('FAIL', 'warn', 'ok')  # the worst first


def run(config: ConfigDict, workdir: str, as_json: bool = False) -> int:
    """Prints a row for each check, or all of them `as_json`.

    JSON is {'status': the worst of all, 'results': [{'status', 'name', 'message', 'fix'}]}.

    Returns: the exit status: 0 if nothing is FAIL, else 1.

    Raises: ConfigError for a wrong config, which in JSON is a result.
    """
    if as_json:
        return _print_json(config, workdir)
    counts = dict.fromkeys(STATUSES, 0)
    for result in results(config, workdir):
        counts[result.status] += 1
        console.check_row(*result)
    some = ', '.join(f'{counts[status]} {status}' for status in STATUSES[:2] if counts[status])
    console.line()
    if counts['FAIL']:
        console.line(f'{some}: apply the fixes after ->, then check again')
        return 1
    console.line(f'ready to train; {some}' if some else 'ready to train')
    return 0


def _print_json(config: ConfigDict, workdir: str) -> int:
    status = 1
    try:
        found = list(results(config, workdir))
    except ConfigError as error:
        found, status = [from_error('config', error)], error.exit_status
    return status if print_json(found) == 'FAIL' else 0


def print_json(found: Sequence[CheckResult]) -> str:
    """Prints results as JSON; returns the worst status among them."""
    worst = min((result.status for result in found), key=STATUSES.index)
    rows = [result._asdict() for result in found]
    console.line(json.dumps({'status': worst, 'results': rows}, indent=2))
    return worst


def results(
    config: ConfigDict,
    workdir: str,
    root: str = '/',
    environ: Mapping[str, str] = os.environ,
    probe_seconds: float = tpu_probe.SECONDS,
) -> Iterator[CheckResult]:
    """Yields the results in the order of the table; `root` has the folders proc, sys and dev.

    Raises: ConfigError.
    """
    config_schema.check_values(config)
    wants_tpu = tpu_environment.should_use_tpu(config, environ, root)
    seconds = CHECK_SECONDS + 2 * probe_seconds
    with WorkerProcess(
        'diagnostics.tensorflow_checks', 'examine', seconds, without_tpu(environ)
    ) as worker:
        worker.send((config.to_dict(), workdir))
        messages = iter(worker)
        imported: dict[str, Any] = {}
        last: dict[str, Any] = {}
        for last in messages:
            if 'config_error' in last:
                raise ConfigError(*last['config_error'])
            imported = last.get('imported', imported)
            if 'checked' in last:
                break
        problem = '' if 'checked' in last else worker.end or SILENCE
        tpu_cores = yield from check_environment(
            config, imported, problem, wants_tpu, root, environ, probe_seconds
        )
        yield check_writable(workdir)
        if problem:
            return
        expected = expected_cores(root) if wants_tpu else 0
        worker.send(tpu_cores or expected)
        for last in messages:
            if 'result' in last:
                yield CheckResult(*last['result'])
        if 'done' not in last:
            yield fail(
                'config',
                f'the process that checks data and model failed: {worker.end or SILENCE}',
                'the same command without --mode=check and with --verbosity=1 shows where',
            )


def without_tpu(environ: Mapping[str, str]) -> Mapping[str, str]:
    """Returns an environment in which a TPU build of TensorFlow leaves the TPU to the probe."""
    if not packages.installed(['tensorflow-tpu']):
        return environ
    return tpu_environment.without_tpu(environ)


def check_environment(
    config: ConfigDict,
    imported: Mapping[str, Any],
    import_problem: str,
    wants_tpu: bool,
    root: str,
    environ: Mapping[str, str],
    probe_seconds: float,
) -> Generator[CheckResult, None, int]:
    """Yields the checks that depend on the strategy alone, not on the rest of the config.

    Returns: the number of TPU cores that computed.
    """
    gpus, gpu_problem = machine.nvidia_smi()
    accelerator = 'cpu'
    if gpus and environ.get('CUDA_VISIBLE_DEVICES') not in NO_GPU:
        accelerator = 'gpu'
    if wants_tpu and tpu_environment.is_tpu_expected(config.get('tpu', 'local'), environ, root):
        accelerator = 'tpu'
    yield packages.check_python()
    yield ok('platform', machine.describe_platform(environ, root))
    build, name, version = packages.check_tensorflow(accelerator)
    yield build
    if import_problem and build.status != 'FAIL':
        yield check_import(import_problem, bool(imported), name, accelerator)
    yield packages.check_keras()
    yield packages.check_packages(accelerator)
    tpu_cores = 0
    library = packages.check_libtpu(version) if name == 'tensorflow-tpu' else None
    if library:
        yield library
    if wants_tpu:
        can_start = library is not None and library.status == 'ok'
        tpu_cores = yield from check_tpu(
            config, version if can_start else None, environ, root, probe_seconds
        )
    yield from check_gpu(gpus, gpu_problem, imported, name, environ, root)
    yield check_cores(machine.cores(root), len(gpus) or tpu_cores)
    if 'TF_CONFIG' in environ:
        yield check_cluster(environ['TF_CONFIG'])
    return tpu_cores


def check_import(reason: str, has_tensorflow: bool, name: str, accelerator: str) -> CheckResult:
    """Explains a failed import of TensorFlow, or of Keras and our modules after it."""
    install = install_command(accelerator)
    if has_tensorflow:
        message = f'TensorFlow can be imported, but not what is used with it: {reason}'
        return fail('import', message, install)
    message = f'import tensorflow fails: {reason}'
    return fail('import', message, packages.reinstall([name], install))


def check_tpu(
    config: ConfigDict,
    version: str | None,
    environ: Mapping[str, str],
    root: str,
    probe_seconds: float,
    lock: str = tpu_lock.LOCK,
    library: str | None = None,
) -> Generator[CheckResult, None, int]:
    """Yields what keeps a TPU from starting; then tries each method that the build has for it.

    Args:
        version: of tensorflow-tpu, or None if it could not start.

    Returns: the number of cores that computed, or 0.
    """
    if not tpu_environment.is_tpu_expected(config.get('tpu', 'local'), environ, root):
        message = "config.strategy='tpu', but no TPU is attached, and none is named"
        yield fail('TPU', message, '--config.strategy=auto')
        return 0
    yield tpu_lock.check_jax()
    holders = tpu_lock.check_lock(lock, root)
    yield holders
    tpu_name = environ.get('TPU_NAME', config.tpu)
    if environ.get('TPU_LOAD_LIBRARY') == '0' and tpu_name == 'local':
        message = 'TPU_LOAD_LIBRARY=0 keeps TensorFlow from loading libtpu'
        yield fail('TPU library', message, 'unset TPU_LOAD_LIBRARY')
        return 0
    if not version or holders.status == 'FAIL':
        return 0  # that row says what fixes it
    failures: list[str] = []
    for method in tpu_probe.start_methods(version, environ, root, library):
        outcome = tpu_probe.probe(method, tpu_name, probe_seconds, environ, lock)
        computed = f'{outcome.cores} cores computed'
        if outcome.cores and not failures:
            yield ok('TPU', f'{computed} and summed up, through {method.name}')
            return outcome.cores
        if outcome.cores:
            variables = method.variables or {'NEXT_PLUGGABLE_DEVICE_USE_C_API': 'false'}
            settings = ' '.join(f'{key}={value}' for key, value in variables.items())
            message = f'{"; ".join(failures)}; but {computed} through {method.name}'
            yield fail('TPU', message, f'export {settings}')
            return outcome.cores
        failures.append(f'through {method.name} it fails at step {outcome.step}: {outcome.reason}')
    message = f'tensorflow-tpu {version} does not start it: {"; ".join(failures)}'
    yield fail('TPU', message, other_build(version))
    return 0


def other_build(version: str, python: Sequence[Any] = sys.version_info) -> str:
    """Returns the command that installs the other of the two TPU builds.

    Each is available for some versions of Python only.
    """
    other, oldest, newest = 'tpu', (3, 10), (3, 12)
    if version.startswith('2.19.'):
        other, oldest, newest = 'tpu220', (3, 11), (3, 13)
    if not oldest <= tuple(python[:2]) <= newest:
        make = f'make train PYTHON=python3.12 ACCELERATOR={other}'
        return f'rm -rf .venv && {make}   # the other build is not available for this Python'
    return packages.reinstall(['tensorflow-tpu', 'libtpu'], install_command(other))


def expected_cores(root: str) -> int:
    """Returns how many cores the chips of a TPU that did not start have."""
    return max(
        1,
        sum(tpu_environment.CORES.get(chip, 1) for chip in tpu_environment.chip_generations(root)),
    )


def check_gpu(
    gpus: Sequence[machine.Gpu],
    problem: str,
    imported: Mapping[str, Any],
    build: str,
    environ: Mapping[str, str],
    root: str,
) -> Iterator[CheckResult]:
    """Compares NVIDIA's driver with what TensorFlow sees; no row without a sign of a GPU."""
    has_cuda = build == 'tensorflow' and (not imported or bool(imported['cuda']))
    if not gpus and machine.count_nvidia_cards(root):
        message = f'an NVIDIA GPU is in this machine, but {problem or "its driver is missing"}'
        cpu = 'export CUDA_VISIBLE_DEVICES=-1   # to train on the CPU'
        fix = f'sudo ubuntu-drivers install && sudo reboot   # or: {cpu}'
        yield fail('GPU', message, fix) if has_cuda else warn('GPU', message, fix)
    elif not gpus and problem:
        fix = 'nvidia-smi   # shows more; without an NVIDIA GPU nothing has to be fixed'
        yield warn('GPU', f'nvidia-smi is installed, but fails: {problem}', fix)
    elif gpus:
        yield _check_driver(gpus, imported, build, has_cuda, environ)


def _check_driver(
    gpus: Sequence[machine.Gpu],
    imported: Mapping[str, Any],
    build: str,
    has_cuda: bool,
    environ: Mapping[str, str],
) -> CheckResult:
    kinds = [f'{gpu.name} ({gpu.memory})' for gpu in gpus]
    names = ', '.join(f'{kinds.count(kind)} x {kind}' for kind in sorted(set(kinds)))
    if environ.get('CUDA_VISIBLE_DEVICES') in NO_GPU:
        return ok('GPU', f'{names}, hidden by CUDA_VISIBLE_DEVICES')
    driver = gpus[0].driver
    found = f'{names}, driver {driver}'
    if build == 'tensorflow' and not has_cuda:
        message = f'{found}, but this build of TensorFlow has no CUDA: it trains on the CPU'
        return warn('GPU', message, install_command('gpu'))
    if not has_cuda:
        return ok('GPU', f'{found}; this build of TensorFlow does not use it')
    if packages.numbers(driver)[:1] < (OLDEST_DRIVER,):
        message = f'{found} is too old for CUDA 12, which needs {OLDEST_DRIVER} or later'
        return fail('GPU', message, 'sudo ubuntu-drivers install && sudo reboot')
    if not imported:
        return ok('GPU', found)
    cuda, cudnn = imported['cuda'], imported['cudnn']
    if not imported['gpus']:
        libraries = f'the libraries of CUDA {cuda} and cuDNN {cudnn} are missing or do not fit'
        message = f'{found}, but TensorFlow sees none: {libraries}'
        return fail('GPU', message, packages.reinstall([build], install_command('gpu')))
    seen = f'TensorFlow sees {len(imported["gpus"])}'
    return ok('GPU', f'{found}, CUDA {cuda}, cuDNN {cudnn}; {seen}')


def check_cores(cores: float, accelerators: int) -> CheckResult:
    """Checks for enough CPU cores to decode and crop the images."""
    if cores < 2 * accelerators:
        message = f'{cores:g} for {accelerators} accelerators, which will have to wait for images'
        service = f'{python_command()} -m inputs.service'
        return warn('cores', message, f'{service}   # on other machines: see docs/scaling.md')
    return ok('cores', f'{cores:g}')


def check_cluster(text: str) -> CheckResult:
    """Checks that TF_CONFIG is a cluster in which this worker has a place."""
    fix = 'unset TF_CONFIG   # or write it as docs/scaling.md says'
    try:
        values = json.loads(text)
        if values == {}:
            return ok('TF_CONFIG', 'names no cluster: this machine trains alone')
        jobs = {job: list(map(str, addresses)) for job, addresses in values['cluster'].items()}
        task, index = values['task']['type'], int(values['task']['index'])
        if not 0 <= index < len(jobs[task]):
            raise IndexError(f'there is no {task} {index}')
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = f'{type(error).__name__}: {error}'
        message = f'is not a cluster with a place for this worker ({reason})'
        return fail('TF_CONFIG', message, fix)
    addresses = [address for job in jobs.values() for address in job]
    for address in addresses:
        if not re.fullmatch('.+:[0-9]+', address):
            return fail('TF_CONFIG', f'{address!r} is not an address HOST:PORT', fix)
    return ok('TF_CONFIG', f'{len(addresses)} workers; this is {task} {index}')


def check_writable(workdir: str) -> CheckResult:
    """Checks that files can be written into the workdir, or that it can be created."""
    if '://' in workdir:  # a bucket: the training process checks access when it begins
        return ok('workdir', f'{workdir} is a bucket: access is checked when the run begins')
    place = machine.nearest_existing_path(workdir)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b'x')
    except OSError as error:
        message = f'{workdir} cannot be written to: {place}: {error.strerror or error}'
        return fail('workdir', message, '--workdir=DIR, a folder that you can write to')
    return ok('workdir', f'{workdir} can be written to')
