"""Reads a traced function and writes the program that is left once everything affine is folded."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from repvgg_jax.transform.merging.affine import Affine
from repvgg_jax.transform.merging.builder import Emitter, Group
from repvgg_jax.transform.merging.constants import Constant, bind, can_evaluate, evaluate, is_key
from repvgg_jax.transform.merging.detours import without_detours
from repvgg_jax.transform.merging.primitives import RULES, STRETCHING, Value
from repvgg_jax.transform.merging.program import Program

_BATCH_STATISTICS = (
    "a mean of each channel over the batch, which depends on the images. Was the function traced with train=True? "
    "Batch norms fold in evaluation"
)
_INSIDE = "the convolutions are inside of `{}`, where nothing is merged. {}"
_UNROLL = (
    "Trace the layers one after the other: a Python loop in the place of nn.scan, lax.scan or lax.map merges them all"
)
_TAKE_OUT = "Reparameterize the function inside of it for itself, and call the result there"
# What these primitives call is part of the function, whatever they say of its compilation.
_CALLS = {
    "pjit": "jaxpr",
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}
_CUSTOM_GRADIENTS = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


class Interpreter:
    """Walks a jaxpr once; values are constants, or affine in a value of the program.

    Attributes:
      convolutions: read so far.
      multiply_adds: of the convolutions and products read so far.
    """

    def __init__(self, convolution: Callable[..., jax.Array], fewest: bool):
        self.convolutions, self.multiply_adds = 0, 0
        self._emitter = Emitter(convolution, fewest)

    @property
    def program(self) -> Program:
        """What was written."""
        return self._emitter.program

    @property
    def left(self) -> dict[str, list[str]]:
        """Why convolutions were not merged, and in which scopes."""
        return self._emitter.left

    @property
    def groups(self) -> list[Group]:
        """What was merged."""
        return self._emitter.groups

    def input(self, aval: Any) -> Affine:
        """A value that is given when the program runs."""
        node = self.program.node()
        self.program.inputs.append(node)
        return self._emitter.value(node, aval)

    def read(self, closed: Any, arguments: Sequence[Value]) -> None:
        """Read a whole function; its results become the program's outputs."""
        outputs = self._run(closed.jaxpr, [_given(each) for each in closed.consts], arguments, "")
        self.program.outputs = [self._emitter.operand(value, "output") for value in outputs]
        self.program.prune()

    def _run(self, jaxpr: Any, constants: Sequence[Value], arguments: Sequence[Value], scope: str) -> list[Value]:
        """Read the equations of a jaxpr that stands in a scope of names."""
        jaxpr = without_detours(jaxpr)
        environment: dict[Any, Value] = {}
        uses = Counter(v for e in jaxpr.eqns for v in e.invars if not isinstance(v, core.Literal))
        uses.update(v for v in jaxpr.outvars if not isinstance(v, core.Literal))

        def read(variable: Any) -> Value:
            return _literal(variable) if isinstance(variable, core.Literal) else environment[variable]

        def write(variables: Sequence[Any], values: Sequence[Value]) -> None:
            for variable, value in zip(variables, values, strict=True):
                # A value that is read twice is computed once; a view of one can be taken in twice.
                if uses[variable] > 1 and isinstance(value, Affine) and not value.is_view:
                    value = self._emitter.materialized(value)
                environment[variable] = value

        write(jaxpr.constvars, constants)
        write(jaxpr.invars, arguments)
        for equation in jaxpr.eqns:
            write(equation.outvars, self._equation(equation, list(map(read, equation.invars)), scope))
        return list(map(read, jaxpr.outvars))

    def _equation(self, equation: Any, operands: list[Value], scope: str) -> Sequence[Value]:
        self._emitter.scope = scope = "/".join(filter(None, (scope, str(equation.source_info.name_stack))))
        inner = _called(equation)
        if inner is not None:
            # A choice by platform has an operand before those of its branches: the platform.
            operands = operands[len(operands) - len(inner.jaxpr.invars) :]
            return self._run(inner.jaxpr, [_given(each) for each in inner.consts], operands, scope)
        name = equation.primitive.name
        if name == "reverse_mode_only":  # of `repvgg_jax.ops`: a gate that computes nothing
            return operands
        constants = [operand for operand in operands if isinstance(operand, Constant)]
        if len(constants) == len(operands) and not equation.effects and can_evaluate(equation, constants):
            return evaluate(equation, constants)
        self.convolutions += _convolutions(equation)
        self.multiply_adds += _multiply_adds(equation)
        if name in RULES and jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating):
            shape = equation.outvars[0].aval.shape
            # A sum or product that stretches an operand is no map of its channels.
            same = all(operand.aval.shape == shape for operand in operands if isinstance(operand, Affine))
            result = RULES[name](self._emitter, equation, *operands) if same or name in STRETCHING else None
            if result is not None:
                return [result]
        return self._leave(equation, operands)

    def _leave(self, equation: Any, operands: Sequence[Value]) -> list[Value]:
        """Keep an equation as it is, on whatever its operands have become."""
        name = equation.primitive.name
        taken = [self._emitter.operand(operand, name) for operand in operands]
        self._note_batch_statistics(equation, taken)
        self._note_convolutions_inside(equation)
        nodes = self.program.add(
            lambda *values: bind(equation, values, equation.params),
            taken,
            name=name,
            results=len(equation.outvars),
            convolutions=_convolutions(equation),
            multiply_adds=_multiply_adds(equation),
            keep=bool(equation.effects),
        )
        return [
            self._emitter.value(node, variable.aval) for node, variable in zip(nodes, equation.outvars, strict=True)
        ]

    def _note_batch_statistics(self, equation: Any, operands: Sequence[Any]) -> None:
        of_images = any(_keeps_channels(inner) for _, inner in _within(equation))
        if not of_images and equation.primitive.name == "reduce_sum" and isinstance(operands[0], int):
            # Fewer axes might be those of one example, but for what is known to come from a convolution.
            of_images = _kept(equation) == {self._emitter.convolved.get(operands[0])}
        if of_images:
            self._emitter.leave(_BATCH_STATISTICS)

    def _note_convolutions_inside(self, equation: Any) -> None:
        name = equation.primitive.name
        if name != "conv_general_dilated" and _convolutions(equation):
            self._emitter.leave(_INSIDE.format(name, _UNROLL if name in ("scan", "while") else _TAKE_OUT))


