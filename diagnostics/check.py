"""The doctor: whether this environment, config and data will work, and how to mend what will not. Trains, downloads and prepares nothing.

What can be known without importing TensorFlow is looked at here, the rest in a process of its own (diagnostics/tensorflow_checks.py), and on a TPU host
the TPU is started in further ones: a broken installation ends or hangs the process that imports it, and the doctor says so.
"""

import json
import os
import re
import shutil
import sys
import tempfile
import textwrap

from common import machine, tpu_environment
from common.commands import install_command, python_command
from common.errors import ConfigError
from diagnostics import packages, tpu_lock, tpu_probe
from diagnostics.check_result import Finding, fail, ok, warn
from diagnostics.worker_process import Apart

SECONDS = 600.0  # of the trial, without the TPU: a cold import over a network disk and a large model take minutes
OLDEST_DRIVER = (
    525  # of NVIDIA, that CUDA 12 runs with. Source: CUDA's compatibility table, minor versions
)
SILENCE = 'it ended without a word'
NO_GPU = ('', '-1')  # of CUDA_VISIBLE_DEVICES
STATUS_WIDTH, WHAT_WIDTH = 6, 14


def run(config, workdir):
    """Prints the table; returns the exit status: 0 if nothing is FAIL, else 1. Raises ConfigError for a wrong config."""
    counts = {'ok': 0, 'warn': 0, 'FAIL': 0}
    for finding in findings(config, workdir):
        counts[finding.status] += 1
        print(as_text(finding), flush=True)
    some = ', '.join(
        f'{count} {status}'
        for status, count in reversed(counts.items())
        if count and status != 'ok'
    )
    print(
        f'\n{some}: what follows -> mends it; then check again'
        if counts['FAIL']
        else f'\nready to train{f"; {some}" if some else ""}'
    )
    return 1 if counts['FAIL'] else 0


def findings(config, workdir, root='/', environ=os.environ, probe_seconds=tpu_probe.SECONDS):
    """Yields each Finding, in the order of the table. `root` is where /proc, /sys and /dev are looked for."""
    wants_tpu = tpu_environment.is_wanted(config, environ, root)
    with Apart(
        'diagnostics.tensorflow_checks',
        'examine',
        SECONDS + 2 * probe_seconds,
        without_tpu(environ),
    ) as trial:
        trial.tell((config.to_dict(), workdir))
        messages, imported, last = iter(trial), {}, {}
        for last in messages:
            if 'mistake' in last:
                raise ConfigError(last['mistake'])
            imported = last.get('imported', imported)
            if 'checked' in last:
                break
        problem = '' if 'checked' in last else trial.end or SILENCE
        tpu_cores = yield from environment_findings(
            config, imported, problem, wants_tpu, root, environ, probe_seconds
        )
        yield writable_finding(workdir)
        if problem:
            return
        trial.tell(tpu_cores or (expected_cores(root) if wants_tpu else 0))
        for last in messages:
            if 'finding' in last:
                yield Finding(*last['finding'])
        if 'done' not in last:
            yield fail(
                'config',
                f'the process that looks at data and model: {trial.end or SILENCE}',
                'the same command without --mode=check and with --verbosity=1 shows where',
            )


def without_tpu(environ):
    """An environment in which a TPU build of TensorFlow leaves the TPU alone: one process can have it, and that is for the probe."""
    if not packages.installed(['tensorflow-tpu']):
        return environ
    return tpu_environment.without_tpu(environ)


def environment_findings(config, imported, import_problem, wants_tpu, root, environ, probe_seconds):
    """What does not depend on the config, except for the strategy; returns the number of TPU cores that computed."""
    gpus, gpu_problem = machine.nvidia_smi()
    has_tpu = wants_tpu and tpu_environment.is_expected(config.get('tpu', 'local'), environ, root)
    accelerator = (
        'tpu'
        if has_tpu
        else 'gpu'
        if gpus and environ.get('CUDA_VISIBLE_DEVICES') not in NO_GPU
        else 'cpu'
    )
    yield packages.python_finding()
    yield ok('platform', machine.describe_platform(environ, root))
    build, name, version = packages.tensorflow_finding(accelerator)
    yield build
    if import_problem and build.status != 'FAIL':
        yield import_finding(import_problem, bool(imported), name, accelerator)
    yield packages.keras_finding()
    yield packages.packages_finding(accelerator)
    tpu_cores = 0
    library = packages.libtpu_finding(version) if name == 'tensorflow-tpu' else None
    if library:
        yield library
    if wants_tpu:
        starts = library is not None and library.status == 'ok'
        tpu_cores = yield from tpu_findings(
            config, version if starts else None, environ, root, probe_seconds
        )
    yield from gpu_findings(gpus, gpu_problem, imported, name, environ, root)
    yield cores_finding(machine.cores(root), len(gpus) or tpu_cores)
    if 'TF_CONFIG' in environ:
        yield cluster_finding(environ['TF_CONFIG'])
    return tpu_cores


