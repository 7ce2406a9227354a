"""The form that every data set has for the rest of the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict

import numpy as np

from repvgg_jax.terminal import printable


class Record(TypedDict):
    """One decoded example.

    Attributes:
      image: uint8 `(height, width, channels)`.
      label: An integer in `[0, num_classes)`.
    """

    image: np.ndarray
    label: int


class Source(Protocol):
    """Random access to records. A list of records is a source too.

    A source may also offer `__getitems__(indices) -> list[Record]`. Batches are then read with it.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


def read_records(source: Source, indices: Sequence[int]) -> Sequence[Record]:
    """Read several records, in one call where the source offers `__getitems__`."""
    read_many = getattr(source, "__getitems__", None)
    return [source[i] for i in indices] if read_many is None else read_many(indices)


@dataclass(frozen=True)
class ImageDataset:
    """An image classification data set with a training and a test split.

    Attributes:
      name: The name that was given to `load_dataset`.
      train: Records to train on.
      test: Records held out to test on.
      class_names: One name for each label.
      channels: 1 (grey) or 3 (RGB), the same for every image.
      image_shape: `(height, width)` where all images are declared to share one size, else None.
      left_out: One line that says what lies among the images and is not read. It is empty where there is nothing.

    Raises:
      ValueError: If there are fewer than two classes.
    """

    name: str
    train: Source
    test: Source
    class_names: tuple[str, ...]
    channels: int
    image_shape: tuple[int, int] | None = None
    left_out: str = ""

    def __post_init__(self) -> None:
        if len(self.class_names) < 2:
            found = f"the one class {printable(self.class_names[0])}" if self.class_names else "no class"
            raise ValueError(
                f"{printable(self.name)} has {found}: expected two or more, as there is nothing to tell apart otherwise"
            )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)
