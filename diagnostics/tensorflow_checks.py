"""What the doctor can find out with TensorFlow alone: devices, data set, plan, model, checkpoints. It runs in a process of its own,
because TensorFlow can end or hang the process that imports it.
"""

import math
import os
import re
import shlex

from common import machine
from common.commands import python_command
from diagnostics.check_result import fail, ok, warn

GIB = 2**30
BATCHES = 3  # of decoded pictures on the host: one that is filled, one that waits, one that is used
LEFT_FOR_THE_MODEL = (
    1.5 * GIB
)  # of host memory, beside what is read ahead: TensorFlow with a loaded model takes about as much


def examine(say, hear):
    """Says {'imported': ...}, then {'checked': True} or {'mistake': why the config is wrong}, a {'finding': ...} for each row, and {'done': True}.

    It hears the config as a dict, the workdir, and after the check the number of TPU cores that were started, or 0.
    """
    values, workdir = hear()
    import tensorflow as tf

    built = tf.sysconfig.get_build_info()
    say(
        {
            'imported': {
                'version': tf.__version__,
                'gpus': [device.name for device in tf.config.list_physical_devices('GPU')],
                'cuda': built.get('cuda_version', ''),
                'cudnn': built.get('cudnn_version', ''),
            }
        }
    )
    from ml_collections import ConfigDict

    from common.errors import ConfigError, UserError, one_line
    from experiment import config_schema

    config = ConfigDict(values)
    try:
        config_schema.check_config(config)
    except ConfigError as error:
        say({'mistake': str(error)})
        return
    say({'checked': True})
    tpu_cores = hear()
    try:
        for finding in findings(config, workdir, tpu_cores):
            say({'finding': finding})
    except UserError as error:  # of something that the rest needs
        say({'finding': of_error('config', error)})
    except Exception as error:
        say(
            {
                'finding': fail(
                    'config',
                    f'{type(error).__name__}: {one_line(error)}',
                    'the same command without --mode=check and with --verbosity=1 shows where',
                )
            }
        )
    say({'done': True})


def findings(config, workdir, tpu_cores, root='/'):
    """Yields the rows from the strategy on. Raises UserError."""
    from common.errors import UserError
    from inputs import dataset_status

    replicas = tpu_cores
    if not tpu_cores:
        finding, replicas = strategy_finding(config)
        yield finding
    elif config.jit_compile == 'true':
        yield tpu_compile_finding(config)
    try:
        data = dataset_status.look(config.dataset)
    except UserError as error:
        yield of_error('data set', error)
        yield workdir_finding(config, workdir)
        return
    yield data_finding(config, data)
    yield memory_finding(config, data, root)
    plan = yield from plan_findings(config, data, replicas)
    checkpoint_bytes = (yield from model_findings(config, workdir, data, plan)) if plan else 0
    if checkpoint_bytes or data.room_bytes:
        yield disk_finding(config, workdir, data, checkpoint_bytes)
    yield workdir_finding(config, workdir)


def strategy_finding(config):
    """(Finding, number of replicas). Several workers are counted, not called: they are not there yet."""
    from common.errors import UserError
    from devices.strategy import (
        device_kind,
        make_strategy,
        num_workers,
        resolve_jit_compile,
        resolve_precision,
    )

    workers = num_workers()
    if config.strategy == 'multi_worker' or config.strategy == 'auto' and workers > 1:
        import tensorflow as tf

        return ok(
            'strategy', f'MultiWorkerMirroredStrategy on {workers} workers: TF_CONFIG names them'
        ), workers * max(1, len(tf.config.list_physical_devices('GPU')))
    try:
        strategy, reason = make_strategy(config)
    except UserError as error:
        return of_error('strategy', error), 1
    kind = device_kind(strategy)
    compute = f'{resolve_precision(config.precision, kind)}, XLA {"on" if resolve_jit_compile(config.jit_compile, kind) else "off"}'
    return ok('strategy', f'{reason}; {compute}'), strategy.num_replicas_in_sync


def tpu_compile_finding(config):
    """The setting that a TPU refuses."""
    from common.errors import ConfigError
    from devices.strategy import resolve_jit_compile

    try:
        resolve_jit_compile(config.jit_compile, 'TPU')
    except ConfigError as error:
        return fail('strategy', str(error), '--config.jit_compile=auto')


