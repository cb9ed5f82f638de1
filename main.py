"""Trains, evaluates and exports image classifiers.

    python main.py --config=configs/digits.py

The exit status is 0 on success or Ctrl-C, 1 if the run failed, 2 for wrong usage or a wrong config,
143 after SIGTERM. An error that the user can fix is reported in one line; --verbosity=1 adds the
stack trace.
"""

import glob
import os
import platform
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from common.commands import install_command

try:
    from absl import flags, logging
    from ml_collections import ConfigDict, config_flags
except ImportError as error:
    sys.exit(
        f'error: {sys.executable} lacks what this program needs ({error}): '
        f'write .venv/bin/python after `make train`, or {install_command("cpu")}'
    )

os.environ['KERAS_BACKEND'] = 'tensorflow'  # before Keras is imported, whatever ~/.keras says
if platform.machine() in ('x86_64', 'AMD64'):
    # Kernels that TensorFlow leaves out without AVX-512, but which are faster without it too.
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')

from common import console, tpu_environment  # noqa: E402
from common.errors import (
    ConfigError,
    UserError,
    assertion_message,
    closest_match,
    one_line,
)  # noqa: E402
from experiment.overrides import check_overrides  # noqa: E402

# The two ways in which TensorFlow's messages name a lost worker.
LOST_WORKER = (
    r'(?:remote target|stopped sending heartbeats\):)\s+'
    r'/job:(\w+)/replica:[0-9]+/task:([0-9]+)'
)
FLAGS = flags.FLAGS
# Not locked: extra keys of config.schedule and config.optimizer are passed on as arguments.
# config_schema.check_config finds unknown keys.
config_flags.DEFINE_config_file(
    'config',
    None,
    'Config file, such as configs/digits.py; --config.KEY=VALUE changes a key.',
    lock_config=False,
    accept_new_attributes=True,
)
flags.DEFINE_string('workdir', None, 'Folder of the run; runs/NAME for configs/NAME.py by default.')
flags.DEFINE_enum(
    'mode',
    'train',
    ['train', 'evaluate', 'export', 'check', 'preview', 'preflight'],  # see MODES
    'What to do.',
)
flags.DEFINE_enum(
    'resume',
    'same',
    ['same', 'changed', 'never'],
    'What training does with an existing run in the folder. same: continues it if its config is '
    'the same; changed: continues it even with a changed config; never: moves it aside and starts '
    'a new one.',
)
flags.DEFINE_enum(
    'checkpoint',
    None,
    ['last', 'best'],
    'Which checkpoint to evaluate or export. Default for evaluate: the last; for export: the one '
    'that training exports, which is the best if config.patience is set, else the last.',
)
flags.DEFINE_string(
    'topology',
    'v5e:2x2',
    'TPU that preflight compiles for: generation and chip layout, such as v5e:2x2, or a generation '
    'alone for one chip.',
)
flags.DEFINE_bool('largest_batch', False, 'Let preflight search for the largest batch that fits.')
flags.DEFINE_bool('tune', False, 'Let preflight compare numbers of micro-batches.')
flags.DEFINE_integer(
    'step',
    None,
    'Which update to preview; by default the first skipped update of a run that diverged, else the '
    'first update of each stage.',
)
flags.DEFINE_string(
    'coordinator',
    None,
    'HOST:PORT of process 0, for several processes on JAX. On TPU slices and under Slurm they find '
    'each other without it.',
)
flags.DEFINE_integer('num_processes', None, 'How many processes there are; see --coordinator.')
flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0; see --coordinator.')
flags.DEFINE_bool('json', False, 'Print the results of --mode=check as JSON.')


def main(arguments: Sequence[str]) -> int:
    """Runs the mode that the command line names; returns the exit status."""
    signal.signal(signal.SIGTERM, raise_interrupt)
    try:
        config = parse(arguments)
        workdir = FLAGS.workdir or os.path.join('runs', config_name())
        # Two spellings of a folder must share one lock.
        workdir = os.path.expanduser(workdir.removeprefix('file://'))
        if FLAGS.mode != 'check':  # check must work even where TensorFlow cannot be imported
            import_tensorflow_and_check(config)
        return MODES[FLAGS.mode](config, workdir) or 0
    except BrokenPipeError:  # the reader of our output, such as `head`, has exited
        return console.discard_output()
    except KeyboardInterrupt as interrupted:
        return report_interrupt(interrupted)
    except Exception as error:
        return report_failure(error, as_json={'--json', '--mode=check'} <= set(arguments))


