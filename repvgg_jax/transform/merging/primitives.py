"""What each primitive does to values that are affine in another; None leaves the equation as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from repvgg_jax.transform.merging.affine import Affine, Apart, Term, View, Window, ones
from repvgg_jax.transform.merging.builder import Emitter
from repvgg_jax.transform.merging.compose import Refusal, compose, pixels_read, scale_before
from repvgg_jax.transform.merging.constants import Constant, is_static

Value = Constant | Affine


def _convolution(emitter: Emitter, equation: Any, source: Value, kernel: Value) -> Value | None:
    if not isinstance(kernel, Constant) or not isinstance(source, Affine):
        return None
    aval, p = equation.outvars[0].aval, equation.params
    if kernel.dtype != aval.dtype or source.aval.dtype != aval.dtype:
        return None
    if not _is_static(p["padding"]):
        return None
    numbers = p["dimension_numbers"]
    out, within, *spatial = numbers.rhs_spec
    order = (*spatial, within, out)
    shape = tuple(kernel.shape[axis] for axis in order)
    canonical = kernel.map(
        "transpose", lambda value: np.broadcast_to(value, kernel.shape).transpose(order), shape=shape, by=order
    )
    window = Window(
        tuple(p["window_strides"]),
        tuple((int(low), int(high)) for low, high in p["padding"]),
        tuple(p["lhs_dilation"]),
        tuple(p["rhs_dilation"]),
        p["feature_group_count"],
        p["batch_group_count"],
        tuple(numbers.lhs_spec),
        tuple(numbers.out_spec),
        p["precision"],
        p["preferred_element_type"],
    )
    term, scopes = Term(canonical, window), (*source.scopes, emitter.scope)
    if source.is_view:
        widened = _widened(window, source)
        if widened is not None:
            term = Term(canonical, widened)
            return Affine(source.source, source.source_shape, aval, terms=(term,), scopes=scopes)
    elif source.terms:
        composed = compose(source, term, emitter.fewest)
        if not isinstance(composed, Refusal):
            return Affine(source.source, source.source_shape, aval, terms=(composed,), scopes=scopes)
        emitter.leave(composed.reason)
    elif source.view is None:
        before = scale_before(source, term)
        if isinstance(before, Refusal):
            emitter.leave(before.reason)
        elif before is not None:
            term = Term(before[0], window, before[1])
            return Affine(source.source, source.source_shape, aval, terms=(term,), scopes=scopes)
    source = emitter.materialized(source)
    return Affine(source.source, source.aval.shape, aval, terms=(term,), scopes=scopes[-1:])


def _is_static(padding: Sequence[tuple[Any, Any]]) -> bool:
    """Whether it is known, and does not depend on the symbols of a shape."""
    return all(map(is_static, padding))


def _pad(emitter: Emitter, equation: Any, source: Value, value: Value) -> Value | None:
    config = equation.params["padding_config"]
    if not isinstance(source, Affine) or not isinstance(value, Constant) or value.variable or np.any(value.value != 0):
        return None
    if not _is_static([widths[:2] for widths in config]):
        return None
    if any(low < 0 or high < 0 or between for low, high, between in config):
        return None
    return _view(emitter, equation, source, [(int(low), int(high)) for low, high, _ in config], (1,) * len(config))


def _slice(emitter: Emitter, equation: Any, source: Value) -> Value | None:
    start, limit = equation.params["start_indices"], equation.params["limit_indices"]
    if not isinstance(source, Affine):
        return None
    # What is cropped behind the last element that is read makes no difference; sizes may be symbols.
    padding = [(-low, high - size) for low, high, size in zip(start, limit, source.aval.shape, strict=True)]
    if not _is_static(padding):
        return None
    steps = equation.params["strides"] or (1,) * len(padding)
    return _view(emitter, equation, source, padding, tuple(steps))


def _view(
    emitter: Emitter, equation: Any, source: Affine, padding: Sequence[tuple[int, int]], steps: tuple[int, ...]
) -> Affine:
    source, aval = emitter.materialized(source), equation.outvars[0].aval
    return dataclasses.replace(source, aval=aval, scale=ones(aval), view=View(tuple(padding), steps))


def _widened(window: Window, source: Affine) -> Window | None:
    """The window of a convolution that pads or crops for itself."""
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


def _pool(emitter: Emitter, equation: Any, source: Value) -> Value | None:
    """A sum over windows: a convolution of each channel with ones, should a convolution beside it take it in."""
    p, aval = equation.params, equation.outvars[0].aval
    if not isinstance(source, Affine) or not source.terms or len(source.terms) != 1:
        return None
    window = source.terms[0].window
    sizes = tuple(p["window_dimensions"])
    batch, channel, *spatial = window.axes
    other = [(sizes[axis], p["window_strides"][axis], tuple(p["padding"][axis])) for axis in (batch, channel)]
    if not _is_static(p["padding"]) or other != [(1, 1, (0, 0))] * 2 or any(step != 1 for step in p["base_dilation"]):
        return None
    pick = lambda values: tuple(values[axis] for axis in spatial)  # noqa: E731
    channels = source.aval.shape[channel]
    shape = (*pick(sizes), channels, channels)
    ones = lambda: np.broadcast_to(np.eye(channels), shape)  # noqa: E731
    kernel = Constant(shape, aval.dtype, ones, recipe=("ones by channel",), variable=False)
    outer = Window(
        pick(p["window_strides"]),
        tuple((int(low), int(high)) for low, high in pick(p["padding"])),
        (1,) * len(spatial),
        pick(p["window_dilation"]),
        1,
        1,
        window.axes,
        window.axes,
        window.precision,
        window.preferred,
    )
    ones_term = Term(kernel, outer)
    composed = compose(source, ones_term, emitter.fewest)
    if isinstance(composed, Refusal):
        return None
    if not emitter.fewest:
        cost = source.terms[0].cost * pixels_read(ones_term)
        composed = dataclasses.replace(composed, apart=Apart(source, equation, None, cost))
    return Affine(source.source, source.source_shape, aval, terms=(composed,), scopes=source.scopes)


def _multiply(emitter: Emitter, equation: Any, left: Value, right: Value) -> Value | None:
    affine, constant = (left, right) if isinstance(left, Affine) else (right, left)
    if isinstance(affine, Affine) and isinstance(constant, Constant):
        return affine.times(constant)
    return None


def _divide(emitter: Emitter, equation: Any, left: Value, right: Value) -> Value | None:
    if isinstance(left, Affine) and isinstance(right, Constant):
        return left.times(_mapped(right, np.reciprocal))
    return None


def _add(emitter: Emitter, equation: Any, left: Value, right: Value) -> Value | None:
    if isinstance(left, Affine) and isinstance(right, Affine):
        return left.add(right)
    affine, constant = (left, right) if isinstance(left, Affine) else (right, left)
    return affine.plus(constant) if isinstance(affine, Affine) and isinstance(constant, Constant) else None


def _subtract(emitter: Emitter, equation: Any, left: Value, right: Value) -> Value | None:
    if isinstance(right, Constant):
        return _add(emitter, equation, left, _mapped(right, np.negative))
    negated = _negate(emitter, equation, right)
    return None if negated is None else _add(emitter, equation, left, negated)


def _negate(emitter: Emitter, equation: Any, value: Value) -> Value | None:
    if not isinstance(value, Affine):
        return None
    minus = Constant((), value.aval.dtype, lambda: np.asarray(-1.0), recipe=("minus one",), variable=False)
    return value.times(minus)


def _cast(emitter: Emitter, equation: Any, value: Value) -> Value | None:
    # Another dtype rounds elsewhere than the fold would.
    if isinstance(value, Affine) and value.aval.dtype == equation.params["new_dtype"]:
        return value
    if isinstance(value, Affine) and value.terms:
        emitter.leave(
            "the dtype changes after a convolution, and a fold would round elsewhere: merge in float32, then cast"
        )
    return None


def _mapped(constant: Constant, function: Any) -> Constant:
    return Constant(
        constant.shape,
        constant.dtype,
        lambda: function(constant.value),
        recipe=(function.__name__, constant.recipe),
        compact=constant.compact,
        variable=constant.variable,
    )


RULES: dict[str, Callable[..., Value | None]] = {
    "conv_general_dilated": _convolution,
    "mul": _multiply,
    "div": _divide,
    "add": _add,
    "add_any": _add,
    "sub": _subtract,
    "neg": _negate,
    "convert_element_type": _cast,
    "pad": _pad,
    "slice": _slice,
    "reduce_window_sum": _pool,
}
# Their results have other shapes than their operands.
STRETCHING = ("conv_general_dilated", "pad", "reduce_window_sum", "slice")
