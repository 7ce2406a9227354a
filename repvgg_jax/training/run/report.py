"""`report.md` of a run, with its pictures."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tabulate import tabulate

from repvgg_jax.files import write_whole
from repvgg_jax.preprocess import Normalization
from repvgg_jax.terminal import printable
from repvgg_jax.training.config import TrainConfig
from repvgg_jax.training.export.int8_proof import Int8Proof
from repvgg_jax.training.run.comparison import Comparison
from repvgg_jax.training.run.plots import draw_confusion, draw_curves, draw_differences

REPORT = "report.md"
_EMA_NOTE = "The test figures and the deploy form are of the moving average of the variables, the training figures not."

_QUANTIZE_AWARE_NOTE = "Figures of training and its tests are of the network in 8 bits, those of the two forms are not."


def write_report(
    workdir: Path,
    config: TrainConfig,
    history: Sequence[dict[str, float]],
    comparison: Comparison,
    normalization: Normalization,
    class_names: Sequence[str],
) -> Path:
    """Write `report.md`, `curves.png`, `confusion.png` and `differences.png` into a run directory.

    Args:
      workdir: The run directory.
      config: The settings of the run.
      history: The lines of `metrics.jsonl`.
      comparison: The comparison of the two forms.
      normalization: The normalisation of the images.
      class_names: One name for each class.

    Returns:
      The path of the report.
    """
    draw_curves(workdir / "curves.png", history)
    draw_confusion(workdir / "confusion.png", comparison.labels, comparison.predictions, class_names)
    draw_differences(workdir / "differences.png", comparison.differences, comparison.agreement.max_reference)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax"))
    device = jax.devices()[0]
    found = config.settings | normalization._asdict()
    settings = [(name, _in_table(value)) for name, value in found.items() if value is not None and name != "data_dir"]
    notes = [_EMA_NOTE] if config.optimization.ema_decay else []
    if config.optimization.quantize_aware:
        notes.append(_QUANTIZE_AWARE_NOTE)
    note = "".join(f"\n{each}" for each in notes)
    seconds = sum(line.get("seconds", 0) for line in history)
    text = f"""# {config.network.description} on {printable(config.data.dataset)}

Test accuracy **{100 * comparison.deploy.accuracy:.2f} %** in the deploy form, after {config.optimization.epochs} epochs
({seconds:,.0f} s of training and evaluation, without compiling the training step).

## Training form and deploy form

{comparison.table("github")}

Both forms saw the whole test split in float32 with float32 products, on {jax.device_count()} × {device.device_kind}.
The deploy form is what `deploy.safetensors` holds.

![distribution of the logit differences](differences.png)

## Training

![loss and accuracy](curves.png)

Training figures are averages over an epoch, on augmented images and smoothed targets; test figures are not.{note}

## Confusion matrix of the deploy form

![confusion matrix](confusion.png)

## Settings

{tabulate(settings, ("field", "value"), tablefmt="github", disable_numparse=True)}

{versions}, Python {platform.python_version()}
"""
    path = workdir / REPORT
    write_whole(path, text)
    return path


def add_int8(workdir: Path, proof: Int8Proof) -> None:
    """Add to the report of a run what its network loses in 8 bits."""
    path = workdir / REPORT
    text = f"""
## In 8 bits

`deploy.int8.onnx` beside the deploy form, on the whole test split:

{proof.table("github")}

Each layer's output beside that of the deploy form, on a few test images:

{proof.layer_table("github")}
"""
    write_whole(path, path.read_text(encoding="utf-8") + text)


def _in_table(value: Any) -> str:
    return printable(str(value)).replace("|", r"\|")
