"""One branch of a block in a tree of variables: checked, and folded into the one convolution that it is."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from repvgg_jax.reparam.concrete import rounded
from repvgg_jax.reparam.kernels import Array, Convolution, fold_batch_norm, identity_kernel

Tree = Mapping[str, Any]


def has_convolution(branch: Any, conv: str) -> bool:
    """Return whether a node is a mapping that has a convolution of this name."""
    return isinstance(branch, Mapping) and isinstance(branch.get(conv), Mapping) and "kernel" in branch[conv]


def check_branch(name: str, branch: Any, statistics: Any, conv: str, norm: str) -> None:
    """Raise a ValueError unless a branch has a convolution and a norm of these names."""
    if not isinstance(branch, Mapping) or not isinstance(statistics, Mapping):
        raise ValueError(f"{name} is an array, expected a mapping with {conv}/kernel and {norm}")
    if not has_convolution(branch, conv) or (norm not in branch and norm not in statistics):
        raise ValueError(
            f"{name} has the children {sorted(branch)} in params and {sorted(statistics)} in batch_stats, expected "
            f"{conv}/kernel and {norm}"
        )


def require_one_plane(name: str, kernel: Any, vectors: Tree) -> None:
    """Raise a ValueError unless a kernel is of one 2-D convolution.

    The vectors of its norm tell a stack of kernels from a kernel of another rank.
    """
    stacked = max((vector.ndim - 1 for vector in vectors.values()), default=0)
    if kernel.ndim == 4 and stacked <= 0:
        return
    spatial = kernel.ndim - 2 - max(stacked, 0)
    stack = "blocks stacked by a scan or an ensemble are fused with jax.vmap(fuse) over the stacked axis"
    other = f"{spatial}-D convolutions are merged by repvgg_jax.reparameterize(apply, variables, inputs)"
    if stacked > 0:
        advice = stack if spatial == 2 else f"{other}, with the {stacked} stacked axes of the scan unrolled"
    elif kernel.ndim == 5 and (not vectors or len(set(kernel.shape[:3])) > 1):
        advice = f"{stack}; {other}"
    elif kernel.ndim in (3, 5):
        advice = other
    else:
        advice = stack if kernel.ndim > 5 else "a rule names convolutions alone"
    raise ValueError(f"{name} has shape {tuple(kernel.shape)}, expected rank 4 (kh, kw, in/groups, out); {advice}")


def identity_beside(beside: Convolution, name: str, statistics: Tree) -> Array:
    """Return the kernel of a batch norm alone, in the groups of a convolution beside it."""
    in_channels, out_channels = beside.kernel.shape[2:]
    mean = statistics.get("mean", beside.bias)
    if mean.shape != (out_channels,) or out_channels % in_channels:
        raise ValueError(
            f"{name} normalises {tuple(mean.shape)} channels beside a kernel {tuple(beside.kernel.shape)}: expected as "
            "many channels as the kernel puts out, and in/groups to divide them"
        )
    dtype = jnp.promote_types(mean.dtype, jnp.float32)
    return identity_kernel(out_channels, groups=out_channels // in_channels, dtype=dtype)


def fold(name: str, kernel: Any, conv_bias: Any, affine: Tree, statistics: Tree, epsilon: float) -> Convolution:
    """Fold a norm, its parameters and its statistics into a kernel. Errors begin with its name."""
    missing = [key for key in ("mean", "var") if key not in statistics]
    if missing:
        raise ValueError(
            f"batch_stats of {name} lack {' and '.join(missing)} (found {sorted(statistics)}): expected the running "
            "statistics of its batch norm; pass the whole variables, {'params': …, 'batch_stats': …}"
        )
    try:
        return fold_batch_norm(
            kernel,
            mean=statistics["mean"],
            var=statistics["var"],
            scale=affine.get("scale"),
            bias=affine.get("bias"),
            conv_bias=conv_bias,
            epsilon=epsilon,
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def rounded_as(fused: Convolution, stored: Sequence[Tree]) -> dict[str, Any]:
    """Round a fused convolution to the dtype of stored ones, and place it where the first of them lies."""
    dtype = functools.reduce(jnp.promote_types, (leaf.dtype for leaf in jax.tree.leaves(stored)))
    return {key: rounded(value, dtype, stored[0]["kernel"]) for key, value in fused._asdict().items()}


def only(tree: Tree, keys: set[str]) -> dict[str, Any]:
    """Return the children of these names."""
    return {key: tree[key] for key in tree if key in keys}


def without(tree: Tree, keys: set[str]) -> dict[str, Any]:
    """Return the children of other names."""
    return {key: tree[key] for key in tree if key not in keys}