def import_finding(reason, has_tensorflow, name, accelerator):
    """TensorFlow is installed, and importing it, or Keras and our own settings after it, fails."""
    if has_tensorflow:
        return fail(
            'import',
            f'TensorFlow can be imported, but not what is used with it: {reason}',
            install_command(accelerator),
        )
    return fail(
        'import',
        f'import tensorflow fails: {reason}',
        packages.reinstall([name], install_command(accelerator)),
    )


def tpu_findings(config, version, environ, root, probe_seconds, lock=tpu_lock.LOCK, library=None):
    """What keeps a TPU from starting, then a trial of it in each way that the build has; returns the number of cores that computed, or 0.

    `version` is that of tensorflow-tpu, or None where there is none that could start.
    """
    if not tpu_environment.is_expected(config.get('tpu', 'local'), environ, root):
        yield fail(
            'TPU',
            "config.strategy='tpu', but no TPU is attached, and none is named",
            '--config.strategy=auto',
        )
        return 0
    yield tpu_lock.jax_finding()
    holders = tpu_lock.lock_finding(lock, root)
    yield holders
    if environ.get('TPU_LOAD_LIBRARY') == '0' and environ.get('TPU_NAME', config.tpu) == 'local':
        yield fail(
            'TPU library',
            'TPU_LOAD_LIBRARY=0 keeps TensorFlow from loading libtpu',
            'unset TPU_LOAD_LIBRARY',
        )
        return 0
    if not version or holders.status == 'FAIL':
        return 0  # the row that says so also says what mends it
    tried = []
    for way in tpu_probe.ways(version, environ, root, library):
        outcome = tpu_probe.probe(
            way, environ.get('TPU_NAME', config.tpu), probe_seconds, environ, lock
        )
        if outcome.cores and not tried:
            yield ok('TPU', f'{outcome.cores} cores computed and summed up, through {way.name}')
            return outcome.cores
        if outcome.cores:
            settings = (
                ' '.join(f'{key}={value}' for key, value in way.variables.items())
                or 'NEXT_PLUGGABLE_DEVICE_USE_C_API=false'
            )
            yield fail(
                'TPU',
                f'{"; ".join(tried)}; but {outcome.cores} cores computed through {way.name}',
                f'export {settings}',
            )
            return outcome.cores
        tried.append(f'through {way.name} it fails to {outcome.step}: {outcome.reason}')
    yield fail(
        'TPU',
        f'tensorflow-tpu {version} does not start it: {"; ".join(tried)}',
        other_build(version),
    )
    return 0


def other_build(version, python=sys.version_info):
    """The command that installs the other of the two TPU builds; each is made for some versions of Python only."""
    other, oldest, newest = (
        ('tpu220', (3, 11), (3, 13)) if version.startswith('2.19.') else ('tpu', (3, 10), (3, 12))
    )
    if not oldest <= tuple(python[:2]) <= newest:
        return f'rm -rf .venv && make train PYTHON=python3.12 ACCELERATOR={other}   # the other build is not made for this Python'
    return packages.reinstall(['tensorflow-tpu', 'libtpu'], install_command(other))


def expected_cores(root):
    """Of a TPU that did not start: what its chips would have."""
    return max(1, sum(tpu_environment.CORES.get(chip, 1) for chip in tpu_environment.chips(root)))


