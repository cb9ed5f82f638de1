"""A folder of your own images: its classes, its usable files, and those that are evaluated.

    DIR/train/CLASS/**  and  DIR/test/CLASS/**    the two splits as they are
    DIR/CLASS/train/**  and  DIR/CLASS/test/**    the same, with splits inside the class folders
    DIR/train/CLASS/**  or   DIR/CLASS/**         a share of each class is held out for evaluation

`image_validation` decides which files are usable. Nothing is written into the user's folder.
"""

import collections
import dataclasses
import hashlib
import math
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import tensorflow as tf
from ml_collections import ConfigDict

from common.console import printable
from common.errors import ConfigError, RunError, counted, did_you_mean, one_line
from inputs import file_signatures, folder_splits, image_validation
from inputs.folder_splits import HELD_OUT, MAX_NAMES, SORT, Split, image_names, named
from inputs.folder_tree import Tree

DEEP_BITS = (10, 12, 14)  # depths of cameras and scanners, stored in 16 bits


class ExampleFile(NamedTuple):
    """A file that `tf.io.decode_image` reads correctly; `label` is the index of its class."""

    path: str
    label: int
    num_bytes: int
    digest: str  # of the original
    original: str  # path of the user's file; `path` may be that of a converted copy


@dataclasses.dataclass(frozen=True)
class Folder:
    """The classes and images of a folder.

    Attributes:
        class_names: sorted.
        splits: {name of a split: its images, in an order that is always the same and mixes the
            classes}.
        broken: (path below data_dir, reason) of each file that cannot be used.
        notes: what the user may not expect, a line each.
    """

    class_names: tuple[str, ...]
    splits: dict[str, list[ExampleFile]]
    broken: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


NOT_EXAMINED = image_validation.FileCheck()


class _File(NamedTuple):
    split: str
    class_name: str
    path: str  # below data_dir
    check: image_validation.FileCheck = NOT_EXAMINED


def find(dataset_config: ConfigDict, needs_training: bool = True) -> Folder:
    """Finds classes and images in `dataset.data_dir`; examines files that are new or changed.

    Args:
        dataset_config: `config.dataset`.
        needs_training: False if images to evaluate are enough.

    Raises:
        ConfigError: no folder is given, or a split has a name that no subfolder can have.
        RunError: there are no classes of images, too many files are broken, or something cannot be
            read or written.
    """
    root = os.path.expanduser(dataset_config.data_dir)
    train_split, eval_split = dataset_config.train_split, dataset_config.eval_split
    split_folders, notes, files, class_names = _survey(dataset_config, needs_training)
    label_of = {name: label for label, name in enumerate(class_names)}
    checks = image_validation.examine(
        root, sorted(file.path for file in files), dataset_config.white_level
    )
    broken = tuple((path, check.broken) for path, check in checks.items() if check.broken)
    notes += _check_broken(root, broken, len(checks), dataset_config.max_broken)
    files = [
        file._replace(check=checks[file.path]) for file in files if not checks[file.path].broken
    ]
    if eval_split not in split_folders:
        files = _hold_out(files, eval_split, dataset_config.eval_share, dataset_config.split_seed)
        notes.append(
            f'{dataset_config.eval_share:.3g} of each class in '
            f'{split_folders[train_split].place} is held out as {eval_split}; '
            f'config.dataset.split_seed={dataset_config.split_seed} says which images'
        )
    _check_enough(root, split_folders, files, class_names, eval_split)
    notes += _content_notes(files, class_names, eval_split)
    notes += _white_level_notes(files, dataset_config.white_level)
    notes += _notes_on_odd_jpegs(files)

    splits: dict[str, list[ExampleFile]] = {split: [] for split in (*split_folders, eval_split)}
    # Sorting by digest is as good as shuffling: it mixes the classes.
    for file in sorted(files, key=lambda file: (file.check.digest, file.path)):
        original = os.path.join(root, file.path)
        path = file.check.copy or original
        label, check = label_of[file.class_name], file.check
        image = ExampleFile(path, label, check.num_bytes, check.digest, original)
        splits[file.split].append(image)
    return Folder(class_names, splits, broken, tuple(notes))


def count(dataset_config: ConfigDict) -> tuple[tuple[str, ...], dict[str, int], int | None]:
    """Returns what `find` would find, without opening any file.

    If a part is held out, the numbers are exact only for a folder without duplicates. Raises as
    `find` does.

    Returns: (class names, {split: files that may be images}, bytes of all or None).
    """
    root = os.path.expanduser(dataset_config.data_dir)
    split_folders, _, files, class_names = _survey(dataset_config, needs_training=True)
    num_bytes = (
        None
        if '://' in root
        else sum(os.path.getsize(os.path.join(root, file.path)) for file in files)
    )
    counts = collections.Counter((file.split, file.class_name) for file in files)
    sizes = {
        split: sum(count for (owner, _), count in counts.items() if owner == split)
        for split in split_folders
    }
    if dataset_config.eval_split not in split_folders:
        sizes[dataset_config.eval_split] = sum(
            _num_held_out(number, dataset_config.eval_share) for number in counts.values()
        )
        sizes[dataset_config.train_split] -= sizes[dataset_config.eval_split]
    return class_names, sizes, num_bytes


