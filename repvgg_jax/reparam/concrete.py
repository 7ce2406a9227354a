"""What fusing does with concrete arrays: it looks at their values, and folds them in float64 on the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def is_concrete(leaf: Any) -> bool:
    """Return whether the values of an array are at hand: no tracer, and no shards on another host."""
    if isinstance(leaf, jax.Array):
        return not isinstance(leaf, jax.core.Tracer) and leaf.is_fully_addressable
    return isinstance(leaf, np.ndarray)


def lift(tree: Any) -> Any:
    """Turn concrete arrays into float64 on the host, so that the fold rounds once. Tracers stay as they are."""
    if not all(is_concrete(leaf) for leaf in jax.tree.leaves(tree)):
        return tree
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), tree)


def rounded(value: Any, dtype: Any, like: Any) -> Any:
    """Round a folded value to a dtype, and place it where another array lies. Tracers are cast alone."""
    if not isinstance(value, np.ndarray):
        return value.astype(dtype)
    value = value.astype(dtype)
    if isinstance(like, np.ndarray):
        return value
    replicated = like.sharding.is_fully_replicated or value.shape == like.shape
    return jax.device_put(value, like.sharding if replicated else None)


def check_statistics(statistics: Mapping[str, Any]) -> None:
    """Raise a ValueError where concrete running statistics are not finite, or a variance is negative."""
    problems = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(statistics)[0]:
        if not is_concrete(leaf):
            continue
        where = "/".join(str(getattr(key, "key", key)) for key in path)
        values = np.asarray(leaf).astype(np.float64)
        bad = int(np.sum(~np.isfinite(values)))
        if bad:
            problems.append(f"{where} holds {bad} values that are not finite (of {values.size})")
        elif where.endswith("var") and np.any(values < 0):
            problems.append(f"{where} holds negative variances (smallest {values.min():.6g})")
    if problems:
        raise ValueError(
            "; ".join(problems) + ": expected finite means and non-negative variances; the training diverged or the "
            "file is damaged, go back to an earlier checkpoint"
        )