def gpu_findings(gpus, problem, imported, build, environ, root):
    """NVIDIA's driver beside what TensorFlow sees; nothing where there is no sign of a GPU."""
    if not gpus and not machine.nvidia_on_the_bus(root):
        if problem:
            yield warn(
                'GPU',
                f'nvidia-smi is installed, but fails: {problem}',
                'nvidia-smi   # shows more; without an NVIDIA GPU nothing has to be mended',
            )
        return
    can_use_them, processor = (
        build == 'tensorflow' and (not imported or bool(imported['cuda'])),
        'export CUDA_VISIBLE_DEVICES=-1   # to train on the processor',
    )
    if not gpus:
        reason = problem or 'its driver is not installed'
        yield (fail if can_use_them else warn)(
            'GPU',
            f'an NVIDIA GPU is in this machine, but {reason}',
            f'sudo ubuntu-drivers install && sudo reboot   # or: {processor}',
        )
        return
    names = ', '.join(
        sorted(
            {
                f'{sum(other.name == gpu.name for other in gpus)} x {gpu.name} ({gpu.memory})'
                for gpu in gpus
            }
        )
    )
    driver = gpus[0].driver
    if environ.get('CUDA_VISIBLE_DEVICES') in NO_GPU:
        yield ok('GPU', f'{names}, hidden by CUDA_VISIBLE_DEVICES')
    elif build == 'tensorflow' and not can_use_them:
        yield warn(
            'GPU',
            f'{names}, driver {driver}, but this build of TensorFlow is made without CUDA: it trains on the processor',
            install_command('gpu'),
        )
    elif not can_use_them:
        yield ok('GPU', f'{names}, driver {driver}; this build of TensorFlow does not use it')
    elif packages.numbers(driver)[:1] < (OLDEST_DRIVER,):
        yield fail(
            'GPU',
            f'{names}, driver {driver} is too old for CUDA 12: it takes {OLDEST_DRIVER} or later',
            'sudo ubuntu-drivers install && sudo reboot',
        )
    elif imported and not imported['gpus']:
        libraries = f'the libraries of CUDA {imported["cuda"]} and cuDNN {imported["cudnn"]}'
        yield fail(
            'GPU',
            f'{names}, driver {driver}, but TensorFlow sees none: {libraries} are missing or do not fit',
            packages.reinstall([build], install_command('gpu')),
        )
    else:
        versions = (
            f', CUDA {imported["cuda"]}, cuDNN {imported["cudnn"]}; TensorFlow sees {len(imported["gpus"])}'
            if imported
            else ''
        )
        yield ok('GPU', f'{names}, driver {driver}{versions}')


def cores_finding(cores, accelerators):
    """Processor cores, which decode and crop the pictures."""
    found = f'{cores:g}'
    if cores < 2 * accelerators:
        return warn(
            'cores',
            f'{found} beside {accelerators} accelerators, which will wait for pictures',
            f'{python_command()} -m inputs.service   # on other machines: see README.md, Inputs',
        )
    return ok('cores', found)


def cluster_finding(text):
    """Whether TF_CONFIG is a cluster in which this worker has a place."""
    mend = 'unset TF_CONFIG   # or write it as docs/scaling.md says'
    try:
        values = json.loads(text)
        if values == {}:
            return ok('TF_CONFIG', 'names no cluster: this machine trains alone')
        jobs = {
            job: [str(address) for address in addresses]
            for job, addresses in values['cluster'].items()
        }
        task, index = values['task']['type'], int(values['task']['index'])
        jobs[task][index if index >= 0 else len(jobs[task])]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        return fail(
            'TF_CONFIG',
            f'is no cluster with a place for this worker ({type(error).__name__}: {error})',
            mend,
        )
    wrong = [
        address
        for addresses in jobs.values()
        for address in addresses
        if not re.fullmatch('.+:[0-9]+', address)
    ]
    if wrong:
        return fail('TF_CONFIG', f'{wrong[0]!r} is no address HOST:PORT', mend)
    return ok('TF_CONFIG', f'{sum(map(len, jobs.values()))} workers; this is {task} {index}')


def writable_finding(workdir):
    """Whether files can be written into the workdir, or it can be made."""
    if '://' in workdir:  # a bucket: the training process asks it when it begins
        return ok('workdir', f'{workdir} is a bucket: what is missing shows when the run begins')
    place = machine.nearest(workdir)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b'x')
    except OSError as error:
        return fail(
            'workdir',
            f'{workdir} cannot be written to: {place}: {error.strerror or error}',
            '--workdir=DIR, a folder of yours',
        )
    return ok('workdir', f'{workdir} can be written to')


def as_text(finding):
    """A Finding as a line of the table, wrapped for a terminal; the command that mends it stands on a line of its own, whole."""
    indent = ' ' * (STATUS_WIDTH + WHAT_WIDTH)
    width = max(60, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 10_000
    head = f'{finding.status:{STATUS_WIDTH}}{finding.what:{WHAT_WIDTH}}'
    text = textwrap.fill(
        f'{head}{finding.found}',
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return f'{text}\n{indent}-> {finding.mend}' if finding.mend else text