def data_finding(config, data):
    """Whether the data set is there, and if not how to get it."""
    name = config.dataset.name
    program = os.path.join(
        os.path.dirname(python_command()), 'tfds'
    )  # TFDS's own, beside this Python
    above = os.path.expanduser(config.dataset.data_dir) or data.place.split(f'/{name}/')[0]
    get = f'{program if os.path.exists(program) else "tfds"} build {name} --data_dir={shlex.quote(above)}   # or let the first start do it'
    if data.state == 'here':
        return ok('data set', f'{name} in {data.place}')
    in_the_way = machine.nearest(data.place) if '://' not in data.place else ''
    if in_the_way and not (os.path.isdir(in_the_way) and os.access(in_the_way, os.W_OK)):
        return fail(
            'data set',
            f'{name} is not prepared, and {in_the_way} is no folder that can be written to',
            '--config.dataset.data_dir=DIR, or export TFDS_DATA_DIR=DIR',
        )
    if data.state == 'made':
        return ok(
            'data set',
            f'{name}: made at the first start from what scikit-learn brings, in {data.place}',
        )
    if data.state == 'downloaded':
        size = (
            f'at most {machine.gib(data.num_bytes)}'
            if data.num_bytes
            else 'a size that TFDS does not know'
        )
        return warn(
            'data set',
            f'{name} is not in {data.place}: the first start downloads {size} and prepares it',
            get,
        )
    if data.state == 'unpacked':
        return warn(
            'data set',
            f'{name} is not prepared in {data.place}, but its archives are here: the first start unpacks them, which takes hours',
            get,
        )
    return fail(
        'data set',
        f'{name} is not prepared in {data.place}, and its archives are not here',
        f'{data.how}  Or name a folder that has it: --config.dataset.data_dir=DIR',
    )


