"""Times the training step of configs/imagenet.py on one GPU, run by JAX, beside timm's.

    python benchmarks/gpu_step.py write FOLDER               with TensorFlow; needs no GPU
    python3 benchmarks/gpu_step.py run FOLDER --output=FILE  on the GPU; needs no TensorFlow

`write` lowers the step as modeling/steps.py has it to StableHLO, and lets TensorFlow itself make a
few updates in float32 without dropout, for comparison. `run` compiles the programs with JAX, checks
them against these updates, and times them, in groups of falling importance:

ours POLICY-BATCH     EfficientNetV2B0 as shipped, one program for the whole update: flip,
                      normalisation, forward, backward, L2, RMSProp with momentum, averaged weights
  ...-keras_layers    the same with the layers of keras.applications, without fused_layers.py
  ...-for_tpu         the same as it is written for a TPU
  ...-loop_of_8       the same, eight updates in a loop on the GPU
timm eager ...        tf_efficientnetv2_b0 in PyTorch, channels_last, with the same update written
                      with torch._foreach functions
timm compiled ...     the same, model and update compiled by torch.compile
timm ..., graph       either of them, the whole update replayed as one CUDA graph

All take random images, uint8 on the GPU, from several batches in turn; reading images and copying
them to the GPU is not measured. timm's step differs from ours in this: it updates whether or not
the gradient is finite; its learning rate is a constant; under bfloat16 it computes the head in
bfloat16, ours in float32; it averages over pixels before the first convolution of a gate, ours
after it. Both may use TF32 in float32.

Each part has a process of its own and all take turns; the figures are medians over the rounds, the
ratios those within a round, of images a second. XLA_FLAGS are passed on, and --only='^ours .*-128$'
measures them on some of the parts. On a machine without a GPU --platform=cpu tries all of it but
the CUDA graphs, best with what `write --size=32 --batch_sizes=4,2 --float32_batch_sizes=4
--check_batch_size=4` has written; at that size batch normalisation magnifies every rounding, so
that the comparison with TensorFlow fails.
"""

import argparse
import contextlib
import dataclasses
import glob
import gzip
import itertools
import json
import math
import os
import random
import re
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TRAIN_EXAMPLES, EVAL_EXAMPLES = 1_281_167, 50_000
CHECK_RATE = 1e-3  # of the updates that are compared: a warmup would hardly move a weight
BATCHES = 8  # that take turns as input; together larger than a GPU's cache
WARMUP = 5  # updates
PROFILED = 3  # updates
MAX_ROWS = 300  # of a profile
RESERVE = 30  # seconds before the end: what is ready by then can still be timed
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LOSS_TOLERANCE = {'float32': 1e-4, 'mixed_bfloat16': 1e-2}  # relative, of every loss
BYTES = {'f32': 4, 'bf16': 2}  # of an element of what is multiplied


class Program(NamedTuple):
    """One training step that `write` lowers.

    Attributes:
        name: of its files.
        policy: Keras' dtype policy.
        batch_size: images of an update.
        masks: whether dropout and drop-path are on. Their masks are drawn in another way by each
            runtime, so what is compared has none.
        layers: 'ours' (modeling/fused_layers.py) or 'keras'.
        for_tpu: `on_tpu` of modeling/steps.py.
    """

    name: str
    policy: str
    batch_size: int
    masks: bool = True
    layers: str = 'ours'
    for_tpu: bool = False


class Part(NamedTuple):
    """What `run` starts as a process of its own.

    Attributes:
        label: its name in the report.
        kind: a key of PARTS.
        arguments: what its function takes.
        python: the interpreter.
        minutes: in which it has to get ready.
        environment: variables beside those of this process.
    """

    label: str
    kind: str
    arguments: dict
    python: str
    minutes: float
    environment: dict = {}


class Stream(NamedTuple):
    """Something that can be timed: `advance` begins updates, `wait` returns when all are done."""

    advance: Callable[[], object]
    wait: Callable[[], object]
    updates: int = 1  # that `advance` begins


def main():
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(dest='verb', required=True)
    writing = verbs.add_parser('write')
    writing.add_argument('folder')
    writing.add_argument('--size', type=int, default=224, help='pixels')
    writing.add_argument('--classes', type=int, default=1000)
    writing.add_argument('--batch_sizes', type=numbers, default='128,64,256')
    writing.add_argument('--float32_batch_sizes', type=numbers, default='128')
    writing.add_argument('--check_batch_size', type=int, default=16)
    writing.add_argument('--check_updates', type=int, default=4)
    running = verbs.add_parser('run')
    running.add_argument('folder')
    running.add_argument('--output', required=True)
    running.add_argument('--platform', choices=('cuda', 'cpu'), default='cuda')
    running.add_argument('--torch_python', default=sys.executable, help='an interpreter with timm')
    running.add_argument('--minutes', type=float, default=9.0, help='after which nothing is begun')
    running.add_argument('--part_minutes', type=float, default=5.0, help='for one to get ready')
    running.add_argument('--check_minutes', type=float, default=2.0, help='for one to get ready')
    running.add_argument('--seconds', type=float, default=0.5, help='of a turn')
    running.add_argument('--rounds', type=int, default=7)
    running.add_argument('--only', default='', help='regular expression: only parts that match')
    converting = verbs.add_parser('convert')  # how `write` starts its worker
    converting.add_argument('path')
    converting.add_argument('--exact', action='store_true')
    starting = verbs.add_parser('part')  # how `run` starts a part
    starting.add_argument('kind', choices=PARTS)
    starting.add_argument('arguments', type=json.loads)
    options = parser.parse_args()
    if options.verb == 'write':
        write(options)
    elif options.verb == 'run':
        run(options)
    elif options.verb == 'convert':
        convert(options.path, options.exact)
    else:
        serve(options.kind, options.arguments)


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(',') if number]


# 1. With TensorFlow: the programs, and what they should compute.


