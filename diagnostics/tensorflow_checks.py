"""The checks that need TensorFlow: devices, data set, plan, model, checkpoints.

They run in a process of their own, because importing TensorFlow can crash or hang a process.
"""

import math
import os
import shlex
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ml_collections import ConfigDict

from common import machine
from common.commands import python_command
from common.errors import ConfigError, UserError, one_line
from diagnostics.check_result import CheckResult, fail, from_error, ok, warn

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    from experiment.planning import Plan
    from inputs.dataset_status import DatasetStatus

GIB = 2**30
BATCHES = 3  # of decoded images on the host: one is filled, one waits, one is used
# Host memory besides read-ahead images: about what TensorFlow with a loaded model needs.
LEFT_FOR_THE_MODEL = 1.5 * GIB


def examine(send: Callable[[dict], None], receive: Callable[[], Any]) -> None:
    """Runs the checks in a `WorkerProcess`.

    It receives the config as a dict and the workdir, and after the check of the config the number
    of TPU cores that were started, or 0. It sends {'imported': ...}; then {'checked': True} or
    {'config_error': its problem, fix and key}; a {'result': ...} for each row; and {'done': True}.
    """
    values, workdir = receive()
    import tensorflow as tf

    built = tf.sysconfig.get_build_info()
    imported = {
        'version': tf.__version__,
        'gpus': [device.name for device in tf.config.list_physical_devices('GPU')],
        'cuda': built.get('cuda_version', ''),
        'cudnn': built.get('cudnn_version', ''),
    }
    send({'imported': imported})
    from experiment import config_schema

    config = ConfigDict(values)
    try:
        config_schema.check_config(config)
    except ConfigError as error:
        send({'config_error': (error.problem, error.fix, error.key)})
        return
    send({'checked': True})
    tpu_cores = receive()
    try:
        for result in results(config, workdir, tpu_cores):
            send({'result': result})
    except UserError as error:  # in something that the remaining checks need
        send({'result': from_error('config', error)})
    except Exception as error:
        fix = 'the same command without --mode=check and with --verbosity=1 shows where'
        send({'result': fail('config', f'{type(error).__name__}: {one_line(error)}', fix)})
    send({'done': True})


def results(
    config: ConfigDict, workdir: str, tpu_cores: int, root: str = '/'
) -> Iterator[CheckResult]:
    """Yields the rows from the strategy on. Raises UserError."""
    from inputs import dataset_status

    replicas = tpu_cores
    if not tpu_cores:
        result, replicas = check_strategy(config)
        yield result
    elif config.jit_compile != 'auto':
        yield check_tpu_compile(config)
    try:
        data = dataset_status.find_status(config.dataset)
    except UserError as error:
        yield from_error('data set', error)
        yield check_workdir(config, workdir)
        return
    yield check_data(config, data)
    yield check_memory(config, data, root)
    plan = yield from check_plan(config, data, replicas)
    checkpoint_bytes = 0
    if plan:
        checkpoint_bytes = yield from check_model(config, workdir, data, plan)
    if checkpoint_bytes or data.room_bytes:
        yield check_disk(config, workdir, data, checkpoint_bytes)
    yield check_workdir(config, workdir)


def check_strategy(config: ConfigDict) -> tuple[CheckResult, int]:
    """Returns the result, and the number of replicas.

    Several workers are counted, not contacted: they are not running yet.
    """
    from devices import cluster, jax_start
    from devices.lowering import OneOfMany
    from devices.strategy import (
        device_kind,
        make_strategy,
        num_workers,
        resolve_jit_compile,
        resolve_precision,
    )

    workers = num_workers()
    if config.strategy == 'multi_worker' or (config.strategy == 'auto' and workers > 1):
        import tensorflow as tf

        devices = max(1, len(tf.config.list_physical_devices('GPU')))
        message = f'MultiWorkerMirroredStrategy on {workers} workers: TF_CONFIG names them'
        return ok('strategy', message), workers * devices
    num_processes = 1
    try:
        if jax_start.is_wanted(config):  # the other processes are counted, not contacted
            num_processes = cluster.find().num_processes or 1
        strategy, reason = make_strategy(config)
    except UserError as error:
        return from_error('strategy', error), 1
    kind = device_kind(strategy)
    is_compiled = isinstance(strategy, OneOfMany) or resolve_jit_compile(config.jit_compile, kind)
    xla = 'on' if is_compiled else 'off'
    precision = resolve_precision(config.precision, kind)
    message = f'{reason}; {precision}, XLA {xla}'
    return ok('strategy', message), strategy.num_replicas_in_sync * num_processes


