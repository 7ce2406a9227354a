"""Blocks that begin near the identity, so that a deep stack of them learns from the first step."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

# Mean over deviation of a rectified standard normal. A norm takes a block's input to mean 0, and the ReLU behind it
# would cut off what lies below; with this bias it lets the input through, divided by its deviation.
_PASSING_BIAS = 1 / math.sqrt(math.pi - 1)


def residual_start(variables: dict[str, Any], *, scale: float) -> dict[str, Any]:
    """Let the identity branch of each block that has one pass its input, and quieten the branches beside it.

    As published, the three norms of a block begin with scale 1 and bias 0. The input is then a third of the variance of
    what is rectified, and what lies below its mean is cut off in every block. After 14 blocks no pixel of a channel is
    correlated with what it was. Here the norms behind the convolutions begin with the scale `scale`, and the identity's
    with the bias that keeps a rectified input whole. In quantizable blocks the norm of the sum has that bias, and the
    kernel of the 1×1 branch, which has no norm, is multiplied by `scale`. Blocks without an identity branch begin as
    published. Nothing else changes: neither the network nor how it is fused.

    Args:
      variables: `{'params', 'batch_stats'}` of a training form, freshly initialised.
      scale: Scale of the norms behind the 3×3 and the 1×1 convolution.

    Returns:
      Variables of the same shapes and dtypes.

    References:
      Residual networks whose branches begin small: Goyal et al., arXiv:1706.02677, section 5.1.
    """
    return {
        **variables,
        "params": {
            name: _near_identity(part, scale) if {"branch_identity", "bn_with_identity"} & set(part) else part
            for name, part in variables["params"].items()
        },
    }


def _near_identity(block: dict[str, Any], scale: float) -> dict[str, Any]:
    quiet = {name: quieten(block[name], scale) for name in ("branch_3x3", "branch_1x1")}
    # Where the input is normalised: alone, or within the sum.
    norm = "branch_identity" if "branch_identity" in block else "bn_with_identity"
    passing = {**block[norm], "bias": jnp.full_like(block[norm]["bias"], _PASSING_BIAS)}
    return {**block, **quiet, norm: passing}


def quieten(branch: dict[str, Any], scale: float) -> dict[str, Any]:
    """Let the norm of a freshly initialised branch begin at a scale, or multiply its kernel where it has no norm."""
    if "bn" not in branch:
        return {**branch, "kernel": branch["kernel"] * jnp.asarray(scale, branch["kernel"].dtype)}
    return {**branch, "bn": {**branch["bn"], "scale": jnp.full_like(branch["bn"]["scale"], scale)}}
