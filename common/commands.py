"""Formats commands as a user would type them in the current folder."""

import argparse
import os
import sys
from typing import NoReturn

from common import console

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def python_command() -> str:
    """Returns this interpreter's path as typed from the current folder."""
    relative = os.path.relpath(sys.executable)
    return sys.executable if relative.startswith('..') else relative


def install_command(accelerator: str) -> str:
    """Returns the command that installs the pinned packages of an extra of pyproject.toml."""
    here = (
        os.path.relpath(ROOT) if os.path.realpath(os.getcwd()) == os.path.realpath(ROOT) else ROOT
    )
    requirements = os.path.join('' if here == '.' else here, 'requirements', f'{accelerator}.txt')
    return f"{python_command()} -m pip install -c {requirements} '{here}[{accelerator}]'"


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, as those of `main.py` are."""

    def error(self, message: str) -> NoReturn:
        console.error(message, 'see --help')
        sys.exit(2)
