"""Shapes of a network's variables, and where two tables of shapes differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from repvgg_jax.models.repvgg import RepVGG

Shapes = Mapping[str, tuple[int, ...]]


def abstract_variables(model: RepVGG, channels: int) -> Any:
    """Return the shapes and dtypes of a model's variables without computing them. The tree is shared: do not change it.

    Args:
      model: The network, in either form.
      channels: Channels of its images.
    """
    return _abstract_variables(model, channels, jax.config.jax_enable_x64)  # type: ignore[attr-defined]


@lru_cache
def _abstract_variables(model: RepVGG, channels: int, x64: bool) -> Any:
    del x64  # without it, arrays of float64 are of float32
    images = jax.ShapeDtypeStruct((1, 32, 32, channels), model.param_dtype)
    init: Callable[..., Any] = lambda key, x: model.init(key, x, train=False)  # noqa: E731
    return jax.eval_shape(init, jax.random.key(0), images)


def input_channels(variables: Mapping[str, Any]) -> int:
    """Read the channels of the images that a network takes off the kernel of its stem, in either form."""
    stem = variables["params"]["stem"]
    convolution = stem["reparam"] if "reparam" in stem else stem["branch_3x3"]["conv"]
    return int(np.shape(convolution["kernel"])[2])


def shapes_by_name(tree: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a tree's arrays by name, such as `params/head/kernel`, whatever kinds of nodes it has."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(np.shape(leaf)) for path, leaf in leaves}


def differences(found: Shapes, expected: Shapes) -> list[str]:
    """Return a clause for each name whose shapes differ, in order: `head/kernel is (8, 2), expected (8, 10)`."""
    return [
        f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'nothing')}"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    ]


def few(clauses: Sequence[str], separator: str = "; ") -> str:
    """Join the first three clauses, and say how many more there are."""
    more = [f"and {len(clauses) - 3} more"] if len(clauses) > 3 else []
    return separator.join([*clauses[:3], *more])