def write(options: argparse.Namespace) -> None:
    """Writes NAME.json and NAME.stablehlo.gz for each program into the folder."""
    sys.path.insert(0, ROOT)
    os.environ.update(KERAS_BACKEND='tensorflow', CUDA_VISIBLE_DEVICES='-1')
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    os.makedirs(options.folder, exist_ok=True)
    reference, names = None, []
    for program in programs(options):
        began = time.monotonic()
        built = build(program, options.size, options.classes)
        hlo, captured = lower_program(built, program, options.size)
        description = program._asdict() | {'size': options.size, 'classes': options.classes}
        description['parameters'] = [describe_parameter(built, handle) for handle in captured]
        path = os.path.join(options.folder, program.name)
        is_exact = not program.masks and program.policy == 'float32'
        description |= to_stablehlo(hlo, path, is_exact)
        if not program.masks:
            if reference is None:  # the first of them is in float32
                reference = make_updates(built, program, options)
            description['reference'] = reference
        with open(f'{path}.json', 'w') as file:
            json.dump(description, file)
        names.append(program.name)
        kilobytes = os.path.getsize(f'{path}.stablehlo.gz') / 1000
        work = description['work']
        print(
            f'{program.name:32} {kilobytes:5.0f} KB, {work["flops"] / 1e9:,.0f} GFLOP, '
            f'{time.monotonic() - began:.0f} s',
            flush=True,
        )
    with open(os.path.join(options.folder, 'programs.json'), 'w') as file:
        json.dump(names, file)


def programs(options: argparse.Namespace) -> list[Program]:
    """Returns what to lower. The first two are for comparison, the third is the main one."""
    checked = options.check_batch_size
    listed = [
        Program('check-float32', 'float32', checked, masks=False),
        Program('check-mixed_bfloat16', 'mixed_bfloat16', checked, masks=False),
    ]
    for policy, batch_sizes in (
        ('mixed_bfloat16', options.batch_sizes),
        ('float32', options.float32_batch_sizes),
    ):
        for batch_size in batch_sizes:
            listed.append(Program(f'{policy}-{batch_size}', policy, batch_size))
    name, policy, batch_size = listed[2][:3]
    listed.append(Program(f'{name}-keras_layers', policy, batch_size, layers='keras'))
    listed.append(Program(f'{name}-for_tpu', policy, batch_size, for_tpu=True))
    return listed


class Built(NamedTuple):
    """A state to lower the step with.

    Attributes:
        strategy: devices.lowering.OneOfMany of one replica.
        state: modeling.steps.TrainState.
        step: what make_train_step returned.
        variables: all of the state, (name, variable).
        seeds: by name, (seed, limit) of a weight that `seeded` drew.
    """

    strategy: object
    state: object
    step: Callable
    variables: list
    seeds: dict


def build(program: Program, size: int, classes: int) -> Built:
    """Builds configs/imagenet.py for one replica, with weights that `seeded` can draw again."""
    import keras

    from configs import imagenet
    from devices.lowering import OneOfMany
    from experiment import planning, session
    from inputs import augment
    from modeling import models, steps

    keras.backend.clear_session()
    random.seed(0)  # of Keras' initializers: every program begins with the same weights
    keras.config.set_dtype_policy(program.policy)
    config = imagenet.get_config()
    config.image_size, config.batch_size = size, program.batch_size
    config.schedule.peak_lr = 0.016 * program.batch_size / 256
    config.schedule.start_lr = config.schedule.peak_lr * program.batch_size / (5 * TRAIN_EXAMPLES)
    if not program.masks:
        config.model.dropout = config.model.drop_path = 0.0
        config.schedule.start_lr = config.schedule.peak_lr = CHECK_RATE
    plan = planning.make_plan(config, TRAIN_EXAMPLES, EVAL_EXAMPLES, classes, 1)
    strategy = OneOfMany(1)
    with strategy.scope():
        with layers_of(program.layers):
            model = models.build_model(config, classes)
        seeds = draw_weights(models.float_variables(model))
        state = session.build_state(model, config, plan, program.policy)
    step = steps.make_train_step(
        state,
        config,
        augment.make_device_augment(config.augment, classes),
        num_classes=classes,
        num_replicas=1,
        jit_compile=False,
        on_tpu=program.for_tpu,
    )
    variables = []
    paths = [variable.path for variable in models.float_variables(model)]
    for part, values in state.variables().items():
        if part == 'model':
            part_names = paths
        elif part == 'average':
            part_names = [f'average/{path}' for path in paths]
            seeds |= {f'average/{path}': seeds[path] for path in paths if path in seeds}
        elif part == 'optimizer':
            part_names = [f'optimizer/{variable.path}' for variable in state.optimizer.variables]
        else:
            part_names = [f'{part}/{index}' for index in range(len(values))]
        variables += zip(part_names, values, strict=True)
    return Built(strategy, state, step, variables, seeds)


def layers_of(kind: str) -> contextlib.AbstractContextManager:
    """Leaves the layers of keras.applications as they are where `kind` is 'keras'."""
    from unittest import mock

    from modeling import models

    if kind == 'ours':
        return contextlib.nullcontext()
    return mock.patch.object(models, 'fuse', lambda model, synchronized: None)


def draw_weights(weights: list) -> dict[str, tuple[int, float]]:
    """Gives each weight that is not constant values of the same deviation from `seeded`.

    Returns: {path: (seed, limit)}.
    """
    seeds = {}
    for seed, weight in enumerate(weights):
        values = np.asarray(weight)
        if values.min() == values.max():
            continue
        limit = float(values.std() * math.sqrt(3))
        weight.assign(seeded(seed, limit, values.shape))
        seeds[weight.path] = seed, limit
    return seeds


def seeded(seed: int, limit: float, shape: tuple[int, ...]) -> np.ndarray:
    """Draws float32 uniform in [-limit, limit): the same for a seed with every version of NumPy."""
    uniform = np.random.RandomState(seed).random_sample(shape)
    return ((2 * uniform - 1) * limit).astype(np.float32)


def lower_program(built: Built, program: Program, size: int) -> tuple[bytes, list]:
    """Lowers the step.

    Returns: (HLO module, what it captures: parameters that follow images, labels and flips).
    """
    import tensorflow as tf

    from devices.lowering import lower

    graphs = []

    def step(*arguments):
        graphs.append(tf.compat.v1.get_default_graph())
        return built.step(*arguments)

    batch = program.batch_size
    specs = (
        tf.TensorSpec((batch, size, size, 3), tf.uint8),
        tf.TensorSpec((batch,), tf.int64),
        {'flip': tf.TensorSpec((batch, 1), tf.float32)},
    )
    hlo = lower(built.strategy, step, specs).hlo
    return hlo, graphs[-1].external_captures


def describe_parameter(built: Built, handle) -> dict:
    """Returns {'name', 'value'} of a captured variable or constant, for `value_of`."""
    for name, variable in built.variables:
        if variable.handle is handle:
            return {'name': name, 'value': describe_value(variable.numpy(), built.seeds.get(name))}
    return {'name': 'constant', 'value': describe_value(handle.numpy(), None)}


def describe_value(value: np.ndarray, seed: tuple[int, float] | None) -> dict:
    if seed:
        assert np.array_equal(seeded(*seed, value.shape), value)
        return {'seed': seed[0], 'limit': seed[1]}
    if value.min() == value.max():
        return {'fill': value.flat[0].item()}
    assert value.size <= 16, 'too many numbers for a description'
    return {'values': value.tolist()}


def to_stablehlo(hlo: bytes, path: str, is_exact: bool) -> dict:
    """Writes PATH.stablehlo.gz, in the environment of the TPU compiler, which has JAX.

    Returns: what `convert` found out.
    """
    from diagnostics import tpu_compiler

    with tempfile.TemporaryDirectory() as scratch:
        module = os.path.join(scratch, 'step')
        with open(f'{module}.hlo', 'wb') as file:
            file.write(hlo)
        command = [tpu_compiler.environment(), os.path.abspath(__file__), 'convert', module]
        environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
        if is_exact:
            command.append('--exact')
        subprocess.run(command, check=True, env=environment)
        with open(f'{module}.stablehlo', 'rb') as file:
            artifact = file.read()
        with gzip.open(f'{path}.stablehlo.gz', 'wb') as file:
            file.write(artifact)
        with open(f'{module}.json') as file:
            return json.load(file)


def make_updates(built: Built, program: Program, options: argparse.Namespace) -> dict:
    """Lets TensorFlow's own kernels make the updates that the programs are compared with."""
    import tensorflow as tf

    names = {name for name, _ in built.variables if name in built.seeds}
    before = {name: variable.numpy() for name, variable in built.variables if name in names}

    @tf.function(autograph=False)
    def update(images, labels, flip):
        return built.strategy.run(built.step, args=(images, labels, {'flip': flip}))

    losses, gradient_norms = [], []
    for index in range(options.check_updates):
        results = update(*random_batch(index, program.batch_size, options.size, options.classes))
        losses.append(float(results['loss']))
        gradient_norms.append(float(results['grad_norm']))
    changes = {}
    for name, variable in built.variables:
        if name in names:
            changes[name] = float(np.linalg.norm(variable.numpy() - before[name]))
    print(f'by TensorFlow: losses {losses}', flush=True)
    return {'losses': losses, 'gradient_norms': gradient_norms, 'changes': changes}


def random_batch(seed: int, batch_size: int, size: int, classes: int) -> tuple[np.ndarray, ...]:
    """Draws images uint8 [batch, size, size, 3], labels int64 [batch], flips float32 [batch, 1]."""
    generator = np.random.RandomState(seed)
    images = generator.randint(0, 256, (batch_size, size, size, 3), dtype=np.uint8)
    labels = generator.randint(0, classes, batch_size, dtype=np.int64)
    return images, labels, generator.random_sample((batch_size, 1)).astype(np.float32)


def convert(path: str, exact: bool) -> None:
    """Turns PATH.hlo into PATH.stablehlo, a portable artifact, and PATH.json, which describes it.

    It reaches into JAX, so it runs with the JAX of requirements/tpu.txt alone.

    Args:
        exact: whether matrix products and convolutions are to be computed in full float32.
    """
    from jax._src.interpreters import mlir as jax_mlir
    from jax._src.lib import _jax
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import hlo as stablehlo

    with open(f'{path}.hlo', 'rb') as file:
        module_bytes = _jax.mlir.hlo_to_stablehlo(file.read())
    with jax_mlir.make_ir_context():
        module = ir.Module.parse(module_bytes)
        attributes = module.operation.attributes
        pattern = r'parameter_number = (\d+) : i64\}, output_index = array<i64: (\d+)>'
        aliases = re.findall(pattern, str(attributes['mhlo.input_output_alias']))
        for name in [named if isinstance(named, str) else named.name for named in attributes]:
            if name.startswith('mhlo.'):
                del attributes[name]
        remove_copies(module)
        functions = {function.attributes['sym_name'].value: function for function in module.body}
        signature = functions['main'].attributes['function_type'].value
        text = module.operation.get_asm(enable_debug_info=True)  # with TensorFlow's names
        if exact:
            text = text.replace('precision DEFAULT', 'precision HIGHEST')
            text = text.replace('precision = [DEFAULT, DEFAULT]', 'precision = [HIGHEST, HIGHEST]')
        weeks = stablehlo.StablehloCompatibilityRequirement.WEEK_12
        version = stablehlo.get_version_from_compatibility_requirement(weeks)
        artifact = _jax.mlir.serialize_portable_artifact(text, version, False)
        assert 'custom_call' not in text, 'a custom call is for one platform only'
        description = {
            'stablehlo_version': version,
            'inputs': [tensor_type(kind) for kind in signature.inputs],
            'results': [tensor_type(kind) for kind in signature.results],
            'new_values': {int(result): int(parameter) for parameter, result in aliases},
            'work': count_work(text),
        }
    with open(f'{path}.stablehlo', 'wb') as file:
        file.write(artifact)
    with open(f'{path}.json', 'w') as file:
        json.dump(description, file)


def remove_copies(module) -> None:
    """Takes out the copies that mark returned variables: StableHLO does not have them."""
    from jax._src.lib.mlir import ir

    copies = []

    def visit(operation):
        if operation.name == 'mhlo.copy':
            copies.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    for copy in copies:
        copy.results[0].replace_all_uses_with(copy.operands[0])
        copy.erase()


def tensor_type(kind) -> tuple[list[int], str]:
    """Returns (shape, NumPy's name of the dtype) of an MLIR type."""
    from jax._src.lib.mlir import ir

    kind = ir.RankedTensorType(kind)
    names = {'f32': 'float32', 'i64': 'int64', 'i32': 'int32', 'ui8': 'uint8', 'i1': 'bool'}
    return list(kind.shape), names[str(kind.element_type)]


def count_work(text: str) -> dict[str, float]:
    """Counts what the convolutions and matrix products of a StableHLO module cannot do without.

    Returns: 'flops', and 'bytes': their operands read once, their results written once.
    """
    flops = moved = convolutions = products = 0
    for line in text.splitlines():
        matched = re.search(r'stablehlo\.(convolution|dot_general|dot)\b', line)
        if not matched:
            continue
        tensors = [parse_tensor(found) for found in re.findall(r'tensor<([^>]*)>', line)]
        (left, _), (right, _), (result, _) = tensors
        moved += sum(math.prod(shape) * width for shape, width in tensors)
        if matched[1] == 'convolution':
            kernel = re.search(r'\]x\[([^\]]*)\]', line)[1].split(', ')
            dilation = re.search(r'lhs_dilate = \[([^\]]*)\]', line)[1].split(', ')
            taps = math.prod(right) / right[kernel.index('o')]
            flops += 2 * math.prod(result) * taps / math.prod(map(int, dilation))
            convolutions += 1
        else:
            inner = math.sqrt(math.prod(left) * math.prod(right) / math.prod(result))
            flops += 2 * math.prod(result) * inner
            products += 1
    return {'flops': flops, 'bytes': moved, 'convolutions': convolutions, 'products': products}


def parse_tensor(text: str) -> tuple[list[int], int]:
    """Returns (shape, bytes of an element) of '128x7x7x1280xbf16'."""
    *shape, element = text.split('x')
    return [int(side) for side in shape], BYTES[element]


# 2. On the GPU: the process that starts the parts, and lets them take turns.


class Step(NamedTuple):
    """A program as `write` described it, read back."""

    description: dict
    artifact: bytes


def read_step(folder: str, name: str) -> Step:
    with open(os.path.join(folder, f'{name}.json')) as file:
        description = json.load(file)
    with gzip.open(os.path.join(folder, f'{name}.stablehlo.gz')) as file:
        return Step(description, file.read())


def run(options: argparse.Namespace) -> None:
    """Starts all parts, group by group, and writes the report after each."""
    report = Report(options)
    deadline = time.monotonic() + 60 * options.minutes
    with contextlib.ExitStack() as stack:
        alive = {}
        for group in groups(options):
            parts = [part for part in group if re.search(options.only, part.label)]
            if not parts:
                continue
            if time.monotonic() > deadline:
                report.skip(parts)
                continue
            alive |= start(parts, deadline - RESERVE, stack, report)
            for baseline, others in contests(parts, alive):
                compare(baseline, others, alive, options, deadline, report)
            for label in [part.label for part in parts if part.arguments.get('profiled')]:
                if label in alive and time.monotonic() < deadline:
                    answer = alive[label].ask({'profile': True}, time.monotonic() + 60)
                    report.add(label, {'profile': answer})
                    if alive[label].is_over:
                        del alive[label]
    print(report.table())


