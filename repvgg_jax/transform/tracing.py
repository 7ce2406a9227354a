"""What a function is traced with: shapes and dtypes in the place of arrays, and the settings that shape a program."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import jax


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return shape and dtype of an array, a number, or what stands in the place of one."""
    aval = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


def signature(tree: Any, avals: Sequence[jax.ShapeDtypeStruct]) -> Hashable:
    """Return all that tells one traced program of a function from another: its inputs, and two settings of JAX."""
    settings = jax.config.jax_default_matmul_precision, jax.config.jax_enable_x64  # type: ignore[attr-defined]
    return tree, settings, tuple((aval.shape, aval.dtype, aval.weak_type) for aval in avals)


def require_arrays(leaves: Sequence[Any], act: str, why: str) -> None:
    """Raise a ValueError where variables are values of a function that is just being traced."""
    traced = [leaf for leaf in leaves if isinstance(leaf, jax.core.Tracer)]
    if traced:
        raise ValueError(
            f"{len(traced)} of {len(leaves)} variables are tracers: {why}; call {act} outside of jit, vmap and grad, "
            "and what it returns inside"
        )
