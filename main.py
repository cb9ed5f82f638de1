"""Trains, evaluates and exports image classifiers: python main.py --config=configs/digits.py

Picks the verb, and turns a user's mistake into one clear line and an exit status: 0 done, 1 the run failed, 2 wrong
usage or config. --verbosity=1 shows the stack trace as well.
"""

import functools
import glob
import os
import re
import signal
import sys
import traceback

from common.commands import install_command

try:
    from absl import flags, logging
    from ml_collections import config_flags
except ImportError as error:
    sys.exit(
        f'error: {sys.executable} lacks what this program needs ({error}): write .venv/bin/python after `make train`, or {install_command("cpu")}'
    )

os.environ['KERAS_BACKEND'] = (
    'tensorflow'  # before Keras is imported, whatever ~/.keras/keras.json says
)

from common import tpu_environment  # noqa: E402
from common.console import discard_output, import_tensorflow_quietly, tolerate_any_terminal  # noqa: E402
from common.errors import ConfigError, UserError, did_you_mean, one_line  # noqa: E402
from configs import default  # noqa: E402

FLAGS = flags.FLAGS
# Not locked: further keys of config.schedule and config.optimizer are arguments. config_schema.check_config finds unknown keys.
config_flags.DEFINE_config_file(
    'config',
    None,
    'Config file, such as configs/digits.py; --config.KEY=VALUE changes a key.',
    lock_config=False,
    accept_new_attributes=True,
)
flags.DEFINE_string('workdir', None, 'Folder of the run; runs/NAME for configs/NAME.py by default.')
flags.DEFINE_enum(
    'mode', 'train', ['train', 'evaluate', 'export', 'check', 'preview', 'preflight'], 'What to do.'
)  # see MODES
flags.DEFINE_enum(
    'resume',
    'same',
    ['same', 'changed', 'never'],
    'What training does with a run that is in the folder: goes on if its config is the '
    'same; goes on with this config although it is another; or moves it aside and begins anew.',
)
flags.DEFINE_enum(
    'checkpoint',
    None,
    ['last', 'best'],
    'Which checkpoint to evaluate or export. By default the last is evaluated, and what training '
    'exports is exported: the best where config.patience is set, else the last.',
)
flags.DEFINE_string(
    'topology',
    'v5e:2x2',
    'The TPU of preflight: its generation and how its chips are wired, or a generation for one chip.',
)
flags.DEFINE_bool(
    'largest_batch',
    False,
    'Whether preflight searches the largest batch that fits, which takes some more compilations.',
)
flags.DEFINE_integer(
    'step',
    None,
    'Which update to preview; by default the first, and of a progressive run the first of each stage.',
)


def main(arguments):
    """Runs the verb that the command line names; returns the exit status."""
    signal.signal(signal.SIGTERM, interrupt)
    try:
        config = parse(arguments)
        workdir = os.path.expanduser(
            (FLAGS.workdir or os.path.join('runs', config_name())).removeprefix('file://')
        )  # the same folder has the same lock
        if FLAGS.mode != 'check':  # it must get by where TensorFlow cannot be imported
            prepare(config)
        return MODES[FLAGS.mode](config, workdir) or 0
    except BrokenPipeError:  # who read the output has gone
        return discard_output()
    except KeyboardInterrupt as interrupted:
        if FLAGS.is_parsed() and FLAGS.mode in ('check', 'preflight'):
            print('stopped: nothing was changed', file=sys.stderr)
            return interrupted.args[0] if interrupted.args else 128 + signal.SIGINT
        print(
            'stopped; the same command goes on from the last checkpoint, if there is one',
            file=sys.stderr,
        )
        return interrupted.args[0] if interrupted.args else 0
    except Exception as error:
        line, status = failure(error)
        if line is None or FLAGS.is_parsed() and FLAGS.verbosity >= 1:
            traceback.print_exc()
        print(f'error: {line or "this is a mistake of the program, not yours"}', file=sys.stderr)
        return status


def prepare(config):
    """Imports TensorFlow as this machine wants it, and checks the config. Raises ConfigError."""
    tpu_environment.prepare(config)
    if FLAGS.verbosity < 1:
        import_tensorflow_quietly()
    from experiment import config_schema

    config_schema.check_config(config)


def run_train(config, workdir):
    import train

    return train.run(config, workdir, FLAGS.resume)


def run_evaluate(config, workdir):
    import evaluate

    evaluate.run(config, workdir, FLAGS.checkpoint)


def run_export(config, workdir):
    import export

    export.run(config, workdir, FLAGS.checkpoint)


def run_check(config, workdir):
    from diagnostics import check

    return check.run(config, workdir)


def run_preview(config, workdir):
    from diagnostics import preview

    preview.run(config, workdir, FLAGS.step)


def run_preflight(config, workdir):
    from diagnostics import preflight

    preflight.run(config, workdir, FLAGS.topology, FLAGS.largest_batch)


# Each returns the exit status, or None for 0. Their modules need TensorFlow, which is imported after `prepare`.
MODES = {
    'train': run_train,
    'evaluate': run_evaluate,
    'export': run_export,
    'check': run_check,
    'preview': run_preview,
    'preflight': run_preflight,
}


def interrupt(signal_number, frame):
    """SIGTERM outside of training stops as SIGINT does, with the status that is usual for it."""
    raise KeyboardInterrupt(128 + signal_number)


