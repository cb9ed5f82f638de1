"""Compiles for a TPU on a machine without one: libtpu has the compiler, and JAX calls it.

It is the JAX and the libtpu of the extra 'tpu', so what is compiled here is what a TPU runs. Where
they are not installed they are put into an environment of their own. Compiled programs are cached.
"""

import dataclasses
import fcntl
import gzip
import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from typing import Any

from common import console
from common.commands import ROOT
from common.errors import ConfigError, RunError, one_line
from common.machine import cache_folder
from diagnostics import installation
from diagnostics.hlo_cost import Program, read_program

WORKER = os.path.join(ROOT, 'diagnostics', 'tpu_compiler_worker.py')
READER = os.path.join(ROOT, 'devices', 'stable_hlo.py')  # what the worker reads programs with
PIP_INSTALL = ('install', '--quiet', '--disable-pip-version-check', '--no-deps')
GIB = 2**30
# How the compiler says that a program needs more memory than there is: before it has placed
# anything, and after.
TOO_MUCH = (
    r'\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)|Used ([\d.]+[KMGT]) of '
    r'([\d.]+[KMGT]) hbm'
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation.

    Figures of a chip as Google publishes them (cloud.google.com/tpu/docs, a page for each
    generation). The clock follows from the peak, which is matrix units x side^2 multiply-adds x 2 x
    clock.
    """

    accelerator: str  # prefix of TPU_ACCELERATOR_TYPE
    units: int  # per chip, how much the number after it counts
    topology: str  # prefix of JAX's topology name
    dimensions: int  # of a topology
    replicas: int  # programs that run on a chip
    peak_flops: float  # bfloat16, a second
    hbm_bytes: float
    hbm_bandwidth: float  # bytes a second
    clock: float  # cycles a second


CHIPS = {
    'v2': Chip('v2', 2, 'v2', 2, 2, 45e12, 16 * GIB, 700e9, 0.70e9),
    'v3': Chip('v3', 2, 'v3', 2, 2, 123e12, 32 * GIB, 900e9, 0.94e9),
    'v4': Chip('v4', 2, 'v4', 3, 1, 275e12, 32 * GIB, 1228e9, 1.05e9),
    'v5e': Chip('v5litepod', 1, 'v5e', 2, 1, 197e12, 16 * GIB, 819e9, 1.5e9),
    'v5p': Chip('v5p', 2, 'v5p', 3, 1, 459e12, 95 * GIB, 2765e9, 1.75e9),
    'v6e': Chip('v6e', 1, 'v6e', 2, 1, 918e12, 32 * GIB, 1640e9, 1.75e9),
    'v7x': Chip('v7x', 2, 'tpu7x', 3, 2, 2307e12, 192 * GIB, 7380e9, 2.2e9),
}


# Shapes in which chips are wired, by number of dimensions; only the smaller ones for rent.
SHAPES = {
    2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: (
        (1, 1, 1),
        (2, 2, 1),
        (2, 2, 2),
        (2, 2, 4),
        (2, 4, 4),
        (4, 4, 4),
        (4, 4, 8),
        (4, 8, 8),
        (8, 8, 8),
    ),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of chips of one generation, and how they are wired."""

    generation: str
    shape: tuple

    @classmethod
    def parse(cls, text: str) -> 'Topology':
        """Parses 'v5e:2x2', or 'v5e' for one chip of it. Raises ConfigError."""
        match = re.fullmatch(r'(v\d\w?)(?::(\d+(?:x\d+)*))?', (text or '').strip().lower())
        if not match or match[1] not in CHIPS:
            raise ConfigError(
                f'--topology={text!r} is not a TPU',
                'write a generation and how its chips are wired, such as v5e:2x2, '
                f'v4:2x2x1 or v6e for one chip; generations are {", ".join(CHIPS)}',
            )
        dimensions = CHIPS[match[1]].dimensions
        shape = tuple(int(side) for side in match[2].split('x')) if match[2] else (1,) * dimensions
        if shape not in SHAPES[dimensions]:
            known = ', '.join('x'.join(map(str, sides)) for sides in SHAPES[dimensions])
            problem = f'--topology={text!r} is not how chips of {match[1]} are wired'
            raise ConfigError(problem, f'write one of {known}')
        return cls(match[1], shape)

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def num_replicas(self) -> int:
        return self.num_chips * self.chip.replicas

    def for_compiler(self) -> tuple[str, str]:
        """Returns JAX's name and TPU_ACCELERATOR_TYPE of the smallest topology with these chips.

        For one chip that is a topology of four.
        """
        smallest = (2, 2, 1) if self.chip.dimensions == 3 else (2, 2)
        shape = self.shape if self.num_chips > 1 else smallest
        return (
            f'{self.chip.topology}:{"x".join(map(str, shape))}',
            f'{self.chip.accelerator}-{math.prod(shape) * self.chip.units}',
        )

    def __str__(self) -> str:
        return f'{self.generation}:{"x".join(map(str, self.shape))}'


class DoesNotFit(Exception):
    """The program needs more memory than a replica has: bytes `needed` and `available`."""

    def __init__(self, needed: float, available: float) -> None:
        super().__init__(f'{needed / GIB:.2f} of {available / GIB:.2f} GiB')
        self.needed, self.available = needed, available


def compile_program(lower: Callable[[], bytes], topology: Topology, *described_by: str) -> Program:
    """Compiles a program for all replicas of a topology.

    Args:
        lower: returns a serialized HLO module, as TensorFlow lowers a replica's step.
        described_by: texts that determine the program. With the same ones it is not lowered or
            compiled again.

    Raises:
        DoesNotFit: it needs more memory than there is.
        RunError: the compiler refuses it; or its environment cannot be created.
    """
    pins = installation.compiler_pins()
    texts = [str(topology), *described_by, pins['jax'], pins['jaxlib'], pins['libtpu']]
    for path in (WORKER, READER):
        with open(path) as file:
            texts.append(file.read())
    key = hashlib.sha256('\0'.join(texts).encode()).hexdigest()[:32]
    kept = os.path.join(cache_folder(), 'compiled', f'{key}.json.gz')
    answer = _read(kept)
    is_new = answer is None
    if answer is None:
        answer = _compile(environment(), lower(), topology)
    too_much = re.search(TOO_MUCH, answer.get('error', ''), re.IGNORECASE)
    if is_new and (too_much or 'error' not in answer):  # other errors may be this machine's
        _keep(kept, answer)
    if 'error' not in answer:
        return read_program(answer, topology.chip)
    if too_much:
        raise DoesNotFit(
            *(
                float(size[:-1]) * 2 ** {'K': 10, 'M': 20, 'G': 30, 'T': 40}[size[-1]]
                for size in filter(None, too_much.groups())
            )
        )
    raise RunError(
        f'the compiler for {topology} refuses the program: {one_line(answer["error"], 600)}'
    )


def _read(path: str) -> dict[str, Any] | None:
    """Returns what was kept, or None if it is missing or damaged."""
    try:
        with gzip.open(path, 'rt') as file:
            answer = json.load(file)
    except (OSError, EOFError, ValueError, zlib.error):
        return None
    return answer if isinstance(answer, dict) and answer.keys() & {'error', 'text'} else None


def _keep(path: str, answer: dict[str, Any]) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with gzip.open(f'{path}.{os.getpid()}', 'wt') as file:
        json.dump(answer, file)
    os.replace(f'{path}.{os.getpid()}', path)


def _compile(python: str, hlo: bytes, topology: Topology) -> dict[str, Any]:
    """Returns the worker's answer. Raises RunError if it dies."""
    name, accelerator = topology.for_compiler()
    variables = {
        'TPU_SKIP_MDS_QUERY': '1',  # there is no metadata server to query
        'TPU_ACCELERATOR_TYPE': accelerator,
        'TPU_WORKER_HOSTNAMES': 'localhost',
        'JAX_PLATFORMS': 'cpu',
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # it uses no TPU, so it needs no lock and leaves none
        'TF_CPP_MIN_LOG_LEVEL': '3',
    }
    environ = {name: value for name, value in os.environ.items() if name != 'TPU_LIBRARY_PATH'}
    with tempfile.TemporaryDirectory() as folder:
        program, answer = os.path.join(folder, 'program.hlo'), os.path.join(folder, 'answer.json')
        with open(program, 'wb') as file:
            file.write(hlo)
        done = subprocess.run(
            [python, '-I', WORKER, program, name, str(topology.num_replicas), answer],
            env={**environ, **variables},
            capture_output=True,
            text=True,
        )
        if not os.path.exists(answer):
            said = [line for line in done.stderr.strip().splitlines() if line.strip()] or [
                f'it ended with status {done.returncode}'
            ]
            raise RunError(
                f'the TPU compiler failed ({one_line(said[-1], 400)})',
                'if its installation is damaged, rm -r '
                f'{shlex.quote(os.path.dirname(os.path.dirname(python)))}   # the same '
                'command then recreates it',
            )
        with open(answer) as file:
            return json.load(file)


def environment() -> str:
    """Returns the Python of the compiler's environment, which is created if needed.

    Raises: RunError if it cannot be.
    """
    if sys.version_info < (3, 11) or sys.platform != 'linux' or os.uname().machine != 'x86_64':
        raise RunError(
            'the TPU compiler is only available for Linux on x86-64 and Python 3.11 or later',
            'run preflight on such a machine',
        )
    pinned = installation.compiler_pins()
    if not installation.missing_of(pinned):
        return sys.executable
    pins = [f'{name}=={version}' for name, version in pinned.items()]
    key = hashlib.sha256(' '.join(pins).encode()).hexdigest()[:12]
    folder = os.path.join(
        cache_folder(), f'preflight-{sys.version_info[0]}.{sys.version_info[1]}-{key}'
    )
    python, finished = os.path.join(folder, 'bin', 'python'), os.path.join(folder, 'installed')
    if not _is_there(python, finished):
        os.makedirs(cache_folder(), exist_ok=True)
        with open(f'{folder}.lock', 'w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until another preflight has installed it
            if not _is_there(python, finished):
                _install(folder, python, pins)
                with open(finished, 'w'):
                    pass
    return python


def _is_there(python: str, finished: str) -> bool:
    """Returns whether the environment is usable; one whose Python is gone is created again."""
    return os.path.exists(finished) and os.path.exists(python)


def _install(folder: str, python: str, pins: list[str]) -> None:
    """Creates the compiler's environment. Raises RunError."""
    console.line(f'installing the TPU compiler into {folder} (first use only)')
    commands = (
        [sys.executable, '-m', 'venv', '--clear', '--without-pip', folder],
        [sys.executable, '-m', 'pip', '--python', python, *PIP_INSTALL, *pins],
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RunError(
                f'the TPU compiler could not be installed into {folder}: '
                f'{one_line(done.stderr or done.stdout, 400)}'
            )
