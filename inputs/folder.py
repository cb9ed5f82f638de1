"""A folder of one's own pictures: its classes, which of its files can be used, and which of them are for evaluation.

    DIR/train/CLASS/**  and  DIR/test/CLASS/**    the two splits as they are
    DIR/CLASS/train/**  and  DIR/CLASS/test/**    the same, with the classes above
    DIR/train/CLASS/**  or   DIR/CLASS/**         a share of each class is held out for evaluation

What a file is good for, `picture_files` says. Nothing is written into the user's folder.
"""
import collections
import dataclasses
import hashlib
import math
import os
import re
import unicodedata
from typing import NamedTuple

import tensorflow as tf

from errors import ConfigError, RunError, did_you_mean, one_line
from inputs import file_signatures, picture_files
from inputs.picture_files import shown

USUAL = ('train', 'training', 'val', 'valid', 'validation', 'dev', 'test', 'testing', 'eval', 'evaluation')  # names of splits
HELD_OUT = 'held_out'  # the name of an evaluation split that is never a folder
# What systems leave in any folder or at the top of a disk, in small letters: Mac archives, Windows, ext4, Synology, QNAP and
# NetApp disks, Android cards. Names that begin with a dot are left out anyway. Some of these may not even be read.
NOT_OURS = ('__macosx', 'thumbs.db', 'ehthumbs.db', 'desktop.ini', '$recycle.bin', 'system volume information', 'lost+found',
            '@eadir', '#recycle', '#snapshot', '@tmp', '@recycle', '@recently-snapshot', '@__thumb', '~snapshot', 'lost.dir',
            'network trash folder', 'temporary items', 'thevolumesettingsfolder', '__pycache__')
NOT_OURS_PATTERN = re.compile(r'found\.[0-9]{3}')  # of Windows, after a repair of the disk
NAMED = 10  # names in one line
DEEP_BITS = (10, 12, 14)  # that cameras and scanners have, and store in 16
SORT = 'put the pictures of each class into a folder of its own'