def report_interrupt(interrupted: KeyboardInterrupt) -> int:
    """Reports an interruption by a signal; returns the exit status."""
    status = interrupted.args[0] if interrupted.args else None
    if FLAGS.is_parsed() and FLAGS.mode in ('check', 'preflight'):
        console.warning('stopped: nothing was changed')
        return status or 128 + signal.SIGINT
    trains = not FLAGS.is_parsed() or FLAGS.mode == 'train'
    resumes = '; the same command continues from the last checkpoint, if there is one'
    console.warning(f'stopped{resumes if trains else ": nothing was changed"}')
    return status or 0


def report_failure(error: Exception, as_json: bool) -> int:
    """Prints an error, with its stack trace if the user cannot fix it or asks for it."""
    if 'devices.jax_start' in sys.modules:
        sys.modules['devices.jax_start'].await_report_of_loss(error)
    failure = as_user_error(error)
    if failure is None or (FLAGS.is_parsed() and FLAGS.verbosity >= 1):
        traceback.print_exc()
    if failure is None:
        console.error('internal error, please report it')
        return 1
    if as_json:
        from diagnostics import check, check_result

        check.print_json([check_result.from_error('config', failure)])
    console.error(failure.problem, failure.fix)
    return failure.exit_status


def import_tensorflow_and_check(config: ConfigDict) -> None:
    """Checks the config, and imports TensorFlow with this machine's settings."""
    from experiment import config_schema

    config_schema.check_values(config)  # before the import, which takes seconds
    join_processes(config)
    tpu_environment.set_pjrt_variables(config)
    if FLAGS.verbosity < 1:
        console.import_tensorflow_quietly()
    config_schema.check_config(config)


