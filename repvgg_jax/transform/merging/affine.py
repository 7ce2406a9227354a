"""Values that are affine in an earlier value: convolutions of it, and itself, scaled and shifted by channel."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from repvgg_jax.transform.merging.constants import Constant

Node = int


@dataclasses.dataclass(frozen=True)
class Window:
    """How a convolution reads its source; one entry for each spatial dimension."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    source_dilation: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    batch_groups: int
    source_axes: tuple[int, ...]
    """Batch axis, channel axis, spatial axes of the source."""
    axes: tuple[int, ...]
    """The same of the result."""
    precision: Any
    preferred: Any


@dataclasses.dataclass(frozen=True)
class View:
    """A value with zeros around it, or a part of it, evenly spaced; one entry for each axis."""

    padding: tuple[tuple[int, int], ...]
    """Low and high; negative where the value is cropped."""
    steps: tuple[int, ...]

    def of(self, axes: tuple[int, ...]) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]] | None:
        """Padding and steps along the spatial axes; None where batch or channels are not left alone."""
        batch, channel, *spatial = axes
        if any(self.padding[axis] != (0, 0) or self.steps[axis] != 1 for axis in (batch, channel)):
            return None
        return tuple(self.padding[axis] for axis in spatial), tuple(self.steps[axis] for axis in spatial)


@dataclasses.dataclass(frozen=True)
class Apart:
    """Another way to compute a term, for as long as it stands alone: from a value in between.

    Attributes:
      inner: the value in between.
      outer: a convolution of it, or an equation (pooling, padding) with `scale` for its result.
      scale: of each channel, or None.
      cost: multiply-adds for one pixel of the result.
    """

    inner: Affine
    outer: Any
    scale: Constant | None
    cost: float


@dataclasses.dataclass(frozen=True)
class Term:
    """One convolution of the source: the kernel has its spatial axes first, then in/groups, then out."""

    kernel: Constant
    window: Window
    bias: Constant | None = None
    apart: Apart | None = None

    @property
    def size(self) -> tuple[int, ...]:
        """Of the kernel, along the spatial dimensions."""
        return self.kernel.shape[:-2]

    @property
    def cost(self) -> float:
        """Multiply-adds for one pixel of the result, computed the cheapest way there is."""
        return self.apart.cost if self.apart else math.prod(self.kernel.shape)

    def scaled(self, vector: Constant) -> Term:
        """Its result times a constant of each channel."""
        bias = None if self.bias is None else self.bias.map("multiply", np.multiply, vector, shape=self.bias.shape)
        apart = self.apart
        if apart and isinstance(apart.outer, Term):
            apart = dataclasses.replace(apart, outer=apart.outer.scaled(vector))
        elif apart:
            before = apart.scale
            if before is not None:
                shape = np.broadcast_shapes(before.shape, vector.shape)
                apart = dataclasses.replace(apart, scale=before.map("multiply", np.multiply, vector, shape=shape))
            else:
                apart = dataclasses.replace(apart, scale=vector)
        kernel = self.kernel.map("multiply", np.multiply, vector, shape=self.kernel.shape)
        return dataclasses.replace(self, kernel=kernel, bias=bias, apart=apart)


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
        """Of the result; None where no convolution says so."""
        return self.terms[0].window.axes[1] if self.terms else None

    def times(self, factor: Constant) -> Affine | None:
        """Multiplied by a constant; None where that is not a scale of the channels."""
        fitting = self._fitting(factor)
        if fitting is None:
            return None
        terms: tuple[Term, ...] = ()
        if self.terms:
            vector = fitting.vector(len(self.aval.shape), self.terms[0].window.axes[1])
            assert vector is not None
            terms = tuple(term.scaled(vector) for term in self.terms)
        product = lambda constant: None if constant is None else _combine(np.multiply, constant, fitting)  # noqa: E731
        return dataclasses.replace(self, terms=terms, scale=product(self.scale), shift=product(self.shift))

    def plus(self, summand: Constant) -> Affine | None:
        """Shifted by a constant; None where that is not a shift of the channels."""
        fitting = self._fitting(summand)
        return None if fitting is None else dataclasses.replace(self, shift=_sum(self.shift, fitting))

    def add(self, other: Affine) -> Affine | None:
        """The sum of two that are affine in one value; None where no single convolution could compute it."""
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
        """The constant in the rank of the result, where it varies along the channels alone."""
        rank = len(self.aval.shape)
        if constant.dtype != self.aval.dtype:
            return None
        compact = (1,) * (rank - len(constant.compact)) + constant.compact
        varying = [axis for axis, size in enumerate(compact) if size != 1]
        if len(varying) > 1 or (self.terms and varying not in ([], [self.channel_axis])):
            return None
        return Constant(
            self.aval.shape,
            constant.dtype,
            lambda: constant.value,
            recipe=("fit", constant.recipe),
            compact=compact,
            variable=constant.variable,
        )


def is_one(scale: Constant | None) -> bool:
    """Whether a scale is known to change nothing."""
    return scale is not None and not scale.variable and bool(np.all(scale.value == 1))


def ones(aval: Any) -> Constant:
    """One, in the rank of an array."""
    return Constant(
        aval.shape,
        aval.dtype,
        lambda: np.ones([1] * len(aval.shape)),
        recipe=("one",),
        compact=[1] * len(aval.shape),
        variable=False,
    )


def _combine(operation: Any, left: Constant, right: Constant) -> Constant:
    compact = np.broadcast_shapes(left.compact, right.compact)
    return Constant(
        left.shape,
        left.dtype,
        lambda: operation(left.value, right.value),
        recipe=(operation.__name__, left.recipe, right.recipe),
        compact=compact,
        variable=left.variable or right.variable,
    )


def _sum(left: Constant | None, right: Constant | None) -> Constant | None:
    if left is None or right is None:
        return right if left is None else left
    return _combine(np.add, left, right)
