"""Draws block.png, the picture at the top of the README: `python docs/pictures/block.py`."""

import itertools
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from repvgg_jax.reparam import fold_batch_norm, identity_kernel, merge_branches, pad_kernel

INK, SOFT = "#1f2733", "#7a869a"
CONV, POINT, IDENTITY, FUSED = "#cfe0f7", "#d8efdc", "#f7e7c9", "#1f5fbf"


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 1.7, ink: str = INK) -> None:
    patch = FancyBboxPatch(
        (x - width / 2, y - 0.22), width, 0.44, boxstyle="round,pad=0,rounding_size=0.09", fc=colour, ec="none"
    )
    axes.add_patch(patch)
    axes.text(x, y, text, ha="center", va="center", fontsize=10, color=ink)


def arrow(axes: Axes, *points: tuple[float, float]) -> None:
    for start, end in itertools.pairwise(points[:-1]):
        axes.plot(*zip(start, end, strict=True), color=SOFT, linewidth=1.3, solid_capstyle="round")
    axes.annotate(
        "", points[-1], points[-2], arrowprops=dict(arrowstyle="-|>", color=SOFT, lw=1.3, shrinkA=0, shrinkB=0)
    )


def draw_forms(axes: Axes) -> None:
    columns = {2.0: ("3×3 conv", CONV), 4.1: ("1×1 conv", POINT), 6.2: ("identity", IDENTITY)}
    for x, (name, colour) in columns.items():
        arrow(axes, (4.1, 3.75), (x, 3.75), (x, 3.12))
        box(axes, x, 2.9, name, colour)
        arrow(axes, (x, 2.68), (x, 2.42))
        box(axes, x, 2.2, "batch norm", colour)
        arrow(axes, (x, 1.98), (x, 1.4), (4.1, 1.4), (4.1, 1.28)) if x != 4.1 else arrow(axes, (x, 1.98), (x, 1.28))
    axes.text(4.1, 4.05, "training form", ha="center", fontsize=12, weight="bold", color=INK)
    box(axes, 4.1, 1.06, "+", "#e8ebf0", width=0.5)
    arrow(axes, (4.1, 0.84), (4.1, 0.62))
    box(axes, 4.1, 0.4, "ReLU", "#e8ebf0")

    arrow(axes, (7.6, 2.2), (9.0, 2.2))
    axes.text(8.3, 2.4, "fuse", ha="center", fontsize=12, color=INK, style="italic")
    axes.text(8.3, 1.78, "exactly", ha="center", fontsize=9, color=SOFT)

    axes.text(10.4, 4.05, "deploy form", ha="center", fontsize=12, weight="bold", color=INK)
    arrow(axes, (10.4, 3.75), (10.4, 2.42))
    for x in (4.1, 10.4):
        axes.plot([x, x], [3.75, 3.92], color=SOFT, linewidth=1.3)
    box(axes, 10.4, 2.2, "3×3 conv + bias", FUSED, width=2.1, ink="white")
    arrow(axes, (10.4, 1.98), (10.4, 0.62))
    box(axes, 10.4, 0.4, "ReLU", "#e8ebf0")
    axes.set(xlim=(0.9, 11.7), ylim=(0, 4.3))
    axes.axis("off")


def draw_kernels(axes: Axes) -> None:
    rng = np.random.default_rng(19)
    norms = [
        dict(mean=rng.normal(size=1), var=rng.uniform(0.5, 1.5, 1), scale=rng.uniform(0.5, 1.5, 1)) for _ in range(3)
    ]
    kernels = [rng.normal(0, 0.6, (3, 3, 1, 1)), rng.normal(0, 0.9, (1, 1, 1, 1)), identity_kernel(1)]
    folded = [fold_batch_norm(kernel, **norm) for kernel, norm in zip(kernels, norms, strict=True)]
    parts = [pad_kernel(part.kernel, (3, 3)) for part in folded] + [merge_branches(folded).kernel]
    labels = (
        "3×3 kernel\n× scale / √(var + ε)",
        "1×1 kernel, likewise,\npadded to 3×3",
        "identity, likewise,\npadded to 3×3",
        "the fused kernel",
    )
    for number, (kernel, label) in enumerate(zip(parts, labels, strict=True)):
        left = 3.0 * number
        for row in range(3):
            for column in range(3):
                value = float(kernel[row, column, 0, 0])
                colour = (0.85, 0.35, 0.2, min(1, abs(value))) if value < 0 else (0.12, 0.37, 0.75, min(1, abs(value)))
                axes.add_patch(
                    FancyBboxPatch(
                        (left + 0.5 * column, 1 - 0.5 * row),
                        0.44,
                        0.44,
                        boxstyle="square,pad=0",
                        fc=colour if value else "white",
                        ec="#d4d9e1",
                        lw=0.8,
                    )
                )
                axes.text(
                    left + 0.5 * column + 0.22,
                    1.22 - 0.5 * row,
                    f"{value:.1f}" if value else "0",
                    ha="center",
                    va="center",
                    fontsize=10,
                    color="white" if abs(value) > 0.6 else INK,
                )
        axes.text(left + 0.72, -0.2, label, ha="center", va="top", fontsize=9.5, color=INK)
        if number < 3:
            axes.text(left + 2.22, 0.72, "=" if number == 2 else "+", ha="center", va="center", fontsize=16, color=SOFT)
    axes.text(5.25, -1.0, "(one channel; the biases add up likewise)", ha="center", va="top", fontsize=9.5, color=SOFT)
    axes.set(xlim=(-0.6, 11.1), ylim=(-1.3, 1.55))
    axes.set_aspect("equal")
    axes.axis("off")


if __name__ == "__main__":
    figure = Figure(figsize=(9.4, 5.9), layout="constrained", facecolor="white")
    forms, kernels = figure.subplots(2, 1, height_ratios=(3, 2))
    draw_forms(forms)
    draw_kernels(kernels)
    figure.savefig(Path(__file__).with_name("block.png"), dpi=140)
