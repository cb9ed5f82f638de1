"""Tells splits from classes among the user's folders, by name. Two splits are never mixed."""

import os
from collections.abc import Iterable
from typing import NamedTuple

from common.console import printable
from common.errors import RunError
from inputs import image_validation
from inputs.folder_tree import Tree

USUAL_SPLITS = frozenset(
    (  # names of splits
        'train',
        'training',
        'val',
        'valid',
        'validation',
        'dev',
        'test',
        'testing',
        'eval',
        'evaluation',
    )
)
# An evaluation split that is held out of the training images even if there are other splits.
HELD_OUT = 'held_out'
MAX_NAMES = 10  # listed in one line
SORT = 'put the images of each class into a folder of its own'


class RequestedSplits(NamedTuple):
    """The splits that the config names."""

    train: str
    eval: str
    needs_training: bool  # False where images to evaluate are enough


class Split(NamedTuple):
    """Where the images of a split are.

    Attributes:
        place: for messages: 'DIR/train', or 'DIR/CLASS/train' where the split folders are inside
            the class folders.
        folder: the one that holds the class folders.
        classes: {class name: the folder of its images of this split}.
    """

    place: str
    folder: str
    classes: dict[str, str]


class _SplitInClass(NamedTuple):
    """A folder below a class folder that is named like a split and has images in or below it."""

    class_name: str
    above: str  # path from the class folder to it, '' if none
    split: str
    below: str  # the first folder between it and the images, '' if none


def find(tree: Tree, asked: RequestedSplits) -> tuple[dict[str, Split], list[str]]:
    """Finds the splits.

    Returns: ({name: Split}, without `asked.eval` if it is to be held out of `asked.train`; notes).

    Raises: RunError, with what to do, where splits would be mixed or one of `asked` is not there.
    """
    root = tree.root
    folders, _ = tree.entries(root)
    like_splits = [name for name in folders if _is_like_split(name, asked)]
    subfolders = {name: tree.entries(os.path.join(root, name))[0] for name in like_splits}
    # A folder 'train' without subfolders may be a class: pictures of trains.
    splits = [name for name in like_splits if subfolders[name]]
    if not splits:
        _check_classes(tree, folders, like_splits)
        return _find_in_classes(tree, folders, asked)
    if asked.train in splits and asked.eval in subfolders and asked.eval not in splits:
        raise RunError(
            f'{printable(root)}/{asked.eval} has no class folders',
            'sort its images into them, or write '
            f'--config.dataset.eval_split={HELD_OUT} to hold out a part of '
            f'{asked.train}',
        )
    chosen = _choose(printable(root), splits, asked, 'with class folders')
    found = {}
    for name in chosen:
        found[name] = _with_classes(os.path.join(root, name), subfolders[name])
        _check_classes_of_split(tree, found[name], asked)
    unused = [name for name in folders if name not in chosen]
    return found, [f'not used: {named(unused)} in {printable(root)}'] if unused else []


def named(names: Iterable[str]) -> str:
    """Lists the first names in sorted order, and the number of others."""
    names = sorted(names)
    more = f' and {len(names) - MAX_NAMES:,} more' if len(names) > MAX_NAMES else ''
    return ', '.join(map(printable, names[:MAX_NAMES])) + more


def image_names(files: list[str]) -> list[str]:
    """Returns the names that end like an image's."""
    return [name for name in files if name.lower().endswith(image_validation.SUFFIXES)]


def _is_like_split(name: str, asked: RequestedSplits) -> bool:
    return name in (asked.train, asked.eval) or name.casefold() in USUAL_SPLITS


def _with_classes(folder: str, names: list[str]) -> Split:
    return Split(printable(folder), folder, {name: os.path.join(folder, name) for name in names})


def _choose(place: str, splits: list[str], asked: RequestedSplits, having: str) -> list[str]:
    """Returns the splits to use: `asked`, or the training split alone, to hold a part out of it."""
    for split in (asked.train, asked.eval):
        same = [name for name in splits if name.casefold() == split.casefold()]
        if len(same) > 1:
            raise RunError(
                f'{place} has splits that look the same, {named(same)}',
                'merge or rename them',
            )
    if asked.eval in splits and (asked.train in splits or not asked.needs_training):
        return [split for split in (asked.train, asked.eval) if split in splits]
    others = [name for name in splits if name != asked.train]
    if asked.train not in splits:
        train_like = next((name for name in splits if name.casefold().startswith('train')), 'NAME')
        eval_like = next((name for name in splits if name != train_like), HELD_OUT)
        raise RunError(
            f'{place} has no split {asked.train} {having}, only {named(splits)}',
            f'--config.dataset.train_split={train_like} --config.dataset.eval_split={eval_like}',
        )
    if others and asked.eval != HELD_OUT:
        raise RunError(
            f'{place} has no split {asked.eval}, but has {named(others)}',
            f'--config.dataset.eval_split={others[0]}',
        )
    return [asked.train]


