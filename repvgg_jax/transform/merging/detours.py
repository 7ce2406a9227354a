"""Axes of size one that come and go: `vmap` over a function of one example leaves a pair around every convolution."""

from __future__ import annotations

from typing import Any

from jax.extend import core

_RESHAPES = ("reshape", "squeeze", "expand_dims", "broadcast_in_dim")


def without_detours(jaxpr: Any) -> Any:
    """Leave out reshapes that add or take axes of size one alone and end in the shape that they began with."""
    begins: dict[Any, Any] = {}  # of a value that such reshapes made: what they began with
    same: dict[Any, Any] = {}  # of a value: the earlier one that it is
    equations = []
    for equation in jaxpr.eqns:
        operands = [same.get(v, v) if isinstance(v, core.Var) else v for v in equation.invars]
        equation = equation.replace(invars=operands)
        if _only_ones(equation):
            (source, *_), (result,) = operands, equation.outvars
            begins[result] = begin = begins.get(source, source)
            if begin.aval.shape == result.aval.shape:
                same[result] = begin
                continue
        equations.append(equation)
    results = [same.get(v, v) if isinstance(v, core.Var) else v for v in jaxpr.outvars]
    return jaxpr.replace(eqns=_used(equations, results), outvars=results)


def _only_ones(equation: Any) -> bool:
    """Whether an equation adds or takes away axes of size one, and does nothing else."""
    name, p = equation.primitive.name, equation.params
    if name not in _RESHAPES or len(equation.invars) != 1 or not isinstance(equation.invars[0], core.Var):
        return False
    before, after = (variable.aval.shape for variable in (*equation.invars, *equation.outvars))
    if name == "broadcast_in_dim" and any(
        after[axis] != size for axis, size in zip(p["broadcast_dimensions"], before, strict=True)
    ):
        return False
    if name == "reshape" and p.get("dimensions") is not None:
        return False
    return [size for size in before if size != 1] == [size for size in after if size != 1]


def _used(equations: list[Any], results: list[Any]) -> list[Any]:
    """Leave out reshapes whose results nothing takes any more."""
    needed = {v for v in results if isinstance(v, core.Var)}
    kept = []
    for equation in reversed(equations):
        if equation.primitive.name in _RESHAPES and not needed.intersection(equation.outvars):
            continue
        needed.update(v for v in equation.invars if isinstance(v, core.Var))
        kept.append(equation)
    return kept[::-1]
