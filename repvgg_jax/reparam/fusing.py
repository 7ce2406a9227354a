"""Fusing of trees of variables: params and batch_stats of the training form become params of the deploy form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from repvgg_jax.reparam.branches import Tree
from repvgg_jax.reparam.kernels import Convolution
from repvgg_jax.reparam.networks import repvgg_rule
from repvgg_jax.reparam.rules import Path, Replacement, Rule

Variables = TypeVar("Variables", bound=Mapping[str, Any])


def fuse(variables: Variables, *, epsilon: float = 1e-5) -> Variables:
    """Fuse every RepVGG block of a training form into one 3×3 convolution.

    The function is pure: `jit`, `vmap`, `grad` and `eval_shape` work on it. Concrete arrays are folded in float64 on
    the host and rounded once. Under a transformation the fold runs in at least float32.

    Args:
      variables: `{'params': …, 'batch_stats': …, …}` of a training form, or of any model that contains one, as a dict
        or a FrozenDict. The leaves are arrays, and kernels are HWIO.
      epsilon: The epsilon of the batch norms. The variables do not hold it; `fuse_model` reads it from the model.

    Returns:
      The variables of the deploy form, in a container of the same type. The branches of each block become a child
      `reparam` with `kernel` and `bias`, in the dtype of its convolutions; its other children are unchanged. Auxiliary
      heads of RepVGGplus are left out. Other collections are kept, and so are batch statistics that belong to no block;
      a `batch_stats` that ends up empty is left out.

    Raises:
      ValueError: If there is no block, the tree is fused already, a block is malformed, or `variables` is no such tree.
        The message names each path with what was found, what was expected and the remedy.

    References:
      RepVGG, section 3.3, https://arxiv.org/abs/2101.03697

    Example:
      >>> import jax, repvgg_jax
      >>> model = repvgg_jax.create_model("repvgg_a0", num_classes=10, depths=(1, 1, 1, 1))
      >>> variables = jax.eval_shape(
      ...     lambda: model.init(jax.random.key(0), jax.numpy.ones((1, 32, 32, 3)), train=False))
      >>> sorted(jax.eval_shape(repvgg_jax.fuse, variables))
      ['params']
    """
    return fuse_with(repvgg_rule(epsilon), variables)


def equivalent_kernels(variables: Mapping[str, Any], *, epsilon: float = 1e-5) -> dict[str, Convolution]:
    """Return the 3×3 convolution that each RepVGG block is equivalent to.

    Use it for a loss or a statistic over the kernels that inference will see. It is pure, as `fuse` is, so `grad` works
    on it.

    Args:
      variables: The variables of a training form, as for `fuse`.
      epsilon: The epsilon of the batch norms.

    Returns:
      The convolutions `(kernel, bias)` by the path of the block, e.g. 'stage1_block1', in the order of the tree.

    Raises:
      ValueError: If `fuse` would raise one.

    References:
      The custom L2 of the official implementation penalises similar kernels: `get_custom_L2`,
      https://github.com/DingXiaoH/RepVGG
    """
    rule, found = repvgg_rule(epsilon), {}

    def collect(path: Path, params: Tree, batch_stats: Tree) -> Replacement | None:
        replacement = rule(path, params, batch_stats)
        if replacement is not None and "reparam" in replacement.params:
            found["/".join(path)] = Convolution(**replacement.params["reparam"])
        return replacement

    fuse_with(collect, variables)
    return found


def fuse_with(rule: Rule, variables: Variables) -> Variables:
    """Replace every node of a tree of variables that a rule matches.

    Args:
      rule: A rule from `branch_rule` or `first_match`, or your own function
        `(path, params, batch_stats) -> Replacement | None`. It is asked at every node from the root downwards. What it
        replaces is not searched further.
      variables: `{'params': …, 'batch_stats': …, …}` as a dict or a FrozenDict. The leaves are arrays.

    Returns:
      The new variables, in a container of the same type. What the rule does not match is kept. A node whose replacement
      is empty is left out, and so is a `batch_stats` that ends up empty.

    Raises:
      ValueError: If the rule matches no node or raises a ValueError, or if `variables` is no such tree. One message
        names all nodes for which the rule raised an error.

    Example:
      >>> import numpy as np
      >>> from repvgg_jax.reparam import branch_rule, fuse_with
      >>> ones = np.ones(2)
      >>> branch = {"conv": {"kernel": np.ones((3, 3, 2, 2))}, "bn": {"scale": ones, "bias": ones}}
      >>> variables = {"params": {"block": {"branch": branch}},
      ...              "batch_stats": {"block": {"branch": {"bn": {"mean": ones, "var": ones}}}}}
      >>> fuse_with(branch_rule(["branch"], into="conv"), variables)["params"]["block"]["conv"]["bias"].shape
      (2,)
    """
    _check_variables(variables)
    matched: list[Path] = []
    problems: list[str] = []

    def walk(path: Path, params: Tree, batch_stats: Tree) -> tuple[Tree, Tree]:
        try:
            replacement = rule(path, params, batch_stats)
        except ValueError as error:
            problems.append(f"{'/'.join(path) or 'the root'}: {error}")
            return params, batch_stats
        if replacement is not None:
            matched.append(path)
            return replacement
        new_params, new_stats = {}, dict(batch_stats)
        for key, child in params.items():
            if not isinstance(child, Mapping):
                new_params[key] = child
                continue
            old_stats = batch_stats.get(key, {})
            if not isinstance(old_stats, Mapping):
                problems.append(f"{'/'.join((*path, key))}: batch_stats hold an array here, params a mapping")
                continue
            child_params, child_stats = walk((*path, key), child, old_stats)
            if child_params or not child:
                new_params[key] = _as(child, child_params)
            if child_stats:
                new_stats[key] = _as(old_stats, child_stats)
            elif old_stats:
                new_stats.pop(key)
        return new_params, new_stats

    old_stats = variables.get("batch_stats", {})
    params, batch_stats = walk((), variables["params"], old_stats)
    if problems:
        raise ValueError("cannot fuse these blocks:\n  " + "\n  ".join(problems))
    if not matched:
        raise ValueError(_nothing_found(variables["params"]))

    fused = {key: variables[key] for key in variables if key != "batch_stats"}
    fused["params"] = _as(variables["params"], params)
    if batch_stats:
        fused["batch_stats"] = _as(old_stats, batch_stats)
    return _as(variables, fused)


def _as(original: Any, content: Any) -> Any:
    """Give the content the container type of the original: dict, FrozenDict or another mapping."""
    container: Any = type(original)
    return container(content) if isinstance(original, Mapping) else content


def _check_variables(variables: Any) -> None:
    if not isinstance(variables, Mapping) or "params" not in variables:
        found = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(
            f"expected variables, a mapping with the key 'params' (and 'batch_stats'), found {found}; pass "
            "{'params': state.params, 'batch_stats': state.batch_stats}"
        )
    problems: list[str] = []
    for name in ("params", "batch_stats"):
        _find_problems(name, variables.get(name, {}), problems)
    if problems:
        raise ValueError(
            "expected nested mappings with string keys and arrays as leaves, found: " + "; ".join(problems) + "; take "
            "boxes off with flax.linen.meta.unbox(variables), trace shapes with jax.eval_shape(fuse, variables)"
        )


def _find_problems(path: str, node: Any, problems: list[str]) -> None:
    if isinstance(node, Mapping):
        for key, child in node.items():
            if isinstance(key, str):
                _find_problems(f"{path}/{key}", child, problems)
            else:
                problems.append(f"{path} has the key {key!r}")
    elif not isinstance(node, jax.Array | np.ndarray):
        problems.append(f"{path} is a {type(node).__name__}")
    elif path == "batch_stats":
        problems.append("batch_stats is an array")


def _nothing_found(params: Tree) -> str:
    paths = ["/".join(str(key.key) for key in path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    if any("reparam/" in path for path in paths):
        where = sorted({path.split("reparam/")[0].rstrip("/") for path in paths if "reparam/" in path})
        return (
            f"no block to fuse: the tree is fused already, 'reparam' stands in {', '.join(where[:4])}"
            f"{', …' if len(where) > 4 else ''}; use it with the deploy form, create_model(…, deploy=True)"
        )
    shown = ", ".join(paths[:4]) + (", …" if len(paths) > 4 else "")
    return (
        f"no block to fuse among {len(paths)} parameters ({shown}): expected nodes with the branches the rule names "
        "(branch_3x3/{conv,bn}, branch_1x1/{conv,bn}, branch_identity for RepVGG); for other names build a rule with "
        "branch_rule(…) and use fuse_with(rule, variables)"
    )
