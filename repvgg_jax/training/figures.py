"""The pictures of a run report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_TRAIN, _TEST = "#7a869a", "#1f5fbf"


def draw_curves(path: Path, history: Sequence[dict[str, float]]) -> None:
    """Draw loss and accuracy over the epochs, training beside test; a picture that is there is replaced at once."""
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


def draw_confusion(path: Path, labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str]) -> None:
    """Draw the confusion matrix, rows normalised to the true class; cells carry counts up to 20 classes."""
    classes = len(class_names)
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (labels, predictions), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = float(np.clip(0.42 * classes + 1.6, 4, 9))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, fraction=0.045, label="share of the true class")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if classes <= 20:
        axes.set_xticks(range(classes), class_names, rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(classes), class_names, fontsize=8)
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=colour)
    _save(figure, path)


def draw_differences(path: Path, differences: np.ndarray, max_reference: float) -> None:
    """Draw how the deploy form's logits differ from the training form's, over all test images and classes."""
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


def _save(figure: Figure, path: Path) -> None:
    # A viewer that looks while the picture is written sees the earlier one.
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=130, bbox_inches="tight", format="png")
    partial.replace(path)