def failure(error):
    """(one line, exit status) for what a user can mend: a UserError, the file system, data or memory; else (None, 1)."""
    if isinstance(error, UserError):
        return str(error), error.exit_status
    text = one_line(error, 600)
    if isinstance(error, OSError):
        return f'{type(error).__name__}: {text}', 1
    errors = sys.modules['tensorflow'].errors if 'tensorflow' in sys.modules else None
    if errors and isinstance(error, errors.ResourceExhaustedError):
        return (
            f'out of memory: lower config.batch_size, config.eval_batch_size or config.image_size ({text[:200]})',
            1,
        )
    lost = re.search(
        r'(?:remote target|stopped sending heartbeats\):)\s+/job:(\w+)/replica:[0-9]+/task:([0-9]+)',
        str(error),
    )
    if errors and isinstance(error, errors.UnavailableError) and lost:
        return (
            f'{lost[1]} {lost[2]} does not answer any more: start all workers again, and they continue at the last checkpoint',
            1,
        )
    if errors and isinstance(error, (errors.DataLossError, errors.OutOfRangeError)):
        return (
            f'a file of the data set is damaged or cut short ({text[:200]}): delete the folder that --mode=check names for it, and prepare it again',
            1,
        )
    if errors and isinstance(error, errors.OpError):
        from inputs.tfds_features import BAD_LABEL

        if text.startswith(BAD_LABEL):
            return text, 1
        hint = ' (a picture that cannot be decoded?)' if 'ecode' in text else ''
        return (
            f'TensorFlow stopped with {type(error).__name__}: {text}{hint}; --verbosity=1 shows where',
            1,
        )
    return None, 1


def parse(arguments):
    """Parses the command line; returns the config. Raises ConfigError."""
    if {'--help', '-h', '--helpfull'} & set(arguments):
        print(f'{__doc__}\n{FLAGS.main_module_help()}\n\nconfigs: {known_configs()}')
        sys.exit(0)
    logging.set_verbosity(logging.ERROR)  # unless --verbosity says otherwise
    try:
        rest = FLAGS(arguments)[1:]
        if rest:
            raise ConfigError(
                f'{rest[0]!r} is no flag: write --config=configs/NAME.py and --config.KEY=VALUE'
            )
        if FLAGS['config'].present == 0:
            raise ConfigError(f'say what to train: --config=NAME, one of {known_configs()}')
        if not hasattr(FLAGS.config, 'to_json'):  # a file that cannot be read shows itself only now
            raise ConfigError(
                'get_config() of the config file must return the config: end it with `return config`'
            )
    except ConfigError:
        raise
    except Exception as error:  # of absl, ml_collections, or the user's own config file
        raise ConfigError(explain(error, arguments)) from error
    return FLAGS.config


def explain(error, arguments):
    """One line about a command line or config file that could not be read."""
    path = next(
        (
            value
            for argument, value in zip(arguments, [*arguments[1:], ''])
            if argument in ('--config', '-config')
        ),
        None,
    )
    path = next(
        (argument.split('=', 1)[1] for argument in arguments if re.match('--?config=', argument)),
        path,
    )
    if path is not None and not os.path.isfile(path):
        return f'--config={path}: there is no such file; configs are {known_configs()}'
    text = one_line(error, limit=10_000) or type(error).__name__
    wrong_value = re.match(r'flag --(config\.[\w.]+)=(.*?): ', text)
    if wrong_value:
        key, value = wrong_value.groups()
        reference = functools.reduce(
            lambda section, part: section.get(part, 0.0), key.split('.')[1:], default.get_config()
        )
        if hasattr(reference, 'keys'):
            return f'{key} has keys of its own: write --{key}.KEY=VALUE, KEY being one of {", ".join(reference.keys())}'
        kind = {
            int: 'a whole number',
            float: 'a number',
            bool: 'true or false',
            tuple: 'several values in brackets',
        }[type(reference)]
        return f'{key}={value!r} cannot be read: write {kind}, as in --{key}={reference!r}'
    sections = [name for name, value in default.get_config().items() if hasattr(value, 'keys')]
    for section in re.findall(r'--?config\.(\w+)\.', ' '.join(arguments)):
        if section not in sections:
            return f'config.{section} has no keys: sections are {", ".join(sections)}{did_you_mean(section, sections)}'
    if path is None:
        return (
            text
            if '--config.' not in ' '.join(arguments)
            else f'say what to train first: --config=NAME, one of {known_configs()}'
        )
    if 'whilst parsing config file' in text:  # with the whole stack trace
        lines = re.findall(f'File "[^"]*{re.escape(os.path.basename(path))}", line ([0-9]+)', text)
        where = f', line {lines[-1]}' if lines else ''
        return f'--config={path} is broken{where}: {str(error).strip().splitlines()[-1]}'
    if isinstance(error, flags.Error):
        return text
    where = traceback.extract_tb(error.__traceback__)[-1]
    where = (
        f' ({os.path.basename(where.filename)}, line {where.lineno})'
        if where.filename == os.path.abspath(path)
        or os.path.basename(path) == os.path.basename(where.filename)
        else ''
    )
    return f'--config={path} is broken: {type(error).__name__}: {text[-300:]}{where}'


def config_name():
    return os.path.splitext(os.path.basename(config_flags.get_config_filename(FLAGS['config'])))[0]


def known_configs():
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configs')
    return ', '.join(
        f'configs/{os.path.basename(path)}'
        for path in sorted(glob.glob(os.path.join(folder, '[a-z]*.py')))
    )


if __name__ == '__main__':
    tolerate_any_terminal()
    sys.exit(main(sys.argv))
