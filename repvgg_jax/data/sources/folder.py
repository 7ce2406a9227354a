"""Directories of images with one subdirectory for each class."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from repvgg_jax.data.dataset import ImageDataset, Record
from repvgg_jax.data.images import read_image
from repvgg_jax.data.sources.image_files import EXTENSIONS, LeftOut, describe_left_out, find_images, list_directory
from repvgg_jax.data.sources.locate import expand_home
from repvgg_jax.terminal import printable

TEST_FRACTION = 0.2
_HELD_OUT = ("test", "validation", "val")
_SPLITS = ("train", "training", "test", "testing", "validation", "val", "valid")
_NAMES_SHOWN = 10


def load_folder(path: str | os.PathLike[str], *, seed: int = 0) -> ImageDataset:
    """Read images from a directory. Images are RGB, and labels follow the sorted names of the classes.

    There are two layouts. In the first, `PATH/train/CLASS/` lies beside `PATH/test/CLASS/`. Instead of `test` it may be
    `validation` or `val`; the first of the three with directories of the classes in train is taken. In the second,
    `PATH/CLASS/`, a fifth of each class, at least one image, is drawn for testing.

    The images of a class are those that `find_images` finds in its directory and below. No directory is read twice,
    whatever links lead to it: an image would otherwise have two labels, or be trained on and tested with.

    Args:
      path: The directory.
      seed: Seed that draws the test images of the second layout.

    Returns:
      The data set.

    Raises:
      FileNotFoundError: If the directory, its classes, a split, or the images of a class are missing.
      OSError: If a directory cannot be read.
      ValueError: If there are fewer than two classes, splits that have no classes, a class too small to split, or test
        classes that are not in train.
    """
    root = expand_home(path)
    if not os.fspath(path):
        raise FileNotFoundError("folder: names no directory; expected folder:PATH, or folder:. for this directory")
    if not os.path.isdir(root):
        raise FileNotFoundError(f"folder {_shown(root)} does not exist or is no directory")
    left_out: list[LeftOut] = []
    if _class_directories(root / "train"):
        train, test = _read_splits(root, left_out)
        _require_two_classes(root / "train", list(train))
    else:
        classes = _read_classes(root, left_out, set())
        _require_two_classes(root, list(classes))
        train, test = _draw_split(classes, seed)
    class_names = tuple(train)
    return ImageDataset(
        name=f"folder:{os.fspath(path)}",
        train=FolderSource(train, class_names),
        test=FolderSource(test, class_names),
        class_names=class_names,
        channels=3,
        left_out=describe_left_out(left_out, root),
    )


class FolderSource:
    """Image files with their labels, sorted by class and then by name."""

    def __init__(self, files: dict[str, list[str]], class_names: tuple[str, ...]):
        self._files = [file for name in class_names for file in files.get(name, [])]
        counts = [len(files.get(name, [])) for name in class_names]
        self._labels = np.repeat(np.arange(len(class_names), dtype=np.int32), counts)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        return {"image": read_image(self._files[index], 3), "label": int(self._labels[index])}


def _class_directories(path: Path) -> list[str]:
    return [os.path.basename(directory) for directory in list_directory(path).directories] if path.is_dir() else []


def _read_classes(path: Path, left_out: list[LeftOut], read: set[tuple[int, int]]) -> dict[str, list[str]]:
    """Return the images of each class in a directory of class directories. What else is there goes to `left_out`.

    Directories that are in `read` already are left out too; those of the classes are added.
    """
    here = list_directory(path)
    _require_readable(here.unreadable)
    names = [os.path.basename(directory) for directory in here.directories]
    if not names:
        raise FileNotFoundError(_no_classes(path, here.images))
    _refuse_splits_as_classes(path, names)
    left_out += here.left_out
    left_out += [LeftOut("image in no class directory", image) for image in here.images]
    # Links come last, so that images are of the class in whose directory they lie.
    found = {
        name: find_images(path / name, read) for name in sorted(names, key=lambda name: os.path.islink(path / name))
    }
    for in_class in found.values():
        _require_readable(in_class.unreadable)
        left_out += in_class.left_out
    empty = [name for name in names if not found[name].images]
    if empty:
        there = describe_left_out([item for name in empty for item in found[name].left_out], path)
        raise FileNotFoundError(
            f"{_shown(path)}: no images in the class directories {_list(empty)}; expected files ending in "
            f"{', '.join(EXTENSIONS)}{f'. In {there}' if there else ''}"
        )
    return {name: found[name].images for name in names}


def _read_splits(root: Path, left_out: list[LeftOut]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    here = list_directory(root)
    _require_readable(here.unreadable)
    held_out = [root / name for name in _HELD_OUT if (root / name).is_dir()]
    others = [name for name in map(os.path.basename, here.directories) if name != "train"]
    if not held_out:
        raise FileNotFoundError(
            f"{_shown(root)} has train/{f', {_list(others)}' if others else ''}, but none of test/, validation/ and "
            "val/: add one, give one of them that name, or remove the train/ level to have the split drawn"
        )
    read: set[tuple[int, int]] = set()
    train = _read_classes(root / "train", left_out, read)
    classes = {directory: set(_class_directories(directory)) for directory in held_out}
    with_classes = [directory for directory in held_out if classes[directory]] or held_out
    # Test images without labels often lie flat, or in one directory of any name, beside a labelled validation split.
    chosen = next((directory for directory in with_classes if classes[directory] & set(train)), with_classes[0])
    unknown = sorted(classes[chosen] - set(train))
    if unknown:
        raise ValueError(
            f"{_shown(chosen)} has classes that {_shown(root / 'train')} lacks: {_list(unknown)}; train has "
            f"{_list(train)}"
        )
    test = _read_classes(chosen, left_out, read)
    left_out += here.left_out
    left_out += [LeftOut("image in no class directory", image) for image in here.images]
    for path in here.directories:
        name = os.path.basename(path)
        if name not in _SPLITS:
            left_out.append(LeftOut("directory beside train/", path))
        elif root / name in held_out[: held_out.index(chosen)]:
            left_out.append(LeftOut(f"held-out directory without classes, {chosen.name}/ is read instead", path))
    return train, test


def _draw_split(classes: dict[str, list[str]], seed: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    train, test = {}, {}
    for label, (name, files) in enumerate(classes.items()):
        if len(files) < 2:
            raise ValueError(
                f"class {printable(name)!r} has {len(files)} image ({printable(files[0])}); drawing a test split takes "
                "at least 2 per class: add images, or arrange the folder as train/CLASS and test/CLASS"
            )
        order = np.random.default_rng([seed, label]).permutation(len(files))
        size = max(1, round(TEST_FRACTION * len(files)))
        test[name] = [files[i] for i in sorted(order[:size])]
        train[name] = [files[i] for i in sorted(order[size:])]
    return train, test


def _refuse_splits_as_classes(path: Path, names: list[str]) -> None:
    """Raise a ValueError where names of classes are names of splits.

    A class may be called 'train'. Several such names, or nothing else, are splits that lie otherwise.
    """
    splits = [name for name in names if name.lower() in _SPLITS]
    if splits and (len(splits) > 1 or splits == names):
        raise ValueError(
            f"{_shown(path)} has the directories {_list(splits)}, which are named as splits, not as classes: expected "
            "train/CLASS/IMAGE and test/CLASS/IMAGE (or validation, or val), in small letters, or only CLASS/IMAGE, "
            "to have the split drawn"
        )


def _require_two_classes(path: Path, names: list[str]) -> None:
    if len(names) > 1:
        return
    below = _class_directories(path / names[0])
    deeper = f". If {_list(below)} in it are the classes or the splits, name {_shown(path / names[0])}" if below else ""
    raise ValueError(
        f"{_shown(path)} has the one class directory {printable(names[0])}: expected two or more, as there is nothing "
        f"to tell apart otherwise{deeper}"
    )


def _no_classes(path: Path, images: list[str]) -> str:
    instead = f" ({len(images)} images lie in it without one)" if images else ""
    top = path.parent if path.name in _SPLITS else path
    return (
        f"{_shown(path)} has no class directories{instead}; expected {_shown(top)}/CLASS/IMAGE or "
        f"{_shown(top)}/train/CLASS/IMAGE and {_shown(top)}/test/CLASS/IMAGE"
    )


def _require_readable(unreadable: dict[str, str]) -> None:
    for path, reason in unreadable.items():
        raise OSError(f"{printable(path)} cannot be read ({reason}): give the right to read it, or take it out")


def _shown(path: Path) -> str:
    return printable(os.fspath(path))


def _list(names: Iterable[str]) -> str:
    names = [printable(name) for name in names]
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
