"""Lists the user's folder: each subfolder once, and nothing that operating systems leave there."""

import os
import re
from collections.abc import Iterator

import tensorflow as tf

# What systems leave in any folder or at the root of a disk, in lower case: Mac archives, Windows,
# ext4, disks of Synology, QNAP and NetApp, Android's memory cards. Some of it is not even readable.
SYSTEM_NAMES = frozenset(
    (
        '__macosx',
        'network trash folder',
        'temporary items',
        'thevolumesettingsfolder',
        '$recycle.bin',
        'system volume information',
        'thumbs.db',
        'ehthumbs.db',
        'desktop.ini',
        '$windows.~bt',
        '$windows.~ws',
        '$winreagent',
        '$sysreset',
        '$getcurrent',
        'windowsapps',
        'wpsystem',
        'wudownloadcache',
        'msocache',
        'config.msi',
        'lost+found',
        'lost.dir',
        '__pycache__',
        '@eadir',
        '@tmp',
        '#recycle',
        '#snapshot',
        '~snapshot',
        '@recycle',
        '@recently-snapshot',
        '@__thumb',
    )
)
SYSTEM_NAMES_PATTERN = re.compile(r'found\.[0-9]{3}')  # from Windows, after a disk repair
# From Windows; in lower case they may be classes.
SYSTEM_NAMES_IN_CAPITALS = frozenset(('RECYCLER', 'RECYCLED'))


class Tree:
    """A folder on any file system, leaving out what is hidden or in SYSTEM_NAMES."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._entries: dict[str, tuple[list[str], list[str]]] = {}
        self._places: dict[str, str] = {}

    def entries(self, folder: str) -> tuple[list[str], list[str]]:
        """Returns (folders, files): sorted names. Raises OSError or tf.errors.OpError."""
        if folder not in self._entries:
            folders, files = _read_remote(folder) if '://' in folder else _read_local(folder)
            self._entries[folder] = _sorted_user_entries(folders), _sorted_user_entries(files)
        return self._entries[folder]

    def walk(self, folder: str, *above: str) -> Iterator[tuple[str, list[str], list[str]]]:
        """Yields what os.walk does, sorted.

        Links are not followed to a folder a second time, nor to one in `above`.
        """
        entered = {self._place(place) for place in above}
        waiting = [folder]
        while waiting:
            here = waiting.pop()
            place = self._place(here)
            if place in entered:
                continue
            entered.add(place)
            folders, files = self.entries(here)
            yield here, folders, files
            waiting += [os.path.join(here, name) for name in reversed(folders)]

    def _place(self, folder: str) -> str:
        if folder not in self._places:
            self._places[folder] = os.path.realpath(folder)
        return self._places[folder]


def _sorted_user_entries(names: list[str]) -> list[str]:
    return sorted(name for name in names if _is_user_entry(name))


def _is_user_entry(name: str) -> bool:
    folded = name.casefold()
    is_system_entry = (
        folded in SYSTEM_NAMES
        or SYSTEM_NAMES_PATTERN.fullmatch(folded)
        or name in SYSTEM_NAMES_IN_CAPITALS
    )
    return not name.startswith('.') and not is_system_entry


def _read_local(folder: str) -> tuple[list[str], list[str]]:
    folders: list[str] = []
    files: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                is_folder = entry.is_dir()
            except OSError:  # such as a link that leads to itself
                is_folder = False
            (folders if is_folder else files).append(entry.name)
    return folders, files


def _read_remote(folder: str) -> tuple[list[str], list[str]]:
    def fail(error: Exception) -> None:
        raise error

    _, folders, files = next(tf.io.gfile.walk(folder, onerror=fail))
    return [name.rstrip('/') for name in folders], list(files)
