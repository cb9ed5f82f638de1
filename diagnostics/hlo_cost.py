"""Reads the cost of a compiled TPU program from its text.

The compiler writes its estimate of the cycles of each instruction, and for each tensor whether it
lives in HBM or in the chip's own memory.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

BYTES = {
    'pred': 1,
    's8': 1,
    'u8': 1,
    'bf16': 2,
    'f16': 2,
    's16': 2,
    'u16': 2,
    'f32': 4,
    's32': 4,
    'u32': 4,
    'f64': 8,
    's64': 8,
    'u64': 8,
}
SHAPE = re.compile(rf'\b({"|".join(BYTES)})\[([\d,]*)\](\{{[^}}]*\}})?')
INSTRUCTION = re.compile(
    r'\s*(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>.*?) (?P<kind>[a-z][\w\-]*)\((?P<rest>.*)$'
)
COMPUTATION = re.compile(r'(?P<entry>ENTRY )?%(?P<name>[\w.\-]+) \(.*\{$')
LOOP = re.compile(r' while\(.*condition=%(?P<condition>[\w.\-]+), body=%(?P<body>[\w.\-]+)')
NO_TRAFFIC = {
    'parameter',
    'tuple',
    'get-tuple-element',
    'bitcast',
    'constant',
    'copy-done',
    'slice-done',
    'all-reduce-done',
    'partition-id',
    'while',
    'replica-id',
    'after-all',
}
VMEM = 'S(1)'  # the memory space of on-chip memory; without it a tensor lives in HBM


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction with an estimate: usually a fusion, named by its last operation."""

    cycles: int
    layer: str  # of the model; '' if it belongs to none
    operation: str  # TensorFlow's name for it
    backward: bool
    shape: str  # of its first result


@dataclasses.dataclass(frozen=True)
class Program:
    """A program as it runs on one replica.

    Attributes:
        compiler: with its version.
        seconds: compilation time.
        flops: of the matrix unit and all else, as the compiler counts them.
        memory_bytes: of HBM: arguments, results that are not arguments, temporary tensors, code.
        memory_available: bytes of HBM of a replica.
        hbm_traffic: bytes of HBM that instructions read and write.
        all_reduce_bytes: size of each all-reduce. The compiler does not estimate their time.
        instructions: the most expensive first.
    """

    compiler: str
    seconds: float
    flops: float
    memory_bytes: int
    memory_available: float
    hbm_traffic: int
    all_reduce_bytes: tuple
    instructions: tuple

    @property
    def cycles(self) -> int:
        return sum(instruction.cycles for instruction in self.instructions)


def read_program(answer: Mapping[str, Any], chip: Any) -> Program:
    """Returns the Program in an answer of diagnostics/tpu_compiler_worker.py, for a Chip."""
    parts = executed(answer['text'])
    memory = answer['memory']
    return Program(
        compiler=answer['compiler'],
        seconds=answer['seconds'],
        # The compiler counts a loop once. What is outside of it is a thousandth of a step.
        flops=answer['flops'] * max(times for _, times in parts),
        memory_bytes=memory['argument']
        + memory['output']
        - memory['alias']
        + memory['temp']
        + memory['generated_code'],
        memory_available=chip.hbm_bytes / chip.replicas,
        hbm_traffic=sum(hbm_traffic(lines) * times for lines, times in parts),
        all_reduce_bytes=tuple(
            _result_bytes(line, ' all-reduce')
            for lines, times in parts
            for line in lines
            if re.search(r' all-reduce(-start)?\(', line)
            for _ in range(times)
        ),
        instructions=tuple(
            sorted(
                (part for lines, times in parts for part in instructions(lines, times)),
                key=lambda instruction: -instruction.cycles,
            )
        ),
    )


