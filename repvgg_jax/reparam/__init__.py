"""Structural re-parameterization as algebra on arrays. It imports JAX and NumPy alone, so any JAX code can use it."""

from repvgg_jax.reparam.equivalence import (
    Agreement,
    EquivalenceError,
    agreement,
    assert_equivalent,
    first_divergence,
)
from repvgg_jax.reparam.fusing import equivalent_kernels, fuse, fuse_with
from repvgg_jax.reparam.kernels import (
    Convolution,
    fold_batch_norm,
    identity_kernel,
    merge_branches,
    pad_kernel,
)
from repvgg_jax.reparam.networks import repvgg_rule
from repvgg_jax.reparam.rules import Replacement, Rule, branch_rule, first_match

__all__ = [
    "Agreement",
    "Convolution",
    "EquivalenceError",
    "Replacement",
    "Rule",
    "agreement",
    "assert_equivalent",
    "branch_rule",
    "equivalent_kernels",
    "first_divergence",
    "first_match",
    "fold_batch_norm",
    "fuse",
    "fuse_with",
    "identity_kernel",
    "merge_branches",
    "pad_kernel",
    "repvgg_rule",
]
