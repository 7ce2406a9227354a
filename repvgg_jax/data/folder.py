"""A directory of images, one subdirectory per class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from repvgg_jax.data.dataset import ImageDataset, Record
from repvgg_jax.data.decode import read_image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TEST_FRACTION = 0.2


def load_folder(path: str | os.PathLike[str], *, seed: int = 0) -> ImageDataset:
    """Reads images from a directory; images are RGB, labels follow the sorted class names.

    Two layouts: `PATH/train/CLASS/*` with `PATH/test/CLASS/*` (or `validation`, or `val`), and
    `PATH/CLASS/*`, of which a fifth of each class, at least one image, is drawn for testing. Files that
    are no images by their extension and names that start with a dot are passed over.

    Args:
      path: the directory.
      seed: draws the test images of the second layout.

    Raises:
      FileNotFoundError: the directory, its classes, a split, or the images of a class are missing.
      ValueError: a class too small to split, or test classes that are not in train.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"folder {root} does not exist or is no directory")
    if _subdirectories(root / "train"):
        train, test = _read_splits(root)
    else:
        train, test = _draw_split(_read_classes(root), seed)
    class_names = tuple(train)
    return ImageDataset(
        name=f"folder:{path}",
        train=FolderSource(train, class_names),
        test=FolderSource(test, class_names),
        class_names=class_names,
        channels=3,
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


def _subdirectories(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _read_classes(path: Path) -> dict[str, list[str]]:
    directories = _subdirectories(path)
    if not directories:
        raise FileNotFoundError(
            f"{path} has no class directories; expected {path}/CLASS/IMAGE or "
            f"{path}/train/CLASS/IMAGE and {path}/test/CLASS/IMAGE"
        )
    classes = {directory.name: _images(directory) for directory in directories}
    empty = [name for name, files in classes.items() if not files]
    if empty:
        raise FileNotFoundError(
            f"{path}: no images in the class directories {', '.join(empty)}; "
            f"expected files ending in {', '.join(EXTENSIONS)}"
        )
    return classes


def _images(directory: Path) -> list[str]:
    with os.scandir(directory) as entries:
        return sorted(
            entry.path
            for entry in entries
            if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".") and entry.is_file()
        )


def _read_splits(root: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    held_out = [root / name for name in ("test", "validation", "val") if (root / name).is_dir()]
    if not held_out:
        raise FileNotFoundError(
            f"{root} has train/ but none of test/, validation/ and val/; add one, or remove the train/ "
            "level to have the split drawn"
        )
    train, test = _read_classes(root / "train"), _read_classes(held_out[0])
    unknown = sorted(set(test) - set(train))
    if unknown:
        raise ValueError(
            f"{held_out[0]} has classes that {root / 'train'} lacks: {', '.join(unknown)}; train has {', '.join(train)}"
        )
    return train, test


def _draw_split(classes: dict[str, list[str]], seed: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    train, test = {}, {}
    for label, (name, files) in enumerate(classes.items()):
        if len(files) < 2:
            raise ValueError(
                f"class {name!r} has {len(files)} image ({files[0]}); drawing a test split takes at least 2 "
                "per class: add images, or arrange the folder as train/CLASS and test/CLASS"
            )
        order = np.random.default_rng([seed, label]).permutation(len(files))
        size = max(1, round(TEST_FRACTION * len(files)))
        test[name] = [files[i] for i in sorted(order[:size])]
        train[name] = [files[i] for i in sorted(order[size:])]
    return train, test
