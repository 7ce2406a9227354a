"""The builder of a program: elementwise maps, pads and merged convolutions are held back until a step needs them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from repvgg_jax.transform.equations import bind, convolutions, multiply_adds
from repvgg_jax.transform.merging.affine import Affine, Node, PooledApart, Term, View, is_one, ones
from repvgg_jax.transform.merging.compose import COSTLY
from repvgg_jax.transform.merging.merge import merge
from repvgg_jax.transform.merging.program import (
    Given,
    Group,
    Operand,
    Parameter,
    Program,
    Step,
    convolve,
)
from repvgg_jax.transform.merging.reading.constants import Constant


class Builder:
    """Collects what becomes a `Program`.

    Attributes:
      fewest: Whether to aim at the fewest convolutions, whatever they cost.
      scope: Scope of the equation that is read.
      channel_axes: Channel axis of every value that is a convolution.
    """

    def __init__(self, convolution: Callable[..., jax.Array], fewest: bool):
        self.fewest = fewest
        self.scope = ""
        self.channel_axes: dict[Node, int] = {}
        self._convolution = convolution
        self._convolutions, self._multiply_adds = 0, 0
        self._groups: list[Group] = []
        self._reasons: dict[str, list[str]] = {}
        self._inputs: list[Node] = []
        self._steps: list[Step] = []
        self._parameters: dict[str, Constant] = {}
        self._names: dict[int, str] = {}
        self._views: dict[tuple[Node, View], Node] = {}
        self._nodes = itertools.count()

    def input(self, aval: jax.core.ShapedArray) -> Affine:
        """Return a value that is given when the program runs."""
        node = next(self._nodes)
        self._inputs.append(node)
        return _itself(node, aval)

    def count(self, equation: JaxprEqn) -> None:
        """Count what an equation of the function computes."""
        self._convolutions += convolutions(equation)
        self._multiply_adds += multiply_adds(equation)

    def note(self, reason: str) -> None:
        """Note why what stands in this scope is not merged with what it reads."""
        scopes, scope = self._reasons.setdefault(reason, []), _tidy(self.scope)
        if scope not in scopes:
            scopes.append(scope)

    def operand(self, value: Constant | Affine, name: str) -> Operand:
        """Return a value as a step takes it: computed now, if it was held back."""
        if isinstance(value, Constant):
            return self._parameter(value, f"{_tidy(self.scope)}/{name}")
        return self.materialized(value).source

    def keep(self, equation: JaxprEqn, operands: Sequence[Operand]) -> list[Affine]:
        """Append an equation as it is."""
        nodes = self._add(
            lambda *values: bind(equation, values, equation.params),
            operands,
            results=len(equation.outvars),
            convolutions=convolutions(equation),
            multiply_adds=multiply_adds(equation),
            keep=bool(equation.effects),
        )
        return [_itself(node, variable.aval) for node, variable in zip(nodes, equation.outvars, strict=True)]

    def materialized(self, value: Affine) -> Affine:
        """Return a value as one of the program's own, so that what follows is affine in it."""
        if value.terms:
            return _itself(self._convolved(value), value.aval)
        scale = None if is_one(value.scale) else value.scale
        if scale is None and value.shift is None:
            return value if value.view is None else _itself(self._viewed(value), value.aval)
        node = self._scaled_and_shifted(self._viewed(value), scale, value.shift, _tidy(self.scope))
        return _itself(node, value.aval)

    def build(self, outputs: Sequence[Operand]) -> Program:
        """Return the program that computes these, without the steps and parameters that none of them needs."""
        needed = {operand for operand in outputs if isinstance(operand, int)}
        steps = []
        for step in reversed(self._steps):
            if step.keep or needed.intersection(step.results):
                steps.append(step)
                needed.update(operand for operand in step.operands if isinstance(operand, int))
        operands = itertools.chain(outputs, *(step.operands for step in steps))
        names = {operand.name for operand in operands if isinstance(operand, Parameter)}
        return Program(
            inputs=tuple(self._inputs),
            steps=tuple(steps[::-1]),
            outputs=tuple(outputs),
            parameters={name: constant for name, constant in self._parameters.items() if name in names},
            convolutions=self._convolutions,
            multiply_adds=self._multiply_adds,
            groups=tuple(self._groups),
            reasons=self._reasons,
        )

    def _parameter(self, constant: Constant, name: str) -> Operand:
        """Return the operand that a constant is. Constants that no variable enters stay in the program itself."""
        if not constant.variable:
            return Given(constant.rounded(), constant.shape)
        stored = constant.stretched_from
        if id(stored) not in self._names:
            taken = sum(each == name or each.startswith(f"{name}.") for each in self._parameters)
            self._names[id(stored)] = name = f"{name}.{taken}" if taken else name
            self._parameters[name] = stored
        return Parameter(self._names[id(stored)], constant.stored_shape, constant.shape, constant.dtype)

    def _add(
        self, run: Callable[..., Sequence[jax.Array]], operands: Sequence[Operand], results: int = 1, **fields: Any
    ) -> tuple[Node, ...]:
        """Append a step, with further fields of `Step`, and return its values."""
        nodes = tuple(itertools.islice(self._nodes, results))
        self._steps.append(Step(run, tuple(operands), nodes, **fields))
        return nodes

    def _scaled_and_shifted(
        self,
        source: Node,
        scale: Constant | None,
        shift: Constant | None,
        scope: str,
        of: Callable[[jax.Array], jax.Array] = lambda x: x,
        axis: int | None = None,
    ) -> Node:
        """Append a step: what a function makes of the source, scaled and shifted.

        With an axis, scale and shift are vectors along it.
        """
        given = {name: each for name, each in (("scale", scale), ("shift", shift)) if each is not None}
        names = tuple(given)  # the step must not keep the values of the constants

        def run(x: jax.Array, *values: jax.Array) -> Sequence[jax.Array]:
            y = of(x)
            if axis is not None:
                values = tuple(value.reshape([-1 if each == axis else 1 for each in range(y.ndim)]) for value in values)
            named = dict(zip(names, values, strict=True))
            y = y * named["scale"] if "scale" in named else y
            return [y + named["shift"] if "shift" in named else y]

        operands = [source, *(self._parameter(constant, f"{scope}/{name}") for name, constant in given.items())]
        return self._add(run, operands)[0]

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

            (self._views[key],) = self._add(run, [value.source])
        return self._views[key]

    def _convolved(self, value: Affine) -> Node:
        scope = _common(value.scopes)
        terms, scale = merge(value, self.fewest)
        axis = terms[0].window.axes[1]
        shift = value.shift_vector(axis)
        nodes = []
        for index, term in enumerate(terms):
            name = scope if len(terms) == 1 else f"{scope}/{index}"
            nodes.append(self._term(value, term, shift if index == 0 else None, name))
        if scale is not None:
            operands = [self._viewed(value), self._parameter(scale, f"{scope}/scale")]
            nodes += self._add(lambda source, scale: [source * scale], operands)
        total = nodes[0]
        for node in nodes[1:]:
            (total,) = self._add(lambda a, b: [a + b], [total, node])
        self._groups.append(Group(scope, before=len(value.scopes), after=len(terms)))
        self.channel_axes[total] = axis
        return total

    def _term(self, value: Affine, term: Term, shift: Constant | None, scope: str) -> Node:
        """Append one convolution of the source or, where that is cheaper, of the value in between."""
        if term.apart is None:
            return self._convolution_of(value.source, term, shift, value.aval, scope)
        self._reasons.setdefault(COSTLY.reason, []).append(scope)
        between = self.materialized(term.apart.between).source
        if isinstance(term.apart, PooledApart):
            axis, sums = term.window.axes[1], partial(_only_result, term.apart.equation)
            return self._scaled_and_shifted(between, term.apart.scale, shift, scope, of=sums, axis=axis)
        return self._convolution_of(between, term.apart.convolution, shift, value.aval, scope)

    def _convolution_of(
        self, source: Node, term: Term, shift: Constant | None, aval: jax.core.ShapedArray, scope: str
    ) -> Node:
        operands: list[Operand] = [source, self._parameter(term.kernel, f"{scope}/kernel")]
        bias = term.bias_with(shift)
        if bias is not None:
            operands.append(self._parameter(bias, f"{scope}/bias"))
        (node,) = self._add(
            convolve(term.window, self._convolution),
            operands,
            convolutions=1,
            multiply_adds=math.prod(term.kernel.shape[:-1]) * math.prod(aval.shape),
        )
        return node


def _itself(node: Node, aval: Any) -> Affine:
    """Return a value of the program as the affine map of itself that it is. A token has no shape."""
    if not hasattr(aval, "shape"):
        return Affine(node, (), aval)
    return Affine(node, aval.shape, aval, scale=ones(aval))


def _only_result(equation: JaxprEqn, x: jax.Array) -> jax.Array:
    (y,) = bind(equation, [x], equation.params)
    return y


def _common(scopes: Sequence[str]) -> str:
    """Return the innermost scope that encloses all."""
    levels = zip(*(scope.split("/") for scope in scopes), strict=False)
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, levels)
    return _tidy("/".join(names[0] for names in shared))


def _tidy(scope: str) -> str:
    """Leave out the methods that Flax writes after a module's name: 'stem/stem._branches' is 'stem'."""
    names: list[str] = []
    for name in scope.split("/"):
        if name and not (names and name.startswith(f"{names[-1]}.")):
            names.append(name)
    return "/".join(names) or "convolution"
