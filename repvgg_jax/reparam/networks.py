"""The rule for the networks of this package: RepVGG blocks, blocks made for 8 bits, and auxiliary heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

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
from repvgg_jax.reparam.rules import FirstMatch, Path, Replacement, branch_rule, first_match

AUXILIARY_HEADS = ("stage1_aux", "stage2_aux", "stage3_first_aux")
SUM_NORMS = ("bn", "bn_with_identity")
"""Names of the norm behind the branches of a quantizable block: without and with its input in the sum.

A plain identity leaves nothing else in the tree that would tell of it.
"""


def repvgg_rule(epsilon: float = 1e-5) -> FirstMatch:
    """Build the rule for the networks of this package.

    It fuses RepVGG blocks and the quantizable blocks of QARepVGG, and drops the auxiliary heads of RepVGGplus, which
    serve training only.

    Args:
      epsilon: The epsilon of the batch norms.

    Returns:
      The rule.

    References:
      The official repository, https://github.com/DingXiaoH/RepVGG, `repvggplus.py`. QARepVGG, arXiv:2212.01593.
    """
    block = branch_rule(
        ("branch_3x3", "branch_1x1"),
        identity="branch_identity",
        into="reparam",
        epsilon=epsilon,
        all_required=True,
    )
    return first_match(QuantizableRule(epsilon), block, _drop_auxiliary_head)


@dataclasses.dataclass(frozen=True)
class QuantizableRule:
    """The rule for the block of QARepVGG: norm(norm(3×3) + 1×1), or norm(norm(3×3) + 1×1 + input)."""

    epsilon: float

    def __call__(self, path: Path, params: Tree, batch_stats: Tree) -> Replacement | None:
        """Return the fused block, or None where the node is no such block.

        Raises:
          ValueError: If the block is malformed.
        """
        pointwise = params.get("branch_1x1")
        if not (has_convolution(params.get("branch_3x3"), "conv") and isinstance(pointwise, Mapping)):
            return None
        if "kernel" not in pointwise:
            return None
        norms = [name for name in SUM_NORMS if name in params or name in batch_stats]
        if len(norms) != 1:
            raise ValueError(f"found the norms {norms} behind the branches, expected one of {', '.join(SUM_NORMS)}")
        check_branch("branch_3x3", params["branch_3x3"], batch_stats.get("branch_3x3", {}), "conv", "bn")
        consumed = {"branch_3x3", "branch_1x1", norms[0]}
        block, statistics = only(params, consumed), only(batch_stats, consumed)
        check_statistics(statistics)
        stored = [params["branch_3x3"]["conv"], pointwise]
        fused = rounded_as(self._fold(norms[0], *lift((block, statistics))), stored)
        return Replacement({**without(params, consumed), "reparam": fused}, without(batch_stats, consumed))

    def _fold(self, norm: str, block: Tree, statistics: Tree) -> Convolution:
        dense, dense_statistics = block["branch_3x3"], statistics.get("branch_3x3", {}).get("bn", {})
        affine = dense.get("bn", {})
        require_one_plane("branch_3x3/conv/kernel", dense["conv"]["kernel"], {**affine, **dense_statistics})
        require_one_plane("branch_1x1/kernel", block["branch_1x1"]["kernel"], {})
        branch = fold("branch_3x3", dense["conv"]["kernel"], None, affine, dense_statistics, self.epsilon)
        none = np.zeros(branch.bias.shape, branch.bias.dtype)
        branches = [branch, Convolution(block["branch_1x1"]["kernel"], none)]
        after = statistics.get(norm, {})
        if norm == "bn_with_identity":
            branches.append(Convolution(identity_beside(branch, norm, after), none))
        kernel, bias = merge_branches(branches)
        return fold(norm, kernel, bias, block.get(norm, {}), after, self.epsilon)


def _drop_auxiliary_head(path: Path, params: Tree, batch_stats: Tree) -> Replacement | None:
    if path and path[-1] in AUXILIARY_HEADS and set(params) == {"conv_bn", "head"}:
        return Replacement({}, {})
    return None