def check_tpu_compile(config: ConfigDict) -> CheckResult:
    """Checks a `jit_compile` that TPUs refuse."""
    from devices.strategy import check_jit_compile_on_tpu

    try:
        check_jit_compile_on_tpu(config)
    except ConfigError as error:
        return from_error('strategy', error)
    return ok('strategy', f'jit_compile={config.jit_compile}')


def check_data(config: ConfigDict, data: 'DatasetStatus') -> CheckResult:
    """Checks whether the data set is there, and if not says how to get it."""
    name, place = config.dataset.name, data.place
    if data.state == 'ready':
        return ok('data set', f'{name} in {place}')
    nearest_folder = machine.nearest_existing_path(place) if '://' not in place else ''
    if nearest_folder and not (
        os.path.isdir(nearest_folder) and os.access(nearest_folder, os.W_OK)
    ):
        return fail(
            'data set',
            f'{name} is not prepared, and {nearest_folder} is not a folder that can be written to',
            '--config.dataset.data_dir=DIR, or export TFDS_DATA_DIR=DIR',
        )
    if data.state == 'to_generate':
        source = "created at the first start from scikit-learn's data"
        return ok('data set', f'{name}: {source}, in {place}')
    if data.state == 'to_download':
        size = 'an amount that TFDS does not know'
        if data.num_bytes:
            size = f'at most {machine.gib(data.num_bytes)}'
        message = f'{name} is not in {place}: the first start downloads {size} and prepares it'
        return warn('data set', message, _build_command(config, data))
    if data.state == 'to_unpack':
        message = (
            f'{name} is not prepared in {place}, but its archives are here: '
            'the first start unpacks them, which takes hours'
        )
        return warn('data set', message, _build_command(config, data))
    return fail(
        'data set',
        f'{name} is not prepared in {place}, and its archives are not here',
        f'{data.how}  Or name a folder that has it: --config.dataset.data_dir=DIR',
    )


def _build_command(config: ConfigDict, data: 'DatasetStatus') -> str:
    """Returns TFDS' command that prepares the data set."""
    name = config.dataset.name
    program = os.path.join(os.path.dirname(python_command()), 'tfds')  # beside this Python
    program = program if os.path.exists(program) else 'tfds'
    above = os.path.expanduser(config.dataset.data_dir) or data.place.split(f'/{name}/')[0]
    folder = shlex.quote(above)
    return f'{program} build {name} --data_dir={folder}   # or let the first start do it'


