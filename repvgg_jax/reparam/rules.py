"""Rules: what counts as a re-parameterizable block in a tree of variables, and what it becomes.

A rule is called as `(path, params, batch_stats) -> Replacement | None`. It looks at one node of the tree, and returns
None where the node is no block of its kind. Rules decide by keys and static shapes, never by values. The rules made
here are values themselves: two with the same fields are equal and have the same hash.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from repvgg_jax.reparam.branches import (
    Tree,
    check_branch,
    fold,
    has_convolution,
    identity_beside,
    only,
    require_one_plane,
    rounded_as,
    without,
)
from repvgg_jax.reparam.concrete import check_statistics, lift
from repvgg_jax.reparam.kernels import Convolution, merge_branches

Path = tuple[str, ...]


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
        if not any(has_convolution(params.get(name), self.conv) for name in self.convolutions):
            return None
        present = [name for name in self.convolutions if name in params]
        self._check(present, params, batch_stats)
        consumed = {*present, *self._identities(params, batch_stats)}
        block, statistics = only(params, consumed), only(batch_stats, consumed)
        check_statistics(statistics)
        branches = self._branches(present, *lift((block, statistics)))
        fused = rounded_as(merge_branches(branches), [params[name][self.conv] for name in present])
        return Replacement({**without(params, consumed), self.into: fused}, without(batch_stats, consumed))

    def _check(self, present: Sequence[str], params: Tree, batch_stats: Tree) -> None:
        """Raise a ValueError unless all required branches are there, each with a convolution and a norm."""
        if self.all_required and len(present) < len(self.convolutions):
            raise ValueError(f"found the branches {', '.join(present)}, expected {', '.join(self.convolutions)}")
        for name in present:
            check_branch(name, params[name], batch_stats.get(name, {}), self.conv, self.norm)

    def _branches(self, present: Sequence[str], params: Tree, batch_stats: Tree) -> list[Convolution]:
        """Return every branch as the one convolution that it is."""
        branches = [self._convolution(name, params[name], batch_stats.get(name, {})) for name in present]
        for name in self._identities(params, batch_stats):
            affine, statistics = params.get(name, {}), batch_stats.get(name, {})
            kernel = identity_beside(branches[0], name, statistics)
            branches.append(fold(name, kernel, None, affine, statistics, self.epsilon))
        return branches

    def _identities(self, params: Tree, batch_stats: Tree) -> list[str]:
        """Return the name of the identity branch in a list, which is empty where the block has none."""
        return [name for name in (self.identity,) if name is not None and (name in params or name in batch_stats)]

    def _convolution(self, name: str, branch: Tree, branch_stats: Tree) -> Convolution:
        convolution, affine = branch[self.conv], branch.get(self.norm, {})
        kernel, statistics = convolution["kernel"], branch_stats.get(self.norm, {})
        require_one_plane(f"{name}/{self.conv}/kernel", kernel, {**affine, **statistics})
        return fold(name, kernel, convolution.get("bias"), affine, statistics, self.epsilon)


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
