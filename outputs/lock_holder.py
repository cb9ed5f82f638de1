"""Who holds the folder of a run: what a lock file and a lease say."""

import datetime
import json
import os
import socket

from common.errors import RunError


def this_process():
    return {
        'host': socket.gethostname(),
        'machine': _machine(),
        'pid': os.getpid(),
        'started': datetime.datetime.now().astimezone().isoformat(timespec='seconds'),
    }


def _machine():
    """What tells apart whose process numbers are the same ones: this start of the machine and this container, or '' if unknown."""
    try:
        with open('/proc/sys/kernel/random/boot_id') as file:
            return f'{file.read().strip()} {os.readlink("/proc/self/ns/pid")}'
    except OSError:
        return ''


def has_died_here(holder):
    """Whether it was a process of this very machine and is none any more; False if that cannot be known."""
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
    except (OSError, OverflowError):  # another user's, or no process number
        pass
    return False


def written(holder):
    return (json.dumps(holder) + '\n').encode()


def parsed(text):
    """What was written last, or {}. The last line: TensorFlow's ram:// appends to a file that is written again."""
    try:
        holder = json.loads((text or b'').splitlines()[-1])
    except (IndexError, ValueError):  # empty, or half written
        return {}
    return holder if isinstance(holder, dict) else {}


def name_of(holder):
    if 'pid' not in holder:
        return 'another run'
    return f'process {holder.get("pid")} on {holder.get("host")} (since {holder.get("started")})'


def in_use(workdir, holder):
    return RunError(
        f'{workdir} is in use: {name_of(holder)} trains there; wait for it, end that process, or give another --workdir'
    )
