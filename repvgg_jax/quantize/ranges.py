"""The values that the activations of a deploy form take on images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from repvgg_jax.models import RepVGG
from repvgg_jax.quantize.equalize import require_plain_deploy_form


def activation_ranges(model: RepVGG, variables: Mapping[str, Any], images: jax.Array) -> dict[str, jax.Array]:
    """Measure the largest value of each channel behind each ReLU.

    The function is pure and works under `jit`. Of several batches, take the maximum.

    Args:
      model: The model, in its deploy form and without squeeze-and-excitation.
      variables: Its variables, `{'params'}`.
      images: Normalised images, `(batch, height, width, channels)`.

    Returns:
      Float arrays `(channels,)` by the name of the block, in the order of computation. A channel that is 0 for all
      images is *dead* on them.

    Raises:
      ValueError: If the model is in its training form, or has squeeze-and-excitation units.
    """
    require_plain_deploy_form(model)
    _, captured = model.apply(
        variables,
        images,
        train=False,
        capture_intermediates=lambda module, _: any(module.name == block.name for block in model.blocks),
        mutable=["intermediates"],
    )
    return {block.name: captured["intermediates"][block.name]["__call__"][0].max((0, 1, 2)) for block in model.blocks}
