"""Compiles a config for a TPU on a machine without one: does it fit, and how fast is it?

It trains nothing.
"""

import dataclasses
import glob
import inspect
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from ml_collections import ConfigDict

from common import console
from common.errors import ConfigError, RunError, counted
from devices.lowering import OneOfMany, lower
from devices.strategy import check_jit_compile_on_tpu, resolve_precision
from diagnostics.hlo_cost import Program
from diagnostics.tpu_compiler import GIB, DoesNotFit, Topology, compile_program
from experiment import planning
from experiment.planning import Plan
from experiment.session import build_state
from inputs import augment, dataset_status
from inputs.dataset_status import DatasetStatus
from modeling import distillation, models, steps

NUM_EXPENSIVE = 10  # instructions that are listed
BATCH_MULTIPLE = 8  # rows of a TPU's registers
MICRO_BATCHES = (64, 128, 256, 512)  # that are compared
TOLERANCE = 0.03  # of the search for the largest batch, as a share of it


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled step: one stage of training, or evaluation. Numbers are of one replica."""

    name: str
    batch: int
    image_size: int
    steps: int  # of the whole run
    program: Program


class EvaluationDoesNotFit(DoesNotFit):
    """Evaluation needs more memory than there is."""


def run(
    config: ConfigDict,
    workdir: str,
    topology_name: str,
    largest_batch: bool = False,
    tune: bool = False,
) -> None:
    """Prints the compiler's report.

    Args:
        largest_batch: whether to search for the largest batch that fits, too.
        tune: whether to compare numbers of micro-batches instead.

    Raises: ConfigError for what a TPU cannot do; RunError if it does not compile or does not fit.
    """
    topology = Topology.parse(topology_name)
    check_jit_compile_on_tpu(config)
    data = known_data(config)
    chips, replicas = counted(topology.num_chips, 'chip'), counted(topology.num_replicas, 'replica')
    console.line(f'preflight for {topology}: {chips}, {replicas}; compiling takes minutes')
    plan = plan_for(config, data, topology)
    for name, text in planning.summarize(config, plan).rows().items():
        console.row(name, text)
    if tune:
        tune_micro_batches(config, plan, topology)
        return
    try:
        compiled_steps = compile_steps(config, plan, topology)
    except DoesNotFit as error:
        key, what = 'batch_size', 'batch'
        if isinstance(error, EvaluationDoesNotFit):
            key, what = 'eval_batch_size', 'batch of the evaluation'
        raise RunError(
            f'{config[key]:,} images in a {what} do not fit into {topology}: a replica needs '
            f'{error}',
            batch_that_fits(config, data, topology, error, key),
            key,
        ) from None
    console.line(describe(compiled_steps, topology))
    if largest_batch:
        console.line('searching for the largest batch, by compiling others')
        per_replica, program = search_largest(
            config,
            data,
            topology,
            max(compiled_steps[:-1], key=lambda step: step.image_size),
        )
        memory = f'{program.memory_bytes / GIB:.2f} of {program.memory_available / GIB:g} GiB'
        flag = f'--config.batch_size={per_replica * topology.num_replicas}'
        console.row('largest', f'{per_replica:,} images on a replica, {flag}: {memory}')


def known_data(config: ConfigDict) -> DatasetStatus:
    """Returns the state of the data set; it need not be prepared.

    Raises: RunError if nothing says how many examples it has.
    """
    data = dataset_status.find_status(config.dataset)
    if data.num_train is None or data.num_eval is None:
        raise RunError(
            f'the number of examples in {config.dataset.name} is known only once it is prepared',
            'see --mode=check for the command',
        )
    return data


def plan_for(config: ConfigDict, data: DatasetStatus, topology: Topology) -> Plan:
    return planning.make_plan(
        config,
        data.num_train or 0,
        data.num_eval or 0,
        data.num_classes,
        topology.num_replicas,
    )


def compile_steps(config: ConfigDict, plan: Plan, topology: Topology) -> list[CompiledStep]:
    """Compiles the training step, for each image size of the run, and the evaluation step, last.

    Raises: DoesNotFit; EvaluationDoesNotFit; RunError.
    """
    compiled_steps: list[CompiledStep] = []
    begin = 0
    for end, stage in planning.stages(config, plan):
        program = compile_training(stage, plan, topology)
        compiled_steps.append(
            CompiledStep(
                'training',
                plan.batch_size // plan.num_replicas,
                stage.image_size,
                end - begin,
                program,
            )
        )
        begin = end
    batches = math.ceil(plan.eval_examples / plan.eval_batch_size) * math.ceil(
        plan.total_steps / plan.eval_every
    )
    try:
        program = compile_evaluation(config, plan, topology)
    except DoesNotFit as error:
        raise EvaluationDoesNotFit(error.needed, error.available) from None
    compiled_steps.append(
        CompiledStep(
            'evaluation',
            plan.eval_batch_size // plan.num_replicas,
            config.image_size,
            batches,
            program,
        )
    )
    return compiled_steps


def compile_training(config: ConfigDict, plan: Plan, topology: Topology) -> Program:
    """Compiles the training step that `train` runs, with its sums over all replicas."""
    return compile_program(
        lambda: lower_training(config, plan, topology),
        topology,
        'training',
        *description(config, plan),
    )


def compile_evaluation(config: ConfigDict, plan: Plan, topology: Topology) -> Program:
    """Compiles the evaluation step."""
    return compile_program(
        lambda: lower_evaluation(config, plan, topology),
        topology,
        'evaluation',
        *description(config, plan),
    )


def lower_training(config: ConfigDict, plan: Plan, topology: Topology) -> bytes:
    strategy, state, teacher = build(config, plan, topology)
    train_step = steps.make_train_step(
        state,
        config,
        augment.make_device_augment(config.augment, plan.num_classes),
        num_classes=plan.num_classes,
        num_replicas=plan.num_replicas,
        jit_compile=False,
        on_tpu=True,
        teacher=teacher,
    )
    batch = plan.batch_size // plan.num_replicas
    drawn = augment.draw_numbers(config.augment, tf.constant([0, 1], tf.int64))
    return lower(
        strategy,
        train_step,
        (
            *image_specs(batch, config.image_size),
            {
                name: tf.TensorSpec((batch, *value.shape), value.dtype)
                for name, value in drawn.items()
            },
        ),
    ).hlo


def lower_evaluation(config: ConfigDict, plan: Plan, topology: Topology) -> bytes:
    strategy, state, _ = build(config, plan, topology)
    batch = plan.eval_batch_size // plan.num_replicas
    return lower(
        strategy,
        steps.make_eval_step(state, num_classes=plan.num_classes),
        (*image_specs(batch, config.image_size), tf.TensorSpec((batch,), tf.float32)),
    ).hlo


def description(config: ConfigDict, plan: Plan) -> tuple[str, ...]:
    """Returns what determines a program: config, plan, versions, and the code that makes it."""
    functions = (build, image_specs, lower_training, lower_evaluation)
    code = ''.join(inspect.getsource(function) for function in functions)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for pattern in (
        'modeling/*.py',
        'inputs/augment.py',
        'experiment/session.py',
        'schedules.py',
        'devices/lowering.py',
    ):
        for path in sorted(glob.glob(os.path.join(root, pattern))):
            with open(path) as file:
                code += file.read()
    return config.to_json(sort_keys=True), repr(plan), tf.__version__, keras.__version__, code


def build(
    config: ConfigDict, plan: Plan, topology: Topology
) -> tuple[OneOfMany, steps.TrainState, Any]:
    """Builds (strategy, state, teacher) with random weights: a program does not depend on them."""
    keras.backend.clear_session()  # restarts the numbering of layer names
    policy = resolve_precision(config.precision, 'TPU')
    keras.config.set_dtype_policy(policy)
    strategy = OneOfMany(topology.num_replicas)
    with strategy.scope():
        state = build_state(models.build_model(config, plan.num_classes), config, plan, policy)
        class_names = known_data(config).class_names
        teacher = distillation.make_teacher(config, class_names, pretrained=False)
    return strategy, state, teacher.predict if teacher else None


def image_specs(batch: int, size: int) -> tuple[tf.TensorSpec, tf.TensorSpec]:
    return tf.TensorSpec((batch, size, size, 3), tf.uint8), tf.TensorSpec((batch,), tf.int64)


def batch_that_fits(
    config: ConfigDict, data: DatasetStatus, topology: Topology, error: DoesNotFit, key: str
) -> str:
    """Returns a sentence with a value of `key`, batch_size or eval_batch_size, that fits.

    It is predicted from the compiler's figure, and confirmed by compiling.
    """
    least = batch_multiple(config) if key == 'batch_size' else 1
    per_replica = config[key] // topology.num_replicas
    while per_replica > least:
        expected = int(0.95 * per_replica * error.available / error.needed)
        unit = (
            math.lcm(BATCH_MULTIPLE, least)
            if expected >= math.lcm(BATCH_MULTIPLE, least)
            else least
        )
        per_replica = max(least, expected // unit * unit)
        try:
            program = compile_with_batch(config, data, topology, per_replica, key)
        except DoesNotFit as again:
            error = again
            continue
        memory = f'{program.memory_bytes / GIB:.2f} GiB'
        fits = f'--config.{key}={per_replica * topology.num_replicas} fits, with {memory}'
        if key == 'eval_batch_size':
            return fits
        return (
            f'{fits}; lower schedule.peak_lr with it, or keep the batch and write '
            '--config.accumulate_steps=N'
        )
    return 'nor does the smallest batch: take smaller images or a smaller model'


def search_largest(
    config: ConfigDict, data: DatasetStatus, topology: Topology, compiled_step: CompiledStep
) -> tuple[int, Program]:
    """Returns (images on a replica, Program) of the largest training batch that fits.

    It bisects to within TOLERANCE, from a compiled step that fits.
    """
    unit = math.lcm(BATCH_MULTIPLE, batch_multiple(config))
    fits, program, too_many = compiled_step.batch, compiled_step.program, None
    while too_many is None or too_many - fits > max(unit, TOLERANCE * too_many):
        # Part of the memory does not grow with the batch, so the first guess is below the limit.
        growth = program.memory_available / program.memory_bytes
        tried = int(fits * max(1.1, growth)) if too_many is None else (fits + too_many) // 2
        tried = (max(fits + unit, tried)) // unit * unit
        try:
            program, fits = compile_with_batch(config, data, topology, tried, 'batch_size'), tried
        except (
            DoesNotFit,
            ConfigError,
        ) as error:
            # Or the config has no such batch: there are too few examples, say.
            too_many = tried
            reason = 'do not fit' if isinstance(error, DoesNotFit) else str(error)
        outcome = 'fit' if fits == tried else reason
        console.row('', f'{tried:,} images on a replica: {outcome}')
    return fits, program


def tune_micro_batches(config: ConfigDict, plan: Plan, topology: Topology) -> None:
    """Prints the speed of the training step, in its last stage, for several micro-batches.

    Their sizes are `MICRO_BATCHES` where they divide the batch of a replica, and the whole batch.
    """
    stage = planning.stages(config, plan)[-1][1]
    per_replica = plan.batch_size // plan.num_replicas
    chosen = steps.num_micro_batches(stage, plan.num_replicas, on_tpu=True)
    counts = {per_replica // size for size in MICRO_BATCHES if per_replica % size == 0}
    for count in sorted({chosen, 1} | counts):
        stage.accumulate_steps = count
        label = f'{counted(count, "micro-batch", "micro-batches")} of {per_replica // count:,}'
        try:
            program = compile_training(stage, plan, topology)
        except DoesNotFit as error:
            console.row('', f'{label}: does not fit, {error}')
            continue
        step = CompiledStep('training', per_replica, stage.image_size, 1, program)
        found = figures(step, topology)
        mark = ', which this config has' if count == chosen else ''
        console.row(
            '',
            f'{label}: {found["images_per_second_per_chip"][found["binds"]]:,.0f} images/s a chip, '
            f'{found["hbm_mb_per_image"]:.3g} MB of HBM traffic an image, '
            f'{found["memory_gib"]:.3g} GiB{mark}',
        )


def batch_multiple(config: ConfigDict) -> int:
    """Returns the number of which a replica's batch must be a multiple."""
    return math.lcm(
        1 if config.accumulate_steps == 'auto' else config.accumulate_steps,
        config.augment.repeats,
        2 if config.augment.mixup or config.augment.cutmix else 1,
    )