def executed(text: str) -> list[tuple[list[str], int]]:
    """Returns (lines, how many times they run) of the computations that run by themselves.

    They are the entry computation and the bodies of its loops; others count where they are called.
    """
    computations: dict[str, list[str]] = {}
    name = ''
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            name = 'ENTRY' if head['entry'] else head['name']
            computations[name] = []
        elif line.startswith('}'):
            name = ''
        elif name:
            computations[name].append(line)

    def with_loops(name: str, times: int) -> list[tuple[list[str], int]]:
        found = [(computations[name], times)]
        for loop in filter(None, map(LOOP.search, computations[name])):
            trips = times * _trips(computations[loop['condition']])
            found += with_loops(loop['body'], trips)
        return found

    return with_loops('ENTRY', 1)


def _trips(condition: Iterable[str]) -> int:
    """Returns how often a loop runs that counts from 0 up to a constant; 1 for any other."""
    text = '\n'.join(condition)
    limits = re.findall(r'= s32\[\]\S* constant\((\d+)\)', text)
    return int(limits[0]) if len(limits) == 1 and 'direction=LT' in text else 1


def instructions(lines: Iterable[str], times: int = 1) -> Iterator[Instruction]:
    """Yields each Instruction that has an estimate, with the cycles of all `times` it runs."""
    for line in lines:
        cycles = re.search(r'"estimated_cycles":"?(\d+)', line)
        match = INSTRUCTION.match(line)
        if cycles and match:
            name = re.search(r'op_name="([^"]*)"', line)
            layer, operation, backward = split_name(name[1] if name else '')
            first = SHAPE.search(match['shape'])
            yield Instruction(
                int(cycles[1]) * times,
                layer,
                operation or match['kind'],
                backward,
                f'{first[1]}[{first[2]}]' if first else '',
            )


def split_name(name: str) -> tuple[str, str, bool]:
    """Splits the name of an operation into (layer, operation, whether it is backward).

    'gradient_tape/MODEL_1/BACKBONE_1/block1a_bn_1/moments/Sum' gives ('block1a_bn', 'moments/Sum',
    True): the number that Keras appends to repeated names is removed.
    """
    backward = 'gradient_tape' in name
    parts = [
        re.sub(r'_[0-9]+$', '', part)
        for part in name.split('/')
        if part and not part.startswith('gradient_tape')
    ]
    known = [
        index
        for index, part in enumerate(parts[:-1])
        if re.match(r'(block|conv|stem|top|normalization|rescaling|predictions|avg_pool)', part)
    ]
    if not known:
        return '', '/'.join(parts[-2:]), backward
    first = known[0]
    return parts[first], '/'.join(parts[first + 1 :]), backward


def _result_bytes(line: str, operation: str) -> int:
    """Returns the bytes of the results of an instruction, which stand before its operation."""
    return sum(map(tensor_bytes, SHAPE.finditer(line.partition(operation)[0])))


def hbm_traffic(lines: Iterable[str]) -> int:
    """Returns the bytes of all operands and results that are not in the chip's own memory.

    An asynchronous copy counts once.
    """
    shapes, total = {}, 0
    for match in filter(None, map(INSTRUCTION.match, lines)):
        shapes[match['name']] = match['shape']
        if match['kind'] in NO_TRAFFIC:
            continue
        parts = list(SHAPE.finditer(match['shape']))
        if match['kind'] == 'slice-start':  # ((source), slice, context): the slice moves
            total += tensor_bytes(parts[1])
        elif match['kind'] == 'copy-start':
            # (destination, source, context): it moves into or out of HBM.
            total += max(in_hbm(part[0]) for part in parts[:2])
        else:
            operands = re.findall(r'%([\w.\-]+)', match['rest'].split('), ')[0])
            total += sum(
                in_hbm(shape)
                for shape in (match['shape'], *(shapes.get(operand, '') for operand in operands))
            )
    return total


def in_hbm(shape: str) -> int:
    """Returns the bytes of the tensors of a shape that live in HBM."""
    return sum(tensor_bytes(part) for part in SHAPE.finditer(shape) if VMEM not in (part[3] or ''))


def tensor_bytes(part: re.Match) -> int:
    return BYTES[part[1]] * math.prod(int(side) for side in part[2].split(',') if side)
