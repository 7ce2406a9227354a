"""What every data set looks like to the rest of the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict

import numpy as np

from repvgg_jax.terminal import printable


class Record(TypedDict):
    """One decoded example: `image` is uint8 `(H, W, C)`, `label` an integer in `[0, num_classes)`."""

    image: np.ndarray
    label: int


class Source(Protocol):
    """Random access to records; a list of records is one too.

    A source may also offer `__getitems__(indices) -> list[Record]`, which batches are then read with.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


def read_records(source: Source, indices: Sequence[int]) -> Sequence[Record]:
    """Read several records, in one call where the source offers `__getitems__`."""
    read_many = getattr(source, "__getitems__", None)
    return [source[i] for i in indices] if read_many is None else read_many(indices)


@dataclass(frozen=True)
class ImageDataset:
    """An image classification data set with a train and a test split.

    Attributes:
      name: as given to `load_dataset`.
      train: training records.
      test: held-out records.
      class_names: one name per label.
      channels: 1 (grey) or 3 (RGB), the same for every image.
      image_shape: `(H, W)` where all images are declared to share one size, else None.
      left_out: one line that says what lies among the images and is not read; empty where there is nothing.

    Raises:
      ValueError: fewer than two classes.
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
        """Number of labels."""
        return len(self.class_names)
