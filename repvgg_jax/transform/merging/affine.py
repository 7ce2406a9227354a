"""Values that are affine in an earlier value: convolutions of it, and itself, scaled and shifted by channel."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.extend.core import JaxprEqn

from repvgg_jax.transform.merging.reading.constants import Constant
from repvgg_jax.transform.windows import Window

Node = int


@dataclasses.dataclass(frozen=True)
class View:
    """A part of a value, evenly spaced, or the value with zeros around it; one entry for each axis."""

    padding: tuple[tuple[int, int], ...]
    """Low and high padding; negative where the value is cropped."""
    steps: tuple[int, ...]

    def of(self, axes: tuple[int, ...]) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]] | None:
        """Return padding and steps along the spatial axes; None where batch or channels are not left alone."""
        batch, channel, *spatial = axes
        if any(self.padding[axis] != (0, 0) or self.steps[axis] != 1 for axis in (batch, channel)):
            return None
        return tuple(self.padding[axis] for axis in spatial), tuple(self.steps[axis] for axis in spatial)


@dataclasses.dataclass(frozen=True)
class ConvolvedApart:
    """Another way to compute a term for as long as it stands alone: as a convolution of a value in between.

    Attributes:
      cost: Multiply-adds for one pixel of the result.
    """

    between: Affine
    convolution: Term
    cost: float

    def scaled(self, vector: Constant) -> ConvolvedApart:
        """Return it with its result multiplied by a constant of each channel."""
        return dataclasses.replace(self, convolution=self.convolution.scaled(vector))


@dataclasses.dataclass(frozen=True)
class PooledApart:
    """Another way to compute a term for as long as it stands alone: as a sum over windows of a value in between.

    Attributes:
      equation: The sum over windows.
      scale: Factor of each channel of the sum, or None.
      cost: Multiply-adds for one pixel of the result.
    """

    between: Affine
    equation: JaxprEqn
    scale: Constant | None
    cost: float

    def scaled(self, vector: Constant) -> PooledApart:
        """Return it with its result multiplied by a constant of each channel."""
        if self.scale is None:
            return dataclasses.replace(self, scale=vector)
        shape = np.broadcast_shapes(self.scale.shape, vector.shape)
        return dataclasses.replace(self, scale=self.scale.map("multiply", np.multiply, vector, shape=shape))


@dataclasses.dataclass(frozen=True)
class Term:
    """One convolution of the source. The kernel has its spatial axes first, then in/groups, then out."""

    kernel: Constant
    window: Window
    bias: Constant | None = None
    apart: ConvolvedApart | PooledApart | None = None

    @property
    def size(self) -> tuple[int, ...]:
        """The size of the kernel along the spatial dimensions."""
        return self.kernel.shape[:-2]

    @property
    def cost(self) -> float:
        """Multiply-adds for one pixel of the result, computed the cheapest way that is known."""
        return self.apart.cost if self.apart else math.prod(self.kernel.shape)

    def scaled(self, vector: Constant) -> Term:
        """Return it with its result multiplied by a constant of each channel."""
        bias = None if self.bias is None else self.bias.map("multiply", np.multiply, vector, shape=self.bias.shape)
        kernel = self.kernel.map("multiply", np.multiply, vector, shape=self.kernel.shape)
        apart = None if self.apart is None else self.apart.scaled(vector)
        return dataclasses.replace(self, kernel=kernel, bias=bias, apart=apart)

    def bias_with(self, shift: Constant | None) -> Constant | None:
        """Return the sum of its bias and another; None where there is neither."""
        if self.bias is None or shift is None:
            return shift if self.bias is None else self.bias
        return self.bias.map("add", np.add, shift, shape=self.bias.shape)


@dataclasses.dataclass(frozen=True)
class Affine:
    """The sum of `terms`, of the source itself times `scale` where there is one, and of `shift`.

    With `view`, it is the view of the source that is scaled. Without terms it is an elementwise map, and stays one.
    """

    source: Node
    source_shape: tuple[int, ...]
    aval: jax.core.ShapedArray
    terms: tuple[Term, ...] = ()
    scale: Constant | None = None
    shift: Constant | None = None
    view: View | None = None
    scopes: tuple[str, ...] = ()

    @property
    def is_view(self) -> bool:
        """Whether it is a view and nothing more."""
        return self.view is not None and not self.terms and self.shift is None and is_one(self.scale)

    @property
    def channel_axis(self) -> int | None:
        """The channel axis of the result; None where no convolution says which it is."""
        return self.terms[0].window.axes[1] if self.terms else None

    def reading(self, aval: jax.core.ShapedArray, term: Term, scopes: tuple[str, ...]) -> Affine:
        """Return a convolution of the value that this one is affine in."""
        return Affine(self.source, self.source_shape, aval, terms=(term,), scopes=scopes)

    def shift_vector(self, axis: int) -> Constant | None:
        """Return the shift as a vector of the channels, which lie along an axis; None where there is no shift."""
        if self.shift is None:
            return None
        vector = self.shift.vector(len(self.aval.shape), axis)
        assert vector is not None
        return vector

    def times(self, factor: Constant) -> Affine | None:
        """Return it multiplied by a constant; None where that is not a scale of the channels."""
        fitting = self._fitting(factor)
        if fitting is None:
            return None
        terms: tuple[Term, ...] = ()
        if self.terms:
            vector = fitting.vector(len(self.aval.shape), self.terms[0].window.axes[1])
            assert vector is not None
            terms = tuple(term.scaled(vector) for term in self.terms)
        scale, shift = (
            None if constant is None else _combine(np.multiply, constant, fitting)
            for constant in (self.scale, self.shift)
        )
        return dataclasses.replace(self, terms=terms, scale=scale, shift=shift)

    def plus(self, summand: Constant) -> Affine | None:
        """Return it shifted by a constant; None where that is not a shift of the channels."""
        fitting = self._fitting(summand)
        return None if fitting is None else dataclasses.replace(self, shift=_sum(self.shift, fitting))

    def add(self, other: Affine) -> Affine | None:
        """Return the sum of two that are affine in one value; None where no single convolution could compute it."""
        if self.source != other.source or self.aval.dtype != other.aval.dtype or self.aval.shape != other.aval.shape:
            return None
        views = {each.view for each in (self, other) if each.scale is not None}
        if len(views) > 1:
            return None
        terms = self.terms + other.terms
        axes = {(term.window.source_axes, term.window.axes) for term in terms}
        if len(axes) > 1:
            return None
        scale = _sum(self.scale, other.scale)
        if terms and scale is not None:
            ((source_axes, result_axes),) = axes
            if source_axes != result_axes or scale.vector(len(self.aval.shape), result_axes[1]) is None:
                return None
        shift = _sum(self.shift, other.shift)
        if terms and shift is not None and shift.vector(len(self.aval.shape), terms[0].window.axes[1]) is None:
            return None
        return dataclasses.replace(
            self, terms=terms, scale=scale, shift=shift, view=next(iter(views), None), scopes=self.scopes + other.scopes
        )

    def _fitting(self, constant: Constant) -> Constant | None:
        """Return a constant in the rank of the result; None where it varies along more than the channels."""
        rank = len(self.aval.shape)
        if constant.dtype != self.aval.dtype:
            return None
        sizes = constant.stored_in_rank(rank)
        varying = [axis for axis, size in enumerate(sizes) if size != 1]
        if len(varying) > 1 or (self.terms and varying not in ([], [self.channel_axis])):
            return None
        return Constant(
            self.aval.shape,
            constant.dtype,
            lambda: constant.value,
            derivation=("fit", constant.fingerprint),
            stored_shape=sizes,
            variable=constant.variable,
        )


def is_one(scale: Constant | None) -> bool:
    """Whether a scale is known to change nothing."""
    return scale is not None and not scale.variable and bool(np.all(scale.value == 1))


def ones(aval: jax.core.ShapedArray) -> Constant:
    """Return the constant 1 in the rank of an array."""
    return Constant(
        aval.shape,
        aval.dtype,
        lambda: np.ones([1] * len(aval.shape)),
        derivation=("one",),
        stored_shape=[1] * len(aval.shape),
        variable=False,
    )


def _combine(operation: Any, left: Constant, right: Constant) -> Constant:
    return Constant(
        left.shape,
        left.dtype,
        lambda: operation(left.value, right.value),
        derivation=(operation.__name__, left.fingerprint, right.fingerprint),
        stored_shape=np.broadcast_shapes(left.stored_shape, right.stored_shape),
        variable=left.variable or right.variable,
    )


def _sum(left: Constant | None, right: Constant | None) -> Constant | None:
    if left is None or right is None:
        return right if left is None else left
    return _combine(np.add, left, right)