def groups(options: argparse.Namespace) -> list[list[Part]]:
    """Lists the parts in the order of their importance; those of a group get ready together.

    Autotuning measures kernels, so the main program gets ready without another that keeps the GPU
    busy: the programs beside it are compiled without autotuning. torch.compile spends its first
    half minute without the GPU, by when `eager` is ready. The later groups get ready all at once.
    """
    with open(os.path.join(options.folder, 'programs.json')) as file:
        names = json.load(file)
    described = {name: read_step(options.folder, name).description for name in names}
    main_name = next(name for name in names if described[name]['masks'])
    main, size = described[main_name], described[main_name]['size']
    shared = {'folder': options.folder, 'platform': options.platform}
    jax_environment = {'JAX_PLATFORMS': options.platform, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
    exact = jax_environment | {'NVIDIA_TF32_OVERRIDE': '0'}

    def ours(name, profiled=False, updates=1):
        arguments = shared | {'name': name, 'profiled': profiled, 'output': options.output}
        arguments['updates'] = updates
        label = f'ours {name}'
        if updates > 1:
            label += f'-loop_of_{updates}'
        return Part(label, 'ours', arguments, sys.executable, options.part_minutes, jax_environment)

    def timm(policy, batch_size, compiled, profiled=False):
        arguments = shared | {
            'policy': policy,
            'batch_size': batch_size,
            'size': size,
            'classes': main['classes'],
            'compiled': compiled,
            'profiled': profiled,
        }
        label = f'timm {"compiled" if compiled else "eager"} {policy}-{batch_size}'
        return Part(label, 'timm', arguments, options.torch_python, options.part_minutes)

    checks = []
    for name in names:
        if not described[name]['masks']:
            arguments = shared | {'name': name}
            checks.append(
                Part(name, 'check', arguments, sys.executable, options.check_minutes, exact)
            )
    policy, batch_size = main['policy'], main['batch_size']
    listed = [
        [Part('floors', 'floors', shared, sys.executable, options.check_minutes, jax_environment)],
        [ours(main_name, profiled=True), *checks],
        [timm(policy, batch_size, False, True), timm(policy, batch_size, True, True)],
    ]
    others = [name for name in names if described[name]['masks'] and name != main_name]
    same_size = [name for name in others if described[name]['batch_size'] == batch_size]
    for batch in (same_size, [name for name in others if name not in same_size]):
        group = [ours(name) for name in batch]
        if batch is same_size:
            group.append(ours(main_name, updates=BATCHES))
        for name in batch:
            if described[name]['policy'] != policy or described[name]['batch_size'] != batch_size:
                peer = described[name]['policy'], described[name]['batch_size']
                group += [timm(*peer, False), timm(*peer, True)]
        listed.append(group)
    return listed


def contests(parts: list[Part], alive: dict) -> Iterator[tuple[str, list[str]]]:
    """Yields (ours, what is timed in turn with it) for what has just got ready.

    The other forms of our main program are timed in turn with it.
    """
    ready = [part.label for part in parts if part.label in alive]
    ours = [label for label in alive if label.startswith('ours ')]
    timms = [label for label in alive if label.startswith('timm ')]
    for baseline in ours:
        kind = baseline.removeprefix('ours ')
        others = [label for label in timms if label.endswith(f' {kind}')]
        others += [label for label in ours if label.startswith(f'{baseline}-')]
        is_variant = any(baseline.startswith(f'{other}-') for other in ours)
        if baseline in ready and not is_variant:
            yield baseline, others
        elif set(others) & set(ready):
            yield baseline, [label for label in others if label in ready]
    for label in timms:
        kind = label.split()[-1]
        if label in ready and f'ours {kind}' not in alive:
            yield label, []


def start(parts: list[Part], end: float, stack: contextlib.ExitStack, report: 'Report') -> dict:
    """Starts the parts together; returns {label: Process} of those that got ready and go on.

    Args:
        end: when even a part that has minutes left is given up.
    """
    waiting, alive = {}, {}
    for part in parts:
        process = Process(part)
        stack.callback(process.end)
        limit = min(end, time.monotonic() + 60 * part.minutes)
        waiting[part.label] = process, limit
    while waiting:
        left = min(limit for _, limit in waiting.values()) - time.monotonic()
        outputs = [process.output for process, _ in waiting.values()]
        readable, _, _ = select.select(outputs, [], [], max(0.0, left))
        for label, (process, limit) in list(waiting.items()):
            if process.output not in readable and time.monotonic() < limit:
                continue
            del waiting[label]
            answer = process.ask(None, limit)
            goes_on = answer.pop('goes_on', False)
            report.add(label, answer)
            if goes_on:
                alive[label] = process
            else:
                process.end()
    return alive


class Process:
    """A part while it runs. It answers each line of JSON on its standard input with one."""

    def __init__(self, part: Part):
        self.log = tempfile.TemporaryFile('w+')  # noqa: SIM115 - closed by `end`
        command = [part.python, os.path.abspath(__file__), 'part', part.kind]
        self.process = subprocess.Popen(
            command + [json.dumps(part.arguments)],
            env={**os.environ, **part.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            start_new_session=True,
        )
        self.output, self.buffer, self.is_over = self.process.stdout, b'', False

    def ask(self, request: dict | None, limit: float) -> dict:
        """Returns the answer, or {'error': ...} if there is none by then. None: asks nothing."""
        try:
            if request is not None:
                self.process.stdin.write(json.dumps(request).encode() + b'\n')
                self.process.stdin.flush()
            while b'\n' not in self.buffer:
                left = max(0.0, limit - time.monotonic())
                readable, _, _ = select.select([self.output], [], [], left)
                if not readable:
                    self.end()
                    return {'error': f'no answer in time\n{self.said()}'}
                received = os.read(self.output.fileno(), 2**20)
                if not received:
                    status = self.process.wait()
                    self.is_over = True
                    return {'error': f'ended with status {status}\n{self.said()}'}
                self.buffer += received
        except OSError as error:
            return {'error': f'{error}\n{self.said()}'}
        line, _, self.buffer = self.buffer.partition(b'\n')
        return json.loads(line)

    def said(self) -> str:
        """Returns the end of what it wrote to standard error."""
        self.log.seek(0)
        return self.log.read()[-3000:]

    def end(self) -> None:
        """Ends it, and what it has started."""
        if not self.is_over:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.is_over = True


def compare(
    baseline: str,
    others: list[str],
    alive: dict,
    options: argparse.Namespace,
    deadline: float,
    report: 'Report',
) -> None:
    """Lets a program of ours and others take turns, and reports medians and ratios."""
    waves = [[(label, 'direct') for label in (baseline, *others)]]
    timms = [label for label in others if label.startswith('timm ')]
    if timms and options.platform == 'cuda':  # later: a failed capture spoils nothing before it
        waves.append([(baseline, 'direct'), *((label, 'graph') for label in timms)])
    batch_size = report.of(baseline, 'batch_size')
    for wave in waves:
        seconds, issued = {stream: [] for stream in wave}, {}
        for _ in range(options.rounds + 1):
            if time.monotonic() > deadline:
                break
            for stream in list(wave):
                label, name = stream
                request = {'stream': name, 'seconds': options.seconds}
                answer = alive[label].ask(request, time.monotonic() + 60)
                if 'seconds' in answer:
                    seconds[stream].append(answer['seconds'])
                    issued[stream] = answer['issue']
                else:
                    report.add(label, {f'{name}_error': answer['error']})
                    wave.remove(stream)
        report.add(baseline, {'gpu': describe_gpu()})
        for stream, measured in seconds.items():
            if len(measured) > 1:
                own = seconds[baseline, 'direct']
                report.add_speed(
                    stream, batch_size, measured[1:], issued[stream], baseline, own[1:]
                )


class Report:
    """What was found out so far: printed as it comes, and written each time."""

    def __init__(self, options: argparse.Namespace):
        self.path, self.began = options.output, time.monotonic()
        self.parts, self.speeds = {}, []
        self.machine = {
            'platform': options.platform,
            'cpu_cores': os.cpu_count(),
            'gpu': describe_gpu(),
            'seconds_of_a_turn': options.seconds,
            'rounds': options.rounds,
        }
        print(self.machine, flush=True)

    def add(self, label: str, found: dict) -> None:
        self.parts.setdefault(label, {}).update(found)
        errors = [value for key, value in found.items() if 'error' in key]
        shown = errors[0][-1500:] if errors else json.dumps(found)[:700]
        self._say(f'{label}: {shown}')

    def add_speed(
        self,
        stream: tuple[str, str],
        batch_size: int,
        seconds: list[float],
        issued: float,
        baseline: str,
        own: list[float],
    ) -> None:
        """Adds a measured stream; ratios are of images a second, those of `baseline` by its own."""
        ratios = [other / ours for other, ours in zip(seconds, own, strict=True)]
        row = {
            'part': stream[0],
            'stream': stream[1],
            'images_per_second': round(batch_size / statistics.median(seconds), 1),
            'ms': round(1000 * statistics.median(seconds), 3),
            'ms_of_rounds': [round(1000 * value, 3) for value in seconds],
            'host_ms': round(1000 * issued, 3),
            'baseline': baseline,
            'baseline_divided_by_it': round(statistics.median(ratios), 3) if ratios else None,
        }
        self.speeds.append(row)
        self._say(speed_line(row))

    def skip(self, parts: list[Part]) -> None:
        for part in parts:
            self.add(part.label, {'error': 'left out: no time'})

    def of(self, label: str, key: str):
        return self.parts[label][key]

    def table(self) -> str:
        """Returns the short table at the end."""
        lines = ['']
        floors = self.parts.get('floors', {})
        if 'bytes_per_second' in floors:
            lines.append(
                f'the chip: {floors["bytes_per_second"] / 1e12:.2f} TB/s, '
                f'{floors["flops_per_second"] / 1e12:.0f} TFLOP/s of bfloat16'
            )
        for label, part in self.parts.items():
            if 'check' in part:
                found = part['check']
                lines.append(
                    f'{label}: {"right" if found["passes"] else "WRONG"}, losses within '
                    f"{found['loss_difference']:.1e} of TensorFlow's, changes of "
                    f'weights within {found["change_difference"]:.1e}'
                )
            if part.get('compiled_bytes') and 'bytes_per_second' in floors:
                lines.append(f'{label}: at least {describe_floors(part, floors)}')
        lines += [speed_line(row) for row in self.speeds]
        for label, part in self.parts.items():
            lines += [f'{label}: {key}, see the file' for key in part if 'error' in key]
        return '\n'.join(lines)

    def _say(self, text: str) -> None:
        """Prints a line, and writes the file."""
        seconds = time.monotonic() - self.began
        print(f'[{seconds:4.0f} s] {text}', flush=True)
        found = {'machine': self.machine, 'seconds': round(seconds, 1)}
        with open(f'{self.path}.new', 'w') as file:
            json.dump(found | {'speeds': self.speeds, 'parts': self.parts}, file, indent=1)
        os.replace(f'{self.path}.new', self.path)


def speed_line(row: dict) -> str:
    name = row['part'] + (', graph' if row['stream'] == 'graph' else '')
    return (
        f'{name:44} {row["images_per_second"]:9,.0f} images/s {row["ms"]:8.2f} ms '
        f'(host {row["host_ms"]:.2f})   ours / it {row["baseline_divided_by_it"]}'
    )


def describe_floors(part: dict, floors: dict) -> str:
    """Says how long the work of a step takes at the speeds that were measured."""
    work, bandwidth = part['work'], floors['bytes_per_second']
    times = {
        'for the operations': work['flops'] / floors['flops_per_second'],
        'for operands and results of convolutions': work['bytes'] / bandwidth,
        'for all bytes of the compiled program': part['compiled_bytes'] / bandwidth,
    }
    return ', '.join(f'{1000 * seconds:.2f} ms {name}' for name, seconds in times.items())


def describe_gpu() -> str:
    """Returns name, driver, clocks and so on as nvidia-smi has them; '' without it."""
    fields = 'name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu,memory.used'
    command = ['nvidia-smi', f'--query-gpu={fields}', '--format=csv,noheader']
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ''


# 3. The parts, each in a process of its own.


def serve(kind: str, arguments: dict) -> None:
    """Runs a part: says that it is ready, then answers each request on standard input."""
    sys.path.insert(0, ROOT)
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(value: dict) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        ready, streams, profile = PARTS[kind](**arguments)
    except Exception:
        answer({'error': traceback.format_exc()[-3000:]})
        return
    if not streams:
        answer(ready)
        return
    estimates = {}
    answer(ready | {'goes_on': True})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if 'profile' in request:
                rows = profile()
                total = sum(row[2] for row in rows)
                answer({'updates': PROFILED, 'ms': total, 'rows': rows[:MAX_ROWS]})
            else:
                answer(time_stream(streams, request['stream'], request['seconds'], estimates))
        except Exception:
            answer({'error': traceback.format_exc()[-3000:]})


def time_stream(streams: dict, name: str, seconds: float, estimates: dict[str, float]) -> dict:
    """Times as many updates as take `seconds`. A stream that is a function is made first."""
    if not isinstance(streams[name], Stream):
        streams[name] = streams[name]()
    stream = streams[name]
    if name not in estimates:
        estimates[name] = time_updates(stream, WARMUP)['seconds']
    count = max(3, round(seconds / estimates[name]))
    measured = time_updates(stream, count)
    estimates[name] = measured['seconds']
    return measured


def time_updates(stream: Stream, count: int) -> dict[str, float]:
    """Returns the 'seconds' of an update, and how long the host took to 'issue' it.

    Args:
        count: of updates; at least so many are made.
    """
    calls = -(-count // stream.updates)
    stream.wait()
    began = time.perf_counter()
    for _ in range(calls):
        stream.advance()
    issued = time.perf_counter()
    stream.wait()
    ended = time.perf_counter()
    made = calls * stream.updates
    return {'seconds': (ended - began) / made, 'issue': (issued - began) / made, 'updates': made}


def floors(folder: str, platform: str):
    """Measures what the chip can do: bytes in and out of a large copy, a large matrix product."""
    import jax
    import jax.numpy as jnp

    elements, side = (2**29, 8192) if platform == 'cuda' else (2**24, 1024)
    found = {'jax': jax.__version__, 'device': jax.devices()[0].device_kind}
    source = jax.random.normal(jax.random.key(0), (elements,), jnp.float32)
    copy = jax.jit(lambda values: values + 1)  # a mere copy may be left out
    found['bytes_per_second'] = 2 * source.nbytes / time_calls(copy, source)
    del source
    matrix = jax.random.normal(jax.random.key(1), (side, side), jnp.bfloat16)
    product = jax.jit(lambda values: values @ values)
    found['flops_per_second'] = 2 * side**3 / time_calls(product, matrix)
    return found, {}, None


def time_calls(function: Callable, argument, rounds: int = 7, count: int = 10) -> float:
    """Returns the median over the rounds of the seconds that a call takes."""
    function(argument).block_until_ready()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(count):
            result = function(argument)
        result.block_until_ready()
        seconds.append((time.perf_counter() - began) / count)
    return statistics.median(seconds)


class Compiled(NamedTuple):
    """A step compiled by JAX: (state, constants, (images, labels, flips)) -> (state, results)."""

    call: Callable
    state: list[np.ndarray]
    constants: list[np.ndarray]
    names: list[str]  # of the state
    seconds: float
    program: object  # jax.stages.Compiled


def compile_step(step: Step, compiler_options: dict | None = None, updates: int = 1) -> Compiled:
    """Compiles a program with JAX's public interface. Its state is donated.

    Args:
        updates: that one call makes, in a loop on the device: so many batches go in, stacked.
    """
    import jax
    import jax.numpy as jnp

    jax.config.update('jax_enable_x64', True)  # labels and counters
    description = step.description
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in description['inputs']]
    new_values = {int(result): parameter for result, parameter in description['new_values'].items()}
    results = sorted(new_values)
    parameters = [new_values[result] for result in results]
    constants = [index for index in range(3, len(inputs)) if index not in set(parameters)]

    # An exported function with the signature of the program; then the program in its place.
    def same_signature(*arguments):
        return tuple(jnp.zeros(shape, dtype) for shape, dtype in description['results'])

    exported = jax.export.export(jax.jit(same_signature, keep_unused=True))(*inputs)
    exported = dataclasses.replace(exported, mlir_module_serialized=step.artifact)

    def update(state, others, batch):
        values = dict(enumerate(batch))
        values |= zip(parameters, state, strict=True)
        values |= zip(constants, others, strict=True)
        outcome = exported.call(*[values[index] for index in range(len(inputs))])
        measured = outcome[: results[0]]
        # In the order of the state: JAX then writes each new value into the place of the old one.
        return [outcome[result] for result in results], measured

    def loop(state, others, batches):
        def body(state, batch):
            return update(state, others, batch)

        state, measured = jax.lax.scan(body, state, batches)
        return state, [values[-1] for values in measured]

    batch_kinds = tuple(inputs[:3])
    if updates > 1:
        batch_kinds = tuple(
            jax.ShapeDtypeStruct((updates, *kind.shape), kind.dtype) for kind in batch_kinds
        )
    began = time.perf_counter()
    kinds = [[inputs[index] for index in indices] for indices in (parameters, constants)]
    jitted = jax.jit(loop if updates > 1 else update, donate_argnums=0)
    program = jitted.lower(*kinds, batch_kinds).compile(compiler_options)
    seconds = time.perf_counter() - began
    described = description['parameters']
    values = [None, None, None]
    for parameter, kind in zip(described, inputs[3:], strict=True):
        values.append(value_of(parameter['value'], kind))
    return Compiled(
        call=program,
        state=[values[index] for index in parameters],
        constants=[values[index] for index in constants],
        names=[described[index - 3]['name'] for index in parameters],
        seconds=seconds,
        program=program,
    )


def value_of(described: dict, kind) -> np.ndarray:
    """Makes the initial value of a parameter of `kind`, which has a shape and a dtype."""
    if 'fill' in described:
        return np.full(kind.shape, described['fill'], kind.dtype)
    if 'seed' in described:
        return seeded(described['seed'], described['limit'], kind.shape)
    return np.asarray(described['values'], kind.dtype).reshape(kind.shape)


MEMORY = ('argument', 'output', 'alias', 'temp')  # as JAX has them
# What a step returns before the new values, sorted.
RESULTS = ('correct', 'grad_norm', 'learning_rate', 'loss', 'skipped', 'skipped_in_a_row')


def check(folder: str, platform: str, name: str):
    """Compares a few updates with those of TensorFlow."""
    step = read_step(folder, name)
    found = {}
    if platform == 'cuda':
        try:  # without measuring kernels, so that it disturbs nobody
            found['check'] = compare_updates(step, {'xla_gpu_autotune_level': 0})
        except Exception:
            found['without_autotuning'] = traceback.format_exc()[-1000:]
    if 'check' not in found:
        found['check'] = compare_updates(step, None)
    return found, {}, None


def compare_updates(step: Step, compiler_options: dict | None) -> dict:
    """Returns the largest relative differences from TensorFlow's updates, and whether they do."""
    import jax

    compiled = compile_step(step, compiler_options)
    state, constants = jax.device_put(compiled.state), jax.device_put(compiled.constants)
    description = step.description
    shape = description['batch_size'], description['size'], description['classes']
    reference, losses, norms = description['reference'], [], []
    for index in range(len(reference['losses'])):
        batch = jax.device_put(random_batch(index, *shape))
        state, results = compiled.call(state, constants, batch)
        losses.append(float(results[RESULTS.index('loss')]))
        norms.append(float(results[RESULTS.index('grad_norm')]))
    changes = {}
    for path, before, after in zip(compiled.names, compiled.state, state, strict=True):
        if path in reference['changes']:
            changes[path] = float(np.linalg.norm(np.asarray(after) - before))
    of_loss = max(map(relative, losses, reference['losses']))
    of_changes = [relative(changes[path], value) for path, value in reference['changes'].items()]
    return {
        'passes': of_loss < LOSS_TOLERANCE[description['policy']],
        'loss_difference': of_loss,
        'gradient_norm_difference': max(map(relative, norms, reference['gradient_norms'])),
        'change_difference': max(of_changes),
        'median_change_difference': statistics.median(of_changes),
        'losses': losses,
        'of_tensorflow': reference['losses'],
        'compile_seconds': compiled.seconds,
    }


def relative(value: float, wanted: float) -> float:
    """Returns the relative difference; infinite where a value is not finite."""
    difference = abs(value - wanted) / abs(wanted)
    return difference if math.isfinite(difference) else math.inf


def ours(folder: str, platform: str, name: str, profiled: bool, output: str, updates: int = 1):
    """Compiles a program and makes the first updates; `updates` in each call."""
    import jax

    from diagnostics.hlo_cost import executed, hbm_traffic

    step = read_step(folder, name)
    description = step.description
    compiled = compile_step(step, updates=updates)
    state, constants = jax.device_put(compiled.state), jax.device_put(compiled.constants)
    shape = description['batch_size'], description['size'], description['classes']
    batches = [random_batch(index, *shape) for index in range(BATCHES)]
    if updates > 1:
        batches = [tuple(np.stack(arrays[:updates]) for arrays in zip(*batches, strict=True))]
    batches = itertools.cycle([jax.device_put(batch) for batch in batches])
    holder = {'state': state, 'results': None}

    def advance():
        results = compiled.call(holder['state'], constants, next(batches))
        holder['state'], holder['results'] = results

    def wait():
        jax.block_until_ready(holder['state'])

    stream = Stream(advance, wait, updates)
    del state
    advance()
    losses = [float(holder['results'][RESULTS.index('loss')])]
    memory = compiled.program.memory_analysis()
    text = compiled.program.as_text()
    aliases = text.partition('\n')[0].count('-alias)')
    time_updates(stream, WARMUP)
    timed = time_updates(stream, WARMUP)
    losses.append(float(holder['results'][RESULTS.index('loss')]))
    ready = {
        'jax': jax.__version__,
        'device': jax.devices()[0].device_kind,
        'batch_size': description['batch_size'],
        'compile_seconds': compiled.seconds,
        'first_ms': 1000 * timed['seconds'],
        'issue_ms': 1000 * timed['issue'],
        'losses': losses,
        'skipped_in_a_row': float(holder['results'][RESULTS.index('skipped_in_a_row')]),
        'in_place': f'{aliases} of {len(compiled.state)} variables',
        'work': description['work'],
        'compiled_bytes': hbm_traffic(executed(text)[0][0]) if updates == 1 else None,
        'by_cost_analysis': cost_analysis(compiled.program),
        'program_bytes': {kind: getattr(memory, f'{kind}_size_in_bytes') for kind in MEMORY},
        'peak_bytes': (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use'),
    }
    if profiled:
        with gzip.open(f'{os.path.splitext(output)[0]}.hlo.txt.gz', 'wt') as file:
            file.write(re.sub(r' source_(file="[^"]*"|line=\d+|end_line=\d+)', '', text))
    return ready, {'direct': stream}, lambda: profile_jax(stream)


def cost_analysis(program) -> dict[str, float] | None:
    """Returns what XLA says of its program, where it says anything."""
    found = program.cost_analysis() or {}
    return {key: found[key] for key in ('flops', 'bytes accessed') if key in found}


def profile_jax(stream: Stream) -> list[tuple[str, str, float, int]]:
    """Returns (operation of the compiled program, kernel, ms, calls) of the GPU, longest first."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(PROFILED):
                stream.advance()
            stream.wait()
        (path,) = glob.glob(os.path.join(folder, '**', '*.xplane.pb'), recursive=True)
        profile = jax.profiler.ProfileData.from_file(path)
        totals = {}
        for plane in profile.planes:
            for line in plane.lines:
                if '/device:GPU' not in plane.name or not line.name.startswith('Stream'):
                    continue
                for event in line.events:
                    operation = str(dict(event.stats).get('hlo_op', ''))
                    total = totals.setdefault((operation, event.name), [0.0, 0])
                    total[0] += event.duration_ns / 1e6
                    total[1] += 1
    rows = [(*key, round(ms, 4), calls) for key, (ms, calls) in totals.items()]
    return sorted(rows, key=lambda row: -row[2])


def timm(
    folder: str,
    platform: str,
    policy: str,
    batch_size: int,
    size: int,
    classes: int,
    compiled: bool,
    profiled: bool,
):
    """Builds timm's model with the update of configs/imagenet.py, and makes the first updates."""
    import timm
    import torch

    device = torch.device(platform)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision('high')  # TF32, which cuDNN may use anyway
    model = timm.create_model(
        'tf_efficientnetv2_b0', num_classes=classes, drop_rate=0.2, drop_path_rate=0.2
    )
    model = model.to(device, memory_format=torch.channels_last).train()
    batches = []
    for index in range(BATCHES):
        arrays = random_batch(index, batch_size, size, classes)
        batches.append([torch.from_numpy(array).to(device) for array in arrays])
    step = torch_step(torch, model, device, policy, batch_size, compiled)

    def wait():
        if platform == 'cuda':
            torch.cuda.synchronize()

    turns = itertools.cycle(batches)
    direct = Stream(lambda: step(*next(turns)), wait)
    began = time.perf_counter()
    losses = [float(step(*next(turns))[0])]
    wait()
    compile_seconds = time.perf_counter() - began
    time_updates(direct, WARMUP)
    timed = time_updates(direct, WARMUP)
    losses.append(float(step(*next(turns))[0]))
    ready = {
        'torch': torch.__version__,
        'timm': timm.__version__,
        'batch_size': batch_size,
        'parameters': sum(parameter.numel() for parameter in model.parameters()),
        'compile_seconds': compile_seconds,
        'first_ms': 1000 * timed['seconds'],
        'issue_ms': 1000 * timed['issue'],
        'losses': losses,
        'peak_bytes': torch.cuda.max_memory_allocated() if platform == 'cuda' else None,
    }

    def graph():
        return capture(torch, step, itertools.cycle(batches), wait)

    return ready, {'direct': direct, 'graph': graph}, lambda: profile_torch(torch, direct)


def torch_step(torch, model, device, policy: str, batch_size: int, compiled: bool) -> Callable:
    """Returns a function of images, labels and flips that makes an update.

    It returns loss, number of correct answers and norm of the gradient, as ours does.
    """
    from torch.nn import functional

    mean = 255 * torch.tensor(MEAN, device=device).reshape(1, 3, 1, 1)
    inverse = 1 / (255 * torch.tensor(DEVIATION, device=device)).reshape(1, 3, 1, 1)
    parameters = list(model.parameters())
    kernels = [index for index, parameter in enumerate(parameters) if parameter.ndim > 1]
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    averaged = parameters + buffers
    average = [tensor.detach().clone() for tensor in averaged]
    squares = [torch.zeros_like(parameter) for parameter in parameters]
    momenta = [torch.zeros_like(parameter) for parameter in parameters]
    rate, decay = 0.016 * batch_size / 256 / 100, 0.9999

    def forward(images, labels, flip):
        images = torch.where(flip[:, :, None, None] < 0.5, images, images.flip(2))
        pixels = images.permute(0, 3, 1, 2)  # as it lies in memory: channels_last
        normalised = (pixels.float() - mean) * inverse
        with torch.autocast(
            device.type, torch.bfloat16, enabled=policy == 'mixed_bfloat16', cache_enabled=False
        ):
            logits = model(normalised)
        logits = logits.float()
        loss = functional.cross_entropy(logits, labels, label_smoothing=0.1)
        return loss, (logits.argmax(1) == labels).sum()

    @torch.no_grad()
    def update(gradients):
        """Keras' RMSProp with momentum, L2 of the kernels, and the moving average."""
        decayed = [gradients[index] for index in kernels]
        torch._foreach_add_(decayed, [parameters[index] for index in kernels], alpha=1e-5)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(squares, 0.9)
        torch._foreach_addcmul_(squares, gradients, gradients, 0.1)
        roots = torch._foreach_add(squares, 1e-3)
        torch._foreach_sqrt_(roots)
        torch._foreach_mul_(momenta, 0.9)
        torch._foreach_addcdiv_(momenta, gradients, roots, rate)
        torch._foreach_sub_(parameters, momenta)
        torch._foreach_lerp_(average, averaged, 1 - decay)
        return norm

    if compiled:
        forward, update = torch.compile(forward), torch.compile(update)

    def step(images, labels, flip):
        loss, correct = forward(images, labels, flip)
        gradients = list(torch.autograd.grad(loss, parameters))
        return loss.detach(), correct, update(gradients)

    return step


def capture(torch, step: Callable, batches: Iterator, wait: Callable) -> Stream:
    """Records an update as a CUDA graph. Each replay begins with copying a batch to its place."""
    fixed = [tensor.clone() for tensor in next(batches)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(*fixed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(*fixed)

    def advance():
        for place, tensor in zip(fixed, next(batches), strict=True):
            place.copy_(tensor)
        graph.replay()
        return results

    advance()
    wait()
    if not math.isfinite(float(results[0])):
        raise ArithmeticError(f'the loss of a replayed update is {float(results[0])}')
    return Stream(advance, wait)


def profile_torch(torch, stream: Stream) -> list[tuple[str, str, float, int]]:
    """Returns ('', kernel, ms, calls) of the GPU, longest first."""
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as profile:
        for _ in range(PROFILED):
            stream.advance()
        stream.wait()
    rows = []
    for event in profile.key_averages():
        is_kernel = 'CUDA' in str(event.device_type)
        if is_kernel and event.self_device_time_total:
            rows.append(('', event.key, round(event.self_device_time_total / 1000, 4), event.count))
    return sorted(rows, key=lambda row: -row[2])


PARTS = {'floors': floors, 'check': check, 'ours': ours, 'timm': timm}


if __name__ == '__main__':
    main()