def check_memory(config: ConfigDict, data: 'DatasetStatus', root: str = '/') -> CheckResult:
    """Compares free memory with what is read ahead and with batches of decoded images.

    `dataset.memory_gib` is read ahead, or the whole data set if that is smaller.
    """
    from devices.strategy import num_workers

    free, where = machine.free_memory(root)
    budget = int(config.dataset.memory_gib * GIB)
    read_ahead = min(budget, data.num_bytes or budget)
    key = max(('batch_size', 'eval_batch_size'), key=config.get)
    batch = 3 * config.image_size**2 * config[key] // max(1, num_workers())
    batches = BATCHES * batch
    message = (
        f'{machine.gib(free)} free on {where}; {machine.gib(read_ahead)} for images that are '
        f'read ahead, {machine.gib(batches)} for batches'
    )
    if batches > free:
        fits = max(1, config[key] // 2 ** math.ceil(math.log2(2 * batches / free)))
        message = f'{message}: one batch of {config[key]:,} images takes {machine.gib(batch)}'
        return fail('memory', message, f'--config.{key}={fits}')
    need = read_ahead + batches
    smaller = f'--config.dataset.memory_gib={max(0.01, free / 2 / GIB):.2g}'
    if need > free:
        message = f'{message} (config.dataset.memory_gib={config.dataset.memory_gib:g})'
        return fail('memory', message, smaller)
    if need + LEFT_FOR_THE_MODEL > free:
        can_shrink = need > LEFT_FOR_THE_MODEL
        fix = smaller if can_shrink else 'end other programs, or take a larger machine'
        return warn('memory', f'{message}, which leaves little for the model', fix)
    return ok('memory', message)


def check_plan(
    config: ConfigDict, data: 'DatasetStatus', replicas: int
) -> Generator[CheckResult, None, 'Plan | None']:
    """Yields a row for each row of the plan; returns the plan, or None if it is impossible."""
    from experiment import planning

    num_train, num_eval = data.num_train, data.num_eval
    is_known = num_train is not None and num_eval is not None
    if num_train is None or num_eval is None:
        num_train, num_eval = 2**20, 2**10  # a stand-in: no row shows what follows from it
    try:
        plan = planning.make_plan(config, num_train, num_eval, data.num_classes, replicas)
    except ConfigError as error:
        yield from_error('config', error)
        return None
    if is_known:
        for name, text in planning.summarize(config, plan).rows().items():
            yield ok(name, text)
    else:
        batches = f'{config.train_for} in batches of {config.batch_size:,}'
        later = 'the number of steps is known only once the data set is prepared'
        yield ok('steps', f'{batches}; {later}')
    return plan


def check_model(
    config: ConfigDict, workdir: str, data: 'DatasetStatus', plan: 'Plan'
) -> Generator[CheckResult, None, int]:
    """Yields rows on parameters, their source, and the cost of an image.

    Returns: the bytes of a checkpoint, 0 if the model cannot be built.
    """
    import keras
    import tensorflow as tf

    from devices.strategy import resolve_precision
    from experiment import resume
    from experiment.session import build_state
    from modeling import distillation, models

    kind = 'GPU' if tf.config.list_physical_devices('GPU') else 'CPU'
    policy = resolve_precision(config.precision, kind)
    keras.config.set_dtype_policy(policy)
    teacher_cost = 0.0
    try:
        with tf.device('CPU:0'):
            model = models.build_model(config, data.num_classes)
            state = build_state(model, config, plan, policy)
            cost = forward_multiply_adds(
                lambda images: model(images, training=False), config.image_size
            )
            if config.model.weights and not resume.has_run(workdir):  # else the run has its own
                yield check_weights(config, model)
            teacher = distillation.make_teacher(config, data.class_names, pretrained=False)
            if teacher:
                teacher_cost = forward_multiply_adds(teacher.predict, config.image_size)
    except UserError as error:
        yield from_error('model', error)
        return 0
    variables = [variable for part in state.variables().values() for variable in part]
    checkpoint_bytes = sum(_size(variable) * variable.dtype.size for variable in variables)
    trained = sum(map(_size, model.trainable_variables))
    yield ok(
        'model',
        f'{config.model.name} with {config.optimizer.name}: {model.count_params():,} parameters, '
        f'{trained:,} of them trained; a checkpoint is {machine.gib(checkpoint_bytes)}',
    )
    yield _cost_result(config, data, plan, cost, teacher_cost)
    if teacher:
        if teacher.is_pretrained:
            yield check_pretrained('teacher', teacher.name)
        else:
            yield ok('teacher', teacher.name)
    return checkpoint_bytes


def _cost_result(
    config: ConfigDict, data: 'DatasetStatus', plan: 'Plan', cost: float, teacher_cost: float
) -> CheckResult:
    to_train = 'about three times that'
    if teacher_cost:
        to_train += f', and {format_multiply_adds(teacher_cost)} of the teacher'
    whole_run = ''
    if data.num_train:
        examples = plan.total_steps * plan.batch_size
        whole_run = f', and the whole run {2 * (3 * cost + teacher_cost) * examples:.2g} FLOP'
    return ok(
        'cost',
        f'{format_multiply_adds(cost)} for an image of {config.image_size} x {config.image_size} '
        f'pixels; training on it takes {to_train}{whole_run}',
    )


def _size(variable: 'tf.Variable') -> int:
    return math.prod(variable.shape)


def check_weights(config: ConfigDict, model: 'keras.Model') -> CheckResult:
    """Checks whether the model can start with the weights that the config names.

    Raises: UserError: it cannot.
    """
    from modeling import pretrained
    from modeling.models import NETWORKS
    from outputs.checkpoints import find_checkpoint

    source = config.model.weights
    if source == 'imagenet' and config.model.name not in NETWORKS:
        return check_pretrained('weights', f'{config.model.name} (imagenet)')
    pretrained.load_weights(model, config, [], find_checkpoint)
    return ok('weights', f'{source} fits {config.model.name}')


def check_pretrained(name: str, source: str) -> CheckResult:
    """Says where keras.applications stores the weights that it downloads."""
    home = os.environ.get('KERAS_HOME') or os.path.expanduser('~/.keras')
    folder = os.path.join(home, 'models')
    return ok(name, f'{source}: downloaded into {folder} at the first start, unless already there')


def format_multiply_adds(multiply_adds: float) -> str:
    unit, name = (1e9, 'G') if multiply_adds >= 1e8 else (1e6, 'M')
    return (
        f'{multiply_adds / unit:.3g} {name} multiply-adds '
        f'({2 * multiply_adds / unit:.3g} {name}FLOP)'
    )


def forward_multiply_adds(network: 'Callable[[tf.Tensor], tf.Tensor]', image_size: int) -> float:
    """Returns the multiply-adds of one image, float32 [1, size, size, 3], through a network.

    They are half of the operations that TensorFlow's profiler counts.
    """
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2,
    )

    forward = tf.function(network, autograph=False).get_concrete_function(
        tf.TensorSpec([1, image_size, image_size, 3])
    )
    graph = convert_variables_to_constants_v2(forward).graph  # with the functions that it calls
    profiler = tf.compat.v1.profiler
    operations = profiler.ProfileOptionBuilder.float_operation()
    options = profiler.ProfileOptionBuilder(operations).with_empty_output().build()
    return profiler.profile(graph, options=options).total_float_ops / 2