class Picture(NamedTuple):
    """A file that `tf.io.decode_image` reads right, and the place of its class among the class names."""

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
        splits: {name of a split: its pictures, in an order that is always the same and mixes the classes}.
        broken: (path below data_dir, reason) of each file that cannot be used.
        notes: what the user may not expect, a line each.
    """

    class_names: tuple[str, ...]
    splits: dict[str, list[Picture]]
    broken: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


class _Split(NamedTuple):
    """Where the pictures of a split are.

    Attributes:
        place: in words: 'DIR/train', or 'DIR/CLASS/train' where the classes are above.
        folder: the one that holds the class folders.
        classes: {class name: the folder of its pictures of this split}.
    """

    place: str
    folder: str
    classes: dict[str, str]


class _File(NamedTuple):
    split: str
    class_name: str
    path: str  # below data_dir
    verdict: picture_files.Verdict | None = None


def find(dataset_config, needs_training=True):
    """Finds classes and pictures in `dataset.data_dir`, and examines the files that are new or changed.

    Args:
        dataset_config: `config.dataset`.
        needs_training: False where pictures to evaluate are enough.

    Raises:
        ConfigError: no folder is named, or a split that no folder can have.
        RunError: there are no classes of pictures, too many files are broken, or something cannot be read or written.
    """
    root, train_split, eval_split = os.path.expanduser(dataset_config.data_dir), dataset_config.train_split, dataset_config.eval_split
    bases, notes, files, class_names = _survey(dataset_config, needs_training)
    label_of = {name: label for label, name in enumerate(class_names)}
    verdicts = picture_files.examine(root, sorted(file.path for file in files), dataset_config.white_level)
    broken = tuple((path, verdict.broken) for path, verdict in verdicts.items() if verdict.broken)
    notes += _check_broken(root, broken, len(verdicts), dataset_config.max_broken)
    files = [file._replace(verdict=verdicts[file.path]) for file in files if not verdicts[file.path].broken]
    if eval_split not in bases:
        files = _hold_out(files, eval_split, dataset_config.eval_share, dataset_config.split_seed)
        notes.append(f'{dataset_config.eval_share:.3g} of each class in {bases[train_split].place} is held out as {eval_split}; '
                     f'config.dataset.split_seed={dataset_config.split_seed} says which pictures')
    _check_enough(root, bases, files, class_names, eval_split)
    notes += _notes_on_pictures(files, class_names, eval_split)
    notes += _notes_on_deep_pictures(files, dataset_config.white_level)
    notes += _notes_on_odd_jpegs(files)

    splits = {split: [] for split in (*bases, eval_split)}
    for file in sorted(files, key=lambda file: (file.verdict.digest, file.path)):  # as good as shuffled: any part has all classes
        original = os.path.join(root, file.path)
        path = file.verdict.copy or original
        label = label_of[file.class_name]
        splits[file.split].append(Picture(path, label, file.verdict.num_bytes, file.verdict.digest, original))
    return Folder(class_names, splits, broken, tuple(notes))


def count(dataset_config):
    """What `find` would find, without a look into any file: (class names, {split: files that may be pictures}, bytes of all or None).

    Where a part is held out, the numbers are those of a folder in which no picture is there twice. Raises as `find` does.
    """
    root = os.path.expanduser(dataset_config.data_dir)
    bases, _, files, class_names = _survey(dataset_config, needs_training=True)
    num_bytes = None if '://' in root else sum(os.path.getsize(os.path.join(root, file.path)) for file in files)
    counts = collections.Counter((file.split, file.class_name) for file in files)
    sizes = {split: sum(number for (of, _), number in counts.items() if of == split) for split in bases}
    if dataset_config.eval_split not in bases:
        sizes[dataset_config.eval_split] = sum(_number_held_out(number, dataset_config.eval_share) for number in counts.values())
        sizes[dataset_config.train_split] -= sizes[dataset_config.eval_split]
    return class_names, sizes, num_bytes


def _survey(dataset_config, needs_training):
    """({split: _Split}, notes, files, class names), from names alone."""
    root, train_split, eval_split = os.path.expanduser(dataset_config.data_dir), dataset_config.train_split, dataset_config.eval_split
    _check_config(root, train_split, eval_split)
    tree = _Tree(root)
    try:
        bases, notes = _layout(tree, train_split, eval_split, needs_training)
        files, endings = _files(tree, bases)
        class_names = _class_names(tree, bases, files)
    except (OSError, tf.errors.OpError) as error:
        raise RunError(f'{shown(root)} cannot be read: {shown(one_line(error))}') from error
    return bases, notes + _notes_on_names(tree, bases, endings), files, class_names


def _check_config(root, train_split, eval_split):
    def expected(place):
        return f'{place}/{train_split}/CLASS/*.jpg and {place}/{eval_split}/CLASS/*.jpg, or {place}/CLASS/*.jpg'

    for key, split in (('train_split', train_split), ('eval_split', eval_split)):
        if split in ('', '.', '..') or set(split) & set('[]+%:/\\') or shown(split) != split:
            raise ConfigError(f"config.dataset.{key}={split!r} is no split of a folder, which is a subfolder: write its name, as in 'train'; "
                              'for a part of the pictures leave the subfolder out, and config.dataset.eval_share of each class is evaluated')
    if not root:
        raise ConfigError("config.dataset.name='folder' needs --config.dataset.data_dir=DIR with " + expected('DIR'))
    if os.path.isfile(root):
        raise RunError(f'config.dataset.data_dir={shown(root)} is a file: unpack it, and name the folder with {expected("DIR")}')
    if not (tf.io.gfile.isdir if '://' in root else os.path.isdir)(root):
        raise RunError(f'config.dataset.data_dir={shown(root)} is no folder: it should hold {expected(shown(root))}')


def _layout(tree: '_Tree', train_split: str, eval_split: str, needs_training: bool) -> tuple[dict[str, _Split], list[str]]:
    """({split: _Split}, notes); without `eval_split` where it is to be held out of the other."""
    root = tree.root
    folders, _ = tree.entries(root)
    asked = (train_split, eval_split)
    subfolders = {name: tree.entries(os.path.join(root, name))[0] for name in folders if _is_like_split(name, asked)}
    splits = [name for name in subfolders if subfolders[name]]  # 'train' may be a class, too: of pictures of trains
    if not splits:
        return _layout_of_classes(tree, folders, asked, subfolders, needs_training)
    if eval_split in subfolders and eval_split not in splits and train_split in splits:
        raise RunError(f'{shown(root)}/{eval_split} has no class folders: sort its pictures into them, '
                       f'or write --config.dataset.eval_split={HELD_OUT} to hold out a part of {train_split}')
    chosen = _choose(shown(root), splits, asked, needs_training, 'with class folders')
    for split in chosen:
        _check_classes_of(tree, split, subfolders[split], asked)
    bases = {split: _classes_in(os.path.join(root, split), subfolders[split]) for split in chosen}
    unused = [name for name in folders if name not in bases]
    return bases, [f'not used: {_named(unused)} in {shown(root)}'] if unused else []


def _classes_in(folder: str, names: list[str]) -> _Split:
    return _Split(shown(folder), folder, {name: os.path.join(folder, name) for name in names})


def _is_like_split(name: str, asked: tuple[str, str]) -> bool:
    return name in asked or name.casefold() in USUAL


def _choose(place: str, splits: list[str], asked: tuple[str, str], needs_training: bool, having: str) -> list[str]:
    """Which of the `splits` that are there are used: those that are asked for, or training alone to hold a part out."""
    train_split, eval_split = asked
    for split in asked:
        same = [name for name in splits if name.casefold() == split.casefold()]
        if len(same) > 1:
            raise RunError(f'{place} has splits that one takes for the same: {_named(same)}; merge or rename them')
    if eval_split in splits and (train_split in splits or not needs_training):
        return [split for split in asked if split in splits]
    if train_split not in splits:
        train_like = next((name for name in splits if name.casefold().startswith('train')), 'NAME')
        eval_like = next((name for name in splits if name != train_like), HELD_OUT)
        raise RunError(f'{place} has no {train_split} {having}, but {_named(splits)}: '
                       f'write --config.dataset.train_split={train_like} --config.dataset.eval_split={eval_like}')
    others = [name for name in splits if name != train_split]
    if others and eval_split != HELD_OUT:
        raise RunError(f'{place} has no {eval_split}, but {_named(others)}: write --config.dataset.eval_split={others[0]}')
    return [train_split]


def _layout_of_classes(tree, folders, asked, subfolders, needs_training) -> tuple[dict[str, _Split], list[str]]:
    """What `_layout` returns of a folder whose folders are classes, as no split is among them."""
    root = tree.root
    if folders and len(subfolders) == len(folders):
        raise RunError(f'{shown(root)} has {_named(folders)}, but no class folders in them: {SORT}')
    if len(folders) == 1 and tree.entries(os.path.join(root, folders[0]))[0]:
        inner = os.path.join(shown(root), shown(folders[0]))
        raise RunError(f'{shown(root)} has one folder alone, which has folders itself: write --config.dataset.data_dir={inner}')
    everything = _classes_in(root, folders)
    inside = [place for name, folder in everything.classes.items() for place in _splits_inside(tree, name, folder, asked)]
    found = sorted({place.split for place in inside})
    if len(found) < 2 and (needs_training or found != [asked[1]]):  # nothing that could be mixed
        return {asked[0]: everything}, []
    _check_splits_of_classes(root, inside, asked)
    chosen = _choose(f'{shown(root)}/CLASS', found, asked, needs_training, 'with pictures')
    having = {split: {place.class_name for place in inside if place.split == split} for split in found}
    lacking = [name for name in folders if name not in having[chosen[0]]]
    if lacking:
        raise RunError(f'{shown(root)} has {" and ".join(found)} in its class folders, but {_named(lacking)} without {chosen[0]}: '
                       'sort the pictures of every class into such folders, or of none')
    bases = {}
    for split in chosen:
        folders_of = {name: os.path.join(root, name, split) for name in folders if name in having[split]}
        bases[split] = _Split(f'{shown(root)}/CLASS/{split}', root, folders_of)
    notes = [f'the splits are the folders {" and ".join(chosen)} in each class folder of {shown(root)}']
    unused = 0
    for folder in everything.classes.values():
        for place, _, files in tree.walk(folder, root):
            if os.path.relpath(place, folder).split(os.sep)[0] not in chosen:
                unused += len(_pictures(files))
    if unused:
        notes.append(f'not used: {unused:,} pictures in class folders of {shown(root)}, in no {" or ".join(chosen)}')
    return bases, notes


class _Inside(NamedTuple):
    """A folder that is called as a split is, below a class folder, with pictures in or below it."""

    class_name: str
    above: str  # between the class folder and it, '' for nothing
    split: str
    below: str  # the first folder between it and the pictures, '' for nothing


def _splits_inside(tree, class_name: str, folder: str, asked: tuple[str, str]) -> list[_Inside]:
    found = set()
    for place, _, files in tree.walk(folder, tree.root):
        if place == folder or not _pictures(files):
            continue
        parts = os.path.relpath(place, folder).split(os.sep)
        depth = next((depth for depth, part in enumerate(parts) if _is_like_split(part, asked)), None)
        if depth is not None:
            found.add(_Inside(class_name, os.sep.join(parts[:depth]), parts[depth], ''.join(parts[depth + 1:depth + 2])))
    return sorted(found)


def _check_splits_of_classes(root: str, inside: list[_Inside], asked: tuple[str, str]) -> None:
    """Raises RunError unless every split lies directly in a class folder and holds pictures, not classes of its own."""
    train_split, eval_split = asked
    deep = next((place for place in inside if place.above), None)
    classes_below = sorted({place.below for place in inside if place.below})
    if deep is None and len(classes_below) < 2:  # one folder, such as `images`, may lie between
        return
    place = deep or next(place for place in inside if place.below)
    above = os.path.join(shown(root), shown(place.class_name), *filter(None, [shown(place.above)]))
    its_splits = sorted({other.split for other in inside if (other.class_name, other.above) == (place.class_name, place.above)})
    if place.below:
        held = f'{above} is a data set of its own, with {" and ".join(its_splits)}: write --config.dataset.data_dir={above}; or, if'
    else:
        held = f'{above} holds {" and ".join(its_splits)}, which would be mixed in one class: if'
    raise RunError(f'{held} {shown(place.class_name)} is a class, sort its pictures into {shown(root)}/{train_split}/{shown(place.class_name)} '
                   f'and {shown(root)}/{eval_split}/{shown(place.class_name)}')


def _check_classes_of(tree, split: str, names: list[str], asked: tuple[str, str]) -> None:
    """Raises RunError if what lies in the folder of a split are splits again, or splits are below its classes."""
    base = os.path.join(tree.root, split)
    place = f'{shown(tree.root)}/{split}'
    if len(names) > 1 and all(_is_like_split(name, asked) for name in names):
        raise RunError(f'{place} has no class folders, but {_named(names)}, which are called as splits are: '
                       f'write --config.dataset.data_dir={place}')
    for name in names:
        found = {}
        for inside in _splits_inside(tree, name, os.path.join(base, name), asked):
            found.setdefault(inside.split, os.path.join(name, inside.above, inside.split))
        if len(found) > 1:
            raise RunError(f'{place} holds {_named(found.values())}, which would be mixed in one class: '
                           f'sort the pictures into {shown(tree.root)}/{asked[0]}/CLASS and {shown(tree.root)}/{asked[1]}/CLASS')


def _notes_on_names(tree, bases: dict[str, _Split], endings: collections.Counter) -> list[str]:
    """What is left out by its name or place."""
    notes = []
    unread = collections.Counter({ending: count for ending, count in endings.items() if ending in file_signatures.ENDINGS})
    if unread:
        notes.append(f'not used, pictures in formats that are not read: {_counted(unread, NAMED)}; convert them to JPEG or PNG')
    if endings - unread:
        notes.append(f'not used, as their names do not end like a picture\'s: {_counted(endings - unread, NAMED)}')
    for folder in dict.fromkeys(split.folder for split in bases.values()):
        loose = len(_pictures(tree.entries(folder)[1]))
        if loose:
            notes.append(f'not used: {loose:,} pictures that lie in {shown(folder)} itself, in no class folder')
    return notes


def _class_names(tree: '_Tree', bases: dict[str, _Split], files: list[_File]) -> tuple[str, ...]:
    """The names of the class folders, sorted. Raises RunError where they are no classes to train on."""
    (split, base), *others = bases.items()
    names = list(base.classes)
    if len(names) < 2:
        raise RunError(_too_few_classes(tree, base, others))
    odd = [name for name in names if not _is_one_line(name)]
    if odd:
        raise RunError(f'{base.place} has class folders whose names cannot be written as one line of text: {_named(odd)}; rename them')
    alike = collections.defaultdict(list)
    for name in names:
        alike[unicodedata.normalize('NFC', name.strip()).casefold()].append(name)
    for same in alike.values():
        if len(same) > 1:
            raise RunError(f'{base.place} has class folders that one takes for the same: {", ".join(map(repr, same))}; merge or rename them')
    filled = {file.class_name for file in files if file.split == split}
    content = {name: _content(tree, base.classes[name], base.folder) for name in names if name not in filled}
    if content:
        empty = [f'{name} ({_counted(endings, 3) or "empty"})' for name, endings in content.items()]
        unread = set().union(*content.values()) & file_signatures.ENDINGS
        advice = f'convert {_named(unread)} to JPEG or PNG, ' if unread else ''
        raise RunError(f'{base.place} has class folders without pictures: {_named(empty)}; {advice}fill them, or take them away')
    for _, other in others:
        unknown = [name for name in other.classes if name not in base.classes]
        if unknown:
            raise RunError(f'{other.place} has classes that {split} has not: {_named(unknown)}{did_you_mean(unknown[0], names)}')
    return tuple(names)


def _too_few_classes(tree: '_Tree', base: _Split, others: list[tuple[str, _Split]]) -> str:
    """What is wrong with a split that has no class folder or a single one, and what to do."""
    if not base.classes:
        return f'{base.place} has {len(tree.entries(base.folder)[1]):,} files, but no class folder; a classifier needs at least two: {SORT}'
    (name, folder), = base.classes.items()
    text = f'{base.place} has one class folder, {shown(name)}; a classifier needs at least two'
    richer = next((split for split, other in others if len(other.classes) > 1), None)
    if richer:  # data sets for finding what is unlike all training pictures are so
        return (f'{text}, with training pictures of each. {richer} has more: write --config.dataset.train_split={richer} '
                f'--config.dataset.eval_split={HELD_OUT} to train on a part of it')
    inner = next((folders for _, folders, _ in tree.walk(folder, base.folder) if len(folders) > 1), [])
    if inner:
        return f'{text}: if {_named(inner)} in it are the classes, move them up into {base.place}'
    return f'{text}: {SORT}'


def _is_one_line(name: str) -> bool:
    """Whether a name is text without line breaks and other control characters."""
    return not any(unicodedata.category(letter) in ('Cc', 'Cs') for letter in name)


def _check_broken(root, broken, num_files, max_broken):
    """Notes on the broken files. Raises RunError if they are too many; one alone is not, unless none may be."""
    if not broken:
        return []
    if len(broken) > (max(1, max_broken * num_files) if max_broken else 0):
        share = math.ceil(100 * len(broken) / num_files) / 100
        allow = f', or write --config.dataset.max_broken={share}' if share < 1 else ''
        some = '; '.join(f'{shown(path)}: {reason}' for path, reason in broken[:NAMED]) + ('; ...' if len(broken) > NAMED else '')
        raise RunError(f'{len(broken):,} of {num_files:,} files in {shown(root)} are broken '
                       f'({len(broken) / num_files:.2%}, allowed are {max_broken:.2%}): {some}. '
                       f'All of them are listed in {picture_files.list_of_broken(root)}: replace or remove them{allow}')
    return [f'{len(broken):,} of {num_files:,} files are broken and skipped; all of them are in {picture_files.list_of_broken(root)}']


def _hold_out(files, eval_split, share, seed):
    """The files, with `share` of each class in `eval_split`: at least one picture, and at least one is left.

    What decides is the content: the same picture twice stays together, and it does not matter what a file is called or lies beside.
    """
    digests = collections.defaultdict(set)
    for file in files:
        digests[file.class_name].add(file.verdict.digest)
    held_out = set()
    for name, found in digests.items():
        order = sorted(found, key=lambda digest: hashlib.sha256(f'{seed} {digest}'.encode()).digest())
        held_out |= {(name, digest) for digest in order[:_number_held_out(len(order), share)]}
    return [file._replace(split=eval_split) if (file.class_name, file.verdict.digest) in held_out else file for file in files]


def _number_held_out(number, share):
    return min(max(1, round(share * number)), number - 1)


def _check_enough(root, bases, files, class_names, eval_split):
    """Raises RunError if a class, or the evaluation, is left without pictures."""
    split, base = next(iter(bases.items()))
    spoilt = set(class_names) - {file.class_name for file in files if file.split == split}
    if spoilt:
        raise RunError(f'{base.place} has classes of broken files alone: {_named(spoilt)}; see {picture_files.list_of_broken(root)}')
    if not any(file.split == eval_split for file in files):
        advice = 'fill its class folders' if eval_split in bases else 'a class of one picture needs it for training; add some'
        place = bases[eval_split].place if eval_split in bases else shown(root)
        raise RunError(f'{place} has no picture to evaluate: {advice}')


def _notes_on_pictures(files, class_names, eval_split):
    """Classes that are not evaluated, and pictures that are in two places by their content."""
    notes, twins = [], collections.defaultdict(list)
    missing = set(class_names) - {file.class_name for file in files if file.split == eval_split}
    if missing:
        notes.append(f'no picture to evaluate of {_named(missing)}')
    for file in files:
        twins[file.verdict.digest].append(file)
    both = [same for same in twins.values() if len({file.split for file in same}) > 1]
    leaked = [file.path for same in both for file in same if file.split == eval_split]
    if leaked:
        notes.append(f'{len(leaked):,} evaluation pictures are training pictures as well, byte for byte, such as {shown(leaked[0])}: '
                     'they make the accuracy look better than it is')
    torn = [same for same in twins.values() if len({file.class_name for file in same}) > 1]
    if torn:
        notes.append(f'{len(torn):,} pictures are in more than one class, byte for byte, such as {_named(file.path for file in torn[0])}')
    return notes


def _notes_on_deep_pictures(files, white_level):
    """Pictures of more than 8 bits whose values are far from what counts as white."""
    deep = [file for file in files if file.verdict.peak]
    if not deep:
        return []
    brightest = max(deep, key=lambda file: file.verdict.peak)
    peak = brightest.verdict.peak
    if peak > white_level:
        return [f'{shown(brightest.path)} has values up to {peak:,}, which are cut off at config.dataset.white_level={white_level}']
    used = next((2**bits - 1 for bits in DEEP_BITS if peak < 2**bits), white_level)
    if used >= white_level:
        return []
    return [f'{len(deep):,} pictures of 16 bits have no value above {peak:,}, so they are nearly black: '
            f'if {used:,} is their white, write --config.dataset.white_level={used}']


def _notes_on_odd_jpegs(files):
    """JPEG files that break the format and are read all the same."""
    notes = []
    remarkable = [file for file in files if file.verdict.remark and not file.verdict.doubt]
    if remarkable:
        first = remarkable[0]
        notes.append(f'{len(remarkable):,} JPEG files break the format where no pixel can suffer, such as {shown(first.path)} '
                     f'({first.verdict.remark}): they are used')
    doubtful = [file for file in files if file.verdict.doubt]
    if doubtful:
        first = doubtful[0]
        notes.append(f'{len(doubtful):,} JPEG files, nearly all, have the same fault, such as {shown(first.path)} '
                     f'({first.verdict.doubt}): it is taken for a habit of what wrote them, and they are used')
    return notes


def image_paths(root):
    """Yields the files below a folder whose names end like an image's, relative to it, sorted folder by folder."""
    for folder, _, names in _Tree(root).walk(root):
        yield from (os.path.relpath(os.path.join(folder, name), root) for name in _pictures(names))