def _literal(variable: Any) -> Constant:
    value, aval = variable.val, variable.aval
    return Constant(np.shape(value), aval.dtype, lambda: value, recipe=("number", repr(value)), variable=False)


def _given(value: Any) -> Constant:
    """An array that the function closed over; a parameter, unless it is a single number."""
    content = jax.random.key_data(value) if is_key(value.dtype) else value
    recipe = ("array", hashlib.blake2b(np.asarray(content).tobytes()).hexdigest())
    return Constant(np.shape(value), value.dtype, lambda: value, recipe=recipe, variable=np.size(value) > 1)


def _called(equation: Any) -> Any:
    """The closed jaxpr that an equation does no more than call; None for other equations."""
    name = equation.primitive.name
    if name in _CALLS or name in _CUSTOM_GRADIENTS:
        inner = equation.params[(_CALLS | _CUSTOM_GRADIENTS)[name]]
        inner = inner if hasattr(inner, "consts") else core.ClosedJaxpr(inner, ())
        # A gradient of its own would be lost; that of a convolution is the convolution's.
        return inner if name in _CALLS or _convolves(inner.jaxpr) else None
    return _default_branch(equation)


def _default_branch(equation: Any) -> Any:
    """Of a choice by platform, whose branches all compute the same: the plain one. None for other equations."""
    platforms = equation.params.get("branches_platforms") if equation.primitive.name == "cond" else None
    return equation.params["branches"][platforms.index(None)] if platforms and None in platforms else None


def _convolves(jaxpr: Any) -> bool:
    """Whether a convolution stands in it, or in what it calls."""
    return any(_convolutions(equation) for equation in jaxpr.eqns)


def _within(equation: Any) -> Iterator[tuple[int, Any]]:
    """The equation and those of the functions it calls, each with the number of times that it runs."""
    yield 1, equation
    times = equation.params["length"] if equation.primitive.name == "scan" else 1
    given = _default_branch(equation) or list(equation.params.values())
    for called in jax.tree.leaves(given, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
        for inner in getattr(called, "eqns", ()):
            for often, each in _within(inner):
                yield times * often, each


def _kept(equation: Any) -> set[int]:
    """The axes that a sum keeps."""
    return set(range(len(equation.invars[0].aval.shape))) - set(equation.params["axes"])


def _keeps_channels(equation: Any) -> bool:
    """Whether it sums images over all axes but one, the batch among them."""
    if equation.primitive.name != "reduce_sum" or len(equation.invars[0].aval.shape) < 4:
        return False
    kept = _kept(equation)
    return len(kept) == 1 and 0 not in kept


def _convolutions(equation: Any) -> int:
    return sum(times for times, each in _within(equation) if each.primitive.name == "conv_general_dilated")


def _multiply_adds(equation: Any) -> int:
    return sum(times * _own_multiply_adds(each) for times, each in _within(equation))


def _own_multiply_adds(equation: Any) -> int:
    name = equation.primitive.name
    if name == "conv_general_dilated":
        kernel, channel = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec[0]
        return math.prod(kernel) // kernel[channel] * math.prod(equation.outvars[0].aval.shape)
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
    return 0
