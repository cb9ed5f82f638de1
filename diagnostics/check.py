"""Checks whether this environment, config and data will work, and what fixes them: `--mode=check`.

It trains, downloads and prepares nothing. What can be known without importing TensorFlow is checked
here, the rest in a separate process (diagnostics/tensorflow_checks.py); on a TPU host, further
processes start the TPU. A broken installation crashes or hangs the process that imports it, and the
check reports that.
"""

import json
import os
import re
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from common import console, machine, tpu_environment
from common.commands import install_command, python_command
from common.errors import ConfigError
from diagnostics import accelerator_checks, packages, tpu_probe
from diagnostics.check_result import CheckResult, fail, from_error, ok, warn
from diagnostics.worker_process import WorkerProcess
from experiment import config_schema

# Time limit of the checks with TensorFlow, without the TPU: a cold import over a network disk and a
# large model take minutes.
CHECK_SECONDS = 600.0
SILENCE = 'it ended without a message'
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
    runtime = accelerator_checks.Runtime.choose(config, environ, root)
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
            config, imported, problem, runtime, root, environ, probe_seconds
        )
        yield check_writable(workdir)
        if problem:
            return
        expected = accelerator_checks.expected_cores(root) if runtime.wants_tpu else 0
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
    if not machine.installed(['tensorflow-tpu']):
        return environ
    return tpu_environment.without_tpu(environ)


def check_environment(
    config: ConfigDict,
    imported: Mapping[str, Any],
    import_problem: str,
    runtime: accelerator_checks.Runtime,
    root: str,
    environ: Mapping[str, str],
    probe_seconds: float,
) -> Generator[CheckResult, None, int]:
    """Yields the checks that depend on the strategy alone, not on the rest of the config.

    Returns: the number of TPU cores that computed.
    """
    gpus, gpu_problem = machine.nvidia_smi()
    yield packages.check_python(runtime.extra)
    yield ok('platform', machine.describe_platform(environ, root))
    build, name, version = packages.check_tensorflow(runtime.extra)
    yield build
    if import_problem and build.status != 'FAIL':
        yield check_import(import_problem, bool(imported), name, runtime.extra)
    yield packages.check_keras()
    yield packages.check_packages(runtime.extra)
    tpu_cores = 0
    if runtime.is_jax:
        tpu_cores = yield from accelerator_checks.check_jax(
            runtime.platform, environ, root, probe_seconds
        )
    elif runtime.wants_tpu or name == 'tensorflow-tpu':
        tpu_cores = yield from accelerator_checks.check_tensorflow_tpu(
            config,
            runtime,
            version if name == 'tensorflow-tpu' else '',
            environ,
            root,
            probe_seconds,
        )
    yield from accelerator_checks.check_gpu(
        gpus, gpu_problem, imported, name, runtime, environ, root
    )
    hosts = accelerator_checks.num_hosts(environ, root) if runtime.is_jax else 1
    yield check_cores(machine.cores(root), len(gpus) or tpu_cores // hosts)
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