def _survey(dataset_config: ConfigDict, needs_training: bool) -> tuple:
    """Returns ({split name: Split}, notes, files, class names), from names alone."""
    root = os.path.expanduser(dataset_config.data_dir)
    train_split = dataset_config.train_split
    eval_split = dataset_config.eval_split
    _check_config(root, train_split, eval_split)
    tree = Tree(root)
    try:
        asked = folder_splits.RequestedSplits(train_split, eval_split, needs_training)
        split_folders, notes = folder_splits.find(tree, asked)
        files, extensions = _files(tree, split_folders)
        class_names = _class_names(tree, split_folders, files)
    except (OSError, tf.errors.OpError) as error:
        raise RunError(f'{printable(root)} cannot be read: {printable(one_line(error))}') from error
    return (
        split_folders,
        notes + _notes_on_names(tree, split_folders, extensions),
        files,
        class_names,
    )


def _check_config(root: str, train_split: str, eval_split: str) -> None:
    def expected(place: str) -> str:
        return (
            f'{place}/{train_split}/CLASS/*.jpg and {place}/{eval_split}/CLASS/*.jpg, or '
            f'{place}/CLASS/*.jpg'
        )

    for key, split in (('train_split', train_split), ('eval_split', eval_split)):
        if split in ('', '.', '..') or set(split) & set('[]+%:/\\') or printable(split) != split:
            raise ConfigError(
                f'config.dataset.{key}={split!r} cannot be a split: the splits of a folder are '
                'subfolders',
                "write its name, such as 'train'; without that subfolder, "
                'config.dataset.eval_share of each class is held out for evaluation',
                f'dataset.{key}',
            )
    if not root:
        raise ConfigError(
            "config.dataset.name='folder' needs a folder",
            f'--config.dataset.data_dir=DIR with {expected("DIR")}',
            'dataset.data_dir',
        )
    if os.path.isfile(root):
        raise RunError(
            f'config.dataset.data_dir={printable(root)} is a file',
            f'unpack it, and name the folder with {expected("DIR")}',
            'dataset.data_dir',
        )
    if not (tf.io.gfile.isdir if '://' in root else os.path.isdir)(root):
        raise RunError(
            f'config.dataset.data_dir={printable(root)} is not a folder',
            f'it should hold {expected(printable(root))}',
            'dataset.data_dir',
        )


def _notes_on_names(
    tree: Tree, split_folders: dict[str, Split], extensions: collections.Counter
) -> list[str]:
    """Returns notes on what is left out because of its name or place."""
    notes = []
    unread = collections.Counter(
        {
            ending: count
            for ending, count in extensions.items()
            if ending in file_signatures.SKIPPED_EXTENSIONS
        }
    )
    others = extensions - unread
    if unread:
        notes.append(
            'not used, as their formats are not supported: '
            f'{_listed_counts(unread, MAX_NAMES)}; convert them to JPEG or PNG'
        )
    if others:
        notes.append(
            "not used, as their names do not end like an image's: "
            f'{_listed_counts(others, MAX_NAMES)}'
        )
    for folder in dict.fromkeys(split.folder for split in split_folders.values()):
        loose = len(image_names(tree.entries(folder)[1]))
        if loose:
            notes.append(
                f'not used: {loose:,} images in {printable(folder)} itself, outside any class '
                'folder'
            )
    return notes


def _class_names(
    tree: Tree, split_folders: dict[str, Split], files: list[_File]
) -> tuple[str, ...]:
    """Returns the sorted names of the class folders. Raises RunError if they are unusable."""
    (split, base), *others = split_folders.items()
    names = list(base.classes)
    if len(names) < 2:
        raise _too_few_classes(tree, base, others)
    odd = [name for name in names if not _is_one_line(name)]
    if odd:
        raise RunError(
            f'{base.place} has class folders whose names are not one line of text: {named(odd)}',
            'rename them',
        )
    alike = collections.defaultdict(list)
    for name in names:
        alike[unicodedata.normalize('NFC', name.strip()).casefold()].append(name)
    for same in alike.values():
        if len(same) > 1:
            raise RunError(
                f'{base.place} has class folders that look the same, {", ".join(map(repr, same))}',
                'merge or rename them',
            )
    filled = {file.class_name for file in files if file.split == split}
    empty = [name for name in names if name not in filled]
    if empty:
        raise _empty_classes(tree, base, empty)
    for _, other in others:
        unknown = [name for name in other.classes if name not in base.classes]
        if unknown:
            hint = did_you_mean(unknown[0], names)
            raise RunError(f'{other.place} has classes that {split} lacks: {named(unknown)}{hint}')
    return tuple(names)


