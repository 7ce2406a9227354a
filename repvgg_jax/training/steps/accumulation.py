"""Gradient accumulation: a batch computed in pieces, for networks whose activations do not fit at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def accumulate(
    compute: Callable[[Any, Any], tuple[Any, Any]], batch_stats: Any, batch: Any, *, steps: int, mesh: Mesh
) -> tuple[Any, Any]:
    """Run a function on each microbatch in turn. The batch statistics are passed on, and the rest is averaged.

    Microbatch i holds the rows i, i + steps, i + 2·steps, …, so every device splits the rows that it already has. A
    loop takes them, which bounds the memory. XLA:CPU is about twice as slow inside a loop, so this is for accelerators.

    Args:
      compute: `(batch_stats, microbatch) -> (batch_stats, means)`. The means are a tree of floating-point arrays, each
        an average over the microbatch.
      batch_stats: Batch statistics before the first microbatch.
      batch: Tree of `(batch, …)` arrays, sharded over the mesh.
      steps: Number of microbatches. It must divide batch / mesh.size. With 1 this is `compute(batch_stats, batch)`.
      mesh: The mesh from `create_mesh`.

    Returns:
      The batch statistics after the last microbatch, and the means over the whole batch.
    """
    if steps == 1:
        return compute(batch_stats, batch)
    sharding = NamedSharding(mesh, PartitionSpec(None, "data"))

    def split(leaf: jax.Array) -> jax.Array:
        pieces = leaf.reshape(-1, steps, *leaf.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(pieces, sharding)

    def body(carry: tuple[Any, Any], microbatch: Any) -> tuple[tuple[Any, Any], None]:
        stats, total = carry
        stats, means = compute(stats, microbatch)
        return (stats, jax.tree.map(jnp.add, total, means)), None

    microbatches = jax.tree.map(split, batch)
    _, shapes = jax.eval_shape(compute, batch_stats, jax.tree.map(lambda leaf: leaf[0], microbatches))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (batch_stats, total), _ = jax.lax.scan(body, (batch_stats, zeros), microbatches)
    return batch_stats, jax.tree.map(lambda leaf: leaf / steps, total)
