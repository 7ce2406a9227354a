"""Flax NNX: from modules that hold RepVGG blocks to variables that `fuse` takes, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from repvgg_jax.models.shapes import differences

_COLLECTIONS: dict[str, type[nnx.Variable[Any]]] = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


def to_variables(module: nnx.Module | nnx.State) -> dict[str, Any]:
    """Take parameters and batch statistics out of an NNX module.

    The module may be a network of this package in `nnx.bridge.ToNNX`. It may also be NNX code of its own whose blocks
    carry the names that a rule expects: attributes `branch_3x3.conv`, `branch_3x3.bn`, … for `fuse`, and any names for
    `fuse_with`.

    Args:
      module: The module, or its `nnx.state`. Variables other than `nnx.Param` and `nnx.BatchStat` are left out.

    Returns:
      A dict of 'params' and 'batch_stats', nested by attribute. Numbers of list entries become strings. 'batch_stats'
      is left out where the module has none.

    Raises:
      ValueError: If the module holds no parameter.
    """
    variables: dict[str, Any] = {}
    for path, variable in _flat(module).items():
        collection = _collection(variable)
        if collection is None:
            continue
        node = variables.setdefault(collection, {})
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = variable.get_value()
    if "params" not in variables:
        raise ValueError(
            f"{type(module).__name__} holds no nnx.Param: expected a module with parameters; one in nnx.bridge.ToNNX "
            "has them after lazy_init(images, train=False)"
        )
    return variables


def update_module(module: nnx.Module, variables: Mapping[str, Any]) -> None:
    """Put variables into an NNX module in place. It is the inverse of `to_variables`.

    `update_module(deploy_module, fuse(to_variables(module)))` fills a deploy form.

    Args:
      module: A module with a parameter or batch statistic for every leaf of the variables, and no others.
      variables: `{'params': …, 'batch_stats': …}`, nested by attribute.

    Raises:
      ValueError: If leaves are missing, unexpected or of another shape. One message names them all, and the module is
        left unchanged.
    """
    held = {
        (collection, *path): variable
        for path, variable in _flat(module).items()
        if (collection := _collection(variable)) is not None
    }
    leaves = {
        tuple(str(entry.key) for entry in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }
    problems = differences(
        {"/".join(path): jnp.shape(leaf) for path, leaf in leaves.items()},
        {"/".join(path): jnp.shape(variable.get_value()) for path, variable in held.items()},
    )
    if problems:
        raise ValueError(f"the variables are not those of this {type(module).__name__}:\n  " + "\n  ".join(problems))
    for path, variable in held.items():
        variable.set_value(leaves[path])


def _flat(module: nnx.Module | nnx.State) -> dict[tuple[str, ...], nnx.Variable[Any]]:
    # The graph's own variables, not copies: setting one sets the module's.
    pairs = nnx.to_flat_state(module) if isinstance(module, nnx.State) else nnx.iter_graph(module)
    return {
        tuple(str(name) for name in path): variable for path, variable in pairs if isinstance(variable, nnx.Variable)
    }


def _collection(variable: nnx.Variable[Any]) -> str | None:
    return next((name for name, kind in _COLLECTIONS.items() if isinstance(variable, kind)), None)