def _too_few_classes(tree: Tree, base: Split, others: list[tuple[str, Split]]) -> RunError:
    """Returns the error for a split that has no class folder or a single one."""
    if not base.classes:
        _, files = tree.entries(base.folder)
        content = f'has {counted(len(files), "file")}, but no class folder' if files else 'is empty'
        return RunError(f'{base.place} {content}; a classifier needs at least two classes', SORT)
    ((name, folder),) = base.classes.items()
    problem = (
        f'{base.place} has one class folder, {printable(name)}; a classifier needs at least two'
    )
    richer = next((split for split, other in others if len(other.classes) > 1), None)
    if richer:  # as in data sets for anomaly detection
        splits = f'--config.dataset.train_split={richer} --config.dataset.eval_split={HELD_OUT}'
        return RunError(
            f'{problem}, with training images of each. {richer} has more class folders',
            f'{splits} to train on a part of it',
        )
    for _, inner, _ in tree.walk(folder, base.folder):
        if len(inner) > 1:
            fix = f'if {named(inner)} in it are the classes, move them up into {base.place}'
            return RunError(problem, fix)
    return RunError(problem, SORT)


def _empty_classes(tree: Tree, base: Split, names: list[str]) -> RunError:
    """Returns the error for a split that has class folders without images."""
    held = {name: _content(tree, base.classes[name], base.folder) for name in names}
    empty = [
        f'{name} ({_listed_counts(extensions, 3) or "empty"})' for name, extensions in held.items()
    ]
    unread = {
        ending for extensions in held.values() for ending in extensions
    } & file_signatures.SKIPPED_EXTENSIONS
    advice = f'convert {named(unread)} to JPEG or PNG, ' if unread else ''
    problem = f'{base.place} has class folders without images, {named(empty)}'
    return RunError(problem, f'{advice}fill them, or remove them')


def _is_one_line(name: str) -> bool:
    """Returns whether a name is text without line breaks and other control characters."""
    return printable(name) == name


def _check_broken(
    root: str, broken: Sequence[tuple[str, str]], num_files: int, max_broken: float
) -> list[str]:
    """Returns notes on the broken files. Raises RunError if there are too many of them.

    A single one is tolerated unless `max_broken` is 0.
    """
    if not broken:
        return []
    allowed = max(1, max_broken * num_files) if max_broken else 0
    if len(broken) > allowed:
        share = math.ceil(100 * len(broken) / num_files) / 100
        allow = f', or write --config.dataset.max_broken={share}' if share < 1 else ''
        some = '; '.join(f'{printable(path)}: {reason}' for path, reason in broken[:MAX_NAMES])
        if len(broken) > MAX_NAMES:
            some += '; ...'
        raise RunError(
            f'{len(broken):,} of {num_files:,} files in {printable(root)} are broken '
            f'({len(broken) / num_files:.2%}, {max_broken:.2%} are allowed): {some}. '
            f'All of them are listed in {image_validation.list_of_broken(root)}',
            f'replace or remove them{allow}',
        )
    return [
        f'{len(broken):,} of {num_files:,} files are broken and skipped; all of them are in '
        f'{image_validation.list_of_broken(root)}'
    ]


def _hold_out(files: list[_File], eval_split: str, share: float, seed: int) -> list[_File]:
    """Returns the files, with `share` of each class in `eval_split`.

    That is at least one image, unless the class has only one. The choice depends on content, not on
    file names, so duplicates stay together.
    """
    digests: dict[str, set[str]] = collections.defaultdict(set)
    for file in files:
        digests[file.class_name].add(file.check.digest)
    held_out = set()
    for name, found in digests.items():
        order = sorted(
            found, key=lambda digest: hashlib.sha256(f'{seed} {digest}'.encode()).digest()
        )
        held_out |= {(name, digest) for digest in order[: _num_held_out(len(order), share)]}
    return [
        file._replace(split=eval_split)
        if (file.class_name, file.check.digest) in held_out
        else file
        for file in files
    ]


def _num_held_out(number: int, share: float) -> int:
    return min(max(1, round(share * number)), number - 1)


def _check_enough(
    root: str,
    split_folders: Mapping[str, Split],
    files: list[_File],
    class_names: Sequence[str],
    eval_split: str,
) -> None:
    """Raises RunError if a class, or the evaluation, is left without images."""
    split, base = next(iter(split_folders.items()))
    spoilt = set(class_names) - {file.class_name for file in files if file.split == split}
    if spoilt:
        raise RunError(
            f'{base.place} has classes whose files are all broken',
            f'{named(spoilt)}; see {image_validation.list_of_broken(root)}',
        )
    if not any(file.split == eval_split for file in files):
        advice = (
            'fill its class folders'
            if eval_split in split_folders
            else 'a class with a single image keeps it for training; add more'
        )
        place = split_folders[eval_split].place if eval_split in split_folders else printable(root)
        raise RunError(f'{place} has no images for evaluation', advice)


