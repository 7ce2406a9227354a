"""A network as it will be in 8 bits, from the variables of its training form: through `fuse`, with gradients.

Training this way needs the branches and their batch norms no more than fusing does: one convolution a block is
computed, where other implementations compute the branches to find their statistics and the fused kernel besides. The
running statistics stay as they are.

References:
  Prutianova et al., *RepQ*, arXiv:2311.05317. Jacob et al., arXiv:1712.05877, section 3.1, for ranges that follow the
  batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from repvgg_jax.models import RepVGG
from repvgg_jax.models.forms import fuse_model
from repvgg_jax.quantize import Range, range_of, simulate, tensor_ranges

Ranges = Mapping[str, Range]
_MOMENTUM = 0.99


def quantized_logits(model: RepVGG, variables: Any, images: jax.Array, *, reduce_range: bool = False) -> jax.Array:
    """Compute the logits that a network will have in 8 bits.

    Args:
      model: The network in its training form.
      variables: `{'params', 'batch_stats', 'ranges'}`.
      images: Normalised images, `(batch, height, width, channels)`.
      reduce_range: Whether weights have 7 bits.

    Returns:
      The logits, `(batch, num_classes)`.
    """
    return train_quantized(model, variables, images, reduce_range=reduce_range)[0]


def train_quantized(
    model: RepVGG, variables: Any, images: jax.Array, *, reduce_range: bool = False
) -> tuple[jax.Array, Ranges]:
    """Compute the logits in 8 bits, and ranges that have moved towards those of these images.

    The arguments are those of `quantized_logits`.

    Returns:
      The logits, and the ranges after this batch.
    """
    deploy_model, deployed = _fused(model, variables)
    ranges, moved = variables["ranges"], {}

    def watch(name: str, y: jax.Array) -> jax.Array:
        now = range_of(jax.lax.stop_gradient(y))
        moved[name] = Range(*(_move(old, new) for old, new in zip(ranges[name], now, strict=True)))
        return y

    logits = simulate(deploy_model, deployed, images, ranges, reduce_range=reduce_range, watch=watch)
    return logits, moved


def first_ranges(model: RepVGG, variables: Any, images: jax.Array) -> Ranges:
    """Measure ranges on a first batch of normalised images, for training to move."""
    return tensor_ranges(*_fused(model, variables), images)


def no_ranges(model: RepVGG) -> Ranges:
    """Return ranges of the right names and dtypes, before any image was seen."""
    names = ("images", *(block.name for block in model.blocks), "pooled", "logits")
    return {name: Range(jnp.zeros(()), jnp.zeros(())) for name in names}


def _fused(model: RepVGG, variables: Any) -> tuple[RepVGG, Any]:
    # In float32, since bfloat16 has no room for the steps of 8 bits. Recomputing a block would watch it twice.
    deploy_model, deployed = fuse_model(model, {name: variables[name] for name in ("params", "batch_stats")})
    return deploy_model.clone(dtype=None, remat=False), deployed


def _move(old: jax.Array, new: jax.Array) -> jax.Array:
    return (old + (1 - _MOMENTUM) * (new - old)).astype(old.dtype)
