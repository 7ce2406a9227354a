"""From record numbers to arrays of the wanted size. Callables, so that worker processes can be sent them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from repvgg_jax.data.dataset import Source, read_records
from repvgg_jax.data.decode import convert_channels, fit
from repvgg_jax.data.memory import InMemory
from repvgg_jax.data.random_resized import random_resized_crop

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class ReadBatch:
    """Reads the records of an index array as one batch, each resized and cropped as `fit` does."""

    source: Source
    image_size: int
    channels: int
    resize: int | None = None

    def __call__(self, indices: np.ndarray) -> Batch:
        """Returns `{"image": uint8 (N, S, S, C), "label": int32 (N,)}`."""
        if isinstance(self.source, InMemory):
            images, labels = self.source.gather(indices)
            if images.shape[1:] != (self.image_size, self.image_size, self.channels) or self.resize:
                images = np.stack([self._fit(image) for image in images])
        else:
            records = read_records(self.source, indices.tolist())
            images = np.stack([self._fit(record["image"]) for record in records])
            labels = np.asarray([record["label"] for record in records], np.int32)
        return {"image": images, "label": labels}

    def _fit(self, image: np.ndarray) -> np.ndarray:
        return fit(convert_channels(image, self.channels), self.image_size, self.resize)


@dataclass(frozen=True)
class ReadCrop:
    """Reads one record, cropped as `random_resized_crop` does."""

    source: Source
    image_size: int
    channels: int

    def __call__(self, index: int, rng: np.random.Generator) -> Batch:
        """Returns `{"image": uint8 (S, S, C), "label": int32 ()}`."""
        record = self.source[index]
        image = random_resized_crop(convert_channels(record["image"], self.channels), self.image_size, rng)
        return {"image": image, "label": np.asarray(record["label"], np.int32)}


def read_options(source: Source) -> grain.ReadOptions:
    """How many threads should read: decoding releases the interpreter lock, copying from memory holds it."""
    import grain

    threads = 1 if isinstance(source, InMemory) else min(16, os.cpu_count() or 1)
    # A thread prepares whole batches, so that is what the buffer counts.
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads))
