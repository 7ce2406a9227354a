"""The interpreter of a traced function: it computes some of its convolutions in another way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from repvgg_jax.transform.equations import bind, called
from repvgg_jax.transform.expanding.listing import Position

Convolve = Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]]
"""A function of source and kernel. Beside the result, it returns what is to be kept."""
_REMATERIALIZED = ("checkpoint", "remat2")


def interpret(
    closed: ClosedJaxpr, arguments: Sequence[Any], convolutions: Mapping[Position, Convolve], here: Position = ()
) -> tuple[list[Any], dict[Position, Any]]:
    """Compute a function.

    Args:
      closed: The function.
      arguments: What it is given.
      convolutions: Other functions for the convolutions at these positions.
      here: Position of the call that the function stands in.

    Returns:
      What the function returns, and what the other convolutions keep, by position.
    """
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *arguments), strict=True))
    kept: dict[Position, Any] = {}
    for index, equation in enumerate(jaxpr.eqns):
        operands = [each.val if isinstance(each, Literal) else values[each] for each in equation.invars]
        position = (*here, index)
        results: Sequence[Any]
        if position in convolutions:
            result, kept[position] = convolutions[position](*operands)
            results = [result]
        elif any(each[: len(position)] == position for each in convolutions):
            results, more = _call(equation, operands, convolutions, position)
            kept.update(more)
        else:
            results = bind(equation, operands, equation.params)
        values.update(zip(equation.outvars, results, strict=True))
    return [each.val if isinstance(each, Literal) else values[each] for each in jaxpr.outvars], kept


def _call(
    equation: JaxprEqn, operands: list[Any], convolutions: Mapping[Position, Convolve], position: Position
) -> tuple[list[Any], dict[Position, Any]]:
    """Compute a call. One whose intermediate values are computed anew in the backward pass stays one."""
    inner = called(equation)
    assert inner is not None, "what is found stands in calls alone"
    call = partial(interpret, inner, convolutions=convolutions, here=position)
    if equation.primitive.name in _REMATERIALIZED:
        params = equation.params
        call = jax.checkpoint(call, prevent_cse=params["prevent_cse"], policy=params["policy"])  # type: ignore[assignment]
    # A choice by platform has an operand before those of its branches: the platform.
    return call(operands[len(operands) - len(inner.jaxpr.invars) :])
