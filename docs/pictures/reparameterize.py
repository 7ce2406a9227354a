"""Draws reparameterize.png, of docs/concepts/reading-a-program.md: `python docs/pictures/reparameterize.py`."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

INK, SOFT, HELD, LEFT, CONSTANT = "#1f2733", "#7a869a", "#cfe0f7", "#e8ebf0", "#f7e7c9"

# The equation as traced, what the interpreter holds its result to be, and what kind of thing that is.
LINES = (
    ("f = conv(x, kernel)", "kernel ∗ x", HELD),
    ("h = f − mean", "kernel ∗ x − mean", HELD),
    ("i = var + 1e-5", "of v and numbers alone", CONSTANT),
    ("j = rsqrt(i)", "of v and numbers alone", CONSTANT),
    ("s = scale × j", "of v and numbers alone", CONSTANT),
    ("m = h × s", "(s kernel) ∗ x − s mean", HELD),
    ("n = m + x", "(s kernel + identity) ∗ x − s mean", HELD),
    ("o = tanh(n)", "not affine: n is computed, then tanh", LEFT),
)
LEGEND = (("affine value", HELD), ("constant", CONSTANT), ("any other value", LEFT))


def cell(axes: Axes, x: float, y: float, width: float, text: str, colour: str) -> None:
    patch = FancyBboxPatch((x, y - 0.32), width, 0.64, boxstyle="round,pad=0,rounding_size=0.1", fc=colour, ec="none")
    axes.add_patch(patch)
    axes.text(x + 0.18, y, text, va="center", fontsize=9.5, color=INK)


def main() -> None:
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots()
    top = len(LINES)
    for x, title in ((0.1, "the traced program"), (3.5, "what each value is"), (9.3, "the program that is left")):
        axes.text(x, top + 0.1, title, fontsize=11, weight="bold", color=INK)
    for row, (equation, meaning, colour) in enumerate(LINES):
        y = top - 0.75 - row * 0.9
        axes.text(0.1, y, equation, va="center", fontsize=10, family="monospace", color=INK)
        cell(axes, 3.5, y, 4.9, meaning, colour)
    arrow = dict(arrowstyle="-|>", color=SOFT, lw=1.4, shrinkA=0, shrinkB=0)
    for row, (text, target) in {6: ("n = conv(x, K) + b", 6), 7: ("o = tanh(n)", 7)}.items():
        y = top - 0.75 - row * 0.9
        axes.annotate("", (9.2, top - 0.75 - target * 0.9), (8.5, y), arrowprops=arrow)
        axes.text(9.3, y, text, va="center", fontsize=10, family="monospace", color=INK)
    for row, text in ((2.6, "computed once, on the host:"), (3.5, "K = s kernel + identity"), (4.4, "b = −s mean")):
        family = "monospace" if "=" in text else None
        axes.text(9.3, top - 0.75 - row * 0.9, text, va="center", fontsize=10, family=family, color=INK)
    for place, (text, colour) in enumerate(LEGEND):
        x = 3.5 + 1.7 * place
        axes.add_patch(FancyBboxPatch((x, -0.4), 0.3, 0.3, boxstyle="square,pad=0", fc=colour, ec="none"))
        axes.text(x + 0.42, -0.25, text, va="center", fontsize=9.5, color=INK)
    axes.set(xlim=(0, 12.4), ylim=(-0.6, top + 0.6))
    axes.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
