"""A folder of your own images: its classes, its usable files, and those that are evaluated.

    DIR/train/CLASS/**  and  DIR/test/CLASS/**    the two splits as they are
    DIR/CLASS/train/**  and  DIR/CLASS/test/**    the same, with the classes above
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
from inputs.folder_splits import HELD_OUT, NAMED, SORT, Split, image_names, named
from inputs.folder_tree import Tree

DEEP_BITS = (10, 12, 14)  # that cameras and scanners have, and store in 16


class ExampleFile(NamedTuple):
    """A file that `tf.io.decode_image` reads right; `label` is the index of its class."""

    path: str
    label: int
    num_bytes: int
    digest: str  # of the original
    original: str  # path of the user's file; `path` may be that of a converted copy


@dataclasses.dataclass(frozen=True)
class Folder:
    """What was found.

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
        ConfigError: no folder is named, or a split that no folder can have.
        RunError: there are no classes of images, too many files are broken, or something cannot be
            read or written.
    """
    root = os.path.expanduser(dataset_config.data_dir)
    train_split, eval_split = dataset_config.train_split, dataset_config.eval_split
    bases, notes, files, class_names = _survey(dataset_config, needs_training)
    label_of = {name: label for label, name in enumerate(class_names)}
    checks = image_validation.examine(
        root, sorted(file.path for file in files), dataset_config.white_level
    )
    broken = tuple((path, check.broken) for path, check in checks.items() if check.broken)
    notes += _check_broken(root, broken, len(checks), dataset_config.max_broken)
    files = [
        file._replace(check=checks[file.path]) for file in files if not checks[file.path].broken
    ]
    if eval_split not in bases:
        files = _hold_out(files, eval_split, dataset_config.eval_share, dataset_config.split_seed)
        notes.append(
            f'{dataset_config.eval_share:.3g} of each class in {bases[train_split].place} is '
            f'held out as {eval_split}; '
            f'config.dataset.split_seed={dataset_config.split_seed} says which images'
        )
    _check_enough(root, bases, files, class_names, eval_split)
    notes += _content_notes(files, class_names, eval_split)
    notes += _white_level_notes(files, dataset_config.white_level)
    notes += _notes_on_odd_jpegs(files)

    splits: dict[str, list[ExampleFile]] = {split: [] for split in (*bases, eval_split)}
    # As good as shuffled: any part has all classes.
    for file in sorted(files, key=lambda file: (file.check.digest, file.path)):
        original = os.path.join(root, file.path)
        path = file.check.copy or original
        label, check = label_of[file.class_name], file.check
        image = ExampleFile(path, label, check.num_bytes, check.digest, original)
        splits[file.split].append(image)
    return Folder(class_names, splits, broken, tuple(notes))


def count(dataset_config: ConfigDict) -> tuple[tuple[str, ...], dict[str, int], int | None]:
    """Returns what `find` would find, without opening any file.

    If a part is held out, the numbers are those of a folder without duplicates. Raises as `find`
    does.

    Returns: (class names, {split: files that may be images}, bytes of all or None).
    """
    root = os.path.expanduser(dataset_config.data_dir)
    bases, _, files, class_names = _survey(dataset_config, needs_training=True)
    num_bytes = (
        None
        if '://' in root
        else sum(os.path.getsize(os.path.join(root, file.path)) for file in files)
    )
    counts = collections.Counter((file.split, file.class_name) for file in files)
    sizes = {
        split: sum(number for (of, _), number in counts.items() if of == split) for split in bases
    }
    if dataset_config.eval_split not in bases:
        sizes[dataset_config.eval_split] = sum(
            _number_held_out(number, dataset_config.eval_share) for number in counts.values()
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
        asked = folder_splits.Asked(train_split, eval_split, needs_training)
        bases, notes = folder_splits.find(tree, asked)
        files, endings = _files(tree, bases)
        class_names = _class_names(tree, bases, files)
    except (OSError, tf.errors.OpError) as error:
        raise RunError(f'{printable(root)} cannot be read: {printable(one_line(error))}') from error
    return bases, notes + _notes_on_names(tree, bases, endings), files, class_names


def _check_config(root: str, train_split: str, eval_split: str) -> None:
    def expected(place: str) -> str:
        return (
            f'{place}/{train_split}/CLASS/*.jpg and {place}/{eval_split}/CLASS/*.jpg, or '
            f'{place}/CLASS/*.jpg'
        )

    for key, split in (('train_split', train_split), ('eval_split', eval_split)):
        if split in ('', '.', '..') or set(split) & set('[]+%:/\\') or printable(split) != split:
            raise ConfigError(
                f'config.dataset.{key}={split!r} is not a split of a folder, which is a subfolder',
                "write its name, as in 'train'; for a part of the images leave the "
                'subfolder out, and config.dataset.eval_share of each class is evaluated',
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


def _notes_on_names(tree: Tree, bases: dict[str, Split], endings: collections.Counter) -> list[str]:
    """Notes what is left out because of its name or place."""
    notes = []
    unread = collections.Counter(
        {ending: count for ending, count in endings.items() if ending in file_signatures.ENDINGS}
    )
    others = endings - unread
    if unread:
        notes.append(
            'not used, images in formats that are not read: '
            f'{_counted(unread, NAMED)}; convert them to JPEG or PNG'
        )
    if others:
        notes.append(
            f"not used, as their names do not end like an image's: {_counted(others, NAMED)}"
        )
    for folder in dict.fromkeys(split.folder for split in bases.values()):
        loose = len(image_names(tree.entries(folder)[1]))
        if loose:
            notes.append(
                f'not used: {loose:,} images that lie in {printable(folder)} itself, in no class '
                'folder'
            )
    return notes


def _class_names(tree: Tree, bases: dict[str, Split], files: list[_File]) -> tuple[str, ...]:
    """Returns the sorted names of the class folders. Raises RunError if they are unusable."""
    (split, base), *others = bases.items()
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
    """Returns the error of a split that has no class folder or a single one."""
    if not base.classes:
        _, files = tree.entries(base.folder)
        number = counted(len(files), 'file')
        problem = f'{base.place} has {number}, but no class folder; a classifier needs at least two'
        return RunError(problem, SORT)
    ((name, folder),) = base.classes.items()
    problem = (
        f'{base.place} has one class folder, {printable(name)}; a classifier needs at least two'
    )
    richer = next((split for split, other in others if len(other.classes) > 1), None)
    if richer:  # as in data sets for anomaly detection
        splits = f'--config.dataset.train_split={richer} --config.dataset.eval_split={HELD_OUT}'
        return RunError(
            f'{problem}, with training images of each. {richer} has more',
            f'{splits} to train on a part of it',
        )
    for _, inner, _ in tree.walk(folder, base.folder):
        if len(inner) > 1:
            fix = f'if {named(inner)} in it are the classes, move them up into {base.place}'
            return RunError(problem, fix)
    return RunError(problem, SORT)


def _empty_classes(tree: Tree, base: Split, names: list[str]) -> RunError:
    """Returns the error of a split that has class folders without images."""
    held = {name: _content(tree, base.classes[name], base.folder) for name in names}
    empty = [f'{name} ({_counted(endings, 3) or "empty"})' for name, endings in held.items()]
    unread = {ending for endings in held.values() for ending in endings} & file_signatures.ENDINGS
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

    A single one is not too many, unless none may be.
    """
    if not broken:
        return []
    allowed = max(1, max_broken * num_files) if max_broken else 0
    if len(broken) > allowed:
        share = math.ceil(100 * len(broken) / num_files) / 100
        allow = f', or write --config.dataset.max_broken={share}' if share < 1 else ''
        some = '; '.join(f'{printable(path)}: {reason}' for path, reason in broken[:NAMED])
        if len(broken) > NAMED:
            some += '; ...'
        raise RunError(
            f'{len(broken):,} of {num_files:,} files in {printable(root)} are broken '
            f'({len(broken) / num_files:.2%}, allowed are {max_broken:.2%}): {some}. '
            f'All of them are listed in {image_validation.list_of_broken(root)}',
            f'replace or remove them{allow}',
        )
    return [
        f'{len(broken):,} of {num_files:,} files are broken and skipped; all of them are in '
        f'{image_validation.list_of_broken(root)}'
    ]


