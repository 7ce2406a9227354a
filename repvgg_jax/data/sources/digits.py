"""Handwritten digits that come with scikit-learn, as a TFDS data set. Nothing is downloaded.

References:
  Alpaydin and Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tensorflow_datasets.core.utils import tqdm_utils

from repvgg_jax.data.sources.locate import tfds_directory

TEST_SIZE = 360


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 grey digits of 8×8 pixels, split by class into 1,437 for training and 360 for testing."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012 (TFDS reads a plain class attribute)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of scikit-learn, scaled from 0..16 to 0..255.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        digits = load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        train, test = train_test_split(
            np.arange(len(images)), test_size=TEST_SIZE, stratify=digits.target, random_state=0
        )
        return {
            "train": self._generate_examples(train, images, digits.target),
            "test": self._generate_examples(test, images, digits.target),
        }

    def _generate_examples(
        self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict]]:
        for index in indices.tolist():
            yield index, {"image": _png(images[index]), "label": int(labels[index])}


def prepare_digits(data_dir: str | os.PathLike[str] | None) -> None:
    """Write the digits into `data_dir` in the layout of TFDS, unless they are there. It takes about a second.

    An interrupted run leaves nothing that would be read: TFDS writes beside the final directory and renames at the end.
    """
    with _quiet():
        builder = Digits(data_dir=str(tfds_directory(data_dir)), file_format="array_record")
        try:
            builder.download_and_prepare()
        except OSError:
            # Another process may have finished first, and the renaming found its directory.
            if not (builder.data_path / "dataset_info.json").exists():
                raise


def _png(image: np.ndarray) -> io.BytesIO:
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "PNG")
    encoded.seek(0)
    return encoded


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep TFDS from printing, logging and drawing progress bars."""
    logger, bars = logging.getLogger("absl"), tqdm_utils._active
    level = logger.level
    logger.setLevel(logging.ERROR)
    tfds.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        tfds.display_progress_bar(bars)
