"""Trains, evaluates and exports image classifiers.

    python main.py --config=configs/digits.py

The exit status is 0 if all is done, 1 if the run failed, 2 for wrong usage or a wrong config. What
the user can fix is one line; --verbosity=1 adds the stack trace.
"""

import glob
import os
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

from common import console, tpu_environment  # noqa: E402
from common.errors import ConfigError, UserError, assertion_in, one_line  # noqa: E402
from experiment.overrides import check_overrides  # noqa: E402

# How TensorFlow names a worker that it has lost, in the two ways that it has.
LOST_WORKER = (
    r'(?:remote target|stopped sending heartbeats\):)\s+'
    r'/job:(\w+)/replica:[0-9]+/task:([0-9]+)'
)
FLAGS = flags.FLAGS
# Not locked: further keys of config.schedule and config.optimizer are arguments.
# config_schema.check_config finds unknown keys.
config_flags.DEFINE_config_file(
    'config',
    None,
    'Config file, such as configs/digits.py; --config.KEY=VALUE changes a key.',
    lock_config=False,
    accept_new_attributes=True,
)
flags.DEFINE_string('workdir', None, 'Folder of the run; by default runs/NAME for configs/NAME.py.')
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
    'What training does with a run in the folder: continues it if its config is the same; '
    'continues '
    'it with a changed config; or moves it aside and starts a new one.',
)
flags.DEFINE_enum(
    'checkpoint',
    None,
    ['last', 'best'],
    'Which checkpoint to evaluate or export. By default the last is evaluated, and what training '
    'exports is exported: the best if config.patience is set, else the last.',
)
flags.DEFINE_string(
    'topology',
    'v5e:2x2',
    'The TPU of preflight: its generation and how its chips are wired, or a generation for one '
    'chip.',
)
flags.DEFINE_bool(
    'largest_batch', False, 'Whether preflight searches for the largest batch that fits.'
)
flags.DEFINE_integer(
    'step',
    None,
    'Which update to preview; by default the first, and of a progressive run the first of each '
    'stage.',
)
flags.DEFINE_bool('json', False, 'Whether check prints JSON.')


def main(arguments: Sequence[str]) -> int:
    """Runs the mode that the command line names; returns the exit status."""
    signal.signal(signal.SIGTERM, interrupt)
    try:
        config = parse(arguments)
        workdir = FLAGS.workdir or os.path.join('runs', config_name())
        workdir = os.path.expanduser(workdir.removeprefix('file://'))  # one folder has one lock
        if FLAGS.mode != 'check':  # it must work where TensorFlow cannot be imported
            prepare(config)
        return MODES[FLAGS.mode](config, workdir) or 0
    except BrokenPipeError:  # whoever read the output has gone
        return console.discard_output()
    except KeyboardInterrupt as interrupted:
        return report_interrupt(interrupted)
    except Exception as error:
        return report_failure(error)


def report_interrupt(interrupted: KeyboardInterrupt) -> int:
    """Says what a signal has stopped; returns the exit status."""
    status = interrupted.args[0] if interrupted.args else None
    if FLAGS.is_parsed() and FLAGS.mode in ('check', 'preflight'):
        console.warning('stopped: nothing was changed')
        return status or 128 + signal.SIGINT
    console.warning('stopped; the same command continues at the last checkpoint, if there is one')
    return status or 0


def report_failure(error: Exception) -> int:
    """Prints an error, with its stack trace if the user cannot fix it or asks for it."""
    failure = as_user_error(error)
    if failure is None or (FLAGS.is_parsed() and FLAGS.verbosity >= 1):
        traceback.print_exc()
    if failure is None:
        console.error('internal error, please report it')
        return 1
    console.error(failure.problem, failure.fix)
    return failure.exit_status


def prepare(config: ConfigDict) -> None:
    """Imports TensorFlow with this machine's settings, and checks the config."""
    tpu_environment.prepare(config)
    if FLAGS.verbosity < 1:
        console.import_tensorflow_quietly()
    from experiment import config_schema

    config_schema.check_config(config)


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

    preflight.run(config, workdir, FLAGS.topology, FLAGS.largest_batch)


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


def interrupt(signal_number: int, frame: FrameType | None) -> None:
    """Lets SIGTERM outside of training stop the program as SIGINT does, with its usual status."""
    raise KeyboardInterrupt(128 + signal_number)


