"""What would another network cost? `python -m benchmarks.step PRESET [--also="FLAGS OF train.py" …]`.

Images per second of the training step of a preset, and of the same with other flags, e.g.

    python -m benchmarks.step cifar10_cpu --also="--strides 2 1 2 2 1" --also="--batch-size 256 --trivial-augment"

All take turns in one process, on one batch of random images: the median over the turns, and the median of the ratios to
the preset within a turn.
"""

import argparse
import dataclasses
import shlex
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
import tyro
from jax.sharding import Mesh
from tabulate import tabulate

from repvgg_jax.training import PRESETS, TrainConfig
from repvgg_jax.training.huge_pages import restart_with_huge_pages
from repvgg_jax.training.optimizer import create_optimizer
from repvgg_jax.training.steps import (
    Batch,
    TrainState,
    abstract_batch,
    abstract_state,
    create_mesh,
    create_state,
    make_train_step,
    shard_batch,
)

CHANNELS = 3


def compile_step(config: TrainConfig, mesh: Mesh) -> tuple[jax.stages.Compiled, TrainState]:
    """The training step of a config for ten classes, and the state it begins with."""
    if config.mean is None:
        config = dataclasses.replace(config, mean=(0.5,) * CHANNELS, std=(0.25,) * CHANNELS)
    model, optimizer = config.create_model(num_classes=10), create_optimizer(config, steps_per_epoch=100)
    setting = (model, optimizer, config, CHANNELS, mesh)
    shapes = (abstract_state(*setting), abstract_batch(config, CHANNELS, mesh))
    return make_train_step(model, optimizer, config, mesh).lower(*shapes).compile(), create_state(*setting)


def random_batch(config: TrainConfig, mesh: Mesh) -> Batch:
    """Noise of the shapes that the config trains on."""
    random = np.random.default_rng(0)
    shape = (config.batch_size, config.image_size, config.image_size, CHANNELS)
    images, labels = random.integers(0, 256, shape, np.uint8), random.integers(0, 10, config.batch_size, np.int32)
    return shard_batch({"image": images, "label": labels}, mesh)


def contestant(config: TrainConfig, seconds: float) -> Callable[[], float]:
    """A function that trains for so many seconds and returns images per second; compiled and warm."""
    mesh = create_mesh()
    compiled, state = compile_step(config, mesh)
    batch = random_batch(config, mesh)

    def turn(seconds: float = seconds) -> float:
        nonlocal state
        start, images = time.perf_counter(), 0
        while not images or time.perf_counter() - start < seconds:
            state, _ = compiled(state, batch)
            jax.block_until_ready(state)
            images += config.batch_size
        return images / (time.perf_counter() - start)

    turn(0.0)
    return turn


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--also", action="append", default=[], metavar="FLAGS", help="an alternative, quoted")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn, at least")
    options = parser.parse_args(arguments)
    preset = PRESETS[options.preset]
    alternatives = ["", *options.also]
    configs = [tyro.cli(TrainConfig, args=shlex.split(flags), default=preset) for flags in alternatives]
    contestants = [contestant(config, options.seconds) for config in configs]
    rates = np.array([[turn() for turn in contestants] for _ in range(options.turns)])
    print(f"{jax.device_count()} × {jax.devices()[0].device_kind}, images/s, medians of {options.turns} turns")
    medians, ratios = np.median(rates, 0), np.median(rates / rates[:, :1], 0)
    rows = [
        (f"{options.preset} {flags}", f"{rate:,.1f}", f"{ratio:.2f}")
        for flags, rate, ratio in zip(alternatives, medians, ratios, strict=True)
    ]
    print(
        tabulate(
            rows, ("training step", "images/s", "ratio"), disable_numparse=True, colalign=("left", "right", "right")
        )
    )


if __name__ == "__main__":
    restart_with_huge_pages()
    main()
