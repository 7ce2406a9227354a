"""Batches of images for the device: an endless shuffled stream to train on, and one ordered pass to evaluate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from repvgg_jax.data.dataset import Source, read_records
from repvgg_jax.data.images import convert_channels, fit, random_resized_crop
from repvgg_jax.data.sources.memory import InMemory

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]


def train_iterator(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    channels: int,
    seed: int,
    crop: Literal["resize", "random_resized"] = "resize",
    shard: tuple[int, int] = (0, 1),
    num_workers: int = 0,
) -> grain.DatasetIterator[Batch]:
    """Return an endless iterator over shuffled training batches.

    Every epoch draws a new permutation of all records and has exactly `len(source) // (batch_size * num_shards)` steps.
    Batches never mix epochs: the last `len(source) % (batch_size * num_shards)` records of each permutation are left
    out, others each time. Step for step, the shards together read the same records, cropped alike, as a single shard
    with `num_shards` times the batch would.

    The arguments determine the stream. `get_state()` returns a state that is JSON-serialisable, and `set_state()`
    resumes with the very next batch, as long as `num_workers` stays the same. Call `close()` to end worker processes.

    Args:
      source: Records to draw from.
      batch_size: Number of records in a batch of one shard.
      image_size: Side length of the images in pixels.
      channels: 1 (grey) or 3 (RGB). Images of the other kind are converted.
      seed: Seed of order and crops.
      crop: What to do with images of another size. "resize" does what `fit` does: it resizes the shorter side to
        `image_size` and takes the centre. "random_resized" crops every image as `random_resized_crop` does, anew in
        each epoch.
      shard: `(index, count)` of this process.
      num_workers: Number of processes that read and decode. 0 reads in threads. Images that are kept in memory are
        always read in a thread.

    Returns:
      A grain iterator over dicts of 'image', uint8 `(batch_size, image_size, image_size, channels)`, and 'label' and
      'index', int32 `(batch_size,)`. The index says where in `source` a record lies.

    Raises:
      ValueError: If an argument is out of range, or there are fewer records than one batch of every shard.
    """
    import grain

    _check(source, batch_size, image_size, channels, shard)
    if seed < 0:
        raise ValueError(f"seed (={seed}) must not be negative")
    index, count = shard
    steps = len(source) // (batch_size * count)
    if not steps:
        raise ValueError(
            f"batch_size (={batch_size}) times {count} shard(s) exceeds the {len(source)} training records; "
            f"lower batch_size to at most {len(source) // count}"
        )
    # Grain adds the epoch to the seed, so that neighbouring seeds would share their epochs.
    order_seed, crop_seed = (int(word) for word in np.random.SeedSequence(seed).generate_state(2))
    mine = slice(index, steps * batch_size * count, count)
    order = grain.MapDataset.range(len(source)).shuffle(seed=order_seed)
    if crop == "resize":
        read = ReadBatch(source, image_size, channels)
        batches = order[mine].batch(batch_size, batch_fn=np.asarray).map(read)
    elif crop == "random_resized":
        read_crop = ReadCrop(source, image_size, channels)
        batches = order.random_map(read_crop, seed=crop_seed)[mine].batch(batch_size)
    else:
        raise ValueError(f"crop (={crop!r}) must be 'resize' or 'random_resized'")
    stream = batches.repeat().to_iter_dataset(read_options(source))
    if num_workers and not isinstance(source, InMemory):
        _parse_absl_flags()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2))
    return iter(stream)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    channels: int,
    eval_resize: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Return an iterator over every record once, in order, in batches of one shape.

    All shards have the same number of batches, `ceil(len(source) / (batch_size * num_shards))`. Shard i reads the
    records i, i + num_shards, … What is missing from the last batch is zeros with a false mask.

    Args:
      source: Records to read.
      batch_size: Number of records in a batch of one shard.
      image_size: Side length of the images in pixels.
      channels: 1 (grey) or 3 (RGB). Images of the other kind are converted.
      eval_resize: Length of the shorter side before the centre crop in pixels, e.g. 256 for 224. None stands for
        `image_size`.
      shard: `(index, count)` of this process.

    Returns:
      An iterator over dicts of 'image', uint8 `(batch_size, image_size, image_size, channels)`, 'label', int32
      `(batch_size,)`, and 'mask', bool `(batch_size,)`.

    Raises:
      ValueError: If an argument is out of range.
    """
    import grain

    _check(source, batch_size, image_size, channels, shard)
    if eval_resize is not None and eval_resize < image_size:
        raise ValueError(f"eval_resize (={eval_resize}) must be at least image_size (={image_size})")
    read = _ReadPadded(ReadBatch(source, image_size, channels, eval_resize), len(source), batch_size, shard)
    steps = -(-len(source) // (batch_size * shard[1]))
    return iter(grain.MapDataset.range(steps).map(read).to_iter_dataset(read_options(source)))


@dataclass(frozen=True)
class ReadBatch:
    """Reads the records of an index array as one batch, each resized and cropped as by `fit`."""

    source: Source
    image_size: int
    channels: int
    resize: int | None = None

    def __call__(self, indices: np.ndarray) -> Batch:
        """Return `{"image": uint8 (N, S, S, C), "label": int32 (N,), "index": int32 (N,)}`."""
        if isinstance(self.source, InMemory):
            images, labels = self.source.gather(indices)
            if images.shape[1:] != (self.image_size, self.image_size, self.channels) or self.resize:
                images = np.stack([self._fit(image) for image in images])
        else:
            records = read_records(self.source, indices.tolist())
            images = np.stack([self._fit(record["image"]) for record in records])
            labels = np.asarray([record["label"] for record in records], np.int32)
        return {"image": images, "label": labels, "index": indices.astype(np.int32)}

    def _fit(self, image: np.ndarray) -> np.ndarray:
        return fit(convert_channels(image, self.channels), self.image_size, self.resize)


@dataclass(frozen=True)
class ReadCrop:
    """Reads one record, cropped as by `random_resized_crop`."""

    source: Source
    image_size: int
    channels: int

    def __call__(self, index: int, rng: np.random.Generator) -> Batch:
        """Return `{"image": uint8 (S, S, C), "label": int32 (), "index": int32 ()}`."""
        record = self.source[index]
        image = random_resized_crop(convert_channels(record["image"], self.channels), self.image_size, rng)
        return {"image": image, "label": np.asarray(record["label"], np.int32), "index": np.asarray(index, np.int32)}


def read_options(source: Source) -> grain.ReadOptions:
    """Return how many threads should read: decoding releases the interpreter lock, copying from memory holds it."""
    import grain

    threads = 1 if isinstance(source, InMemory) else min(16, os.cpu_count() or 1)
    # A thread prepares whole batches, so that is what the buffer counts.
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads))