def as_user_error(error: Exception) -> UserError | None:
    """Returns what the user can do about an error, or None: the program is wrong."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        return UserError(f'{type(error).__name__}: {one_line(error, 600)}')
    if 'tensorflow' in sys.modules:
        return _of_tensorflow(error, sys.modules['tensorflow'].errors)
    return None


def _of_tensorflow(error: Exception, errors: Any) -> UserError | None:
    """Returns what the user can do about one of TensorFlow's `errors`."""
    text = one_line(error, 600)
    short = text[:200]
    if isinstance(error, errors.ResourceExhaustedError):
        fix = 'lower config.batch_size, config.eval_batch_size or config.image_size'
        return UserError(f'out of memory ({short})', fix)
    lost = re.search(LOST_WORKER, str(error))
    if isinstance(error, errors.UnavailableError) and lost:
        fix = 'start all workers again, and they continue at the last checkpoint'
        return UserError(f'{lost[1]} {lost[2]} does not respond any more', fix)
    if isinstance(error, (errors.DataLossError, errors.OutOfRangeError)):
        fix = 'delete the folder that --mode=check names for it, and prepare it again'
        return UserError(f'a file of the data set is damaged or truncated ({short})', fix)
    if not isinstance(error, errors.OpError):
        return None
    if assertion := assertion_in(error):  # of this program's own graphs: it says what is wrong
        return UserError(assertion)
    hint = ' (an image that cannot be decoded?)' if 'ecode' in text else ''
    name = type(error).__name__
    return UserError(f'TensorFlow stopped with {name}: {text}{hint}; --verbosity=1 shows where')


def parse(arguments: Sequence[str]) -> ConfigDict:
    """Parses the command line; returns the config. Raises ConfigError."""
    if {'--help', '-h', '--helpfull'} & set(arguments):
        console.line(f'{__doc__}\n{FLAGS.main_module_help()}\n\nconfigs: {known_configs()}')
        sys.exit(0)
    logging.set_verbosity(logging.ERROR)  # unless --verbosity says otherwise
    path = config_path(arguments)
    if path is None:
        raise ConfigError('say what to train', f'--config=NAME, one of {known_configs()}')
    if not os.path.isfile(path):
        raise ConfigError(
            f'--config={path}: there is no such file', f'configs are {known_configs()}'
        )
    check_overrides(arguments)
    try:
        rest = FLAGS(arguments)[1:]
        config = FLAGS.config
        is_config = hasattr(config, 'to_json')  # a file that cannot be read fails only here
    except flags.Error as error:
        raise ConfigError(explain(error, path)) from error
    except Exception as error:  # of the user's own config file
        raise ConfigError(explain(error, path)) from error
    if rest:
        fix = '--config=configs/NAME.py and --config.KEY=VALUE'
        raise ConfigError(f'{rest[0]!r} is not a valid flag', fix)
    if not is_config:
        problem = 'get_config() of the config file must return the config'
        raise ConfigError(problem, 'end it with `return config`')
    if FLAGS.json and FLAGS.mode != 'check':
        raise ConfigError(
            f'--json is for --mode=check, not for --mode={FLAGS.mode}', 'leave it out'
        )
    return config


def config_path(arguments: Sequence[str]) -> str | None:
    """Returns the value of --config, the last one, or None."""
    path = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        name, equals, value = argument.partition('=')
        if name in ('--config', '-config'):
            path = value if equals else following
    return path


def explain(error: BaseException, path: str) -> str:
    """Returns one line on arguments that absl refuses, or on a config file that is broken."""
    for cause in causes(error):
        frames = traceback.extract_tb(cause.__traceback__)
        lines = [frame.lineno for frame in frames if is_same(frame.filename, path)]
        if lines:
            where = f'{os.path.basename(path)}, line {lines[-1]}'
            return f'--config={path} is broken: {type(cause).__name__}: {one_line(cause)} ({where})'
    if isinstance(error, flags.Error):
        return one_line(error, 10_000)
    return f'--config={path} is broken: {type(error).__name__}: {one_line(error)}'


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception, and those that it was raised from or during, the first of them first."""
    if error:
        yield from causes(error.__cause__ or error.__context__)
        yield error


def is_same(path: str, other: str) -> bool:
    return os.path.abspath(path) == os.path.abspath(other)


def config_name() -> str:
    path = config_flags.get_config_filename(FLAGS['config'])
    return os.path.splitext(os.path.basename(path))[0]


def known_configs() -> str:
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configs')
    paths = sorted(glob.glob(os.path.join(folder, '[a-z]*.py')))
    return ', '.join(f'configs/{os.path.basename(path)}' for path in paths)


if __name__ == '__main__':
    console.tolerate_any_terminal()
    sys.exit(main(sys.argv))
