"""The training form beside the deploy form: size, speed, accuracy, and whether they are the same function."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tabulate import tabulate

from repvgg_jax.models import RepVGG, compile_inference, fuse_model
from repvgg_jax.models.shapes import abstract_variables, input_channels
from repvgg_jax.preprocess import Normalization
from repvgg_jax.reparam import Agreement, EquivalenceError, agreement
from repvgg_jax.training.steps.eval_step import make_eval_step
from repvgg_jax.training.steps.mesh import Batch, shard_batch

# Of the largest logit. Rounding in float32 stays near 1e-6.
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Form:
    """Figures of one form of a network.

    Attributes:
      parameters: Number of trainable parameters.
      megabytes: Size of all variables in 10⁶ bytes. Those of the training form include the batch statistics.
      milliseconds: Median time of the forward pass for one image, measured in evaluation batches.
      accuracy: Accuracy on the test split, in [0, 1].
    """

    parameters: int
    megabytes: float
    milliseconds: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The two forms of a network on the whole test split.

    Attributes:
      training: Figures of the training form.
      deploy: Figures of the deploy form.
      agreement: How the logits of the two forms compare.
      labels: True classes, `(records,)`.
      predictions: Classes that the deploy form predicts, `(records,)`.
      differences: Deploy logits minus training logits, `(records, classes)`.
      batch_size: Number of images in a timed forward pass.
    """

    training: Form
    deploy: Form
    agreement: Agreement
    labels: np.ndarray
    predictions: np.ndarray
    differences: np.ndarray
    batch_size: int

    def table(self, style: str = "simple") -> str:
        """Return the table that a run ends with, in one of tabulate's styles ('simple', 'github', …)."""
        a, b, found = self.training, self.deploy, self.agreement
        rows = [
            ("trainable parameters", f"{a.parameters:,}", f"{b.parameters:,}"),
            ("size (MB)", f"{a.megabytes:.3f}", f"{b.megabytes:.3f}"),
            (
                f"forward time per image (ms, batch {self.batch_size})",
                f"{a.milliseconds:.4f}",
                f"{b.milliseconds:.4f}",
            ),
            (
                f"test accuracy (%, {found.compared:,} images)",
                f"{100 * a.accuracy:.2f}",
                f"{100 * b.accuracy:.2f}",
            ),
            ("largest difference of the logits", "", f"{found.max_difference:.2e}"),
            ("  relative to the largest logit", "", f"{found.relative:.2e}"),
            ("predictions changed", "", f"{found.predictions_changed}"),
        ]
        headers = ("", "training form", "deploy form")
        return tabulate(rows, headers, tablefmt=style, disable_numparse=True, colalign=("left", "right", "right"))

    def check(self) -> None:
        """Raise an EquivalenceError unless the forms agree, no prediction changed, and that proves something.

        `Agreement.require` says what proves nothing: logits that are not finite, and a network that answers every test
        image the same.
        """
        self.agreement.require(TOLERANCE)


def fuse_and_compare(
    model: RepVGG,
    variables: dict[str, Any],
    batches: Callable[[], Iterable[Batch]],
    normalization: Normalization,
    mesh: Mesh,
) -> tuple[RepVGG, dict[str, Any], Comparison]:
    """Fuse a trained network and compare its two forms on every test image.

    The comparison computes in float32 with float32 products, whatever the run's dtype. Times are those of the run's own
    dtype.

    Args:
      model: The network in its training form.
      variables: Its variables, `{'params', 'batch_stats', …}`.
      batches: Returns a fresh pass over this process's share of the test split.
      normalization: The normalisation of the images.
      mesh: The mesh of the run.

    Returns:
      The model in its deploy form, its variables, and the comparison. `comparison.check()` raises an error where the
      forms differ.

    Raises:
      ValueError: If the variables cannot be fused.
      EquivalenceError: If the fused tree is not the one that `deploy_model.init` makes.
    """
    # The same on every process, each of which fuses for itself. Ranges of 8 bits are no part of either form.
    variables = jax.device_get({name: variables[name] for name in ("params", "batch_stats")})
    deploy_model, deploy_variables = fuse_model(model, variables)
    try:
        chex.assert_trees_all_equal_shapes_and_dtypes(
            deploy_variables, abstract_variables(deploy_model, input_channels(variables))
        )
    except AssertionError as error:
        raise EquivalenceError(f"the fused variables are not those of the deploy form: {error}") from None
    exact = [form.clone(dtype=None) for form in (model, deploy_model)]
    both = (variables, jax.device_get(deploy_variables))
    logits: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    labels = []
    first: Batch = {}
    with jax.default_matmul_precision("float32"):
        steps = [make_eval_step(form, normalization, mesh) for form in exact]
        for batch in batches():
            placed = shard_batch(batch, mesh)
            first = first or batch
            results = [step(form_variables, placed) for step, form_variables in zip(steps, both, strict=True)]
            mask = np.asarray(results[0]["mask"])
            labels.append(np.asarray(results[0]["label"])[mask])
            for side, result in zip(logits, results, strict=True):
                side.append(np.asarray(result["logits"])[mask])
    expected, found = (np.concatenate(side) for side in logits)
    truth = np.concatenate(labels)
    milliseconds = _interleaved_times((model, deploy_model), both, first["image"])
    training, deploy = (
        Form(
            parameters=sum(leaf.size for leaf in jax.tree.leaves(form_variables["params"])),
            megabytes=sum(leaf.nbytes for leaf in jax.tree.leaves(form_variables)) / 1e6,
            milliseconds=time_,
            accuracy=float(np.mean(side.argmax(-1) == truth)),
        )
        for form_variables, time_, side in zip(both, milliseconds, (expected, found), strict=True)
    )
    comparison = Comparison(
        training=training,
        deploy=deploy,
        agreement=agreement(expected, found),
        labels=truth,
        predictions=found.argmax(-1),
        differences=found - expected,
        batch_size=len(first["image"]),
    )
    return deploy_model, deploy_variables, comparison


def _interleaved_times(
    models: tuple[RepVGG, RepVGG], both: tuple[Any, Any], images: np.ndarray, repeats: int = 9
) -> list[float]:
    """Return the median milliseconds for one image of each model, compiled for inference and measured in turn."""
    floats = jnp.asarray(images, jnp.float32) / 255
    forwards = [compile_inference(model, variables, floats) for model, variables in zip(models, both, strict=True)]
    times: list[list[float]] = [[] for _ in models]
    for repeat in range(repeats + 1):
        for forward, seconds in zip(forwards, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(forward(floats))
            if repeat:  # the first call warms up
                seconds.append(time.perf_counter() - start)
    return [1e3 * statistics.median(seconds) / len(images) for seconds in times]