class _Need(NamedTuple):
    """What needs room on a disk, and the flag that moves it elsewhere."""

    num_bytes: int
    name: str
    place: str
    elsewhere: str


def check_disk(
    config: ConfigDict, workdir: str, data: 'DatasetStatus', checkpoint_bytes: int
) -> CheckResult:
    """Compares free disk space with a data set to be prepared and with the checkpoints.

    These are the last few, the best, and one that is being written.
    """
    checkpoints = (config.keep_checkpoints + 2) * checkpoint_bytes
    needs = (
        _Need(checkpoints, 'checkpoints', workdir, '--workdir=DIR'),
        _Need(data.room_bytes, config.dataset.name, data.place, '--config.dataset.data_dir=DIR'),
    )
    file_systems: dict[
        tuple[int, int], list[_Need]
    ] = {}  # by (bytes free, number of the file system)
    for need in needs:
        if need.num_bytes and '://' not in need.place:
            file_systems.setdefault(machine.free_disk(need.place), []).append(need)
    found = []
    for (free, _), on_it in file_systems.items():
        parts = ' and '.join(f'{machine.gib(need.num_bytes)} of {need.name}' for need in on_it)
        found.append(f'{machine.gib(free)} free for {parts}')
    message = '; '.join(found) or 'nothing is stored on this machine'
    too_full = [
        max(on_it, key=lambda need: need.num_bytes)
        for (free, _), on_it in file_systems.items()
        if sum(need.num_bytes for need in on_it) > free
    ]
    if not too_full:
        return ok('disk', message)
    largest = too_full[0]
    place = shlex.quote(machine.nearest_existing_path(largest.place))
    fix = f'df -h {place}   # then make room there, or write {largest.elsewhere}'
    # TFDS adds up all variants that can be downloaded.
    is_guess = largest.name != 'checkpoints' and data.state == 'to_download'
    return warn('disk', f'{message} at most', fix) if is_guess else fail('disk', message, fix)


def check_workdir(config: ConfigDict, workdir: str) -> CheckResult:
    """Checks whether the run in `workdir`, if any, is one of this config.

    Whether the folder can be written to is another row.
    """
    from experiment import resume

    try:
        resume.require_same_config(config, workdir)
        has_run, is_finished = resume.has_run(workdir), resume.is_finished(workdir)
    except UserError as error:
        fix = '--workdir=DIR, a folder or gs://BUCKET/FOLDER that you can read and write'
        return from_error('run', error, fix)
    if is_finished:
        return ok('run', f'{workdir} holds the finished run of this config')
    if has_run:
        return ok('run', f'{workdir} holds a run of this config, which continues')
    return ok('run', f'{workdir} holds no run yet')