def _hold_out(files: list[_File], eval_split: str, share: float, seed: int) -> list[_File]:
    """Returns the files, with `share` of each class in `eval_split`.

    That is at least one image, and at least one is left. The content decides: duplicates stay
    together, and it does not matter what a file is called or what lies beside it.
    """
    digests: dict[str, set[str]] = collections.defaultdict(set)
    for file in files:
        digests[file.class_name].add(file.check.digest)
    held_out = set()
    for name, found in digests.items():
        order = sorted(
            found, key=lambda digest: hashlib.sha256(f'{seed} {digest}'.encode()).digest()
        )
        held_out |= {(name, digest) for digest in order[: _number_held_out(len(order), share)]}
    return [
        file._replace(split=eval_split)
        if (file.class_name, file.check.digest) in held_out
        else file
        for file in files
    ]


def _number_held_out(number: int, share: float) -> int:
    return min(max(1, round(share * number)), number - 1)


def _check_enough(
    root: str,
    bases: Mapping[str, Split],
    files: list[_File],
    class_names: Sequence[str],
    eval_split: str,
) -> None:
    """Raises RunError if a class, or the evaluation, is left without images."""
    split, base = next(iter(bases.items()))
    spoilt = set(class_names) - {file.class_name for file in files if file.split == split}
    if spoilt:
        raise RunError(
            f'{base.place} has classes of broken files alone',
            f'{named(spoilt)}; see {image_validation.list_of_broken(root)}',
        )
    if not any(file.split == eval_split for file in files):
        advice = (
            'fill its class folders'
            if eval_split in bases
            else 'a class of one image needs it for training; add some'
        )
        place = bases[eval_split].place if eval_split in bases else printable(root)
        raise RunError(f'{place} has no image to evaluate', advice)


