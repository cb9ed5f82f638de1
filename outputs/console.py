"""What a terminal gets to see, and what becomes of it where nobody looks."""

import importlib
import os
import sys
import tempfile


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


def print_what_can_be_printed():
    """Makes standard output and error get by with letters that a terminal cannot show, and with being closed."""
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, open(os.devnull, 'w'))
        getattr(sys, name).reconfigure(errors='backslashreplace')


def end_unread():
    """The exit status where nobody reads standard output any more; what is still to be written there goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
