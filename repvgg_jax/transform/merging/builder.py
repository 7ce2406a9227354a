"""Steps for values that were held back: elementwise maps, pads, and merged convolutions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from repvgg_jax.transform.merging.affine import Affine, Node, Term, is_one, ones
from repvgg_jax.transform.merging.compose import COSTLY
from repvgg_jax.transform.merging.constants import Constant, bind
from repvgg_jax.transform.merging.merge import merge
from repvgg_jax.transform.merging.program import Operand, Program, convolve, scale_and_shift


class Group(NamedTuple):
    """How many convolutions became how many, and in which scope of names."""

    scope: str
    before: int
    after: int


class Emitter:
    """Writes a program.

    Attributes:
      program: so far.
      scope: of the equation that is read.
      groups: of the convolutions written so far.
      convolved: the channel axis of every value that is a convolution.
      fewest: convolutions, whatever they cost.
      left: why convolutions were not merged, and in which scopes.
    """

    def __init__(self, convolution: Callable[..., jax.Array], fewest: bool):
        self.fewest = fewest
        self.left: dict[str, list[str]] = {}
        self.program, self.scope = Program(), ""
        self.groups: list[Group] = []
        self.convolved: dict[Node, int] = {}
        self._convolution = convolution
        self._views: dict[Any, Node] = {}

    def leave(self, reason: str) -> None:
        """Note why what stands in this scope is not merged with what it reads."""
        scopes, scope = self.left.setdefault(reason, []), _tidy(self.scope)
        if scope not in scopes:
            scopes.append(scope)

    def value(self, node: Node, aval: Any) -> Affine:
        """A value of the program, as the affine map of itself that it is."""
        if not hasattr(aval, "shape"):
            return Affine(node, (), aval)
        return Affine(node, aval.shape, aval, scale=ones(aval))

    def operand(self, value: Constant | Affine, name: str) -> Operand:
        """The value as a step takes it: computed now, if it was held back."""
        if isinstance(value, Constant):
            return self.program.parameter(value, f"{_tidy(self.scope)}/{name}")
        return self.materialized(value).source

    def materialized(self, value: Affine) -> Affine:
        """The value as one of the program's own, so that what follows is affine in it."""
        if value.terms:
            return self.value(self._convolved(value), value.aval)
        scale = None if is_one(value.scale) else value.scale
        if scale is None and value.shift is None:
            return value if value.view is None else self.value(self._viewed(value), value.aval)
        scope = _tidy(self.scope)
        given = [
            (constant, name) for constant, name in ((scale, "scale"), (value.shift, "shift")) if constant is not None
        ]
        (node,) = self.program.add(
            lambda source, *rest: [
                scale_and_shift(source, None if scale is None else rest[0], None if value.shift is None else rest[-1])
            ],
            [self._viewed(value), *(self.program.parameter(constant, f"{scope}/{name}") for constant, name in given)],
            name="scale_and_shift",
        )
        return self.value(node, value.aval)

    def _viewed(self, value: Affine) -> Node:
        view = value.view
        if view is None:
            return value.source
        key = (value.source, view)
        if key not in self._views:
            config = [(low, high, 0) for low, high in view.padding]

            def run(x: jax.Array) -> Sequence[jax.Array]:
                x = lax.pad(x, np.zeros((), x.dtype), config)
                return [x if set(view.steps) == {1} else lax.slice(x, (0,) * x.ndim, x.shape, view.steps)]

            (self._views[key],) = self.program.add(run, [value.source], name="pad")
        return self._views[key]

    def _convolved(self, value: Affine) -> Node:
        scope = _common(value.scopes)
        terms, scale = merge(value, self.fewest)
        axis = terms[0].window.axes[1]
        shift = None if value.shift is None else value.shift.vector(len(value.aval.shape), axis)
        nodes = []
        for index, term in enumerate(terms):
            name = scope if len(terms) == 1 else f"{scope}/{index}"
            nodes.append(self._term(value, term, shift if index == 0 else None, name))
        if scale is not None:
            nodes += self.program.add(
                lambda source, scale: [source * scale],
                [self._viewed(value), self.program.parameter(scale, f"{scope}/scale")],
                name="mul",
            )
        total = nodes[0]
        for node in nodes[1:]:
            (total,) = self.program.add(lambda a, b: [a + b], [total, node], name="add")
        self.groups.append(Group(scope, len(value.scopes), len(terms)))
        self.convolved[total] = axis
        return total

    def _term(self, value: Affine, term: Term, shift: Constant | None, scope: str) -> Node:
        """One convolution, of the source or, where that is cheaper, of the value in between."""
        source, bias = value.source, shift
        if term.apart is not None:
            self.left.setdefault(COSTLY.reason, []).append(scope)
            source = self.materialized(term.apart.inner).source
            if not isinstance(term.apart.outer, Term):
                return self._pooled(value, term, source, shift, scope)
            term = term.apart.outer
        elif term.bias is not None:
            bias = term.bias if shift is None else term.bias.map("add", np.add, shift, shape=term.bias.shape)
        operands: list[Operand] = [source, self.program.parameter(term.kernel, f"{scope}/kernel")]
        if bias is not None:
            operands.append(self.program.parameter(bias, f"{scope}/bias"))
        (node,) = self.program.add(
            convolve(term.window, self._convolution),
            operands,
            name="conv_general_dilated",
            convolutions=1,
            multiply_adds=math.prod(term.kernel.shape[:-1]) * math.prod(value.aval.shape),
        )
        return node

    def _pooled(self, value: Affine, term: Term, source: Node, shift: Constant | None, scope: str) -> Node:
        assert term.apart is not None
        equation, axis = term.apart.outer, term.window.axes[1]
        constants = {"scale": term.apart.scale, "shift": shift}
        given = {name: constant for name, constant in constants.items() if constant is not None}
        shape = [-1 if index == axis else 1 for index in range(len(value.aval.shape))]

        def run(x: jax.Array, *vectors: jax.Array) -> Sequence[jax.Array]:
            (pooled,) = bind(equation, [x], equation.params)
            placed = {name: vector.reshape(shape) for name, vector in zip(given, vectors, strict=True)}
            return [scale_and_shift(pooled, placed.get("scale"), placed.get("shift"))]

        operands = [source, *(self.program.parameter(each, f"{scope}/{name}") for name, each in given.items())]
        (node,) = self.program.add(run, operands, name=equation.primitive.name)
        return node


def _common(scopes: Sequence[str]) -> str:
    """The innermost scope that encloses all."""
    levels = zip(*(scope.split("/") for scope in scopes), strict=False)
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, levels)
    return _tidy("/".join(names[0] for names in shared))


def _tidy(scope: str) -> str:
    """Without the methods that Flax writes after a module's name: 'stem/stem._branches' is 'stem'."""
    names: list[str] = []
    for name in scope.split("/"):
        if name and not (names and name.startswith(f"{names[-1]}.")):
            names.append(name)
    return "/".join(names) or "convolution"
