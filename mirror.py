"""Keeps a copy of a run in a bucket while a command works on it, and brings it back where the machine that had it is gone.

    python mirror.py runs/digits gs://BUCKET/runs/digits -- python main.py --config=configs/digits.py --workdir=runs/digits

A run in the folder counts for more than its copy, which is fetched only where the folder has no checkpoint. The copy is
renewed every minute and at the end, what names the last checkpoint after the checkpoint itself: it can be continued at any moment.
"""
import os
import signal
import subprocess
import sys

from devices import tpu_environment
from errors import one_line
from main import import_tensorflow_quietly

SECONDS = 60.0  # between two copies; what trains saves every ten minutes by default
NAMES_THE_LAST = 'checkpoint'  # TensorFlow's file beside the checkpoints that says which is the last
TRIES = 3  # of one copy: a checkpoint may be saved and an older one deleted meanwhile


def main(arguments):
    """Fetches, runs the command with copies in between, copies; returns the command's exit status, or 1 if the last copy fails."""
    if len(arguments) < 4 or arguments[2] != '--':
        print(__doc__, file=sys.stderr)
        return 2
    run, copy, _, *command = arguments
    problem = unfit(run, copy)
    if problem:
        print(f'error: {problem}', file=sys.stderr)
        return 2
    its_environment = dict(os.environ)
    os.environ.update(tpu_environment.without_accelerators())
    for variable in tpu_environment.PJRT_VARIABLES:
        os.environ.pop(variable, None)
    import_tensorflow_quietly()
    try:
        gfile().makedirs(copy)  # what cannot be written to shows itself before anything is trained
        if fetch(copy, run):
            print(f'fetched   {copy} into {run}', flush=True)
        return work(command, its_environment, Copy(run, copy))
    except errors() as error:
        print(f'error: {copy} cannot be read or written ({one_line(error)}): see whether it is there and this account may use it', file=sys.stderr)
        return 1


def unfit(run, copy):
    """Why `copy` cannot be a copy of `run`, or ''."""
    if os.path.exists(run) and not os.path.isdir(run):
        return f'{run} is no folder of a run'
    here, there = (os.path.join(os.path.realpath(path), '') for path in (run, copy))
    if '://' not in copy and (here.startswith(there) or there.startswith(here)):
        return f'{run} and {copy} are the same folder, or one lies in the other: take another place for the copy'
    return ''


def work(command, environment, copy):
    """Runs the command and renews the copy meanwhile; a signal to this process is the command's."""
    try:
        process = subprocess.Popen(command, env=environment, start_new_session=True)
    except OSError as error:
        print(f'error: {command[0]} cannot be run: {error.strerror}', file=sys.stderr)
        return 127
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: process.send_signal(number))
    while True:
        try:
            status = process.wait(SECONDS)
            break
        except subprocess.TimeoutExpired:
            try:
                copy.renew()
            except errors() as error:  # the next try may succeed
                print(f'note      not copied: {one_line(error)}', file=sys.stderr, flush=True)
    copy.renew()
    return status if status >= 0 else 128 - status


def fetch(copy, run):
    """Copies `copy` to the folder `run`, unless a checkpoint is there; returns whether there was something."""
    files = gfile()
    if os.path.exists(os.path.join(run, 'checkpoints', NAMES_THE_LAST)):
        return False
    found = [os.path.join(folder, name) for folder, _, names in files.walk(copy) for name in names]
    for path in sorted(found, key=lambda path: os.path.basename(path) == NAMES_THE_LAST):
        target = os.path.join(run, os.path.relpath(path, copy))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        files.copy(path, target, overwrite=True)
    return bool(found)


class Copy:
    """The copy of a run, and which files it has in which state."""

    def __init__(self, run, copy):
        self.run, self.copy, self._copied = run, copy, {}

    def renew(self):
        """Copies what is new or has changed, and deletes checkpoints that the run has no more."""
        for _ in range(TRIES):
            last = self._named_last()
            for path, state in self._files():
                if self._copied.get(path) != state and os.path.basename(path) != NAMES_THE_LAST:
                    self._write(path, state)
            if self._named_last() == last:  # then nothing that it names was deleted meanwhile
                break
        else:
            return
        for path, text in last.items():
            with gfile().GFile(os.path.join(self.copy, path), 'w') as file:
                file.write(text)
        self._forget_deleted()

    def _files(self):
        """(path below the run, what changes when the file does) of each file that is whole."""
        for folder, subfolders, names in os.walk(self.run):
            subfolders[:] = [name for name in subfolders if not name.endswith(('.part', '_temp'))]
            for name in names:
                path = os.path.join(folder, name)
                if not name.endswith('.part') and os.path.exists(path):
                    status = os.stat(path)
                    yield os.path.relpath(path, self.run), (status.st_size, status.st_mtime_ns)

    def _named_last(self):
        """{path: text} of the files that name the last and the best checkpoint."""
        named = {}
        for path, _ in self._files():
            if os.path.basename(path) == NAMES_THE_LAST:
                with open(os.path.join(self.run, path)) as file:
                    named[path] = file.read()
        return named

    def _write(self, path, state):
        target = os.path.join(self.copy, path)
        gfile().makedirs(os.path.dirname(target))
        try:
            gfile().copy(os.path.join(self.run, path), target, overwrite=True)
        except errors():
            if os.path.exists(os.path.join(self.run, path)):
                raise
            return  # deleted meanwhile
        self._copied[path] = state

    def _forget_deleted(self):
        files, folder = gfile(), os.path.join(self.copy, 'checkpoints')
        here = {path for path, _ in self._files()}
        for place, _, names in files.walk(folder):
            for name in names:
                path = os.path.join(place, name)
                if os.path.relpath(path, self.copy) not in here:
                    files.remove(path)


def gfile():
    """TensorFlow's files, which may be in a bucket; imported late, after the environment is set."""
    import tensorflow as tf

    return tf.io.gfile


def errors():
    import tensorflow as tf

    return OSError, tf.errors.OpError


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