def _files(tree: '_Tree', bases: dict[str, _Split]) -> tuple[list[_File], collections.Counter]:
    """(the files below the class folders that may be pictures, how many others there are of each ending)."""
    found, endings = [], collections.Counter()
    for split, base in bases.items():
        for class_name, class_folder in base.classes.items():
            for folder, _, names in tree.walk(class_folder, base.folder, tree.root):
                pictures = _pictures(names)
                below = os.path.relpath(folder, tree.root)
                found += [_File(split, class_name, os.path.join(below, name)) for name in pictures]
                if len(pictures) < len(names):
                    endings.update(_ending(name) for name in names if not _is_picture(name))
    return found, endings


def _content(tree: '_Tree', folder: str, base: str) -> collections.Counter:
    """What a class folder without pictures holds: {ending: number of files}."""
    return collections.Counter(_ending(name) for *_, names in tree.walk(folder, base) for name in names)


def _counted(endings: collections.Counter, most: int) -> str:
    return ', '.join(f'{count:,} {ending}' for ending, count in endings.most_common(most))


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower() or 'without ending'


def _pictures(names: list[str]) -> list[str]:
    return [name for name in names if _is_picture(name)]


def _is_picture(name):
    return name.lower().endswith(picture_files.SUFFIXES)


class _Tree:
    """The user's folder, on any file system, of which each folder is read once.

    Left out is what is hidden and what NOT_OURS names: these are not read at all, as often they may not be.
    """

    def __init__(self, root: str):
        self.root = root
        self._entries, self._places = {}, {}

    def entries(self, folder: str) -> tuple[list[str], list[str]]:
        """(folders, files): sorted names of what is in a folder. Raises OSError or tf.errors.OpError."""
        if folder not in self._entries:
            folders, files = (_read_remote if '://' in folder else _read_local)(folder)
            self._entries[folder] = sorted(filter(_is_ours, folders)), sorted(filter(_is_ours, files))
        return self._entries[folder]

    def walk(self, folder: str, *above: str):
        """Like os.walk, sorted; links lead to no place twice, nor to those `above`."""
        entered, waiting = {self._place(place) for place in above}, [folder]
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


def _is_ours(name: str) -> bool:
    folded = name.casefold()
    return not (name.startswith('.') or folded in NOT_OURS or NOT_OURS_PATTERN.fullmatch(folded))


def _read_local(folder: str) -> tuple[list[str], list[str]]:
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                is_folder = entry.is_dir()
            except OSError:  # such as a link that leads to itself
                is_folder = False
            (folders if is_folder else files).append(entry.name)
    return folders, files


def _read_remote(folder: str) -> tuple[list[str], list[str]]:
    def fail(error):
        raise error

    _, folders, files = next(tf.io.gfile.walk(folder, onerror=fail))
    return [name.rstrip('/') for name in folders], list(files)


def _named(names):
    names = sorted(names)
    return ', '.join(map(shown, names[:NAMED])) + (f' and {len(names) - NAMED:,} more' if len(names) > NAMED else '')
