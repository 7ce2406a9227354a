"""The program that is left: a list of steps over numbered values and named parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from repvgg_jax.transform.merging.affine import Node, Window
from repvgg_jax.transform.merging.constants import Constant, is_key


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter by name; it is reshaped to `stored_shape` and broadcast to `shape`."""

    name: str
    stored_shape: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """An array that the function itself holds, in the shape it is stored in, broadcast to `shape`."""

    value: np.ndarray
    shape: tuple[int, ...]


Operand = Node | Parameter | Given


@dataclasses.dataclass(frozen=True)
class Step:
    """Computes the values `results` from `operands`."""

    run: Callable[..., Sequence[jax.Array]]
    operands: tuple[Operand, ...]
    results: tuple[Node, ...]
    convolutions: int = 0
    multiply_adds: int = 0
    keep: bool = False
    """Whether it stays though no output needs it: it prints, say."""


class Group(NamedTuple):
    """How many convolutions became how many, and in which scope of names."""

    scope: str
    before: int
    after: int


@dataclasses.dataclass(frozen=True)
class Program:
    """Steps in order, and what was done to make them.

    Attributes:
      inputs: the values that are given when it runs.
      steps: that compute the others.
      outputs: what it returns.
      parameters: by name, in the order in which they were first read.
      convolutions: of the function that was read.
      multiply_adds: of the convolutions and products of that function.
      groups: of convolutions that were merged.
      reasons: why convolutions were not merged, and in which scopes.
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
        """The parameters, computed in float64, rounded once and not kept here: they can be had once."""
        values = {name: constant.rounded() for name, constant in self.parameters.items()}
        for constant in self.parameters.values():
            constant.forget()
        return values

    def run(self, parameters: Mapping[str, jax.Array], inputs: Sequence[jax.Array]) -> list[jax.Array]:
        """Compute the outputs."""
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
    """The step of a convolution: of source, kernel and, perhaps, bias."""
    spatial = len(window.strides)
    numbers = lax.ConvDimensionNumbers(window.source_axes, (spatial + 1, spatial, *range(spatial)), window.axes)

    def run(source: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> Sequence[jax.Array]:
        y = convolution(
            source,
            kernel,
            window_strides=window.strides,
            padding=window.padding,
            lhs_dilation=window.source_dilation,
            rhs_dilation=window.dilation,
            dimension_numbers=numbers,
            feature_group_count=window.groups,
            batch_group_count=window.batch_groups,
            precision=window.precision,
            preferred_element_type=window.preferred,
        )
        if bias is None:
            return [y]
        shape = [1] * y.ndim
        shape[window.axes[1]] = bias.shape[0]
        return [y + bias.reshape(shape)]

    return run