def _content_notes(files: list[_File], class_names: Sequence[str], eval_split: str) -> list[str]:
    """Notes classes that are not evaluated, and images that are in two places by their content."""
    notes, twins = [], collections.defaultdict(list)
    missing = set(class_names) - {file.class_name for file in files if file.split == eval_split}
    if missing:
        notes.append(f'no image to evaluate of {named(missing)}')
    for file in files:
        twins[file.check.digest].append(file)
    both = [same for same in twins.values() if len({file.split for file in same}) > 1]
    leaked = [file.path for same in both for file in same if file.split == eval_split]
    if leaked:
        notes.append(
            f'{len(leaked):,} evaluation images are training images as well, byte for byte, '
            f'such as {printable(leaked[0])}: '
            'they make the accuracy look better than it is'
        )
    torn = [same for same in twins.values() if len({file.class_name for file in same}) > 1]
    if torn:
        notes.append(
            f'{len(torn):,} images are in more than one class, byte for byte, such as '
            f'{named(file.path for file in torn[0])}'
        )
    return notes


def _white_level_notes(files: list[_File], white_level: int) -> list[str]:
    """Notes images of more than 8 bits whose values are far from what counts as white."""
    deep = [file for file in files if file.check.peak]
    if not deep:
        return []
    brightest = max(deep, key=lambda file: file.check.peak)
    peak = brightest.check.peak
    num_cut = sum(file.check.peak > white_level for file in deep)
    if num_cut:
        return [
            f'{num_cut:,} of {len(deep):,} images of 16 bits have values that are cut off at '
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
    """Notes JPEG files that break the format and are read all the same."""
    notes = []
    remarkable = [file for file in files if file.check.remark and not file.check.doubt]
    if remarkable:
        first = remarkable[0]
        notes.append(
            f'{len(remarkable):,} JPEG files break the format where no pixel can suffer, such '
            f'as {printable(first.path)} '
            f'({first.check.remark}): they are used'
        )
    doubtful = [file for file in files if file.check.doubt]
    if doubtful:
        first = doubtful[0]
        notes.append(
            f'{len(doubtful):,} JPEG files, nearly all, have the same fault, such as '
            f'{printable(first.path)} '
            f'({first.check.doubt}): it is taken for a habit of what wrote them, and they are '
            'used'
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


def _files(tree: Tree, bases: dict[str, Split]) -> tuple[list[_File], collections.Counter]:
    """Returns the files below the class folders that may be images, and other files by ending."""
    found: list[_File] = []
    endings: collections.Counter = collections.Counter()
    for split, base in bases.items():
        for class_name, class_folder in base.classes.items():
            for folder, _, names in tree.walk(class_folder, base.folder, tree.root):
                below = os.path.relpath(folder, tree.root)
                images = image_names(names)
                found += [_File(split, class_name, os.path.join(below, name)) for name in images]
                if len(images) < len(names):
                    known = set(images)
                    endings.update(_ending(name) for name in names if name not in known)
    return found, endings


def _content(tree: Tree, folder: str, base: str) -> collections.Counter:
    """Returns what a class folder without images holds: {ending: number of files}."""
    endings: collections.Counter = collections.Counter()
    for _, _, names in tree.walk(folder, base):
        endings.update(map(_ending, names))
    return endings


def _counted(endings: collections.Counter, most: int) -> str:
    return ', '.join(f'{count:,} {ending}' for ending, count in endings.most_common(most))


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower() or 'without ending'
