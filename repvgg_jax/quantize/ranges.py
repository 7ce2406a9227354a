"""The values that the activations of a deploy form take on images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from repvgg_jax.models import RepVGG
from repvgg_jax.quantize.equalization import require_plain_deploy_form
from repvgg_jax.quantize.layers import run_layers


class Range(NamedTuple):
    """The range of a tensor, which the steps of 8 bits divide. It contains 0.

    Attributes:
      low: Its lower end, a scalar, at most 0.
      high: Its upper end, a scalar, at least 0.
    """

    low: jax.Array
    high: jax.Array


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
    found: dict[str, jax.Array] = {}

    def watch(name: str, y: jax.Array) -> jax.Array:
        found[name] = y.max(tuple(range(y.ndim - 1)))
        return y

    run_layers(model, variables, images, activation=watch)
    return {block.name: found[block.name] for block in model.blocks}


def tensor_ranges(model: RepVGG, variables: Mapping[str, Any], images: jax.Array) -> dict[str, Range]:
    """Measure the range of each tensor that is quantized: images, outputs of blocks, their mean, and logits.

    The function is pure and works under `jit`. Of several batches, take the extremes.

    Args:
      model: The model, in its deploy form and without squeeze-and-excitation.
      variables: Its variables, `{'params'}`.
      images: Normalised images, `(batch, height, width, channels)`.

    Returns:
      The ranges by name: 'images', the names of the blocks, 'pooled' and 'logits', in the order of computation.

    Raises:
      ValueError: If the model is in its training form, or has squeeze-and-excitation units.
    """
    require_plain_deploy_form(model)
    found: dict[str, Range] = {}

    def watch(name: str, y: jax.Array) -> jax.Array:
        found[name] = range_of(y)
        return y

    run_layers(model, variables, images, activation=watch)
    return found


def widen(ranges: Mapping[str, Range], others: Mapping[str, Range]) -> dict[str, Range]:
    """Return ranges that hold those of two batches, by name."""
    return {
        name: Range(jnp.minimum(low, others[name].low), jnp.maximum(high, others[name].high))
        for name, (low, high) in ranges.items()
    }


def range_of(x: jax.Array) -> Range:
    """Return the range from the smallest to the largest value of an array, with 0 in it."""
    return Range(jnp.minimum(x.min(), 0), jnp.maximum(x.max(), 0))
