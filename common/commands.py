"""Commands as a user would type them here."""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def python_command():
    """This interpreter as one types it from here."""
    relative = os.path.relpath(sys.executable)
    return sys.executable if relative.startswith('..') else relative


def install_command(accelerator):
    """The command that installs the pinned set of 'cpu', 'gpu', 'tpu' or 'tpu220' from wherever one is."""
    here = (
        os.path.relpath(ROOT) if os.path.realpath(os.getcwd()) == os.path.realpath(ROOT) else ROOT
    )
    return f"{python_command()} -m pip install -c {os.path.join('' if here == '.' else here, 'requirements', accelerator)}.txt '{here}[{accelerator}]'"
