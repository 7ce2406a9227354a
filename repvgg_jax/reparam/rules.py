"""Rules: what counts as a re-parameterizable block in a tree of variables, and what it becomes.

A rule is a plain function `(path, params, batch_stats) -> Replacement | None`. It looks at one node of the tree
and returns None where the node is not its business. Rules decide by keys and static shapes, never by values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.reparam.kernels import Convolution, fold_batch_norm, identity_kernel, merge_branches

Path = tuple[str, ...]
Tree = Mapping[str, Any]


class Replacement(NamedTuple):
    """What a rule puts in the place of a node: its new params and the batch statistics that remain."""

    params: Tree
    batch_stats: Tree


Rule = Callable[[Path, Tree, Tree], Replacement | None]


def first_match(*rules: Rule) -> Rule:
    """Compose rules: the first that returns a replacement wins."""

    def rule(path: Path, params: Tree, batch_stats: Tree) -> Replacement | None:
        for candidate in rules:
            replacement = candidate(path, params, batch_stats)
            if replacement is not None:
                return replacement
        return None

    return rule


def branch_rule(
    convolutions: Sequence[str],
    *,
    identity: str | None = None,
    into: str = "reparam",
    conv: str = "conv",
    norm: str = "bn",
    epsilon: float = 1e-5,
    all_required: bool = False,
) -> Rule:
    """Build the rule for blocks of parallel convolution + batch-norm branches from the names they carry.

    A node is a block where it holds at least one of `convolutions`, itself a node with the children `conv`
    (`kernel`, perhaps `bias`) and `norm` (in params, in batch_stats, or both). All branches are folded, padded to the
    largest kernel and summed; other children of the node (squeeze-excite, say) pass through untouched.

    Args:
      convolutions: the names of the convolution branches.
      identity: the name of the branch that is a batch norm alone, if blocks may have one.
      into: the name of the fused convolution, `{kernel, bias}`, in the new node.
      conv: the name of the convolution inside a branch.
      norm: the name of the batch norm inside a branch.
      epsilon: of every batch norm in the block.
      all_required: whether a block must have all of `convolutions`.

    Returns:
      The rule. It raises a ValueError that says what was found and expected where a block is malformed:
      branches that lack a part, kernels that are not rank 4, shapes that do not belong together, missing
      statistics, statistics that are not finite, negative variances.

    Example:
      >>> timm_like = branch_rule(("conv_kxk", "conv_1x1"), identity="identity", into="reparam_conv")
      >>> timm_like(("head",), {"kernel": np.ones((4, 2))}, {}) is None
      True
    """

    def rule(path: Path, params: Tree, batch_stats: Tree) -> Replacement | None:
        if not any(_has_convolution(params.get(name), conv) for name in convolutions):
            return None
        present = [name for name in convolutions if name in params]
        if all_required and len(present) < len(convolutions):
            raise ValueError(f"found the branches {', '.join(present)}, expected {', '.join(convolutions)}")
        for name in present:
            _check_branch(name, params[name], batch_stats.get(name, {}), conv, norm)
        consumed = set(present)
        if identity is not None and (identity in params or identity in batch_stats):
            consumed.add(identity)
        used_params = {key: params[key] for key in params if key in consumed}
        used_stats = {key: batch_stats[key] for key in batch_stats if key in consumed}
        _check_statistics(used_stats)
        lifted_params, lifted_stats = _lift((used_params, used_stats))

        branches = []
        for name in present:
            convolution, affine = lifted_params[name][conv], lifted_params[name].get(norm, {})
            kernel, statistics = convolution["kernel"], lifted_stats.get(name, {}).get(norm, {})
            _require_one_plane(f"{name}/{conv}/kernel", kernel, {**affine, **statistics})
            branches.append(_fold(name, kernel, convolution.get("bias"), affine, statistics, epsilon))
        if identity in consumed:
            in_channels, out_channels = branches[0].kernel.shape[2:]
            statistics = lifted_stats.get(identity, {})
            mean = statistics.get("mean", branches[0].bias)
            if mean.shape != (out_channels,) or out_channels % in_channels:
                raise ValueError(
                    f"{identity} normalises {tuple(mean.shape)} channels beside a kernel "
                    f"{tuple(branches[0].kernel.shape)}: expected as many channels as the kernel puts out, and "
                    "in/groups to divide them"
                )
            dtype = jnp.promote_types(mean.dtype, jnp.float32)
            kernel = identity_kernel(out_channels, groups=out_channels // in_channels, dtype=dtype)
            branches.append(_fold(identity, kernel, None, lifted_params.get(identity, {}), statistics, epsilon))

        fused = merge_branches(branches)
        leaves = jax.tree.leaves({key: used_params[key][conv] for key in present})
        dtype = functools.reduce(jnp.promote_types, (leaf.dtype for leaf in leaves))
        like = used_params[present[0]][conv]["kernel"]
        return Replacement(
            {
                **_without(params, consumed),
                into: {k: _rounded(v, dtype, like) for k, v in fused._asdict().items()},
            },
            _without(batch_stats, consumed),
        )

    return rule


def repvgg_rule(epsilon: float = 1e-5) -> Rule:
    """The rule for the networks of this package: RepVGG blocks fuse, RepVGGplus' auxiliary heads go.

    Auxiliary heads serve training only; the deploy form has none (official repository, `repvggplus.py`).
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
    """See that a kernel is of one 2-D convolution; the vectors of its norm tell a stack from another rank."""
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


def _without(tree: Tree, keys: set[str]) -> dict[str, Any]:
    return {key: tree[key] for key in tree if key not in keys}


def _is_concrete(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array):
        return not isinstance(leaf, jax.core.Tracer) and leaf.is_fully_addressable
    return isinstance(leaf, np.ndarray)


def _lift(tree: Any) -> Any:
    """Concrete arrays become float64 on the host, so that the fold rounds once; tracers stay as they are."""
    if not all(_is_concrete(leaf) for leaf in jax.tree.leaves(tree)):
        return tree
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), tree)


def _rounded(value: Any, dtype: Any, like: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value.astype(dtype)
    value = value.astype(dtype)
    if isinstance(like, np.ndarray):
        return value
    replicated = like.sharding.is_fully_replicated or value.shape == like.shape
    return jax.device_put(value, like.sharding if replicated else None)


def _check_statistics(statistics: Tree) -> None:
    problems = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(statistics)[0]:
        if not _is_concrete(leaf):
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
