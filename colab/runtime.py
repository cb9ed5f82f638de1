"""Runs the repository's commands for the cells of train_tpu.ipynb.

Each command is a process of its own: the kernel imports no TensorFlow and never holds the TPU.
"""

import glob
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from types import FrameType

from IPython.display import Image, display

from common import console, machine
from common.commands import ROOT
from common.errors import UserError
from diagnostics import installation

DRIVE = '/content/drive'  # where Colab mounts it
# Copies the files in a bucket that match a pattern into a folder.
COPY = """
import os, sys
import tensorflow as tf
for path in tf.io.gfile.glob(sys.argv[1]):
    tf.io.gfile.copy(path, os.path.join(sys.argv[2], os.path.basename(path)))
"""


class Runtime:
    """A run of one config, with a Python that has the pinned packages for this machine.

    Args:
        config: name of a file in configs/.
        run: name of the run; with other settings, use another name.
        storage: where data and runs are kept: a folder, such as one of Drive, or
            gs://BUCKET/FOLDER; '' for this machine.
        accelerator: see `installation.ensure`; '' for what fits the hardware.
        train_for: in place of the config's, or ''.
        changes: further changes as on the command line, such as '--config.seed=1'.
    """

    def __init__(
        self,
        config: str,
        run: str,
        storage: str = '',
        accelerator: str = '',
        train_for: str = '',
        changes: str = '',
    ) -> None:
        place = resolve_storage(storage)
        open_storage(place)
        self.workdir = os.path.join(place, 'runs', f'{config}-{run}')  # programs run in ROOT
        self._arguments = [
            f'--config=configs/{config}.py',
            f'--workdir={self.workdir}',
            *split_changes(changes),
        ]
        if place:
            self._arguments.append(
                f'--config.dataset.data_dir={os.path.join(place, "tensorflow_datasets")}'
            )
        if train_for:
            self._arguments.append(f'--config.train_for={train_for}')
        accelerator = accelerator or installation.choose()
        console.line(f'{machine.describe_platform()}: using the pinned packages for {accelerator}')
        try:
            self._python = installation.ensure(accelerator)
        except UserError as error:
            raise SystemExit(f'error: {error}') from None
        console.line(f'run in {self.workdir}')

    def main(self, *arguments: str) -> None:
        """Runs `python main.py` with the arguments of this run and these."""
        self.run('main.py', *self._arguments, *arguments)

    def check(self) -> None:
        """Checks this machine and the config, row by row.

        Raises: SystemExit with what failed and how to fix it; the cells below then do not run.
        """
        command = ['main.py', *self._arguments, '--mode=check', '--json']
        console.line(f'$ python {shlex.join(command)}\n')
        done = subprocess.run(
            [self._python, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
        )
        try:
            results = json.loads(done.stdout)['results']
        except (ValueError, KeyError):
            raise SystemExit(describe_end('main.py --mode=check', done.returncode)) from None
        for result in results:
            console.check_row(**result)
        failed = [result for result in results if result['status'] == 'FAIL']
        if failed:
            rows = [f'{row["name"]}: {row["message"]} -> {row["fix"]}' for row in failed]
            raise SystemExit('\n'.join(rows))

    def run(self, program: str, *arguments: str) -> None:
        """Runs one of the repository's programs, with its output in the notebook.

        An interrupted cell ends it as Ctrl-C does: `main.py` saves first.

        Raises: SystemExit if it fails; the cells below then do not run.
        """
        command = [program, *arguments]
        console.line(f'$ python {shlex.join(command)}\n')
        process = subprocess.Popen(
            [self._python, *command],
            cwd=ROOT,
            # The kernel's Matplotlib backend would draw into the notebook.
            env={**os.environ, 'PYTHONUNBUFFERED': '1', 'MPLBACKEND': 'agg'},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
            start_new_session=True,
        )
        interruptions = []

        def interrupt(signal_number: int, frame: FrameType | None) -> None:
            interruptions.append(signal_number)
            process.send_signal(signal.SIGINT)

        usual = signal.signal(signal.SIGINT, interrupt)
        try:
            for line in process.stdout or ():
                sys.stdout.write(line)
                sys.stdout.flush()
            status = process.wait()
        finally:
            signal.signal(signal.SIGINT, usual)
        if interruptions:
            raise KeyboardInterrupt
        if status:
            raise SystemExit(describe_end(program, status))

    def show(self, pattern: str) -> None:
        """Displays images of the run, such as 'plots/*.png'."""
        with tempfile.TemporaryDirectory() as folder:
            found = os.path.join(ROOT, self.workdir, pattern)
            if '://' in self.workdir:
                source = os.path.join(self.workdir, pattern)
                environment = {**os.environ, 'TPU_LOAD_LIBRARY': '0'}
                command = [self._python, '-c', COPY, source, folder]
                subprocess.run(command, check=True, env=environment)
                found = os.path.join(folder, '*')
            for path in sorted(glob.glob(found)):
                display(Image(path))


def describe_end(program: str, status: int) -> str:
    """Says in one line how a program failed; its output says why."""
    if status < 0:
        name = signal.Signals(-status).name
        return f'error: {program} was ended by {name}, perhaps for lack of memory'
    return f'error: {program} ended with status {status}: the lines above say why'


def resolve_storage(storage: str) -> str:
    """Returns STORAGE as an absolute folder, gs://BUCKET/FOLDER, or '' for this machine.

    Raises: SystemExit for anything else.
    """
    storage = storage.strip()
    if not storage or re.match('gs://[^/]', storage):
        return storage
    if not storage.startswith(('/', '~')):  # a folder inside the checkout would be lost with it
        raise SystemExit(
            f'error: STORAGE={storage!r} is not an absolute path: write one, such as '
            f'{DRIVE}/MyDrive/warmstart, or gs://BUCKET/FOLDER'
        )
    return os.path.abspath(os.path.expanduser(storage))


def split_changes(changes: str) -> list[str]:
    """Returns CHANGES as arguments. Raises SystemExit for a quote that is not closed."""
    try:
        return shlex.split(changes)
    except ValueError as error:
        raise SystemExit(
            f'error: CHANGES={changes!r} cannot be read ({error}): write it as on a command '
            'line, such as --config.seed=1'
        ) from None


def open_storage(storage: str) -> None:
    """Mounts Drive, or asks for access to the bucket, on Colab."""
    if 'google.colab' not in sys.modules:
        return
    if storage.startswith(DRIVE) and not os.path.ismount(DRIVE):
        from google.colab import drive

        drive.mount(DRIVE)
    if storage.startswith('gs://'):
        from google.colab import auth

        auth.authenticate_user()
