"""What each primitive does to a value that is affine in another; None leaves the equation as it is.

A value is the sum of convolutions of a source x, of x itself times a scale, and of a shift, each by channel::

  y = Σᵢ (kᵢ ∗ x + bᵢ) + a x + c

The primitives that are linear, or affine where an operand is constant, make another such sum of it, in which s and t
are constants of each channel and ∗ is a convolution. By family, in the order of the tables below::

  mul       s y          =  Σ (s kᵢ ∗ x + s bᵢ) + s a x + s c
  div       y / s        =  (1/s) y
  neg       -y           =  (-1) y
  add       y + t        :  c becomes c + t
            y + y'       :  the terms stand together, a + a', c + c'; `merge` makes one kernel of those that fit
  sub       y - t, y - y', t - y  by add and neg
  convert_element_type  y, where the dtype stays

  convolution of x             a term (k, 0)
              of a x + c       k ∗ (a x + c)          =  (k a) ∗ x + Σ k c                without padding, if c ≠ 0
              of k₁ ∗ x + b₁   k₂ ∗ (k₁ ∗ x + b₁)     =  (k₂ k₁) ∗ x + Σ k₂ b₁            one of the two with one tap
              of x, padded or cropped                 =  k ∗ x with other padding
  pad, slice  a view of x, should a convolution beside or after it take it in
  reduce_window_sum of k ∗ x + b  =  1 ∗ (k ∗ x + b)  with a kernel of ones for each channel

Kernels have in/groups and out as their last axes, so that s k scales the last axis, and k a the one before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import JaxprEqn

from repvgg_jax.transform.equations import result_aval
from repvgg_jax.transform.merging.affine import Affine, PooledApart, Term, View, ones
from repvgg_jax.transform.merging.builder import Builder
from repvgg_jax.transform.merging.compose import Refusal, compose, reads_between, scale_before
from repvgg_jax.transform.merging.reading.constants import Constant, is_static
from repvgg_jax.transform.windows import Window, kernel_order, read_window

Value = Constant | Affine


def _convolution(builder: Builder, equation: JaxprEqn, source: Value, kernel: Value) -> Value | None:
    aval, params = result_aval(equation), equation.params
    if not isinstance(kernel, Constant) or not isinstance(source, Affine):
        return None
    if kernel.dtype != aval.dtype or source.aval.dtype != aval.dtype or not _is_static(params["padding"]):
        return None
    term, scopes = _term(kernel, params), (*source.scopes, builder.scope)
    taken_in = _taken_in(builder, source, term)
    if taken_in is not None:
        return source.reading(aval, taken_in, scopes)
    source = builder.materialized(source)
    return Affine(source.source, source.aval.shape, aval, terms=(term,), scopes=scopes[-1:])


def _term(kernel: Constant, params: dict[str, Any]) -> Term:
    """Return a convolution as a term, with the axes of its kernel in our order."""
    order = kernel_order(params)
    ordered = kernel.map(
        "transpose",
        lambda value: np.broadcast_to(value, kernel.shape).transpose(order),
        shape=tuple(kernel.shape[axis] for axis in order),
        static=order,
    )
    return Term(ordered, read_window(params))


def _taken_in(builder: Builder, source: Affine, term: Term) -> Term | None:
    """Return what was held back before a convolution and the convolution in one; None where no single one is exact."""
    if source.is_view:
        widened = _widened(term.window, source)
        return None if widened is None else Term(term.kernel, widened)
    if source.terms:
        composed = compose(source, term, builder.fewest)
        if isinstance(composed, Term):
            return composed
        builder.note(composed.reason)
    elif source.view is None:
        scaled = scale_before(source, term)
        if isinstance(scaled, Refusal):
            builder.note(scaled.reason)
        elif scaled is not None:
            kernel, bias = scaled
            return Term(kernel, term.window, bias)
    return None


def _whole(padding: Sequence[tuple[Any, Any]]) -> tuple[tuple[int, int], ...]:
    return tuple((int(low), int(high)) for low, high in padding)


def _is_static(padding: Sequence[tuple[Any, Any]]) -> bool:
    """Whether padding holds no symbol of a shape."""
    return all(map(is_static, padding))


def _pad(builder: Builder, equation: JaxprEqn, source: Value, value: Value) -> Value | None:
    config = equation.params["padding_config"]
    if not isinstance(source, Affine) or not isinstance(value, Constant) or value.variable or np.any(value.value != 0):
        return None
    if not _is_static([widths[:2] for widths in config]):
        return None
    if any(low < 0 or high < 0 or between for low, high, between in config):
        return None
    return _view(builder, equation, source, _whole([widths[:2] for widths in config]), (1,) * len(config))


def _slice(builder: Builder, equation: JaxprEqn, source: Value) -> Value | None:
    start, limit = equation.params["start_indices"], equation.params["limit_indices"]
    if not isinstance(source, Affine):
        return None
    # What is cropped behind the last element that is read makes no difference; sizes may be symbols.
    padding = [(-low, high - size) for low, high, size in zip(start, limit, source.aval.shape, strict=True)]
    if not _is_static(padding):
        return None
    steps = equation.params["strides"] or (1,) * len(padding)
    return _view(builder, equation, source, padding, tuple(steps))


def _view(
    builder: Builder, equation: JaxprEqn, source: Affine, padding: Sequence[tuple[int, int]], steps: tuple[int, ...]
) -> Affine:
    source, aval = builder.materialized(source), result_aval(equation)
    return dataclasses.replace(source, aval=aval, scale=ones(aval), view=View(tuple(padding), steps))


def _widened(window: Window, source: Affine) -> Window | None:
    """Return the window of a convolution that pads or crops for itself."""
    view = source.view
    spatial = None if view is None else view.of(window.source_axes)
    if spatial is None or any(step != 1 for step in (*window.source_dilation, *spatial[1])):
        return None
    pads = any(low > 0 or high > 0 for low, high in window.padding)
    if pads and any(low < 0 or high < 0 for low, high in spatial[0]):
        # Zeros would stand where the source goes on.
        return None
    both = tuple(
        (low + lower, high + higher) for (low, high), (lower, higher) in zip(window.padding, spatial[0], strict=True)
    )
    return dataclasses.replace(window, padding=both)


def _pool(builder: Builder, equation: JaxprEqn, source: Value) -> Value | None:
    """Read a sum over windows as a convolution of each channel with ones, should a convolution beside it take it in."""
    if not isinstance(source, Affine) or len(source.terms) != 1:
        return None
    aval, (inner,) = result_aval(equation), source.terms
    pooling = _pooling(equation.params, inner.window, source.aval)
    if pooling is None:
        return None
    composed = compose(source, pooling, builder.fewest)
    if isinstance(composed, Refusal):
        return None
    if not builder.fewest:
        cost = inner.cost if reads_between(pooling) else 0
        composed = dataclasses.replace(composed, apart=PooledApart(source, equation, None, cost))
    return source.reading(aval, composed, source.scopes)


def _pooling(params: dict[str, Any], inner: Window, source: jax.core.ShapedArray) -> Term | None:
    """Return the sum over windows as a convolution of what another makes; None where it is none of each channel."""
    sizes, strides, padding = params["window_dimensions"], params["window_strides"], params["padding"]
    batch, channel, *spatial = inner.axes
    if not _is_static(padding) or any(step != 1 for step in params["base_dilation"]):
        return None
    if any((sizes[axis], strides[axis], tuple(padding[axis])) != (1, 1, (0, 0)) for axis in (batch, channel)):
        return None
    channels = source.shape[channel]
    shape = (*(sizes[axis] for axis in spatial), channels, channels)
    kernel = Constant(
        shape,
        source.dtype,
        lambda: np.broadcast_to(np.eye(channels), shape),
        derivation=("ones by channel",),
        variable=False,
    )
    window = dataclasses.replace(
        inner,
        strides=tuple(strides[axis] for axis in spatial),
        padding=_whole([padding[axis] for axis in spatial]),
        source_dilation=(1,) * len(spatial),
        dilation=tuple(params["window_dilation"][axis] for axis in spatial),
        groups=1,
        batch_groups=1,
        source_axes=inner.axes,
    )
    return Term(kernel, window)


def _multiply(builder: Builder, equation: JaxprEqn, left: Value, right: Value) -> Value | None:
    affine, constant = (left, right) if isinstance(left, Affine) else (right, left)
    if isinstance(affine, Affine) and isinstance(constant, Constant):
        return affine.times(constant)
    return None


def _divide(builder: Builder, equation: JaxprEqn, left: Value, right: Value) -> Value | None:
    if isinstance(left, Affine) and isinstance(right, Constant):
        return left.times(_mapped(right, np.reciprocal))
    return None


def _add(builder: Builder, equation: JaxprEqn, left: Value, right: Value) -> Value | None:
    if isinstance(left, Affine) and isinstance(right, Affine):
        return left.add(right)
    affine, constant = (left, right) if isinstance(left, Affine) else (right, left)
    return affine.plus(constant) if isinstance(affine, Affine) and isinstance(constant, Constant) else None


def _subtract(builder: Builder, equation: JaxprEqn, left: Value, right: Value) -> Value | None:
    if isinstance(right, Constant):
        return _add(builder, equation, left, _mapped(right, np.negative))
    negated = _negate(builder, equation, right)
    return None if negated is None else _add(builder, equation, left, negated)


def _negate(builder: Builder, equation: JaxprEqn, value: Value) -> Value | None:
    if not isinstance(value, Affine):
        return None
    minus = Constant((), value.aval.dtype, lambda: np.asarray(-1.0), derivation=("minus one",), variable=False)
    return value.times(minus)


def _cast(builder: Builder, equation: JaxprEqn, value: Value) -> Value | None:
    # Another dtype rounds elsewhere than the fold would.
    if isinstance(value, Affine) and value.aval.dtype == equation.params["new_dtype"]:
        return value
    if isinstance(value, Affine) and value.terms:
        builder.note(
            "the dtype changes after a convolution, and a fold would round elsewhere: merge in float32, then cast"
        )
    return None


def _mapped(constant: Constant, function: Callable[[np.ndarray], np.ndarray]) -> Constant:
    return Constant(
        constant.shape,
        constant.dtype,
        lambda: function(constant.value),
        derivation=(function.__name__, constant.fingerprint),
        stored_shape=constant.stored_shape,
        variable=constant.variable,
    )


Rule = Callable[..., Value | None]

# Their operands have the shape of the result, or are constants.
ELEMENTWISE: dict[str, Rule] = {
    "mul": _multiply,
    "div": _divide,
    "neg": _negate,
    "add": _add,
    "add_any": _add,
    "sub": _subtract,
    "convert_element_type": _cast,
}
# Their results have other shapes than their operands.
WINDOWED: dict[str, Rule] = {
    "conv_general_dilated": _convolution,
    "pad": _pad,
    "slice": _slice,
    "reduce_window_sum": _pool,
}
