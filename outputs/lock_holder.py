"""Describes who holds a run's folder: the record in a lock file or lease."""

import datetime
import json
import os
import socket
from typing import Any

from common.errors import RunError


def this_process() -> dict[str, Any]:
    return {
        'host': socket.gethostname(),
        'machine': _machine(),
        'pid': os.getpid(),
        'started': datetime.datetime.now().astimezone().isoformat(timespec='seconds'),
    }


def _machine() -> str:
    """Returns an ID of this boot and container, or '' if unknown.

    Process IDs are comparable only within it.
    """
    try:
        with open('/proc/sys/kernel/random/boot_id') as file:
            return f'{file.read().strip()} {os.readlink("/proc/self/ns/pid")}'
    except OSError:
        return ''


def has_died_here(holder: dict[str, Any]) -> bool:
    """Returns whether the holder was a process here that is now dead; False if unknown."""
    here, pid = this_process(), holder.get('pid')
    if (
        not here['machine']
        or any(holder.get(key) != here[key] for key in ('host', 'machine'))
        or type(pid) is not int
        or pid < 1
    ):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # another user's process, or not a valid process ID
        pass
    return False


def encode_record(holder: dict[str, Any]) -> bytes:
    return (json.dumps(holder) + '\n').encode()


def decode_record(text: bytes | None) -> dict[str, Any]:
    """Returns the last record in a lock file, or {}.

    The last line counts because TensorFlow's ram:// appends when a file is rewritten.
    """
    try:
        holder = json.loads((text or b'').splitlines()[-1])
    except (IndexError, ValueError):  # empty, or half written
        return {}
    return holder if isinstance(holder, dict) else {}


def describe_holder(holder: dict[str, Any]) -> str:
    if 'pid' not in holder:
        return 'another run'
    return f'process {holder.get("pid")} on {holder.get("host")} (since {holder.get("started")})'


def in_use_error(workdir: str, holder: dict[str, Any]) -> RunError:
    return RunError(
        f'{workdir} is in use',
        f'{describe_holder(holder)} is training there; wait for it, stop that process, or choose '
        'another --workdir',
    )