def memory_finding(config, data, root='/'):
    """Memory against what is read ahead, `dataset.memory_gib`, or the whole data set where that is smaller, and against batches of decoded pictures."""
    from devices.strategy import num_workers

    free, where = machine.free_memory(root)
    budget = int(config.dataset.memory_gib * GIB)
    need = min(budget, data.num_bytes or budget)
    key = max(('batch_size', 'eval_batch_size'), key=config.get)
    batch = 3 * config.image_size**2 * config[key] // max(1, num_workers())
    batches = BATCHES * batch
    found = f'{machine.gib(free)} free on {where}; {machine.gib(need)} for pictures that are read ahead, {machine.gib(batches)} for batches'
    if batches > free:
        fits = max(1, config[key] // 2 ** math.ceil(math.log2(2 * batches / free)))
        return fail(
            'memory',
            f'{found}: one of {config[key]:,} pictures takes {machine.gib(batch)}',
            f'--config.{key}={fits}',
        )
    need += batches
    smaller = f'--config.dataset.memory_gib={max(0.01, free / 2 / GIB):.2g}'
    if need > free:
        return fail(
            'memory', f'{found} (config.dataset.memory_gib={config.dataset.memory_gib:g})', smaller
        )
    if need + LEFT_FOR_THE_MODEL > free:
        return warn(
            'memory',
            f'{found}, which leaves little for the model',
            smaller
            if need > LEFT_FOR_THE_MODEL
            else 'end other programs, or take a larger machine',
        )
    return ok('memory', found)


def plan_findings(config, data, replicas):
    """The durations of the config in steps, a row for each line of the plan; returns the plan, or None where there can be none."""
    from common.errors import ConfigError
    from experiment import planning

    known = data.num_train is not None
    try:
        plan = planning.make_plan(
            config,
            data.num_train if known else 2**20,
            data.num_eval if known else 2**10,
            data.num_classes,
            replicas,
        )
    except ConfigError as error:
        yield of_error('config', error)
        return None
    if known:
        for line in filter(
            None, (*plan.describe().splitlines(), planning.describe_stages(config, plan))
        ):
            yield ok(*line.split(None, 1))
    else:
        yield ok(
            'steps',
            f'{config.train_for} in batches of {config.batch_size:,}; the number of steps is known when the data set is prepared',
        )
    return plan


def model_findings(config, workdir, data, plan):
    """Parameters, where they come from, and what a picture costs; returns the bytes of a checkpoint, 0 where there can be none."""
    import keras
    import tensorflow as tf

    from common.errors import UserError
    from devices.strategy import resolve_precision
    from experiment import resume
    from experiment.session import build_state
    from modeling import distillation, models

    kind = 'GPU' if tf.config.list_physical_devices('GPU') else 'CPU'
    policy = resolve_precision(config.precision, kind)
    keras.config.set_dtype_policy(policy)
    try:
        with tf.device('CPU:0'):
            model = models.build_model(config, data.num_classes)
            state = build_state(model, config, plan, policy)
            cost = forward_multiply_adds(
                lambda images: model(images, training=False), config.image_size
            )
            if config.model.weights and not resume.begun(workdir):  # a run that goes on has its own
                yield weights_finding(config, model)
            teacher, teacher_source = distillation.make_teacher(
                config, data.class_names, pretrained=False
            )  # nothing is downloaded here
            teacher_cost = forward_multiply_adds(teacher, config.image_size) if teacher else 0
    except UserError as error:
        yield of_error('model', error)
        return 0
    checkpoint_bytes = sum(
        math.prod(variable.shape) * variable.dtype.size
        for part in state.variables().values()
        for variable in part
    )
    trained = sum(math.prod(variable.shape) for variable in model.trainable_variables)
    yield ok(
        'model',
        f'{config.model.name} with {config.optimizer.name}: {model.count_params():,} parameters, {trained:,} of them trained; '
        f'a checkpoint is {machine.gib(checkpoint_bytes)}',
    )
    whole_run = (
        f', and the whole run {2 * (3 * cost + teacher_cost) * plan.total_steps * plan.batch_size:.2g} FLOP'
        if data.num_train
        else ''
    )
    to_train = f'about three times that{f", and {in_words(teacher_cost)} of the teacher" if teacher else ""}'
    yield ok(
        'cost',
        f'{in_words(cost)} for a picture of {config.image_size} pixels; to train on it takes {to_train}{whole_run}',
    )
    if teacher:
        yield (
            pretrained_finding('teacher', teacher_source.name)
            if teacher_source.is_pretrained
            else ok('teacher', teacher_source.name)
        )
    return checkpoint_bytes


def weights_finding(config, model):
    """Whether the model can begin with the weights that the config names. Raises UserError where it cannot."""
    from modeling import pretrained
    from outputs.checkpoints import find

    source = config.model.weights
    if source == 'imagenet' and config.model.name != 'tiny':
        return pretrained_finding('weights', f'{config.model.name} (imagenet)')
    pretrained.load_weights(model, config, [], find)
    return ok('weights', f'{source} fits {config.model.name}')


def pretrained_finding(what, name):
    """Of weights that keras.applications brings."""
    folder = os.path.join(os.environ.get('KERAS_HOME') or os.path.expanduser('~/.keras'), 'models')
    return ok(what, f'{name}: downloaded into {folder} at the first start, unless it is there')


def in_words(multiply_adds):
    unit, name = (1e9, 'G') if multiply_adds >= 1e8 else (1e6, 'M')
    return f'{multiply_adds / unit:.3g} {name} multiply-adds ({2 * multiply_adds / unit:.3g} {name}FLOP)'


def forward_multiply_adds(network, image_size):
    """Multiply-adds of one picture, float32 [1, size, size, 3], through a network: half of the operations that TensorFlow's profiler counts."""
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    forward = tf.function(network, autograph=False).get_concrete_function(
        tf.TensorSpec([1, image_size, image_size, 3])
    )
    graph = convert_variables_to_constants_v2(
        forward
    ).graph  # with what functions, such as a SavedModel's, call
    profiler = tf.compat.v1.profiler
    options = (
        profiler.ProfileOptionBuilder(profiler.ProfileOptionBuilder.float_operation())
        .with_empty_output()
        .build()
    )
    return profiler.profile(graph, options=options).total_float_ops / 2


def disk_finding(config, workdir, data, checkpoint_bytes):
    """Disk against the data set where it is not prepared, and the checkpoints: the last few, the best, and one that is being written."""
    needs = [
        ((config.keep_checkpoints + 2) * checkpoint_bytes, 'checkpoints', workdir, '--workdir=DIR'),
        (data.room_bytes, config.dataset.name, data.place, '--config.dataset.data_dir=DIR'),
    ]
    systems = {}  # {(bytes free, number of the file system): needs there}
    for need in needs:
        if need[0] and '://' not in need[2]:
            systems.setdefault(machine.free_disk(need[2]), []).append(need)
    found = '; '.join(
        f'{machine.gib(free)} free for '
        + ' and '.join(f'{machine.gib(need)} of {name}' for need, name, *_ in of_it)
        for (free, _), of_it in systems.items()
    )
    short = [
        max(of_it) for (free, _), of_it in systems.items() if sum(need for need, *_ in of_it) > free
    ]
    if not short:
        return ok('disk', found or 'nothing is stored on this machine')
    _, name, place, elsewhere = short[0]
    guessed = (
        name != 'checkpoints' and data.state == 'downloaded'
    )  # TFDS adds up all variants that can be downloaded
    return (warn if guessed else fail)(
        'disk',
        f'{found}{" at most" * guessed}',
        f'df -h {shlex.quote(machine.nearest(place))}   # then make room there, or write {elsewhere}',
    )


def workdir_finding(config, workdir):
    """Whether what `workdir` holds, if anything, is a run of this config. Whether it can be written to is another row."""
    from common.errors import UserError
    from experiment.resume import begun, is_finished, require_same_config

    try:
        require_same_config(config, workdir)
        held, finished = begun(workdir), is_finished(workdir)
    except UserError as error:
        return of_error(
            'run',
            error,
            '--workdir=DIR, a folder or gs://BUCKET/FOLDER that you can read and write',
        )
    return ok(
        'run',
        f'{workdir} {"holds the finished run of this config" if finished else "holds a run of this config, which goes on" if held else "is new"}',
    )


def of_error(what, error, otherwise='see what configs/default.py says of it'):
    """A FAIL of one of our errors, whose text says what is wrong, a colon, and what to do; or names the key and the nearest value; or neither."""
    text = str(error)
    meant = re.match(r"config\.([\w.]+)='.*; did you mean (\S+)\?$", text)
    if meant:
        return fail(what, text.partition(';')[0], f'--config.{meant[1]}={meant[2]}')
    found, _, mend = text.rpartition(': ')
    if found and mend.count(')') == mend.count('('):
        return fail(what, found, mend.removeprefix('write '))
    flag = re.search(r'--\S+=\S+', text)
    return fail(what, text, flag[0] if flag else otherwise)
