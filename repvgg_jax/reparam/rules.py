"""Rules: what counts as a re-parameterizable block in a tree of variables, and what it becomes.

A rule is called as `(path, params, batch_stats) -> Replacement | None`. It looks at one node of the tree, and returns
None where the node is no block of its kind. Rules decide by keys and static shapes, never by values. The rules made
here are values themselves: two with the same fields are equal and have the same hash.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from repvgg_jax.reparam.concrete import check_statistics, lift, rounded
from repvgg_jax.reparam.kernels import Array, Convolution, fold_batch_norm, identity_kernel, merge_branches

Path = tuple[str, ...]
Tree = Mapping[str, Any]


class Replacement(NamedTuple):
    """What a rule puts in the place of a node.

    Attributes:
      params: The new parameters of the node. Where they are empty, the node is left out.
      batch_stats: The batch statistics of the node that remain.
    """

    params: Tree
    batch_stats: Tree


Rule = Callable[[Path, Tree, Tree], Replacement | None]
"""A function `(path, params, batch_stats) -> Replacement | None` of one node of a tree of variables."""


@dataclasses.dataclass(frozen=True)
class FirstMatch:
    """A rule that asks other rules in turn. `first_match` makes it."""

    rules: tuple[Rule, ...]

    def __call__(self, path: Path, params: Tree, batch_stats: Tree) -> Replacement | None:
        """Return the replacement of the first rule that matches the node, or None where none does."""
        for rule in self.rules:
            replacement = rule(path, params, batch_stats)
            if replacement is not None:
                return replacement
        return None


def first_match(*rules: Rule) -> FirstMatch:
    """Compose rules into one that returns the first replacement that any of them returns.

    Args:
      *rules: The rules, in the order in which they are asked.

    Returns:
      The rule.
    """
    return FirstMatch(rules)


@dataclasses.dataclass(frozen=True)
class BranchRule:
    """A rule for blocks of parallel branches, each a convolution with a batch norm. `branch_rule` makes it."""

    convolutions: tuple[str, ...]
    identity: str | None
    into: str
    conv: str
    norm: str
    epsilon: float
    all_required: bool

    def __call__(self, path: Path, params: Tree, batch_stats: Tree) -> Replacement | None:
        """Return the fused block, or None where the node is no such block.

        Raises:
          ValueError: If the block is malformed.
        """
        if not any(_has_convolution(params.get(name), self.conv) for name in self.convolutions):
            return None
        present = [name for name in self.convolutions if name in params]
        self._check(present, params, batch_stats)
        consumed = {*present, *self._identities(params, batch_stats)}
        block, statistics = _only(params, consumed), _only(batch_stats, consumed)
        check_statistics(statistics)
        branches = self._branches(present, *lift((block, statistics)))
        fused = self._rounded(merge_branches(branches), [params[name][self.conv] for name in present])
        return Replacement({**_without(params, consumed), self.into: fused}, _without(batch_stats, consumed))

    def _check(self, present: Sequence[str], params: Tree, batch_stats: Tree) -> None:
        """Raise a ValueError unless all required branches are there, each with a convolution and a norm."""
        if self.all_required and len(present) < len(self.convolutions):
            raise ValueError(f"found the branches {', '.join(present)}, expected {', '.join(self.convolutions)}")
        for name in present:
            _check_branch(name, params[name], batch_stats.get(name, {}), self.conv, self.norm)

    def _branches(self, present: Sequence[str], params: Tree, batch_stats: Tree) -> list[Convolution]:
        """Return every branch as the one convolution that it is."""
        branches = [self._convolution(name, params[name], batch_stats.get(name, {})) for name in present]
        for name in self._identities(params, batch_stats):
            affine, statistics = params.get(name, {}), batch_stats.get(name, {})
            kernel = _identity_beside(branches[0], name, statistics)
            branches.append(_fold(name, kernel, None, affine, statistics, self.epsilon))
        return branches

    def _identities(self, params: Tree, batch_stats: Tree) -> list[str]:
        """Return the name of the identity branch in a list, which is empty where the block has none."""
        return [name for name in (self.identity,) if name is not None and (name in params or name in batch_stats)]

    def _convolution(self, name: str, branch: Tree, branch_stats: Tree) -> Convolution:
        convolution, affine = branch[self.conv], branch.get(self.norm, {})
        kernel, statistics = convolution["kernel"], branch_stats.get(self.norm, {})
        _require_one_plane(f"{name}/{self.conv}/kernel", kernel, {**affine, **statistics})
        return _fold(name, kernel, convolution.get("bias"), affine, statistics, self.epsilon)

    def _rounded(self, fused: Convolution, stored: Sequence[Tree]) -> dict[str, Any]:
        """Round the fused convolution to the dtype of the stored ones, and place it where the first of them lies."""
        dtype = functools.reduce(jnp.promote_types, (leaf.dtype for leaf in jax.tree.leaves(stored)))
        return {key: rounded(value, dtype, stored[0]["kernel"]) for key, value in fused._asdict().items()}


def branch_rule(
    convolutions: Sequence[str],
    *,
    identity: str | None = None,
    into: str = "reparam",
    conv: str = "conv",
    norm: str = "bn",
    epsilon: float = 1e-5,
    all_required: bool = False,
) -> BranchRule:
    """Build a rule for blocks of parallel branches, each a convolution with a batch norm, from the names they carry.

    A node is a block where one of its children is named in `convolutions` and has a child `conv` with a `kernel` and
    perhaps a `bias`. Each such branch must also have a batch norm `norm`: its `mean` and `var` in batch_stats, and in
    params its `scale` and `bias`, where it has them. All branches are folded, padded to the largest kernel and summed.
    Other children of the node, such as squeeze-excite, pass through unchanged.

    Args:
      convolutions: Names of the convolution branches. At least one must be there.
      identity: Name of the branch that consists of a batch norm alone, or None. A block may lack it.
      into: Name of the fused convolution, `{kernel, bias}`, in the new node.
      conv: Name of the convolution inside a branch.
      norm: Name of the batch norm inside a branch.
      epsilon: The epsilon of every batch norm in the block.
      all_required: Whether a block must have all of `convolutions`.

    Returns:
      The rule. Where a block is malformed, the rule raises a ValueError that says what was found and what was expected.
      A block is malformed if a branch lacks a part, a kernel is not of rank 4, shapes do not belong together,
      statistics are missing or not finite, or a variance is negative.

    Example:
      >>> import numpy as np
      >>> from repvgg_jax.reparam import branch_rule
      >>> timm_like = branch_rule(("conv_kxk", "conv_1x1"), identity="identity", into="reparam_conv")
      >>> timm_like(("head",), {"kernel": np.ones((4, 2))}, {}) is None
      True
    """
    return BranchRule(tuple(convolutions), identity, into, conv, norm, epsilon, all_required)


def repvgg_rule(epsilon: float = 1e-5) -> FirstMatch:
    """Build the rule for the networks of this package.

    It fuses RepVGG blocks and drops the auxiliary heads of RepVGGplus, which serve training only.

    Args:
      epsilon: The epsilon of the batch norms.

    Returns:
      The rule.

    References:
      The official repository, https://github.com/DingXiaoH/RepVGG, `repvggplus.py`.
    """
    block = branch_rule(
        ("branch_3x3", "branch_1x1"),
        identity="branch_identity",
        into="reparam",
        epsilon=epsilon,
        all_required=True,
    )
    return first_match(block, _drop_auxiliary_head)


AUXILIARY_HEADS = ("stage1_aux", "stage2_aux", "stage3_first_aux")


def _drop_auxiliary_head(path: Path, params: Tree, batch_stats: Tree) -> Replacement | None:
    if path and path[-1] in AUXILIARY_HEADS and set(params) == {"conv_bn", "head"}:
        return Replacement({}, {})
    return None


def _has_convolution(branch: Any, conv: str) -> bool:
    return isinstance(branch, Mapping) and isinstance(branch.get(conv), Mapping) and "kernel" in branch[conv]


def _check_branch(name: str, branch: Any, statistics: Any, conv: str, norm: str) -> None:
    if not isinstance(branch, Mapping) or not isinstance(statistics, Mapping):
        raise ValueError(f"{name} is an array, expected a mapping with {conv}/kernel and {norm}")
    if not _has_convolution(branch, conv) or (norm not in branch and norm not in statistics):
        raise ValueError(
            f"{name} has the children {sorted(branch)} in params and {sorted(statistics)} in batch_stats, expected "
            f"{conv}/kernel and {norm}"
        )


def _require_one_plane(name: str, kernel: Any, vectors: Tree) -> None:
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


def _identity_beside(beside: Convolution, name: str, statistics: Tree) -> Array:
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


def _fold(name: str, kernel: Any, conv_bias: Any, affine: Tree, statistics: Tree, epsilon: float) -> Convolution:
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


def _only(tree: Tree, keys: set[str]) -> dict[str, Any]:
    return {key: tree[key] for key in tree if key in keys}


def _without(tree: Tree, keys: set[str]) -> dict[str, Any]:
    return {key: tree[key] for key in tree if key not in keys}
