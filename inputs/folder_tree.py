"""Lists the user's folder: each folder once, and nothing that systems leave there."""

import os
import re
from collections.abc import Iterator

import tensorflow as tf

# What systems leave in any folder or at the top of a disk, in small letters: Mac archives, Windows,
# ext4, disks of Synology, QNAP and NetApp, Android's cards. Some of these may not even be read.
NOT_OURS = frozenset(
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
NOT_OURS_PATTERN = re.compile(r'found\.[0-9]{3}')  # of Windows, after a repair of the disk
# Of Windows; in small letters they may be classes.
NOT_OURS_IN_CAPITALS = frozenset(('RECYCLER', 'RECYCLED'))


class Tree:
    """A folder on any file system. What is hidden, or in NOT_OURS, is left out and never read."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._entries: dict[str, tuple[list[str], list[str]]] = {}
        self._places: dict[str, str] = {}

    def entries(self, folder: str) -> tuple[list[str], list[str]]:
        """Returns (folders, files): sorted names. Raises OSError or tf.errors.OpError."""
        if folder not in self._entries:
            folders, files = _read_remote(folder) if '://' in folder else _read_local(folder)
            self._entries[folder] = _sorted_ours(folders), _sorted_ours(files)
        return self._entries[folder]

    def walk(self, folder: str, *above: str) -> Iterator[tuple[str, list[str], list[str]]]:
        """Yields what os.walk does, sorted. No place comes twice by links, nor those `above`."""
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


def _sorted_ours(names: list[str]) -> list[str]:
    return sorted(name for name in names if _is_ours(name))


def _is_ours(name: str) -> bool:
    folded = name.casefold()
    is_of_system = (
        folded in NOT_OURS or NOT_OURS_PATTERN.fullmatch(folded) or name in NOT_OURS_IN_CAPITALS
    )
    return not name.startswith('.') and not is_of_system


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
