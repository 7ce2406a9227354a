"""The pictures of a run report. One that cannot be drawn is a warning: no run stops for it."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from repvgg_jax.files import replace_whole
from repvgg_jax.terminal import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TRAIN, _TEST = "#7a869a", "#1f5fbf"
# Of the confusion matrix. No picture shows more rows than it has pixels, and 20,000 classes squared take gigabytes.
_MOST_ROWS = 1000
_SECONDS_BETWEEN_PICTURES = 5.0

_Draw = TypeVar("_Draw", bound=Callable[..., None])


def _harmless(draw: _Draw) -> _Draw:
    """Draw by matplotlib's own settings, not by those of the user's matplotlibrc, and warn where that fails.

    matplotlib is imported here and below for the first time: an MPLBACKEND that it does not know ends the import.
    """

    @functools.wraps(draw)
    def drawn(path: Path, *arguments: Any) -> None:
        try:
            import matplotlib

            with matplotlib.rc_context(), warnings.catch_warnings():
                # Of a layout that a long name spoils, or a sign that no font has.
                warnings.simplefilter("ignore", UserWarning)
                matplotlib.rcdefaults()
                draw(path, *arguments)
        except Exception as error:  # matplotlib raises nearly anything, and the disk may be full
            said = printable(f"{path} could not be drawn: {type(error).__name__}: {error}")
            warnings.warn(f"{said}; all else of the run goes on", stacklevel=2)

    return drawn  # type: ignore[return-value]


@_harmless
def draw_curves(path: Path, history: Sequence[dict[str, float]]) -> None:
    """Draw loss and accuracy over the epochs, training beside test. An earlier picture is replaced at once."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, quantity, factor, unit in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), (1, 100), ("", " (%)"), strict=True
    ):
        for split, colour in (("train", _TRAIN), ("test", _TEST)):
            lines = [line for line in history if f"{split}/{quantity}" in line]
            epochs = [line["epoch"] for line in lines]
            values = [factor * line[f"{split}/{quantity}"] for line in lines]
            label = f"{split} ({values[-1]:.4g} at the end)" if values else split
            axes.plot(epochs, values, color=colour, label=label, marker="o", markersize=2.5, linewidth=1.4)
        axes.set_xlabel("epoch")
        axes.set_title(quantity + unit, fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


@_harmless
def draw_confusion(path: Path, labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str]) -> None:
    """Draw the confusion matrix, with rows normalised to the true class.

    Cells carry counts up to 20 classes. Above 1000 classes, a row stands for several that follow each other.
    """
    from matplotlib.figure import Figure

    from repvgg_jax.training.run.class_labels import class_labels

    together = -(-len(class_names) // _MOST_ROWS)
    classes = -(-len(class_names) // together)
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (np.asarray(labels) // together, np.asarray(predictions) // together), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = float(np.clip(0.42 * classes + 1.6, 4, 9))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, fraction=0.045, label="share of the true class")
    note = f" ({together} classes a row)" if together > 1 else ""
    if classes <= 20:
        names, fonts = class_labels(class_names)
        text: Any = dict(fontsize=8, fontfamily=fonts, parse_math=False)
        axes.set_xticks(range(classes), names, rotation=45, ha="right", **text)
        axes.set_yticks(range(classes), names, **text)
        if any(label.startswith("#") and label != name for label, name in zip(names, class_names, strict=True)):
            note = " (#0 is the first of class_names in dataset.json)"
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=colour)
    axes.set_xlabel("predicted" + note)
    axes.set_ylabel("true")
    _save(figure, path)


@_harmless
def draw_differences(path: Path, differences: np.ndarray, max_reference: float) -> None:
    """Draw how the deploy form's logits differ from the training form's, over all test images and classes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    reach = float(np.abs(differences).max()) or 1e-12
    axes.hist(differences.ravel(), bins=101, range=(-reach, reach), color=_TEST, log=True)
    axes.set_xlabel("deploy logit − training logit")
    axes.set_ylabel("logits")
    axes.set_title(
        f"{differences.size:,} logits, largest difference {np.abs(differences).max():.1e}, "
        f"largest logit {max_reference:.3g}",
        fontsize=9,
    )
    axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


class Pictures:
    """The pictures of a run while it trains, `curves.png` and `confusion.png`.

    Args:
      workdir: The run directory.
      class_names: Names of the classes.
    """

    def __init__(self, workdir: Path, class_names: Sequence[str]):
        self._workdir, self._class_names = workdir, class_names
        self._drawn = -math.inf

    def draw(self, history: list[dict[str, float]], labels: np.ndarray, predictions: np.ndarray) -> None:
        """Draw them, unless that was done a few seconds ago: it takes half a second, and epochs can be short."""
        if time.perf_counter() - self._drawn > _SECONDS_BETWEEN_PICTURES:
            draw_curves(self._workdir / "curves.png", history)
            draw_confusion(self._workdir / "confusion.png", labels, predictions, self._class_names)
            self._drawn = time.perf_counter()


def _save(figure: Figure, path: Path) -> None:
    # A viewer that looks while the picture is written sees the earlier one.
    replace_whole(path, lambda partial: figure.savefig(partial, dpi=130, bbox_inches="tight", format="png"))
