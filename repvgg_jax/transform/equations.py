"""Equations of a jaxpr: what they take and give, what they call, and how much they compute."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

# What these primitives call is part of the function, whatever they say of its compilation.
_CALLS = ["pjit", "jit", "closed_call", "core_call", "checkpoint", "remat2"]
_CUSTOM_GRADIENTS = ["custom_jvp_call", "custom_vjp_call"]


def aval(variable: Var | Literal) -> jax.core.ShapedArray:
    """Return shape and dtype of a variable; of a token, which has neither, what it has."""
    return cast(jax.core.ShapedArray, variable.aval)


def result_aval(equation: JaxprEqn) -> jax.core.ShapedArray:
    """Return shape and dtype of the only, or the first, result."""
    return aval(equation.outvars[0])


def bind(equation: JaxprEqn, values: Sequence[jax.Array], parameters: dict[str, Any]) -> Sequence[jax.Array]:
    """Compute one equation, on arrays or on tracers."""
    primitive = equation.primitive
    with equation.ctx.manager:
        results = primitive.bind(*values, **primitive.get_bind_params(parameters))
    return results if primitive.multiple_results else [results]


def body(equation: JaxprEqn) -> ClosedJaxpr | None:
    """Return the closed jaxpr that an equation computes by no more than calling it; None for other equations."""
    name, params = equation.primitive.name, equation.params
    if name in _CALLS or name in _CUSTOM_GRADIENTS:
        inner = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
        return inner if hasattr(inner, "consts") else ClosedJaxpr(inner, ())
    return _default_branch(equation)


def called(equation: JaxprEqn) -> ClosedJaxpr | None:
    """Return the closed jaxpr that can stand in the place of an equation; None for other equations."""
    inner = body(equation)
    # A gradient of its own would be lost; that of a convolution is the convolution's.
    lost = inner is not None and equation.primitive.name in _CUSTOM_GRADIENTS and not _convolves(inner.jaxpr)
    return None if lost else inner


def _default_branch(equation: JaxprEqn) -> ClosedJaxpr | None:
    """Return the plain one of the branches of a choice by platform; None for other equations."""
    platforms = equation.params.get("branches_platforms") if equation.primitive.name == "cond" else None
    return equation.params["branches"][platforms.index(None)] if platforms and None in platforms else None


def _convolves(jaxpr: Jaxpr) -> bool:
    """Whether a convolution stands in a jaxpr, or in what it calls."""
    return any(convolutions(equation) for equation in jaxpr.eqns)


def within(equation: JaxprEqn) -> Iterator[tuple[int, JaxprEqn]]:
    """Yield the equation and those of the functions it calls, each with the number of times that it runs."""
    yield 1, equation
    times = equation.params["length"] if equation.primitive.name == "scan" else 1
    given = _default_branch(equation) or list(equation.params.values())
    for inner in jax.tree.leaves(given, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
        for each in getattr(inner, "eqns", ()):
            for often, innermost in within(each):
                yield times * often, innermost


def convolutions(equation: JaxprEqn) -> int:
    """Return how many convolutions an equation runs, calls included."""
    return sum(times for times, each in within(equation) if each.primitive.name == "conv_general_dilated")


def multiply_adds(equation: JaxprEqn) -> int:
    """Return the multiply-adds of the convolutions and products that an equation runs, calls included."""
    return sum(times * _own_multiply_adds(each) for times, each in within(equation))


def _own_multiply_adds(equation: JaxprEqn) -> int:
    name = equation.primitive.name
    if name == "conv_general_dilated":
        kernel, channel = aval(equation.invars[1]).shape, equation.params["dimension_numbers"].rhs_spec[0]
        return math.prod(kernel) // kernel[channel] * math.prod(result_aval(equation).shape)
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = aval(equation.invars[0]).shape
        return math.prod(result_aval(equation).shape) * math.prod(shape[axis] for axis in contracted)
    return 0


def kept_axes(reduction: JaxprEqn) -> set[int]:
    """Return the axes that a sum keeps."""
    return set(range(len(aval(reduction.invars[0]).shape))) - set(reduction.params["axes"])


def sums_images(equation: JaxprEqn) -> bool:
    """Whether an equation sums images over all axes but one, the batch among them."""
    if equation.primitive.name != "reduce_sum" or len(aval(equation.invars[0]).shape) < 4:
        return False
    kept = kept_axes(equation)
    return len(kept) == 1 and 0 not in kept
