"""Evaluation of a network on the test split."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from repvgg_jax.training.steps.mesh import shard_batch


class Evaluation(NamedTuple):
    """The means over the records of the test split, and what was predicted for each.

    Attributes:
      metrics: Loss and accuracy.
      labels: Integers `(records,)`, the true classes.
      predictions: Integers `(records,)`, in the same order.
    """

    metrics: dict[str, float]
    labels: np.ndarray
    predictions: np.ndarray


def evaluate(eval_step: jax.stages.Wrapped, variables: Any, batches: Iterable[Any], mesh: Mesh) -> Evaluation:
    """Evaluate variables on every record of some batches.

    Args:
      eval_step: The step from `make_eval_step`.
      variables: The variables of the training form.
      batches: The batches from `evaluation_batches`. All processes take as many.
      mesh: The mesh of the run.

    Returns:
      Means and predictions.
    """
    results = [eval_step(variables, shard_batch(batch, mesh)) for batch in batches]
    loss, correct, count = (sum(float(result[name]) for result in results) for name in ("loss", "correct", "count"))
    masks = [np.asarray(result["mask"]) for result in results]
    labels = [np.asarray(result["label"])[mask] for result, mask in zip(results, masks, strict=True)]
    predictions = [np.asarray(result["logits"]).argmax(-1)[mask] for result, mask in zip(results, masks, strict=True)]
    metrics = {"loss": loss / count, "accuracy": correct / count}
    return Evaluation(metrics, np.concatenate(labels), np.concatenate(predictions))
