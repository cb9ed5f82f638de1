"""What the cells of train_tpu.ipynb call. Each verb is a process of its own: the kernel imports no TensorFlow and never holds the TPU."""

import glob
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile

from IPython.display import Image, display

from common import machine
from common.commands import ROOT
from common.errors import UserError
from diagnostics import installation

DRIVE = '/content/drive'  # where Colab mounts it


class Runtime:
    """A run of one config, with the Python that has the pinned set for this machine.

    Args:
        config: name of a file in configs/.
        run: name of the run: one of another config needs another name.
        storage: where data and runs are kept: a folder, such as one of Drive, or gs://BUCKET/FOLDER; '' for this machine.
        accelerator: see `installation.ensure`; '' for what fits the hardware.
        train_for: in place of the config's, or ''.
        changes: further changes as on the command line, such as '--config.seed=1'.
    """

    def __init__(self, config, run, storage='', accelerator='', train_for='', changes=''):
        place = place_of(storage)
        open_storage(place)
        self.workdir = os.path.join(place, 'runs', f'{config}-{run}')  # programs run in ROOT
        self._arguments = [
            f'--config=configs/{config}.py',
            f'--workdir={self.workdir}',
            *words_of(changes),
        ]
        if place:
            self._arguments.append(
                f'--config.dataset.data_dir={os.path.join(place, "tensorflow_datasets")}'
            )
        if train_for:
            self._arguments.append(f'--config.train_for={train_for}')
        accelerator = accelerator or installation.choose()
        print(f'{machine.describe_platform()}: the {accelerator} set of pins')
        try:
            self._python = installation.ensure(accelerator)
        except UserError as error:
            raise SystemExit(f'error: {error}') from None
        print(f'run in {self.workdir}')

    def main(self, *arguments):
        """`python main.py` of this run."""
        self.run('main.py', *self._arguments, *arguments)

    def run(self, program, *arguments):
        """One of the repository's programs, with its output in the notebook.

        An interrupted cell ends it as Ctrl-C does: `main.py` saves first.

        Raises: SystemExit with the line that says what is wrong: the cells below are not run then.
        """
        command = [program, *arguments]
        print(f'$ python {shlex.join(command)}\n', flush=True)
        environment = {
            **os.environ,
            'PYTHONUNBUFFERED': '1',
            'MPLBACKEND': 'agg',
        }  # the kernel's draws in the notebook
        process = subprocess.Popen(
            [self._python, *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
            start_new_session=True,
        )
        lines, interruptions = [], []

        def interrupt(signal_number, frame):
            interruptions.append(signal_number)
            process.send_signal(signal.SIGINT)

        usual = signal.signal(signal.SIGINT, interrupt)
        try:
            for line in process.stdout:
                print(line, end='', flush=True)
                lines.append(line.rstrip())
            status = process.wait()
        finally:
            signal.signal(signal.SIGINT, usual)
        if interruptions:
            raise KeyboardInterrupt
        if status < 0:
            raise SystemExit(
                f'error: {program} was ended by {signal.Signals(-status).name}, perhaps for want of memory'
            )
        if status:
            raise SystemExit(reason(lines) or f'error: {program} ended with status {status}')

    def show(self, pattern):
        """Pictures of the run, such as 'plots/*.png'."""
        with tempfile.TemporaryDirectory() as folder:
            if '://' in self.workdir:
                copy = 'import os, sys, tensorflow as tf; [tf.io.gfile.copy(path, os.path.join(sys.argv[2], os.path.basename(path))) for path in tf.io.gfile.glob(sys.argv[1])]'
                subprocess.run(
                    [self._python, '-c', copy, os.path.join(self.workdir, pattern), folder],
                    check=True,
                    env={**os.environ, 'TPU_LOAD_LIBRARY': '0'},
                )
            found = (
                os.path.join(folder, '*')
                if '://' in self.workdir
                else os.path.join(ROOT, self.workdir, pattern)
            )
            for path in sorted(glob.glob(found)):
                display(Image(path))


def place_of(storage):
    """Where STORAGE is, whole: a folder, gs://BUCKET/FOLDER, or '' for this machine. Raises SystemExit for what is neither."""
    storage = storage.strip()
    if not storage or re.match('gs://[^/]', storage):
        return storage
    if not storage.startswith(('/', '~')):  # a folder of the checkout would go with it
        raise SystemExit(
            f'error: STORAGE={storage!r} is no place: write a folder with all of its path, such as {DRIVE}/MyDrive/warmstart, or gs://BUCKET/FOLDER'
        )
    return os.path.abspath(os.path.expanduser(storage))


def words_of(changes):
    """CHANGES as arguments. Raises SystemExit for a quote that is not closed."""
    try:
        return shlex.split(changes)
    except ValueError as error:
        raise SystemExit(
            f'error: CHANGES={changes!r} cannot be read ({error}): write it as on a command line, such as --config.seed=1'
        ) from None


def open_storage(storage):
    """On Colab: mounts Drive, or asks for the right to use the bucket."""
    if 'google.colab' not in sys.modules:
        return
    if storage.startswith(DRIVE) and not os.path.ismount(DRIVE):
        from google.colab import drive

        drive.mount(DRIVE)
    if storage.startswith('gs://'):
        from google.colab import auth

        auth.authenticate_user()


def reason(lines):
    """Of what a program printed: the doctor's FAIL with what mends it, else the last line that says error, else the last one."""
    failed = [index for index, line in enumerate(lines) if line.startswith('FAIL')]
    if failed:
        return '\n'.join(' '.join(' '.join(lines[index : index + 2]).split()) for index in failed)
    return next(
        (line for line in reversed(lines) if line.startswith('error: ')), lines[-1] if lines else ''
    )
