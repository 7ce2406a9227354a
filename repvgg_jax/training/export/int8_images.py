"""Images to calibrate 8 bits with, and others to prove them on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from repvgg_jax.data import Source, fit
from repvgg_jax.data.images import convert_channels
from repvgg_jax.data.sources.folder import FolderSource, load_folder
from repvgg_jax.data.sources.image_files import EXTENSIONS, find_images, list_directory
from repvgg_jax.preprocess import Preprocess
from repvgg_jax.terminal import printable
from repvgg_jax.training.steps.mesh import Batch

_BATCH = 64
_SEED = 0


class Int8Images(NamedTuple):
    """What an export to 8 bits needs of a data set.

    Attributes:
      calibration: uint8 `(images, size, size, channels)`, to set the ranges of activations.
      batches: Returns a fresh pass over other images: dicts of 'image', uint8 `(batch, size, size, channels)`, 'label'
        and 'mask'.
      labelled: Whether the labels are those of the images. Otherwise the predictions of the float network stand in.
    """

    calibration: np.ndarray
    batches: Callable[[], Iterable[Batch]]
    labelled: bool


def draw_images(source: Source, preprocess: Preprocess, count: int) -> np.ndarray:
    """Draw images of a data set, always the same, prepared as for evaluation.

    Args:
      source: The records.
      preprocess: How images are prepared.
      count: Number of images. Of fewer records, all are taken.

    Returns:
      uint8 `(images, size, size, channels)`.
    """
    order = np.random.default_rng(_SEED).permutation(len(source))[:count]
    return np.concatenate([batch["image"] for batch in _batches(source, order.tolist(), preprocess)])


def folder_images(path: Path, preprocess: Preprocess, count: int) -> Int8Images:
    """Read images from a folder.

    Where its directories are named as the classes of the network, the folder is read as `load_folder` reads it: the
    training split calibrates, the test split proves, and there are labels. Otherwise all images below it are taken. At
    most half of them calibrate, the others prove.

    Args:
      path: The folder.
      preprocess: How images are prepared, and the names of the classes.
      count: Number of images to calibrate with.

    Returns:
      The images.

    Raises:
      FileNotFoundError: If there is no such folder, or there are fewer than two images.
      ValueError: If `load_folder` raises one.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"images is {path}: expected a folder of images")
    root = path / "train" if (path / "train").is_dir() else path
    names = [os.path.basename(directory) for directory in list_directory(root).directories]
    if set(names) == set(preprocess.class_names):
        dataset = load_folder(path)
        labels = np.asarray([preprocess.class_names.index(name) for name in dataset.class_names], np.int32)

        def test() -> Iterator[Batch]:
            for batch in _batches(dataset.test, range(len(dataset.test)), preprocess):
                yield {**batch, "label": labels[batch["label"]]}

        return Int8Images(draw_images(dataset.train, preprocess, count), test, labelled=True)
    files = find_images(path).images
    if len(files) < 2:
        raise FileNotFoundError(
            f"{printable(str(path))} has {len(files)} images: expected at least two files ending in "
            f"{', '.join(EXTENSIONS)}, some to calibrate with and others to prove the result on"
        )
    source = FolderSource({"": files}, ("",))
    first = min(count, len(files) // 2)
    # The same order as that of `draw_images`: what it leaves.
    order = np.random.default_rng(_SEED).permutation(len(files))
    return Int8Images(
        draw_images(source, preprocess, first),
        lambda: _batches(source, order[first:].tolist(), preprocess),
        labelled=False,
    )


def _batches(source: Source, indices: Sequence[int], preprocess: Preprocess) -> Iterator[Batch]:
    """Yield records in batches."""

    def read(index: int) -> tuple[np.ndarray, int]:
        record = source[index]
        image = convert_channels(record["image"], preprocess.channels)
        return fit(image, preprocess.image_size, preprocess.eval_resize, preprocess.interpolation), record["label"]

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(indices), _BATCH):
            chosen = indices[start : start + _BATCH]
            images, labels = zip(*pool.map(read, chosen), strict=True)
            yield {"image": np.stack(images), "label": np.asarray(labels, np.int32), "mask": np.ones(len(chosen), bool)}
