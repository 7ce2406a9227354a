"""Does the input pipeline keep the device fed? `python -m benchmarks.pipeline [--data memory jpeg] [--workers 0 8]`.

Images per second, medians of turns: of reading and decoding alone, of the training step alone (augmentation is part
of it), and of both as `train.py` runs them. 'memory' is as many images of 32×32 as CIFAR-10 has, kept in memory;
'jpeg' decodes files of 500×375 and crops them to 224×224, as for ImageNet. Images are generated.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image
from tabulate import tabulate

from benchmarks.command import end_with, positive, whole
from benchmarks.step import CHANNELS, Trainer, images_per_second
from repvgg_jax.cli.devices import require_devices
from repvgg_jax.cli.huge_pages import restart_with_huge_pages
from repvgg_jax.data import Source, load_dataset, train_iterator
from repvgg_jax.data.sources.memory import InMemory
from repvgg_jax.training import PRESETS, TrainConfig
from repvgg_jax.training.steps.mesh import create_mesh, shard_batch

HEADERS = ("data", "processes", "network", "batch", "pipeline alone", "step alone", "together", "of the slower")


class Rates(NamedTuple):
    """Images per second."""

    pipeline: float
    step: float
    together: float


def images_in_memory(count: int) -> Source:
    """Random images of 32×32×3, read once already."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, 32, 32, 3), np.uint8)
    source = InMemory([{"image": image, "label": i % 10} for i, image in enumerate(images)], images.shape[1:])
    source.gather(np.arange(count))
    return source


def jpeg_files(directory: Path, count: int) -> Source:
    """JPEGs of 500×375 pixels at quality 90: smooth shapes with some noise."""
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.float32)
        pixels = np.clip(smooth + random.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
        # Two classes, as a folder needs; the first file alone is for testing.
        path = directory / ("train" if number else "test") / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)
    return load_dataset(f"folder:{directory}").train


def measure(config: TrainConfig, source: Source, workers: int, *, turns: int, seconds: float) -> Rates:
    """The three rates, in turns of at least so many seconds each.

    Args:
      config: of the training step; its batch size is used.
      source: at least one batch of it.
      workers: processes that read and decode; 0 reads in threads.
      turns: per rate.
      seconds: per turn.
    """
    mesh = create_mesh()
    trainer = Trainer(config, mesh)
    batch_size = config.optimization.batch_size
    iterator = train_iterator(
        source,
        batch_size=batch_size,
        image_size=config.data.image_size,
        channels=CHANNELS,
        seed=0,
        crop="random_resized" if config.data.random_resized_crop else "resize",
        num_workers=workers,
    )
    one_batch = next(iterator)

    contestants = (
        lambda: next(iterator),
        lambda: trainer.step(shard_batch(one_batch, mesh)),
        lambda: trainer.step(shard_batch(next(iterator), mesh)),
    )
    try:
        rates = [
            [images_per_second(turn, batch_size, seconds, trainer.wait) for turn in contestants] for _ in range(turns)
        ]
    finally:
        iterator.close()
    return Rates(*np.median(rates, axis=0).tolist())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=["memory", "jpeg"], default=["memory", "jpeg"])
    parser.add_argument("--workers", type=int, nargs="+", help="for JPEGs; default: 0, and 2 on a CPU, 8 elsewhere")
    parser.add_argument("--batch-size", type=whole, help="default: the preset's; on a CPU 32 for 224×224")
    parser.add_argument("--images", type=whole, help="how many to generate; default: 50,000 in memory, 2,000 JPEGs")
    parser.add_argument("--turns", type=whole, default=3)
    parser.add_argument("--seconds", type=positive, default=5.0, help="of a turn, at least")
    options = parser.parse_args(arguments)
    device = require_devices()[0]
    on_cpu = device.platform == "cpu"
    workers = options.workers or [0, 2 if on_cpu else 8]
    memory = PRESETS["cifar10_a0_stride32" if on_cpu else "cifar10"]
    jpeg = PRESETS["imagenet"]
    jpeg = jpeg.replace(batch_size=32) if on_cpu else jpeg.replace(dtype="bfloat16")
    print(f"{jax.device_count()} × {device.device_kind}, images/s, medians of {options.turns} turns")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for name, config in (("memory", memory), ("jpeg", jpeg)):
            if name not in options.data:
                continue
            if options.batch_size:
                config = config.replace(batch_size=options.batch_size)
            if name == "memory":
                source = images_in_memory(options.images or 50_000)
            else:
                source = jpeg_files(Path(directory), options.images or 2_000)
            for count in workers if name == "jpeg" else [0]:
                rates = measure(config, source, count, turns=options.turns, seconds=options.seconds)
                network = f"{config.network.variant}, {config.data.image_size}², {config.network.dtype}"
                share = rates.together / min(rates.pipeline, rates.step)
                numbers = [f"{rate:,.0f}" for rate in rates]
                rows.append((name, count, network, config.optimization.batch_size, *numbers, f"{100 * share:.0f} %"))
    print(tabulate(rows, HEADERS, disable_numparse=True, colalign=("left", "right", "left", *["right"] * 5)))


if __name__ == "__main__":
    restart_with_huge_pages()
    end_with(main)
