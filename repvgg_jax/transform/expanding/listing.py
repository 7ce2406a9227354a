"""A traced function as one list of equations: all calls are written out, and values are numbered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from repvgg_jax.transform.equations import aval, body

Position = tuple[int, ...]
"""Where an equation stands: its index, after those of the calls that it is in."""

# They leave the elements of their one operand where they are; the first in another dtype.
IN_PLACE = ("convert_element_type", "copy", "optimization_barrier", "reverse_mode_only", "sharding_constraint")
MOVES = (*IN_PLACE, "broadcast_in_dim", "expand_dims", "reshape", "rev", "squeeze", "transpose")


class Written(NamedTuple):
    """An equation of the function with all calls written out. Values are numbered, literals are None."""

    position: Position
    scope: str
    equation: JaxprEqn
    operands: tuple[int | None, ...]
    results: tuple[int, ...]


class Listing:
    """A function with all calls written out.

    Attributes:
      equations: Its equations, in order.
      arguments: Numbers of its arguments.
      outputs: Numbers of what it returns.
      avals: Shape and dtype of each value.
      producers: The equation that computes a value.
      consumers: The equations that take a value.
    """

    def __init__(self, closed: ClosedJaxpr):
        self.equations: list[Written] = []
        self.avals: list[Any] = []
        self.arguments = [self._value(each) for each in closed.in_avals]
        self.outputs = self._write_out(closed, self.arguments, (), "")
        self.producers = {value: each for each in self.equations for value in each.results}
        self.consumers: dict[int | None, list[Written]] = defaultdict(list)
        for each in self.equations:
            for operand in each.operands:
                self.consumers[operand].append(each)

    def _value(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def _write_out(
        self, closed: ClosedJaxpr, arguments: Sequence[int | None], prefix: Position, scope: str
    ) -> list[int | None]:
        jaxpr = closed.jaxpr
        numbers: dict[Any, int | None] = dict(zip(jaxpr.invars, arguments, strict=True))
        numbers.update((variable, self._value(variable.aval)) for variable in jaxpr.constvars)

        def number(variable: Any) -> int | None:
            return None if isinstance(variable, Literal) else numbers[variable]

        for index, equation in enumerate(jaxpr.eqns):
            operands = tuple(map(number, equation.invars))
            here, inside = (*prefix, index), "/".join(filter(None, (scope, str(equation.source_info.name_stack))))
            inner = body(equation)
            if inner is None:
                results = tuple(self._value(variable.aval) for variable in equation.outvars)
                self.equations.append(Written(here, inside, equation, operands, results))
            else:
                given = operands[len(operands) - len(inner.jaxpr.invars) :]
                results = tuple(self._write_out(inner, given, here, inside))  # type: ignore[arg-type]
            numbers.update(zip(equation.outvars, results, strict=True))
        return list(map(number, jaxpr.outvars))


def moves(equation: JaxprEqn) -> bool:
    """Whether an equation keeps the elements of its one operand, in another order or another floating dtype."""
    if equation.primitive.name not in MOVES or len(equation.invars) != 1:
        return False
    before, after = aval(equation.invars[0]), aval(equation.outvars[0])
    floating = jnp.issubdtype(before.dtype, jnp.floating) and jnp.issubdtype(after.dtype, jnp.floating)
    return floating and before.size == after.size