def compile_with_batch(
    config: ConfigDict, data: DatasetStatus, topology: Topology, per_replica: int, key: str
) -> Program:
    """Compiles the training step, in its largest stage, or the evaluation, with another batch."""
    config = config.copy_and_resolve_references()
    config[key] = per_replica * topology.num_replicas
    plan = plan_for(config, data, topology)
    if key == 'eval_batch_size':
        return compile_evaluation(config, plan, topology)
    return compile_training(planning.stages(config, plan)[-1][1], plan, topology)


def figures(compiled_step: CompiledStep, topology: Topology) -> dict[str, Any]:
    """Returns the figures of a compiled step: rates are in images/s per chip, shares in 0..1."""
    chip, program = topology.chip, compiled_step.program
    per_chip = compiled_step.batch * chip.replicas
    seconds = {
        "compiler's estimate": program.cycles / chip.clock,
        'HBM': program.hbm_traffic / (chip.hbm_bandwidth / chip.replicas),
        'matrix unit': program.flops / (chip.peak_flops / chip.replicas),
    }
    return {
        'batch_per_replica': compiled_step.batch,
        'image_size': compiled_step.image_size,
        'compile_seconds': round(program.seconds, 1),
        'memory_gib': program.memory_bytes / GIB,
        'memory_available_gib': program.memory_available / GIB,
        'estimated_cycles': program.cycles,
        'hbm_mb_per_image': program.hbm_traffic / compiled_step.batch / 1e6,
        'gflop_per_image': program.flops / compiled_step.batch / 1e9,
        'images_per_second_per_chip': {name: per_chip / value for name, value in seconds.items()},
        'binds': max(seconds, key=lambda name: seconds[name]),
        'share_of_peak': seconds['matrix unit'] / max(seconds.values()),
        'all_reduces': len(program.all_reduce_bytes),
        'all_reduce_mb': sum(program.all_reduce_bytes) / 1e6,
        'hours': compiled_step.steps * max(seconds.values()) / 3600,
    }