def _check_classes(tree: Tree, folders: list[str], like_splits: list[str]) -> None:
    """Raises RunError if the top-level folders, none of which is a split, cannot be classes."""
    root = printable(tree.root)
    if folders and len(like_splits) == len(folders):
        raise RunError(f'{root} has {named(folders)}, but no class folders in them', SORT)
    if len(folders) == 1 and tree.entries(os.path.join(tree.root, folders[0]))[0]:
        raise RunError(
            f'{root} has only one folder, which has subfolders',
            f'--config.dataset.data_dir={os.path.join(root, printable(folders[0]))}',
        )


def _find_in_classes(
    tree: Tree, folders: list[str], asked: RequestedSplits
) -> tuple[dict[str, Split], list[str]]:
    """Does the work of `find` where the top-level folders are classes; splits may be below them."""
    root = printable(tree.root)
    everything = _with_classes(tree.root, folders)
    inside = [place for name in folders for place in _splits_inside(tree, everything, name, asked)]
    names = sorted({place.split for place in inside})
    is_for_evaluation = names == [asked.eval] and not asked.needs_training
    if len(names) < 2 and not is_for_evaluation:  # nothing that could be mixed
        return {asked.train: everything}, []
    _check_splits_of_classes(tree, inside, asked)
    chosen = _choose(f'{root}/CLASS', names, asked, 'with images')
    having = {name: {place.class_name for place in inside if place.split == name} for name in names}
    lacking = [name for name in folders if name not in having[chosen[0]]]
    if lacking:
        raise RunError(
            f'{root} has {" and ".join(names)} in its class folders, but no {chosen[0]} in '
            f'{named(lacking)}',
            'use such folders in every class, or in none',
        )
    found = {}
    for split in chosen:
        classes = [name for name in folders if name in having[split]]
        places = {name: os.path.join(tree.root, name, split) for name in classes}
        found[split] = Split(f'{root}/CLASS/{split}', tree.root, places)
    notes = [f'the splits are the folders {" and ".join(chosen)} in each class folder of {root}']
    unused = sum(_count_outside(tree, folder, chosen) for folder in everything.classes.values())
    if unused:
        notes.append(
            f'not used: {unused:,} images in class folders of {root}, but not in '
            f'{" or ".join(chosen)}'
        )
    return found, notes


def _splits_inside(
    tree: Tree, split: Split, class_name: str, asked: RequestedSplits
) -> list[_SplitInClass]:
    """Returns the folders below a class folder that are named like splits and hold images."""
    folder = split.classes[class_name]
    found = set()
    for place, _, files in tree.walk(folder, split.folder, tree.root):
        if place == folder or not image_names(files):
            continue
        parts = os.path.relpath(place, folder).split(os.sep)
        depths = [depth for depth, part in enumerate(parts) if _is_like_split(part, asked)]
        if depths:
            depth = depths[0]
            above, below = os.sep.join(parts[:depth]), ''.join(parts[depth + 1 : depth + 2])
            found.add(_SplitInClass(class_name, above, parts[depth], below))
    return sorted(found)


def _count_outside(tree: Tree, folder: str, splits: list[str]) -> int:
    """Counts the images of a class folder that are in none of these subfolders."""
    return sum(
        len(image_names(files))
        for place, _, files in tree.walk(folder, tree.root)
        if os.path.relpath(place, folder).split(os.sep)[0] not in splits
    )


def _check_splits_of_classes(
    tree: Tree, inside: list[_SplitInClass], asked: RequestedSplits
) -> None:
    """Raises RunError unless all splits are right inside class folders and hold no folders."""
    deep = [place for place in inside if place.above]
    with_folders = [place for place in inside if place.below]
    # A single subfolder, such as train/images, is fine.
    if not deep and len({place.below for place in with_folders}) < 2:
        return
    place = (deep or with_folders)[0]
    root, class_name = printable(tree.root), printable(place.class_name)
    above = os.path.join(root, class_name, printable(place.above)).rstrip('/')
    splits = sorted(
        {
            other.split
            for other in inside
            if (other.class_name, other.above) == (place.class_name, place.above)
        }
    )
    places = f'{root}/{asked.train}/{class_name} and {root}/{asked.eval}/{class_name}'
    fix = f'if {class_name} is a class, sort its images into {places}'
    if not place.below:
        problem = f'{above} holds {" and ".join(splits)}, which would be mixed in one class'
        raise RunError(problem, fix)
    problem = f'{above} is a data set of its own, with {" and ".join(splits)}'
    raise RunError(problem, f'--config.dataset.data_dir={above}; or, {fix}')


def _check_classes_of_split(tree: Tree, split: Split, asked: RequestedSplits) -> None:
    """Raises RunError if the class folders of a split are themselves splits, or hold some."""
    names = list(split.classes)
    if len(names) > 1 and all(_is_like_split(name, asked) for name in names):
        raise RunError(
            f'{split.place} has no class folders, but {named(names)}, which are named like splits',
            f'--config.dataset.data_dir={split.place}',
        )
    for name in names:
        inside = _splits_inside(tree, split, name, asked)
        found = {place.split: os.path.join(name, place.above, place.split) for place in inside}
        if len(found) > 1:
            root = printable(tree.root)
            raise RunError(
                f'{split.place} holds {named(found.values())}, which would be mixed in one class',
                f'sort the images into {root}/{asked.train}/CLASS and {root}/{asked.eval}/CLASS',
            )
