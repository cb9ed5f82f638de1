"""The rows of `--mode=check` about what computes: JAX's runtime, a TPU, GPUs."""

import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from common import machine, tpu_environment
from common.commands import install_command
from common.errors import RunError, counted
from devices import cluster, jax_packages, jax_start
from diagnostics import packages, tpu_lock, tpu_probe
from diagnostics.check_result import CheckResult, fail, from_error, ok, warn

# Versions of CUDA, and the oldest NVIDIA driver that each runs with. Source: CUDA's table of minor
# version compatibility.
TENSORFLOW_CUDA = ('CUDA 12', 525)
JAX_CUDA = {'jax-cuda12-plugin': ('CUDA 12', 525), 'jax-cuda13-plugin': ('CUDA 13', 580)}


@dataclasses.dataclass(frozen=True)
class Runtime:
    """What will run the steps."""

    is_jax: bool
    platform: str  # 'tpu', 'cuda' or 'cpu'

    @classmethod
    def choose(cls, config: ConfigDict, environ: Mapping[str, str], root: str) -> 'Runtime':
        if jax_start.is_wanted(config, environ, root):
            return cls(True, jax_start.expected_platform(config, environ, root))
        if tpu_environment.should_use_tpu(config, environ, root):
            return cls(False, 'tpu')
        has_gpu = machine.nvidia_smi()[0]
        is_hidden = environ.get('CUDA_VISIBLE_DEVICES') in machine.NO_GPU
        return cls(False, 'cuda' if has_gpu and not is_hidden else 'cpu')

    @property
    def wants_tpu(self) -> bool:
        return self.platform == 'tpu'

    @property
    def extra(self) -> str:
        """The extra of pyproject.toml that installs it."""
        if self.is_jax:
            return jax_packages.EXTRAS.get(self.platform, 'cpu')
        return {'tpu': 'tpu-tf', 'cuda': 'gpu', 'cpu': 'cpu'}[self.platform]


def check_jax(
    platform: str,
    environ: Mapping[str, str],
    root: str,
    probe_seconds: float,
    lock: str = tpu_lock.LOCK,
    search_path: list[str] | None = None,
) -> Generator[CheckResult, None, int]:
    """Yields what keeps JAX from starting; then starts it in a process of its own.

    Returns: the number of TPU cores that computed, or 0.
    """
    try:
        yield ok('JAX', jax_packages.check(platform, environ, search_path))
    except RunError as error:
        yield from_error('JAX', error)
        return 0
    name = 'JAX'
    if platform == 'tpu':
        name = 'TPU'
        holders = tpu_lock.check_lock(lock, root)
        yield holders
        if holders.status == 'FAIL':
            return 0
    outcome = tpu_probe.probe('start_jax', platform, probe_seconds, environ, lock)
    if not outcome.cores:
        message = f'JAX does not start: it fails at step {outcome.step}: {outcome.reason}'
        yield fail(name, message, jax_start.START_FIXES[platform])
        return 0
    noun = 'core' if platform == 'tpu' else 'device'
    yield ok(name, f'{counted(outcome.cores, noun)} computed through JAX, and their sum is right')
    return outcome.cores if platform == 'tpu' else 0


def check_tensorflow_tpu(
    config: ConfigDict,
    runtime: Runtime,
    version: str,
    environ: Mapping[str, str],
    root: str,
    probe_seconds: float,
) -> Generator[CheckResult, None, int]:
    """Yields the checks of tensorflow-tpu and of the TPU, if that is wanted; '' is no version.

    Returns: the number of TPU cores that computed, or 0.
    """
    library = packages.check_libtpu(version) if version else None
    if library:
        yield library
    if not runtime.wants_tpu:
        return 0
    can_start = library is not None and library.status == 'ok'
    return (
        yield from check_tpu(config, version if can_start else None, environ, root, probe_seconds)
    )