@dataclass(frozen=True)
class _ReadPadded:
    read: ReadBatch
    size: int
    batch_size: int
    shard: tuple[int, int]

    def __call__(self, step: int) -> Batch:
        index, count = self.shard
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size) * count + index
        mask = positions < self.size
        side, channels = self.read.image_size, self.read.channels
        images = np.zeros((self.batch_size, side, side, channels), np.uint8)
        labels = np.zeros(self.batch_size, np.int32)
        if mask.any():
            batch = self.read(positions[mask])
            images[mask], labels[mask] = batch["image"], batch["label"]
        return {"image": images, "label": labels, "mask": mask}


def _check(source: Source, batch_size: int, image_size: int, channels: int, shard: tuple[int, int]) -> None:
    if len(source) == 0:
        raise ValueError("the source has no records")
    for name, value in (("batch_size", batch_size), ("image_size", image_size)):
        if value < 1:
            raise ValueError(f"{name} (={value}) must be at least 1")
    if channels not in (1, 3):
        raise ValueError(f"channels (={channels}) must be 1 (grey) or 3 (RGB)")
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard (={shard}) must be (index, count) with 0 <= index < count")


def _parse_absl_flags() -> None:
    """Grain's worker processes read absl's flags, which only absl's own `app.run` parses."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
