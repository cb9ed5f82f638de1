"""Finds out who else uses the TPU, which only one process can: it locks a file."""

import fcntl
import glob
import os
import shlex

from diagnostics.check_result import CheckResult, fail, ok, warn

LOCK = '/tmp/libtpu_lockfile'
KERNELS = ('ipykernel', 'colab_kernel_launcher')  # in the commands of notebooks


def check_lock(lock: str = LOCK, root: str = '/') -> CheckResult:
    """Checks whether another process holds the TPU; says which, and how to end it."""
    found = users(lock, root)
    if found:
        names = '; '.join(f'process {pid}, {command}' for pid, command in found.items())
        if os.getpid() in found:
            return fail(
                'TPU lock',
                f'the TPU is held by this very process ({names})',
                'restart the notebook, and train before anything else uses the TPU',
            )
        if any(kernel in command for command in found.values() for kernel in KERNELS):
            return fail(
                'TPU lock',
                f'the TPU is held by a notebook ({names})',
                'restart its kernel (on Colab: Runtime > Restart session)',
            )
        return fail('TPU lock', f'the TPU is held by {names}', f'kill {" ".join(map(str, found))}')
    if not os.path.exists(lock):
        return ok('TPU lock', 'no other process holds the TPU')
    held = is_held(lock)
    if held is None:
        return fail(
            'TPU lock',
            f'{lock} was left by another user, and cannot be opened',
            f'sudo rm -f {shlex.quote(lock)}',
        )
    if held:
        return fail(
            'TPU lock',
            f'{lock} is held by a process that this user cannot see',
            f'sudo fuser -k {shlex.quote(lock)}',
        )
    return warn(
        'TPU lock',
        f'{lock} was left by a process that has ended; nobody holds it',
        f'rm -f {shlex.quote(lock)}',
    )


def users(lock: str, root: str = '/') -> dict[int, str]:
    """Returns {pid: command line} of processes that have the lock or a TPU's device file open.

    This process may be one of them.
    """
    found = {}
    for descriptor in glob.glob(os.path.join(root, 'proc/[0-9]*/fd/*')):
        try:
            target = os.readlink(descriptor)
        except OSError:  # it has ended, or belongs to somebody else
            continue
        pid = int(descriptor.split('/')[-3])
        is_device = target.startswith(('/dev/accel', '/dev/vfio/')) and target[-1].isdigit()
        if is_device or target == os.path.realpath(lock):
            found[pid] = _command(root, pid)
    return dict(sorted(found.items()))


def is_held(lock: str) -> bool | None:
    """Returns whether another process has locked the file; None if it may not be opened.

    TensorFlow locks with lockf, others with flock. Do not call it in a process that has the file
    open: closing it here would release its lock.
    """
    try:
        with open(lock, 'r+') as file:
            for lock_function in (fcntl.lockf, fcntl.flock):
                try:
                    lock_function(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    return True
    except OSError:
        return None
    return False


def _command(root: str, pid: int) -> str:
    def read(name: str) -> bytes:
        try:
            with open(os.path.join(root, 'proc', str(pid), name), 'rb') as file:
                return file.read()
        except OSError:
            return b''

    command = (
        read('cmdline').replace(b'\0', b' ').decode(errors='replace').strip() or 'of unknown name'
    )
    return f'{command[:100]}{" (it has loaded JAX)" if b"jaxlib" in read("maps") else ""}'