def _content_notes(files: list[_File], class_names: Sequence[str], eval_split: str) -> list[str]:
    """Returns notes on classes that are not evaluated, and on images that are in two places."""
    notes, same_content = [], collections.defaultdict(list)
    missing = set(class_names) - {file.class_name for file in files if file.split == eval_split}
    if missing:
        notes.append(f'no evaluation images of {named(missing)}')
    for file in files:
        same_content[file.check.digest].append(file)
    in_both_splits = [
        same for same in same_content.values() if len({file.split for file in same}) > 1
    ]
    leaked = [file.path for same in in_both_splits for file in same if file.split == eval_split]
    if leaked:
        notes.append(
            f'{len(leaked):,} evaluation images are training images as well, byte for byte, '
            f'such as {printable(leaked[0])}: '
            'they make the accuracy look better than it is'
        )
    in_several_classes = [
        same for same in same_content.values() if len({file.class_name for file in same}) > 1
    ]
    if in_several_classes:
        notes.append(
            f'{len(in_several_classes):,} images are in more than one class, byte for byte, such '
            f'as {named(file.path for file in in_several_classes[0])}'
        )
    return notes


def _white_level_notes(files: list[_File], white_level: int) -> list[str]:
    """Returns notes on images of more than 8 bits whose values are far from the white level."""
    deep = [file for file in files if file.check.peak]
    if not deep:
        return []
    brightest = max(deep, key=lambda file: file.check.peak)
    peak = brightest.check.peak
    num_cut = sum(file.check.peak > white_level for file in deep)
    if num_cut:
        return [
            f'{num_cut:,} of {len(deep):,} 16-bit images have values that are cut off at '
            f'config.dataset.white_level={white_level}, such as {printable(brightest.path)}, up to '
            f'{peak:,}'
        ]
    used = next((2**bits - 1 for bits in DEEP_BITS if peak < 2**bits), white_level)
    if used >= white_level:
        return []
    return [
        f'{len(deep):,} images of 16 bits have no value above {peak:,}, so they are nearly '
        'black: '
        f'if {used:,} is their white, write --config.dataset.white_level={used}'
    ]


def _notes_on_odd_jpegs(files: list[_File]) -> list[str]:
    """Returns notes on JPEG files that violate the format and are read all the same."""
    notes = []
    harmless = [file for file in files if file.check.remark and not file.check.doubt]
    if harmless:
        first = harmless[0]
        notes.append(
            f'{len(harmless):,} JPEG files violate the format without affecting any pixel, such as '
            f'{printable(first.path)} ({first.check.remark}): they are used'
        )
    doubtful = [file for file in files if file.check.doubt]
    if doubtful:
        first = doubtful[0]
        notes.append(
            f'{len(doubtful):,} JPEG files, nearly all, have a fault, such as '
            f'{printable(first.path)} ({first.check.doubt}): it is taken for a quirk of the '
            'program that wrote them, and they are used'
        )
    return notes


def image_paths(root: str) -> Iterator[str]:
    """Yields the files below a folder whose names end like an image's, relative to it.

    They are sorted, folder by folder.
    """
    for folder, _, names in Tree(root).walk(root):
        yield from (
            os.path.relpath(os.path.join(folder, name), root) for name in image_names(names)
        )


def _files(tree: Tree, split_folders: dict[str, Split]) -> tuple[list[_File], collections.Counter]:
    """Returns the files in class folders that may be images, and counts the others by extension."""
    found: list[_File] = []
    extensions: collections.Counter = collections.Counter()
    for split, base in split_folders.items():
        for class_name, class_folder in base.classes.items():
            for folder, _, names in tree.walk(class_folder, base.folder, tree.root):
                below = os.path.relpath(folder, tree.root)
                images = image_names(names)
                found += [_File(split, class_name, os.path.join(below, name)) for name in images]
                if len(images) < len(names):
                    known = set(images)
                    extensions.update(_extension(name) for name in names if name not in known)
    return found, extensions


def _content(tree: Tree, folder: str, base: str) -> collections.Counter:
    """Returns what a class folder without images holds: {ending: number of files}."""
    extensions: collections.Counter = collections.Counter()
    for _, _, names in tree.walk(folder, base):
        extensions.update(map(_extension, names))
    return extensions


def _listed_counts(extensions: collections.Counter, most: int) -> str:
    return ', '.join(f'{count:,} {ending}' for ending, count in extensions.most_common(most))


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower() or 'without extension'