def describe(compiled_steps: Sequence[CompiledStep], topology: Topology) -> str:
    """Returns the table, and the most expensive instructions for the largest images."""
    columns = [figures(step, topology) for step in compiled_steps]
    rows = {
        '': [step.name for step in compiled_steps],
        'images': [f'{step.batch:,} of {step.image_size} px' for step in compiled_steps],
        'compiles': [f'yes, {column["compile_seconds"]:.0f} s' for column in columns],
        'memory per replica': [
            f'{column["memory_gib"]:.3g} of {column["memory_available_gib"]:g} GiB'
            for column in columns
        ],
        'sums over replicas': [
            f'{column["all_reduces"]}, {column["all_reduce_mb"]:.3g} MB in all'
            if column['all_reduces']
            else 'none'
            for column in columns
        ],
        'estimated cycles': [f'{column["estimated_cycles"] / 1e6:.3g} M' for column in columns],
        'HBM traffic per image': [f'{column["hbm_mb_per_image"]:.3g} MB' for column in columns],
        'operations per image': [f'{column["gflop_per_image"]:.3g} GFLOP' for column in columns],
    }
    for bound in columns[0]['images_per_second_per_chip']:
        cells = []
        for column in columns:
            mark = ' <- bottleneck' if column['binds'] == bound else ''
            cells.append(f'{column["images_per_second_per_chip"][bound]:,.0f}{mark}')
        rows[f'images/s per chip, {bound}'] = cells
    rows["share of the matrix unit's peak"] = [
        f'{column["share_of_peak"]:.1%}' for column in columns
    ]
    rows['time of the whole run'] = [duration(column['hours']) for column in columns]
    widths = [max(map(len, rows))] + [
        max(len(row[index]) for row in rows.values()) for index in range(len(compiled_steps))
    ]
    lines = ['  '.join(map(str.ljust, (name, *row), widths)).rstrip() for name, row in rows.items()]
    hours = sum(column['hours'] for column in columns)
    largest = max(compiled_steps[:-1], key=lambda step: step.image_size)
    return os.linesep.join(
        (
            '',
            *lines,
            '',
            f'{duration(hours)}, {hours * topology.num_chips:.3g} chip-hours: what the compiler '
            f'({largest.program.compiler}) estimates at {topology.chip.clock / 1e9:g} GHz.',
            'Nothing ran on a TPU; the time of all-reduces, the host and reading images is not '
            'included.',
            '',
            f'the {NUM_EXPENSIVE} most expensive instructions of the training step, of '
            f'{len(largest.program.instructions)}:',
            *expensive(largest.program),
        )
    )


def duration(hours: float) -> str:
    if hours >= 1:
        return f'{hours:.3g} hours'
    if hours >= 1 / 60:
        return f'{60 * hours:.3g} minutes'
    return f'{3600 * hours:.3g} seconds'


def expensive(program: Program) -> Iterator[str]:
    for instruction in program.instructions[:NUM_EXPENSIVE]:
        way = 'backward' if instruction.backward else 'forward' if instruction.layer else '-'
        yield (
            f'{instruction.cycles / program.cycles:6.1%}  {instruction.cycles:>11,}  {way:8}  '
            f'{instruction.layer or "-":24}  '
            f'{instruction.operation:50}  {instruction.shape}'
        )
