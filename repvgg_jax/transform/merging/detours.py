"""Axes of size one that come and go: `vmap` over a function of one example leaves a pair around every convolution."""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from repvgg_jax.transform.equations import aval, result_aval

_RESHAPES = ("reshape", "squeeze", "expand_dims", "broadcast_in_dim")


def without_detours(jaxpr: Jaxpr) -> Jaxpr:
    """Leave out reshapes that add or take axes of size one alone and end in the shape that they began with."""
    begins: dict[Var, Var] = {}  # of a value that such reshapes made: what they began with
    same: dict[Var, Var] = {}  # of a value: the earlier one that it is
    equations = []
    for equation in jaxpr.eqns:
        operands = [same.get(v, v) if isinstance(v, Var) else v for v in equation.invars]
        equation = equation.replace(invars=operands)
        source = _source(equation)
        if source is not None:
            (result,) = equation.outvars
            begins[result] = begin = begins.get(source, source)
            if aval(begin).shape == aval(result).shape:
                same[result] = begin
                continue
        equations.append(equation)
    results = [same.get(v, v) if isinstance(v, Var) else v for v in jaxpr.outvars]
    return jaxpr.replace(eqns=_used(equations, results), outvars=results)


def _source(equation: JaxprEqn) -> Var | None:
    """Return what an equation adds axes of size one to, or takes them from; None where it does anything else."""
    name, params = equation.primitive.name, equation.params
    if name not in _RESHAPES or len(equation.invars) != 1 or not isinstance(equation.invars[0], Var):
        return None
    before, after = aval(equation.invars[0]).shape, result_aval(equation).shape
    if name == "broadcast_in_dim" and tuple(after[axis] for axis in params["broadcast_dimensions"]) != before:
        return None
    if name == "reshape" and params.get("dimensions") is not None:
        return None
    same = [size for size in before if size != 1] == [size for size in after if size != 1]
    return equation.invars[0] if same else None


def _used(equations: Sequence[JaxprEqn], results: Sequence[Var | Literal]) -> list[JaxprEqn]:
    """Leave out reshapes whose results nothing takes any more."""
    needed = {v for v in results if isinstance(v, Var)}
    kept = []
    for equation in reversed(equations):
        if equation.primitive.name in _RESHAPES and not needed.intersection(equation.outvars):
            continue
        needed.update(v for v in equation.invars if isinstance(v, Var))
        kept.append(equation)
    return kept[::-1]
