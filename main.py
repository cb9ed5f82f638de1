"""Trains, evaluates and exports image classifiers: python main.py --config=configs/digits.py

Picks the verb, and turns a user's mistake into one clear line and an exit status: 0 done, 1 the run failed, 2 wrong
usage or config. --verbosity=1 shows the stack trace as well.
"""
import functools
import glob
import importlib
import os
import re
import sys
import tempfile
import traceback

from absl import flags, logging
from ml_collections import config_flags

os.environ['KERAS_BACKEND'] = 'tensorflow'  # before Keras is imported, whatever ~/.keras/keras.json says

from configs import default  # noqa: E402
from errors import ConfigError, UserError  # noqa: E402

FLAGS = flags.FLAGS
# Not locked: further keys of config.schedule and config.optimizer are arguments. plan.check_config finds unknown keys.
config_flags.DEFINE_config_file('config', None, 'Config file, such as configs/digits.py; --config.KEY=VALUE changes a key.',
                                lock_config=False, accept_new_attributes=True)
flags.DEFINE_string('workdir', None, 'Folder of the run; runs/NAME for configs/NAME.py by default.')
flags.DEFINE_enum('mode', 'train', ['train', 'evaluate', 'export'], 'What to do.')
flags.DEFINE_enum('checkpoint', 'last', ['last', 'best'], 'Which checkpoint to evaluate or export.')


def main(arguments):
    """Runs the verb that the command line names; returns the exit status."""
    try:
        config = parse(arguments)
        if FLAGS.verbosity < 1:
            logging.set_verbosity(logging.ERROR)
            import_tensorflow_quietly()
        importlib.import_module('plan').check_config(config)
        workdir = FLAGS.workdir or os.path.join('runs', config_name())
        if FLAGS.mode == 'train':
            return importlib.import_module('train').run(config, workdir)
        importlib.import_module(FLAGS.mode).run(config, workdir, FLAGS.checkpoint)
        return 0
    except UserError as error:
        if FLAGS.is_parsed() and FLAGS.verbosity >= 1:
            traceback.print_exc()
        print(f'error: {error}', file=sys.stderr)
        return error.exit_status


def parse(arguments):
    """Parses the command line; returns the config. Raises ConfigError."""
    if {'--help', '-h', '--helpfull'} & set(arguments):
        print(f'{__doc__}\n{FLAGS.main_module_help()}\n\nconfigs: {known_configs()}')
        sys.exit(0)
    try:
        rest = FLAGS(arguments)[1:]
        if rest:
            raise ConfigError(f'{rest[0]!r} is no flag: write --config=configs/NAME.py and --config.KEY=VALUE')
        if FLAGS.config is None:
            raise ConfigError(f'say what to train: --config=NAME, one of {known_configs()}')
        FLAGS.config.items()  # a file that cannot be read shows itself only now
    except ConfigError:
        raise
    except Exception as error:  # of absl, ml_collections, or the user's own config file
        raise ConfigError(explain(error, arguments)) from error
    return FLAGS.config


def explain(error, arguments):
    """One line about a command line or config file that could not be read."""
    path = next((argument.split('=', 1)[1] for argument in arguments if argument.startswith('--config=')), None)
    if path and not os.path.exists(path):
        return f'--config={path}: there is no such file; configs are {known_configs()}'
    text = ' '.join(str(error).split()) or type(error).__name__
    wrong_value = re.match(r'flag --(config\.[\w.]+)=(.*?): ', text)
    if wrong_value:
        key, value = wrong_value.groups()
        reference = functools.reduce(lambda section, part: section[part], key.split('.')[1:], default.get_config())
        kind = {int: 'a whole number', float: 'a number', bool: 'true or false', tuple: 'several values in brackets'}.get(type(reference), 'single keys of it')
        return f'{key}={value!r} cannot be read: write {kind}' + (f', as in --{key}={reference!r}' if kind != 'single keys of it' else '')
    if isinstance(error, flags.Error) or path is None:
        return text
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f'--config={path} is broken: {type(error).__name__}: {text[-300:]} ({os.path.basename(where.filename)}, line {where.lineno})'


def import_tensorflow_quietly():
    """TensorFlow's libraries greet on standard error whatever the log level; that is shown only if the import fails."""
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    with tempfile.TemporaryFile() as said:
        standard_error = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            importlib.import_module('tensorflow')
        except BaseException:
            said.seek(0)
            os.write(standard_error, said.read())
            raise
        finally:
            os.dup2(standard_error, 2)
            os.close(standard_error)


def config_name():
    return os.path.splitext(os.path.basename(config_flags.get_config_filename(FLAGS['config'])))[0]


def known_configs():
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configs')
    return ', '.join(f'configs/{os.path.basename(path)}' for path in sorted(glob.glob(os.path.join(folder, '[a-z]*.py'))))


if __name__ == '__main__':
    sys.exit(main(sys.argv))
