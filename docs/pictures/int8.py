"""Draws int8.png, of docs/concepts/int8.md, and prints figures of that page: `python docs/pictures/int8.py RUN_DIR`.

The picture there is of a run on the digits, as `python train.py --workdir RUN_DIR` makes one. Any other run will do. A
second argument names another block than stage1_block1. The picture of that is drawn into the folder at hand.
"""

import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from repvgg_jax.data import normalize
from repvgg_jax.interop.safetensors import load_deploy
from repvgg_jax.quantize import prepare
from repvgg_jax.training import TrainConfig
from repvgg_jax.training.export.int8_images import draw_images
from repvgg_jax.training.run.directory import open_data

INK, SOFT, GRID = "#1f2733", "#7a869a", "#e8ebf0"
WEIGHT, TAP, ZERO = "#8fb4e8", "#d9822b", "#f3f4f7"
LARGEST = 127
CALIBRATION = 512


def magnitudes(variables: Any, block: str) -> np.ndarray:
    """|W| by tap, input channel and output channel; tap 4 is the centre."""
    kernel = np.abs(np.asarray(variables["params"][block]["reparam"]["kernel"]))
    return kernel.reshape(9, *kernel.shape[2:])


def identity_taps(kernel: np.ndarray) -> np.ndarray:
    """The centre tap by which each output channel reads the input channel of its own number."""
    return kernel[4].diagonal()


def rounded_to_zero(kernel: np.ndarray, step: Any) -> float:
    """Percentage of the weights below half a step."""
    return float(100 * np.mean(kernel < step / 2))


def describe(kernel: np.ndarray) -> str:
    taps = identity_taps(kernel)
    others = np.delete(kernel, 4, 0)
    step, steps = kernel.max() / LARGEST, kernel.max((0, 1)) / LARGEST
    return (
        f"identity taps: median {np.median(taps):.2f}, largest {taps.max():.2f}\n"
        f"taps beside the centre: median {np.median(others):.3f}\n"
        f"step of the whole kernel {step:.3f}, below half of it {rounded_to_zero(kernel, step):.0f} %\n"
        f"steps of channels {steps.min():.3f} to {steps.max():.3f}, below half of their own "
        f"{rounded_to_zero(kernel, steps):.0f} %\n"
        f"largest weight of a channel: {kernel.max((0, 1)).min():.2f} to {kernel.max((0, 1)).max():.2f}"
    )


def draw(axes: Axes, kernel: np.ndarray, order: np.ndarray, title: str) -> None:
    """Draw the weights of a kernel in steps of its one scale, a column for each output channel."""
    step = kernel.max() / LARGEST
    values, taps = kernel[..., order] / step, identity_taps(kernel)[order] / step
    channels = np.arange(len(order))
    places = np.broadcast_to(channels, values.shape)
    jitter = np.random.default_rng(0).uniform(-0.25, 0.25, values.shape)
    axes.axhspan(1e-3, 0.5, color=ZERO, zorder=0)
    axes.scatter(places + jitter, values, s=3, color=WEIGHT, alpha=0.5, linewidths=0, rasterized=True)
    axes.scatter(channels, taps, s=26, color=TAP, zorder=3)
    axes.axhline(0.5, color=INK, linewidth=1.3)
    half = kernel.max((0, 1))[order] / LARGEST / step / 2
    axes.hlines(half, channels - 0.45, channels + 0.45, color=INK, linewidth=1.3, linestyles=(0, (1, 0.6)))
    under = dict(facecolor=ZERO, edgecolor="none", pad=2)
    axes.text(-0.5, 0.0115, "rounds to 0", fontsize=10, color=INK, va="bottom", bbox=under)
    axes.set_yscale("log")
    axes.set(xlim=(-1, len(order)), ylim=(0.01, 200))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xticks([])
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, which="both", labelcolor=INK, labelsize=10)
    for side in axes.spines.values():
        side.set_visible(False)
    title += f": {rounded_to_zero(kernel, step):.0f} % round to 0"
    axes.set_title(title, fontsize=11, weight="bold", color=INK, loc="left")
    axes.set_xlabel("output channels, by their largest weight as trained", fontsize=10, color=SOFT)


def legend(figure: Figure, axes: Axes) -> None:
    handles = [
        axes.scatter([], [], s=26, color=TAP, label="identity tap: the centre tap that reads the channel itself"),
        axes.scatter([], [], s=8, color=WEIGHT, label="the other weights"),
        *axes.plot([], [], color=INK, linewidth=1.3, label="half a step of one scale for the kernel"),
        *axes.plot([], [], color=INK, linewidth=1.3, linestyle=(0, (1, 0.6)), label="half a step of the channel's own"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=10, frameon=False, labelcolor=INK)


def main(workdir: Path, block: str | None) -> None:
    model, variables, preprocess, _ = load_deploy(workdir / "deploy.safetensors")
    train = open_data(TrainConfig.load(workdir / "config.json")).dataset.train
    pixels = jnp.asarray(draw_images(train, preprocess, CALIBRATION))
    equalized = prepare(model, variables, normalize(pixels, preprocess.mean, preprocess.std)).equalized
    shown = block or "stage1_block1"
    before, after = (magnitudes(each, shown) for each in (variables, equalized))
    print(f"{shown} as trained\n{describe(before)}\n\n{shown} equalized\n{describe(after)}")

    figure = Figure(figsize=(10, 4.8), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    order = before.max((0, 1)).argsort()
    draw(left, before, order, f"{shown} as trained")
    draw(right, after, order, "equalized")
    left.set_ylabel("|weight|, in steps of one scale for the kernel", fontsize=10, color=SOFT)
    legend(figure, left)
    figure.savefig(Path(__file__).with_suffix(".png") if block is None else Path("int8.png"), dpi=130)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
