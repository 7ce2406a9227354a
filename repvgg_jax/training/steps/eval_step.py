"""The compiled evaluation step over a mesh of devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from repvgg_jax.models import RepVGG
from repvgg_jax.ops import compiler_options
from repvgg_jax.preprocess import Normalization, normalize
from repvgg_jax.training.steps.mesh import Batch
from repvgg_jax.training.steps.quantize_aware import quantized_logits


def make_eval_step(
    model: RepVGG, normalization: Normalization, mesh: Mesh, *, reduce_range: bool = False
) -> jax.stages.Wrapped:
    """Build the evaluation step of either form, under `jit`.

    Args:
      model: The network, in the form of the variables that the step will be given. Where these have 'ranges', as in
        training for 8 bits, the logits are those in 8 bits.
      normalization: The normalisation of the images.
      mesh: The mesh from `create_mesh`. Its size must divide the batch.
      reduce_range: Whether weights in 8 bits have 7 of them.

    Returns:
      `step(variables, {'image', 'label', 'mask'}) -> {'logits' (batch, classes), 'label', 'mask', 'loss' (sum),
      'correct', 'count'}` of the global batch, replicated. Rows whose mask is False count in no sum.
    """

    def step(variables: Any, batch: Batch) -> dict[str, jax.Array]:
        images = normalize(batch["image"], *normalization)
        logits: Any
        if "ranges" in variables:
            logits = quantized_logits(model, variables, images, reduce_range=reduce_range)
        else:
            logits = model.apply(variables, images, train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        correct = (logits.argmax(-1) == batch["label"]) & batch["mask"]
        return {
            "logits": logits,
            "label": batch["label"],
            "mask": batch["mask"],
            "loss": jnp.where(batch["mask"], losses, 0).sum(),
            "correct": correct.sum(),
            "count": batch["mask"].sum(),
        }

    replicated, sharded = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
    return jax.jit(
        step,
        in_shardings=(replicated, sharded),
        out_shardings=replicated,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )
