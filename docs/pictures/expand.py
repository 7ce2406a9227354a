"""Draws expand.png, of docs/concepts/branches.md: `python docs/pictures/expand.py`."""

from pathlib import Path

from block import CONV, FUSED, IDENTITY, POINT, SOFT, arrow, box
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PLAIN = "#e8ebf0"
LEFT, MIDDLE, RIGHT = 1.6, 7.1, 12.6


def column(axes: Axes, x: float, title: str, kernel: str, colour: str, ink: str) -> None:
    """One convolution with what stands behind it."""
    axes.text(x, 4.75, title, ha="center", fontsize=12, weight="bold", color="#1f2733")
    arrow(axes, (x, 4.55), (x, 2.92))
    box(axes, x, 2.7, kernel, colour, width=2.3, ink=ink)
    arrow(axes, (x, 2.48), (x, 1.28))
    behind(axes, x)


def behind(axes: Axes, x: float) -> None:
    """The batch norm and the ReLU of the network itself."""
    box(axes, x, 1.06, "batch norm", PLAIN)
    arrow(axes, (x, 0.84), (x, 0.62))
    box(axes, x, 0.4, "ReLU", PLAIN)


def act(axes: Axes, x: float, name: str) -> None:
    """The arrow of one of the two acts."""
    arrow(axes, (x - 0.5, 2.7), (x + 0.5, 2.7))
    axes.text(x, 2.9, name, ha="center", fontsize=12, color="#1f2733", style="italic")


def main() -> None:
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    axes = figure.subplots()
    column(axes, LEFT, "your network", "3×3 conv", CONV, "#1f2733")
    column(axes, RIGHT, "your network, trained", "3×3 conv, new kernel", FUSED, "white")

    axes.text(MIDDLE, 4.75, "while it trains", ha="center", fontsize=12, weight="bold", color="#1f2733")
    axes.plot([MIDDLE, MIDDLE], [4.3, 4.55], color=SOFT, linewidth=1.3)
    branches = {-2.0: ("3×3 conv", CONV), 0.0: ("1×1 conv", POINT), 2.0: ("identity", IDENTITY)}
    for offset, (name, colour) in branches.items():
        x = MIDDLE + offset
        arrow(axes, (MIDDLE, 4.3), (x, 4.3), (x, 3.82))
        box(axes, x, 3.6, name, colour)
        arrow(axes, (x, 3.38), (x, 2.92))
        box(axes, x, 2.7, "× gain / deviation", colour, width=1.85)
        arrow(axes, *([(x, 2.48), (x, 2.08)] if not offset else [(x, 2.48), (x, 1.86), (MIDDLE + offset / 8, 1.86)]))
    box(axes, MIDDLE, 1.86, "+", PLAIN, width=0.5)
    arrow(axes, (MIDDLE, 1.64), (MIDDLE, 1.28))
    behind(axes, MIDDLE)
    act(axes, 3.46, "expand")
    act(axes, 10.74, "collapse")
    axes.set(xlim=(0.3, 14.0), ylim=(0, 5.1))
    axes.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
