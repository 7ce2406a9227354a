"""Draws design.png, the picture in docs/concepts/design.md: `python docs/pictures/design.py`."""

import ast
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

PACKAGE = Path(__file__).parents[2] / "repvgg_jax"
INK, SOFT = "#1f2733", "#7a869a"
ALGEBRA, NETWORKS, RUNS = "#cfe0f7", "#d8efdc", "#f7e7c9"
WIDTH, HEIGHT = 2.7, 0.84

# Each part: where it stands, its colour, and what it is for.
PARTS = {
    "cli": (4.9, 5, RUNS, "commands, exit statuses"),
    "predict": (3.4, 4, RUNS, "classes of image files"),
    "training": (6.4, 4, RUNS, "settings, steps, runs"),
    "interop": (3.4, 3, NETWORKS, "PyTorch, ONNX, StableHLO"),
    "data": (6.4, 3, NETWORKS, "data sets, augmentation"),
    "models": (3.4, 2, NETWORKS, "Flax modules, both forms"),
    "quantize": (0.4, 3, NETWORKS, "equalize, round to 8 bits"),
    "transform": (0.4, 2, ALGEBRA, "reparameterize, expand"),
    "reparam": (0.4, 1, ALGEBRA, "kernels, rules, fuse"),
    "ops": (3.4, 1, ALGEBRA, "convolution, batch norm"),
}


def imports() -> dict[str, set[str]]:
    """The parts that each part imports, as its files say."""
    found: dict[str, set[str]] = {name: set() for name in PARTS}
    for name in PARTS:
        for path in (PACKAGE / name).rglob("[!_]*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("repvgg_jax."):
                    found[name].add((node.module or "").split(".")[1])
        found[name] &= set(PARTS) - {name}
    return found


def reached(name: str, arrows: dict[str, set[str]]) -> set[str]:
    """All that a part imports, and what that imports, and so on."""
    return arrows[name].union(*(reached(each, arrows) for each in arrows[name]))


def box(axes: Axes, name: str) -> None:
    x, y, colour, text = PARTS[name]
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x, y - HEIGHT / 2), WIDTH, HEIGHT * 0.8, boxstyle=style, fc=colour, ec="none"))
    axes.text(x + WIDTH / 2, y + 0.06, name, ha="center", va="center", fontsize=11, weight="bold", color=INK)
    axes.text(x + WIDTH / 2, y - 0.22, text, ha="center", va="center", fontsize=9, color=INK)


def arrow(axes: Axes, source: str, target: str) -> None:
    (from_x, from_y), (to_x, to_y) = PARTS[source][:2], PARTS[target][:2]
    if from_y == to_y:
        style = dict(arrowstyle="-|>", color=SOFT, lw=1.6, shrinkA=0, shrinkB=0)
        axes.annotate("", (to_x + WIDTH + 0.04, to_y - 0.08), (from_x - 0.04, from_y - 0.08), arrowprops=style)
        return
    # Where two arrows reach one box, each has its own place on the edge.
    lean = 0.25 * (from_x - to_x)
    start = from_x + WIDTH / 2 - lean / 2, from_y - HEIGHT / 2
    end = to_x + WIDTH / 2 + lean / 2, to_y + HEIGHT * 0.3
    style = dict(arrowstyle="-|>", color=SOFT, lw=1.4, shrinkA=2, shrinkB=2)
    axes.annotate("", end, start, arrowprops=style)


def main() -> None:
    figure = Figure(figsize=(9, 5.3), layout="constrained")
    axes = figure.subplots()
    arrows = imports()
    for source, targets in arrows.items():
        # What another import brings anyway needs no arrow of its own.
        for target in sorted(targets.difference(*(reached(each, arrows) for each in targets))):
            arrow(axes, source, target)
    for name in PARTS:
        box(axes, name)
    for y, text in (
        (5.05, "An arrow: a part may import\nanother one, below or beside. Arrows that\nothers imply are left out."),
        (0.12, "Optimizers and the leaves (preprocess, files, fields, terminal, invocation, version) are not drawn."),
    ):
        axes.text(0.4, y, text, fontsize=9.5, color=SOFT, va="center")
    axes.set(xlim=(0.2, 9.3), ylim=(-0.05, 5.55))
    axes.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=140, facecolor="white")


if __name__ == "__main__":
    main()
