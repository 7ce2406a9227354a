"""What would another network cost? `python -m benchmarks.step PRESET [--also="FLAGS OF train.py" …]`.

Images per second of the training step of a preset, and of the same with other flags, e.g.

    python -m benchmarks.step cifar10_cpu --also="--strides 2 1 2 2 1" --also="--batch-size 256 --trivial-augment"

All take turns in one process, on one batch of random images of ten classes: the median over the turns, and the median
of the ratios to the preset within a turn. Flags that change only where training starts or ends change nothing here.
"""

import argparse
import shlex
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import tyro
from jax.sharding import Mesh
from tabulate import tabulate

from benchmarks.command import end_with, positive, whole
from repvgg_jax.cli.devices import require_devices
from repvgg_jax.cli.huge_pages import restart_with_huge_pages
from repvgg_jax.preprocess import Normalization
from repvgg_jax.training import PRESETS, TrainConfig
from repvgg_jax.training.steps.mesh import Batch, abstract_batch, create_mesh, shard_batch
from repvgg_jax.training.steps.optimizer import create_optimizer
from repvgg_jax.training.steps.state import abstract_state, create_state
from repvgg_jax.training.steps.train_step import make_train_step

CHANNELS = 3
STEPS_PER_EPOCH = 100


def setting_of(config: TrainConfig, mesh: Mesh) -> tuple[Any, ...]:
    """What the state of a config for ten classes is made of."""
    model = config.network.create_model(num_classes=10)
    optimizer = create_optimizer(config.optimization, STEPS_PER_EPOCH, frozen=config.network.frozen)
    return model, optimizer, config, CHANNELS, mesh


def lowered_step(config: TrainConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The training step of a config for ten classes, lowered for the devices of a mesh."""
    normalization = config.data.normalization or Normalization((0.5,) * CHANNELS, (0.25,) * CHANNELS)
    model, optimizer, *_ = setting = setting_of(config, mesh)
    step = make_train_step(model, optimizer, config, normalization, mesh, steps_per_epoch=STEPS_PER_EPOCH)
    return step.lower(abstract_state(*setting), abstract_batch(config, CHANNELS, mesh))


class Trainer:
    """The compiled training step of a config for ten classes, and its state; as in training, two steps ahead."""

    def __init__(self, config: TrainConfig, mesh: Mesh):
        self._step = lowered_step(config, mesh).compile()
        self._state = create_state(*setting_of(config, mesh))
        self._ahead: deque[Any] = deque()

    def step(self, batch: Batch) -> None:
        """Train on a batch that lies on the devices."""
        self._state, metrics = self._step(self._state, batch)
        self._ahead.append(metrics)
        if len(self._ahead) > 2:
            jax.block_until_ready(self._ahead.popleft())

    def wait(self) -> None:
        """Until all steps are done."""
        jax.block_until_ready(self._state)


def images_per_second(turn: Callable[[], Any], images: int, seconds: float, wait: Callable[[], None]) -> float:
    """The pace of something that takes so many images a turn, over so many seconds at least; `wait` ends it."""
    # What lies ready in buffers, and the compilation of transfers, are not the pace.
    for _ in range(4):
        turn()
    wait()
    start, count = time.perf_counter(), 0
    while not count or time.perf_counter() - start < seconds:
        turn()
        count += 1
    wait()
    return images * count / (time.perf_counter() - start)


def random_batch(config: TrainConfig, mesh: Mesh) -> Batch:
    """Noise of the shapes that the config trains on."""
    random = np.random.default_rng(0)
    count, size = config.optimization.batch_size, config.data.image_size
    images = random.integers(0, 256, (count, size, size, CHANNELS), np.uint8)
    labels = random.integers(0, 10, count, np.int32)
    return shard_batch({"image": images, "label": labels, "index": np.arange(len(labels), dtype=np.int32)}, mesh)


def contestant(config: TrainConfig, seconds: float) -> Callable[[], float]:
    """A function that trains for so many seconds and returns images per second."""
    mesh = create_mesh()
    trainer, batch = Trainer(config, mesh), random_batch(config, mesh)
    images = config.optimization.batch_size
    return lambda: images_per_second(lambda: trainer.step(batch), images, seconds, trainer.wait)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--also", action="append", default=[], metavar="FLAGS", help="an alternative, quoted")
    parser.add_argument("--turns", type=whole, default=5)
    parser.add_argument("--seconds", type=positive, default=3.0, help="of a turn, at least")
    options = parser.parse_args(arguments)
    preset = PRESETS[options.preset]
    alternatives = ["", *options.also]
    flat = (tyro.conf.OmitArgPrefixes,)
    configs = [tyro.cli(TrainConfig, args=shlex.split(flags), default=preset, config=flat) for flags in alternatives]
    device = require_devices()[0]
    contestants = [contestant(config, options.seconds) for config in configs]
    rates = np.array([[turn() for turn in contestants] for _ in range(options.turns)])
    print(f"{jax.device_count()} × {device.device_kind}, images/s, medians of {options.turns} turns")
    medians, ratios = np.median(rates, 0), np.median(rates / rates[:, :1], 0)
    rows = [
        (f"{options.preset} {flags}", f"{rate:,.1f}", f"{ratio:.2f}")
        for flags, rate, ratio in zip(alternatives, medians, ratios, strict=True)
    ]
    headers, alignment = ("training step", "images/s", "ratio"), ("left", "right", "right")
    print(tabulate(rows, headers, disable_numparse=True, colalign=alignment))


if __name__ == "__main__":
    restart_with_huge_pages()
    end_with(main)
