"""Count the arithmetic by channel that a traced program does, which is what batch norms in evaluation cost.

A *scale* is a multiplication or division of a value that depends on the inputs by an array that does not; numbers and
arrays of one repeated number are none. Every batch norm in evaluation has one. A convolution whose batch norm is folded
is followed by one addition of such an array, its bias, and by no scale: what else is done to a convolution's result,
before another operation takes it, is arithmetic that the fold should have removed.
"""

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any, NamedTuple

import jax


class Kind(Enum):
    """What is known of a value."""

    NUMBER = auto()  # independent of the inputs, one number or copies of it
    ARRAY = auto()  # independent of the inputs
    OTHER = auto()  # depends on the inputs, as does the rest
    CONVOLVED = auto()  # the result of a convolution
    SHIFTED = auto()  # one that has its bias


class Arithmetic(NamedTuple):
    """What a program does by channel.

    Attributes:
        scales: multiplications and divisions by an array.
        unfolded: scales of a convolution's result, and additions to one beyond the first.
    """

    scales: int
    unfolded: int


# These change where a value lies and not what it is.
MOVES = {"broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze", "transpose"}
CONSTANT = (Kind.NUMBER, Kind.ARRAY)


def channel_arithmetic(function: Callable[..., Any], variables: Any, *inputs: Any) -> Arithmetic:
    """Count in the trace of `function(variables, *inputs)`; convolutions must be XLA's own.

    Loops and conditionals are not read.
    """
    closed = jax.make_jaxpr(function)(variables, *inputs)
    constants = len(jax.tree.leaves(variables))
    counter = _Counter()
    counter.read(closed, [_constant(v) if n < constants else Kind.OTHER for n, v in enumerate(closed.jaxpr.invars)])
    return Arithmetic(counter.scales, counter.unfolded)


def _constant(variable: Any) -> Kind:
    return Kind.NUMBER if variable.aval.size == 1 else Kind.ARRAY


class _Counter:
    """An interpreter of jaxprs over `Kind`."""

    def __init__(self) -> None:
        self.scales = self.unfolded = 0

    def read(self, closed: Any, kinds: Sequence[Kind]) -> list[Kind]:
        """Return the kinds of a jaxpr's results, from those of its arguments."""
        jaxpr = getattr(closed, "jaxpr", closed)
        known = dict(zip(jaxpr.invars, kinds, strict=True)) | {v: _constant(v) for v in jaxpr.constvars}

        def kind(value: Any) -> Kind:
            return known[value] if isinstance(value, jax.extend.core.Var) else _constant(value)

        for equation in jaxpr.eqns:
            results = self.equation(equation, [kind(value) for value in equation.invars])
            known.update(zip(equation.outvars, results, strict=True))
        return [kind(value) for value in jaxpr.outvars]

    def equation(self, equation: Any, kinds: list[Kind]) -> list[Kind]:
        """Return the kinds of an equation's results, and count what it does."""
        name = equation.primitive.name
        for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            inner = equation.params.get(key)
            if inner is not None and len(getattr(inner, "jaxpr", inner).invars) == len(kinds):
                return self.read(inner, kinds)
        if all(kind in CONSTANT for kind in kinds):
            numbers = all(kind is Kind.NUMBER for kind in kinds)
            return [Kind.NUMBER if numbers and kinds else _constant(v) for v in equation.outvars]
        if name == "conv_general_dilated":
            return [Kind.CONVOLVED]
        if name in MOVES:
            return [kinds[0]]
        if name in ("mul", "div", "add", "sub") and set(kinds) & set(CONSTANT):
            constant, value = sorted(kinds, key=lambda kind: kind not in CONSTANT)
            return [self.by_channel(name in ("mul", "div"), value) if constant is Kind.ARRAY else value]
        return [Kind.OTHER] * len(equation.outvars)

    def by_channel(self, scales: bool, value: Kind) -> Kind:
        """Count one operation with an array, and return the kind of its result."""
        self.scales += scales
        self.unfolded += value is Kind.SHIFTED or (scales and value is Kind.CONVOLVED)
        return Kind.SHIFTED if value in (Kind.CONVOLVED, Kind.SHIFTED) else value
