"""A traced program cut in two: what the weights alone determine, and the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.core import eval_jaxpr
from jax.extend.core import ClosedJaxpr, Literal


def split(traced: ClosedJaxpr) -> tuple[Callable[..., list[Any]], Callable[..., Any]]:
    """Split a program of one result after what all its arguments but the last determine.

    Returns:
      The functions `prepare(*arguments) -> prepared` and `run(prepared, last) -> result`.
    """
    jaxpr = traced.jaxpr
    *weights, images = jaxpr.invars
    ready = {*weights, *jaxpr.constvars}
    early, late = [], []
    for equation in jaxpr.eqns:
        if all(isinstance(var, Literal) or var in ready for var in equation.invars):
            ready.update(equation.outvars)
            early.append(equation)
        else:
            late.append(equation)
    used = [var for equation in late for var in equation.invars if not isinstance(var, Literal) and var in ready]
    boundary = list(dict.fromkeys(used))

    first = jaxpr.replace(invars=weights, outvars=boundary, eqns=early)
    second = jaxpr.replace(constvars=[], invars=[*boundary, images], eqns=late)

    def prepare(*arguments: jax.Array) -> list[Any]:
        return eval_jaxpr(first, traced.consts, *arguments)

    def run(prepared: list[Any], last: jax.Array) -> Any:
        (result,) = eval_jaxpr(second, (), *prepared, last)
        return result

    return prepare, run