def join_processes(config: ConfigDict) -> None:
    """Makes this process one of several, if the flags or a launcher say so."""
    from devices import cluster, jax_start

    flags_ = (FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    processes = cluster.Cluster.from_flags(*flags_)
    if jax_start.is_wanted(config):
        processes = processes or cluster.find()
        if processes.has_peers:
            jax_start.join(processes)
    elif processes:
        raise ConfigError(
            f'--coordinator is for JAX, not for config.strategy={config.strategy!r}',
            '--config.strategy=pjrt, or leave it out',
            'strategy',
        )


def run_train(config: ConfigDict, workdir: str) -> int:
    import train

    return train.run(config, workdir, FLAGS.resume)


def run_evaluate(config: ConfigDict, workdir: str) -> None:
    import evaluate

    evaluate.run(config, workdir, FLAGS.checkpoint)


def run_export(config: ConfigDict, workdir: str) -> None:
    import export

    export.run(config, workdir, FLAGS.checkpoint)


def run_check(config: ConfigDict, workdir: str) -> int:
    from diagnostics import check

    return check.run(config, workdir, as_json=FLAGS.json)


def run_preview(config: ConfigDict, workdir: str) -> None:
    from diagnostics import preview

    preview.run(config, workdir, FLAGS.step)


def run_preflight(config: ConfigDict, workdir: str) -> None:
    from diagnostics import preflight

    preflight.run(config, workdir, FLAGS.topology, FLAGS.largest_batch, FLAGS.tune)


# Each returns the exit status, or None for 0. Their modules need TensorFlow, so they are imported
# after `prepare`.
MODES: dict[str, Callable[[ConfigDict, str], int | None]] = {
    'train': run_train,
    'evaluate': run_evaluate,
    'export': run_export,
    'check': run_check,
    'preview': run_preview,
    'preflight': run_preflight,
}


def raise_interrupt(signal_number: int, frame: FrameType | None) -> None:
    """Handles SIGTERM outside training: stops the program as SIGINT does, with status 143."""
    raise KeyboardInterrupt(128 + signal_number)


def as_user_error(error: Exception) -> UserError | None:
    """Converts an error to a UserError, or returns None if it is a bug in the program."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        return UserError(f'{type(error).__name__}: {one_line(error, 600)}')
    jax = sys.modules.get('jax')
    if jax and isinstance(error, jax.errors.JaxRuntimeError):
        text = one_line(error, 600)
        is_memory = text.startswith('RESOURCE_EXHAUSTED')
        return _out_of_memory(text) if is_memory else UserError(f'JAX stopped with {text}')
    if 'tensorflow' in sys.modules:
        return _tensorflow_user_error(error, sys.modules['tensorflow'].errors)
    return None


def _out_of_memory(text: str) -> UserError:
    fix = 'lower config.batch_size, config.eval_batch_size or config.image_size'
    return UserError(f'out of memory ({text[:200]})', fix)


def _tensorflow_user_error(error: Exception, errors: Any) -> UserError | None:
    """Converts an exception of `errors`, which is tf.errors, to a UserError; else returns None."""
    text = one_line(error, 600)
    short = text[:200]
    if isinstance(error, errors.ResourceExhaustedError):
        return _out_of_memory(text)
    lost = re.search(LOST_WORKER, str(error))
    if isinstance(error, errors.UnavailableError) and lost:
        fix = 'restart all workers; they continue at the last checkpoint'
        return UserError(f'{lost[1]} {lost[2]} no longer responds', fix)
    if isinstance(error, (errors.DataLossError, errors.OutOfRangeError)):
        fix = 'delete the folder that --mode=check names for it, and prepare it again'
        return UserError(f'a file of the data set is damaged or truncated ({short})', fix)
    if not isinstance(error, errors.OpError):
        return None
    if assertion := assertion_message(
        error
    ):  # raised by our own graphs, with a message for the user
        return UserError(assertion)
    hint = ' (an image that cannot be decoded?)' if 'ecode' in text else ''
    name = type(error).__name__
    return UserError(f'TensorFlow stopped with {name}: {text}{hint}; --verbosity=1 shows where')


def parse(arguments: Sequence[str]) -> ConfigDict:
    """Parses the command line; returns the config. Raises ConfigError."""
    if {'--help', '-h', '--helpfull'} & set(arguments):
        configs = ', '.join(known_configs())
        console.line(f'{__doc__}\n{FLAGS.main_module_help()}\n\nconfigs: {configs}')
        sys.exit(0)
    logging.set_verbosity(logging.ERROR)  # unless --verbosity says otherwise
    path = config_path(arguments)
    if not path:
        choices = ', '.join(known_configs())
        raise ConfigError('--config is missing', f'write --config=FILE, one of {choices}')
    if not os.path.isfile(path):
        nearest = closest_match(path, known_configs())
        fix = f'--config={nearest}' if nearest else f'write one of {", ".join(known_configs())}'
        raise ConfigError(f'--config={path} does not exist', fix)
    check_overrides(arguments)
    try:
        rest = FLAGS(arguments)[1:]
        config = FLAGS.config
        is_config = hasattr(config, 'to_json')  # a broken config file raises only when accessed
    except flags.Error as error:
        raise ConfigError(explain_config_error(error, path), 'see --help') from error
    except Exception as error:  # raised by the user's config file
        raise ConfigError(explain_config_error(error, path)) from error
    if rest:
        fix = 'write --config=configs/NAME.py and --config.KEY=VALUE'
        raise ConfigError(f'{rest[0]!r} is not a valid flag', fix)
    if FLAGS.workdir == '':
        raise ConfigError('--workdir is empty', 'name a folder, or leave it out')
    if not is_config:
        problem = 'get_config() of the config file must return the config'
        raise ConfigError(problem, 'end it with `return config`')
    if FLAGS.json and FLAGS.mode != 'check':
        raise ConfigError(
            f'--json is for --mode=check, not for --mode={FLAGS.mode}', 'leave it out'
        )
    return config


def config_path(arguments: Sequence[str]) -> str | None:
    """Returns the value of the last --config, or None."""
    path = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        name, equals, value = argument.partition('=')
        if name in ('--config', '-config'):
            path = value if equals else following
    return path


def explain_config_error(error: BaseException, path: str) -> str:
    """Describes in one line why absl rejects the arguments or what is wrong in the config file."""
    for cause in causes(error):
        frames = traceback.extract_tb(cause.__traceback__)
        lines = [frame.lineno for frame in frames if is_same_path(frame.filename, path)]
        if lines:
            where = f'{os.path.basename(path)}, line {lines[-1]}'
            return f'--config={path} is broken: {type(cause).__name__}: {one_line(cause)} ({where})'
    if isinstance(error, flags.Error):
        return one_line(error, 10_000)
    if isinstance(error, AttributeError) and error.name == 'get_config':
        return f'--config={path} does not define get_config()'
    return f'--config={path} is broken: {type(error).__name__}: {one_line(error)}'


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields the chain of exceptions that led to `error`, oldest first, `error` last."""
    if error:
        yield from causes(error.__cause__ or error.__context__)
        yield error


def is_same_path(path: str, other: str) -> bool:
    return os.path.abspath(path) == os.path.abspath(other)


def config_name() -> str:
    path = config_flags.get_config_filename(FLAGS['config'])
    return os.path.splitext(os.path.basename(path))[0]


def known_configs() -> list[str]:
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configs')
    paths = sorted(glob.glob(os.path.join(folder, '[a-z]*.py')))
    return [f'configs/{os.path.basename(path)}' for path in paths]


if __name__ == '__main__':
    console.tolerate_any_terminal()
    sys.exit(main(sys.argv))
