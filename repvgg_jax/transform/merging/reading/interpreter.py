"""The reader of a traced function: it builds the program that is left once everything affine is folded."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from repvgg_jax.transform.equations import (
    aval,
    called,
    convolutions,
    kept_axes,
    result_aval,
    sums_images,
    within,
)
from repvgg_jax.transform.merging.affine import Affine
from repvgg_jax.transform.merging.builder import Builder
from repvgg_jax.transform.merging.detours import without_detours
from repvgg_jax.transform.merging.program import Operand, Program
from repvgg_jax.transform.merging.reading.constants import Constant, is_key
from repvgg_jax.transform.merging.reading.evaluate import can_evaluate, evaluate
from repvgg_jax.transform.merging.reading.primitives import ELEMENTWISE, WINDOWED, Value

_BATCH_STATISTICS = (
    "a mean of each channel over the batch, which depends on the images. Was the function traced with train=True? "
    "Batch norms fold in evaluation"
)
_INSIDE = "the convolutions are inside of `{}`, where nothing is merged. {}"
_UNROLL = (
    "Trace the layers one after the other: a Python loop in the place of nn.scan, lax.scan or lax.map merges them all"
)
_TAKE_OUT = "Reparameterize the function inside of it for itself, and call the result there"


def interpret(
    closed: ClosedJaxpr, variables: Sequence[Constant], *, convolution: Callable[..., jax.Array], fewest: bool
) -> Program:
    """Read a whole function.

    Args:
      closed: The function, of variables and then of inputs.
      variables: Its first arguments.
      convolution: The function that the program calls, with the arguments of `lax.conv_general_dilated`.
      fewest: Whether to aim at the fewest convolutions, whatever they cost.

    Returns:
      The program of what is left to compute.
    """
    builder = Builder(convolution, fewest)
    arguments: list[Value] = [*variables, *map(builder.input, closed.in_avals[len(variables) :])]
    outputs = _read(builder, closed, arguments, "")
    return builder.build([builder.operand(value, "output") for value in outputs])


def _read(builder: Builder, closed: ClosedJaxpr, arguments: Sequence[Value], scope: str) -> list[Value]:
    """Read the equations of a jaxpr that stands in a scope of names.

    Values are constants, or affine in a value of the program.
    """
    jaxpr = without_detours(closed.jaxpr)
    environment: dict[Var, Value] = {}
    uses = _uses(jaxpr)

    def read(variable: Var | Literal) -> Value:
        return _literal(variable) if isinstance(variable, Literal) else environment[variable]

    def write(variables: Sequence[Var], values: Sequence[Value]) -> None:
        for variable, value in zip(variables, values, strict=True):
            # A value that is read twice is computed once; a view of one can be taken in twice.
            if uses[variable] > 1 and isinstance(value, Affine) and not value.is_view:
                value = builder.materialized(value)
            environment[variable] = value

    write(jaxpr.constvars, [_closed_over(each) for each in closed.consts])
    write(jaxpr.invars, arguments)
    for equation in jaxpr.eqns:
        write(equation.outvars, _read_equation(builder, equation, list(map(read, equation.invars)), scope))
    return list(map(read, jaxpr.outvars))


def _uses(jaxpr: Jaxpr) -> Counter[Var]:
    """Count how often each variable is read."""
    read = [variable for equation in jaxpr.eqns for variable in equation.invars]
    return Counter(variable for variable in (*read, *jaxpr.outvars) if not isinstance(variable, Literal))


def _read_equation(builder: Builder, equation: JaxprEqn, operands: list[Value], scope: str) -> Sequence[Value]:
    builder.scope = scope = "/".join(filter(None, (scope, str(equation.source_info.name_stack))))
    inner = called(equation)
    if inner is not None:
        # A choice by platform has an operand before those of its branches: the platform.
        return _read(builder, inner, operands[len(operands) - len(inner.jaxpr.invars) :], scope)
    if equation.primitive.name == "reverse_mode_only":  # of `repvgg_jax.ops`: a gate that computes nothing
        return operands
    constants = [operand for operand in operands if isinstance(operand, Constant)]
    if len(constants) == len(operands) and not equation.effects and can_evaluate(equation, constants):
        return evaluate(equation, constants)
    builder.count(equation)
    folded = _fold(builder, equation, operands)
    return _keep(builder, equation, operands) if folded is None else [folded]


def _fold(builder: Builder, equation: JaxprEqn, operands: Sequence[Value]) -> Value | None:
    """Return what an equation makes of values that are affine in another, where that is affine too; else None."""
    name = equation.primitive.name
    rule = ELEMENTWISE.get(name) or WINDOWED.get(name)
    if rule is None or not jnp.issubdtype(result_aval(equation).dtype, jnp.floating):
        return None
    shapes = {operand.aval.shape for operand in operands if isinstance(operand, Affine)}
    if name in ELEMENTWISE and shapes - {result_aval(equation).shape}:
        return None  # a sum or product that stretches an operand is no map of its channels
    return rule(builder, equation, *operands)


def _keep(builder: Builder, equation: JaxprEqn, operands: Sequence[Value]) -> list[Affine]:
    """Keep an equation as it is, on whatever its operands have become."""
    name = equation.primitive.name
    taken = [builder.operand(operand, name) for operand in operands]
    if _is_batch_statistic(builder, equation, taken):
        builder.note(_BATCH_STATISTICS)
    if name != "conv_general_dilated" and convolutions(equation):
        builder.note(_INSIDE.format(name, _UNROLL if name in ("scan", "while") else _TAKE_OUT))
    return builder.keep(equation, taken)


def _is_batch_statistic(builder: Builder, equation: JaxprEqn, operands: Sequence[Operand]) -> bool:
    if any(sums_images(inner) for _, inner in within(equation)):
        return True
    if equation.primitive.name != "reduce_sum" or not isinstance(operands[0], int):
        return False
    # Fewer axes might be those of one example, but for what is known to come from a convolution.
    return kept_axes(equation) == {builder.channel_axes.get(operands[0])}


def _literal(variable: Literal) -> Constant:
    value = variable.val
    derivation = ("number", repr(value))
    return Constant(np.shape(value), aval(variable).dtype, lambda: value, derivation=derivation, variable=False)


def _closed_over(value: Any) -> Constant:
    """Return an array that the function closed over: a parameter, unless it is a single number."""
    content = jax.random.key_data(value) if is_key(value.dtype) else value
    derivation = ("array", hashlib.blake2b(np.asarray(content).tobytes()).hexdigest())
    return Constant(np.shape(value), value.dtype, lambda: value, derivation=derivation, variable=np.size(value) > 1)
