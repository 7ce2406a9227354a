"""The program that is left: a list of steps over numbered values and a flat list of parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from repvgg_jax.transform.merging.affine import Node, Window
from repvgg_jax.transform.merging.constants import Constant, is_key


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A place in the list of parameters; what stands there is reshaped to `compact` and broadcast to `shape`."""

    index: int
    compact: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """An array that the function itself holds, in its compact shape, broadcast to `shape`."""

    value: np.ndarray
    shape: tuple[int, ...]


Operand = Node | Parameter | Given


@dataclasses.dataclass(frozen=True)
class Step:
    """Computes the values `results` from `operands`."""

    run: Callable[..., Sequence[jax.Array]]
    operands: tuple[Operand, ...]
    results: tuple[Node, ...]
    name: str
    convolutions: int = 0
    multiply_adds: int = 0
    keep: bool = False
    """Whether it stays though no output needs it: it prints, say."""


class Program:
    """Steps in order, grown by the interpreter."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.constants: list[Constant] = []
        self.names: list[str] = []
        self.outputs: list[Operand] = []
        self.inputs: list[Node] = []
        self._indices: dict[int, int] = {}
        self._next = 0

    def node(self) -> Node:
        """A new value."""
        self._next += 1
        return self._next - 1

    def parameter(self, constant: Constant, name: str) -> Operand:
        """The operand that a constant is; those that no variable enters stay in the program itself."""
        if not constant.variable:
            return Given(rounded(constant), constant.shape)
        base = constant.base
        index = self._indices.get(id(base))
        if index is None:
            index = self._indices[id(base)] = len(self.constants)
            self.constants.append(base)
            taken = sum(each == name or each.startswith(f"{name}.") for each in self.names)
            self.names.append(f"{name}.{taken}" if taken else name)
        return Parameter(index, constant.compact, constant.shape, constant.dtype)

    def add(
        self,
        run: Callable[..., Sequence[jax.Array]],
        operands: Sequence[Operand],
        *,
        name: str,
        results: int = 1,
        convolutions: int = 0,
        multiply_adds: int = 0,
        keep: bool = False,
    ) -> tuple[Node, ...]:
        """Append a step; returns its values."""
        nodes = tuple(self.node() for _ in range(results))
        self.steps.append(Step(run, tuple(operands), nodes, name, convolutions, multiply_adds, keep))
        return nodes

    def prune(self) -> None:
        """Leave out steps and parameters that no output needs."""
        needed = {operand for operand in self.outputs if isinstance(operand, int)}
        kept = []
        for step in reversed(self.steps):
            if step.keep or needed.intersection(step.results):
                kept.append(step)
                needed.update(operand for operand in step.operands if isinstance(operand, int))
        self.steps = kept[::-1]
        used = [o.index for step in self.steps for o in step.operands if isinstance(o, Parameter)]
        used += [o.index for o in self.outputs if isinstance(o, Parameter)]
        order = {old: new for new, old in enumerate(sorted(set(used)))}
        renumber = lambda o: dataclasses.replace(o, index=order[o.index]) if isinstance(o, Parameter) else o  # noqa: E731
        self.steps = [dataclasses.replace(s, operands=tuple(map(renumber, s.operands))) for s in self.steps]
        self.outputs = [renumber(operand) for operand in self.outputs]
        self.constants = [self.constants[old] for old in order]
        self.names = [self.names[old] for old in order]

    def values(self) -> list[np.ndarray]:
        """The parameters, computed in float64 and rounded once; they can be had once."""
        values = [rounded(constant) for constant in self.constants]
        for constant in self.constants:
            constant.forget()
        return values

    def run(self, parameters: Sequence[jax.Array], inputs: Sequence[jax.Array]) -> list[jax.Array]:
        """Compute the outputs."""
        values: dict[Node, jax.Array] = dict(zip(self.inputs, inputs, strict=True))

        def get(operand: Operand) -> Any:
            if isinstance(operand, int):
                return values[operand]
            if isinstance(operand, Parameter):
                parameter = jnp.asarray(parameters[operand.index], None if is_key(operand.dtype) else operand.dtype)
                return jnp.broadcast_to(parameter.reshape(operand.compact), operand.shape)
            return jnp.broadcast_to(operand.value, operand.shape)

        for step in self.steps:
            values.update(zip(step.results, step.run(*map(get, step.operands)), strict=True))
        return [get(output) for output in self.outputs]


def rounded(constant: Constant) -> Any:
    """The value in the dtype of the program."""
    return constant.value if is_key(constant.dtype) else constant.value.astype(constant.dtype)


def convolve(window: Window, convolution: Callable[..., jax.Array]) -> Callable[..., Sequence[jax.Array]]:
    """The step of a convolution: of source, kernel and, perhaps, bias."""
    spatial = len(window.strides)
    numbers = lax.ConvDimensionNumbers(window.source_axes, (spatial + 1, spatial, *range(spatial)), window.axes)

    def run(source: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> Sequence[jax.Array]:
        y = convolution(
            source,
            kernel,
            window.strides,
            window.padding,
            window.source_dilation,
            window.dilation,
            numbers,
            window.groups,
            window.batch_groups,
            window.precision,
            window.preferred,
        )
        if bias is None:
            return [y]
        shape = [1] * y.ndim
        shape[window.axes[1]] = bias.shape[0]
        return [y + bias.reshape(shape)]

    return run


def scale_and_shift(source: jax.Array, scale: jax.Array | None, shift: jax.Array | None) -> jax.Array:
    """An elementwise map with constants broadcast."""
    y = source if scale is None else source * scale
    return y if shift is None else y + shift
