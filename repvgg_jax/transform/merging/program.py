"""The program that is left after merging: a list of steps over numbered values and named parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.transform.merging.affine import Node
from repvgg_jax.transform.merging.reading.constants import Constant, is_key
from repvgg_jax.transform.windows import Window


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter by name. It is reshaped to `stored_shape` and then broadcast to `shape`."""

    name: str
    stored_shape: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """An array that the function itself holds, in the shape that it is stored in. It is broadcast to `shape`."""

    value: np.ndarray
    shape: tuple[int, ...]


Operand = Node | Parameter | Given


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a program. It computes the values `results` from `operands`."""

    run: Callable[..., Sequence[jax.Array]]
    operands: tuple[Operand, ...]
    results: tuple[Node, ...]
    convolutions: int = 0
    multiply_adds: int = 0
    keep: bool = False
    """Whether the step stays though no output needs it, because it prints, say."""


class Group(NamedTuple):
    """A group of convolutions that were merged.

    Attributes:
      scope: The scope of names that the group stands in.
      before: Number of convolutions in the function.
      after: Number of convolutions in the program.
    """

    scope: str
    before: int
    after: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A program: steps in order, and what was done to make them.

    Attributes:
      inputs: Values that are given when the program runs.
      steps: Steps that compute the other values.
      outputs: What the program returns.
      parameters: Parameters by name, in the order in which they were first read.
      convolutions: Number of convolutions in the function that was read.
      multiply_adds: Multiply-adds of the convolutions and products of that function.
      groups: Groups of convolutions that were merged.
      reasons: Reasons why convolutions were not merged, and the scopes that each holds for.
    """

    inputs: tuple[Node, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Operand, ...]
    parameters: Mapping[str, Constant]
    convolutions: int
    multiply_adds: int
    groups: tuple[Group, ...]
    reasons: Mapping[str, Sequence[str]]

    def take_parameters(self) -> dict[str, Any]:
        """Return the parameters, computed in float64 and rounded once. They are not kept here: they can be had once."""
        values = {name: constant.rounded() for name, constant in self.parameters.items()}
        for constant in self.parameters.values():
            constant.forget()
        return values

    def run(self, parameters: Mapping[str, jax.Array], inputs: Sequence[jax.Array]) -> list[jax.Array]:
        """Compute the outputs for parameters by name and inputs in order."""
        values: dict[Node, jax.Array] = dict(zip(self.inputs, inputs, strict=True))

        def get(operand: Operand) -> Any:
            if isinstance(operand, int):
                return values[operand]
            if isinstance(operand, Parameter):
                parameter = jnp.asarray(parameters[operand.name], None if is_key(operand.dtype) else operand.dtype)
                return jnp.broadcast_to(parameter.reshape(operand.stored_shape), operand.shape)
            return jnp.broadcast_to(operand.value, operand.shape)

        for step in self.steps:
            values.update(zip(step.results, step.run(*map(get, step.operands)), strict=True))
        return [get(output) for output in self.outputs]


def convolve(window: Window, convolution: Callable[..., jax.Array]) -> Callable[..., Sequence[jax.Array]]:
    """Return the step of a convolution: a function of source, kernel and, perhaps, bias."""

    def run(source: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> Sequence[jax.Array]:
        y = window.convolve(convolution, source, kernel)
        if bias is None:
            return [y]
        shape = [1] * y.ndim
        shape[window.axes[1]] = bias.shape[0]
        return [y + bias.reshape(shape)]

    return run