def check_tpu(
    config: ConfigDict,
    version: str | None,
    environ: Mapping[str, str],
    root: str,
    probe_seconds: float,
    lock: str = tpu_lock.LOCK,
    library: str | None = None,
) -> Generator[CheckResult, None, int]:
    """Yields what keeps TensorFlow from starting a TPU; then tries each method that it has.

    Args:
        version: of tensorflow-tpu, or None if it could not start.

    Returns: the number of cores that computed, or 0.
    """
    if not tpu_environment.is_tpu_expected(config.get('tpu', 'local'), environ, root):
        message = "config.strategy='tpu', but no TPU is attached, and none is named"
        yield fail('TPU', message, '--config.strategy=auto')
        return 0
    holders = tpu_lock.check_lock(lock, root)
    yield holders
    tpu_name = environ.get('TPU_NAME', 'local') if config.tpu == 'local' else config.tpu
    if environ.get('TPU_LOAD_LIBRARY') == '0' and tpu_name == 'local':
        message = 'TPU_LOAD_LIBRARY=0 keeps TensorFlow from loading libtpu'
        yield fail('TPU library', message, 'unset TPU_LOAD_LIBRARY')
        return 0
    if not version or holders.status == 'FAIL':
        return 0  # that row says what fixes it
    failures: list[str] = []
    for method in tpu_probe.start_methods(version, environ, root, library):
        variables = {**environ, **method.variables}
        outcome = tpu_probe.probe('start_tensorflow', tpu_name, probe_seconds, variables, lock)
        computed = f'{outcome.cores} cores computed'
        if outcome.cores and not failures:
            yield ok('TPU', f'{computed} and summed up, through {method.name}')
            return outcome.cores
        if outcome.cores:
            needed = method.variables or {'NEXT_PLUGGABLE_DEVICE_USE_C_API': 'false'}
            settings = ' '.join(f'{key}={value}' for key, value in needed.items())
            message = f'{"; ".join(failures)}; but {computed} through {method.name}'
            yield fail('TPU', message, f'export {settings}')
            return outcome.cores
        failures.append(f'through {method.name} it fails at step {outcome.step}: {outcome.reason}')
    message = f'tensorflow-tpu {version} does not start it: {"; ".join(failures)}'
    yield fail('TPU', message, jax_instead())
    return 0


def jax_instead() -> str:
    """Returns the command that installs JAX's runtime in place of TensorFlow's TPU build."""
    install = packages.reinstall(['tensorflow-tpu', 'libtpu'], install_command('tpu'))
    return f'{install}   # then --config.strategy=auto takes JAX'


def num_hosts(environ: Mapping[str, str], root: str) -> int:
    """Returns how many hosts share the devices that JAX starts, 1 if that is unknown."""
    try:
        return cluster.find(environ, root).num_processes or 1
    except RunError:  # the row of the strategy says why
        return 1


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
    runtime: Runtime,
    environ: Mapping[str, str],
    root: str,
) -> Iterator[CheckResult]:
    """Compares NVIDIA's driver with what TensorFlow sees; no row without a sign of a GPU."""
    has_cuda = build == 'tensorflow' and (not imported or bool(imported['cuda']))
    has_cuda = has_cuda or (runtime.is_jax and runtime.platform == 'cuda')
    if not gpus and machine.count_nvidia_cards(root):
        message = f'an NVIDIA GPU is in this machine, but {problem or "its driver is missing"}'
        cpu = 'export CUDA_VISIBLE_DEVICES=-1   # to train on the CPU'
        fix = f'sudo ubuntu-drivers install && sudo reboot   # or: {cpu}'
        yield fail('GPU', message, fix) if has_cuda else warn('GPU', message, fix)
    elif not gpus and problem:
        fix = 'nvidia-smi   # shows more; without an NVIDIA GPU nothing has to be fixed'
        yield warn('GPU', f'nvidia-smi is installed, but fails: {problem}', fix)
    elif gpus:
        yield _check_driver(gpus, imported, build, has_cuda, runtime, environ)


def _check_driver(
    gpus: Sequence[machine.Gpu],
    imported: Mapping[str, Any],
    build: str,
    has_cuda: bool,
    runtime: Runtime,
    environ: Mapping[str, str],
) -> CheckResult:
    kinds = [f'{gpu.name} ({gpu.memory})' for gpu in gpus]
    names = ', '.join(f'{kinds.count(kind)} x {kind}' for kind in sorted(set(kinds)))
    if environ.get('CUDA_VISIBLE_DEVICES') in machine.NO_GPU:
        return ok('GPU', f'{names}, hidden by CUDA_VISIBLE_DEVICES')
    driver = gpus[0].driver
    found = f'{names}, driver {driver}'
    if build == 'tensorflow' and not has_cuda:
        message = f'{found}, but this build of TensorFlow has no CUDA: it trains on the CPU'
        return warn('GPU', message, install_command('gpu'))
    if not has_cuda:
        return ok('GPU', f'{found}; this build of TensorFlow does not use it')
    plugin = next(iter(machine.installed(JAX_CUDA)), 'jax-cuda13-plugin')
    cuda, oldest = JAX_CUDA[plugin] if runtime.is_jax else TENSORFLOW_CUDA
    if packages.numbers(driver)[:1] < (oldest,):
        message = f'{found} is too old for {cuda}, which needs {oldest} or later'
        return fail('GPU', message, 'sudo ubuntu-drivers install && sudo reboot')
    if runtime.is_jax or not imported:
        return ok('GPU', found)
    cuda, cudnn = imported['cuda'], imported['cudnn']
    if not imported['gpus']:
        libraries = f'the libraries of CUDA {cuda} and cuDNN {cudnn} are missing or do not fit'
        message = f'{found}, but TensorFlow sees none: {libraries}'
        return fail('GPU', message, packages.reinstall([build], install_command('gpu')))
    seen = f'TensorFlow sees {len(imported["gpus"])}'
    return ok('GPU', f'{found}, CUDA {cuda}, cuDNN {cudnn}; {seen}')
