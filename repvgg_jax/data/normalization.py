"""Statistics of the training images by channel."""

from __future__ import annotations

import math

import numpy as np

from repvgg_jax.data.dataset import Source
from repvgg_jax.data.pipeline import ReadBatch, read_options
from repvgg_jax.preprocess import Normalization


def measure_normalization(source: Source, *, image_size: int, channels: int, limit: int = 10_000) -> Normalization:
    """Measure the mean and the standard deviation of the pixels by channel, in units of [0, 1].

    Args:
      source: Records to read.
      image_size: Side length in pixels that images are resized and cropped to first, as by `fit`.
      channels: 1 (grey) or 3 (RGB). Images of the other kind are converted.
      limit: Largest number of images to read. They are spaced evenly.

    Returns:
      A mean and a standard deviation for each channel. The standard deviation of a constant channel is given as 1.

    Raises:
      ValueError: If the source is empty or `limit` is less than 1.
    """
    import grain

    size = min(limit, len(source))
    if size < 1:
        raise ValueError(f"limit (={limit}) and the number of records (={len(source)}) must be at least 1")
    indices = np.arange(size) * len(source) // size
    chunks = np.array_split(indices, math.ceil(size / 256))
    batches = grain.MapDataset.source(chunks).map(ReadBatch(source, image_size, channels))
    # Integer sums are exact, so the result does not depend on how the images are batched.
    total, squares = [0] * channels, [0] * channels
    for batch in batches.to_iter_dataset(read_options(source)):
        for channel in range(channels):
            values = batch["image"][..., channel].astype(np.int64)
            total[channel] += int(values.sum())
            squares[channel] += int((values**2).sum())
    count = size * image_size**2
    variances = [count * s - t**2 for s, t in zip(squares, total, strict=True)]
    std = tuple(math.sqrt(v) / count / 255 if v else 1.0 for v in variances)
    return Normalization(tuple(t / count / 255 for t in total), std)
