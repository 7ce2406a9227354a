"""Decoded images of a small data set, kept in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from repvgg_jax.data.dataset import Record, Source, read_records

MEMORY_LIMIT = 512 * 2**20


def keep_if_small(source: Source, image_shape: tuple[int, int] | None, channels: int) -> Source:
    """Wrap a source in `InMemory` where its images share one size and take at most 512 MiB."""
    if image_shape is None or len(source) * image_shape[0] * image_shape[1] * channels > MEMORY_LIMIT:
        return source
    return InMemory(source, (*image_shape, channels))


class InMemory:
    """A source that decodes each record once, on first use, into one array."""

    def __init__(self, source: Source, shape: tuple[int, int, int]):
        self.source = source
        self.shape = shape
        self._clear()

    def _clear(self) -> None:
        self._images = np.zeros((len(self.source), *self.shape), np.uint8)
        self._labels = np.zeros(len(self.source), np.int32)
        self._known = np.zeros(len(self.source), bool)

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read records: uint8 images `(N, H, W, C)` and int32 labels `(N,)`."""
        missing = indices[~self._known[indices]]
        # Two threads may decode the same record; they then write the same bytes.
        for index, record in zip(missing, read_records(self.source, missing.tolist()), strict=True):
            self._images[index] = record["image"]
            self._labels[index] = record["label"]
        self._known[missing] = True
        return self._images[indices], self._labels[indices]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        images, labels = self.gather(np.asarray(indices, np.int64))
        return [{"image": image, "label": int(label)} for image, label in zip(images, labels, strict=True)]

    def __getstate__(self) -> dict:
        return {"source": self.source, "shape": self.shape}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._clear()
