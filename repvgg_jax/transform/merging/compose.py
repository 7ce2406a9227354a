"""Convolutions of convolutions, where one of the two has a single tap: merged exactly, or not at all."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from repvgg_jax.transform.merging.affine import Affine, ConvolvedApart, Term, is_one
from repvgg_jax.transform.merging.merge import merge
from repvgg_jax.transform.merging.reading.constants import Constant
from repvgg_jax.transform.windows import Window


class Refusal(NamedTuple):
    """The reason why two things are not merged."""

    reason: str


_SHIFTED = Refusal(
    "a convolution pads with zeros what was shifted before it: it merges only if the padding stands before both"
)
_SEVERAL = Refusal("a convolution reads the sum of convolutions that are not one")
_UNLIKE = Refusal(
    "two convolutions in a row of which one is grouped or transposed, or which differ in layout or precision"
)
_LARGE = Refusal("two convolutions in a row both have more than one tap, or the 1×1 one leaves pixels out or adds some")
COSTLY = Refusal(
    "merged, a convolution, or a mean over windows, of a convolution would take more multiply-adds: "
    "fewest_convolutions=True merges it"
)


def scale_before(source: Affine, term: Term) -> tuple[Constant, Constant | None] | Refusal | None:
    """Fold an elementwise map of the source into the convolution that reads it.

    Returns:
      Kernel and bias; a refusal where the shift would meet zeros of the padding, which it does not shift; None where
      the map is not one of the channels.
    """
    window, rank = term.window, len(source.aval.shape)
    axis = window.source_axes[1]
    scale = None if source.scale is None else source.scale.vector(rank, axis)
    shift = None if source.shift is None else source.shift.vector(rank, axis)
    if scale is None or (shift is None and source.shift is not None):
        return None
    if shift is not None and (_pads(window) or any(step != 1 for step in window.source_dilation)):
        return _SHIFTED
    if window.batch_groups != 1:
        return None
    if not scale.variable and scale.shape == (1,) and not is_one(source.scale):
        # A number of the program, not of the variables, is often made of an image's size, as in a mean over it. In the
        # kernel it would tie the kernel to that size.
        return None
    kernel = term.kernel.map(
        "scale before",
        lambda kernel, scale: kernel * _by_group(scale, kernel, window.groups),
        scale,
        shape=term.kernel.shape,
        static=window.groups,
    )
    if shift is None:
        return kernel, None
    bias = term.kernel.map(
        "shift before",
        lambda kernel, shift: (kernel * _by_group(shift, kernel, window.groups)).sum(tuple(range(kernel.ndim - 1))),
        shift,
        shape=term.kernel.shape[-1:],
        static=window.groups,
    )
    return kernel, bias


def _by_group(vector: np.ndarray, kernel: np.ndarray, groups: int) -> np.ndarray:
    """Arrange a vector of the source's channels as (in/groups, out): the channels that each output reads."""
    *_, within, out = kernel.shape
    channels = np.broadcast_to(vector, (groups * within,)).reshape(groups, within)
    return np.repeat(channels, out // groups, axis=0).T


def compose(inner: Affine, outer: Term, fewest: bool) -> Term | Refusal:
    """Return the one convolution that a convolution of a convolution is.

    Args:
      inner: The value in between, with terms.
      outer: The convolution that reads it.
      fewest: Whether to aim at the fewest convolutions, whatever they cost.

    Returns:
      The term, with the way apart kept where that is cheaper; a refusal where no single convolution is exact.
    """
    terms, scale = merge(inner, fewest)
    if len(terms) != 1 or scale is not None:
        return _SEVERAL
    (first,), second = terms, outer
    a, b = first.window, second.window
    if (
        a.axes != b.source_axes
        or a.groups != 1
        or b.groups != 1
        or a.batch_groups != 1
        or b.batch_groups != 1
        or (a.precision, a.preferred) != (b.precision, b.preferred)
        or any(step != 1 for step in (*a.source_dilation, *b.source_dilation))
    ):
        return _UNLIKE
    bias = first.bias_with(inner.shift_vector(a.axes[1]))
    if bias is not None and _pads(b):
        return _SHIFTED
    one = _kernel_before(first, second) or _kernel_after(first, second)
    if one is None:
        return _LARGE
    term = Term(*one, None if bias is None else _through(second.kernel, bias))
    cost = (first.cost if reads_between(second) else 0) + second.cost
    if fewest or term.cost <= cost:
        return term
    return dataclasses.replace(term, apart=ConvolvedApart(inner, outer, cost))


def _kernel_before(first: Term, second: Term) -> tuple[Constant, Window] | None:
    """Merge a convolution of a single tap with any after it: the padding adds up."""
    a, b = first.window, second.window
    if any(size != 1 for size in first.size) or any(step != 1 for step in a.strides) or _crops(a):
        return None
    padding = tuple(
        (low + lower, high + higher) for (low, high), (lower, higher) in zip(a.padding, b.padding, strict=True)
    )
    kernel = second.kernel.map(
        "1×1, then k×k",
        lambda second, first: np.einsum("im,...mo->...io", first.reshape(first.shape[-2:]), second),
        first.kernel,
        shape=(*second.size, first.kernel.shape[-2], second.kernel.shape[-1]),
    )
    return kernel, dataclasses.replace(b, source_axes=a.source_axes, padding=padding)


def _kernel_after(first: Term, second: Term) -> tuple[Constant, Window] | None:
    """Merge any convolution with one after it of a single tap, which leaves no pixel out and adds none."""
    a, b = first.window, second.window
    if any(size != 1 for size in second.size) or any(step != 1 for step in b.strides) or _pads(b) or _crops(b):
        return None
    kernel = first.kernel.map(
        "k×k, then 1×1",
        lambda first, second: np.einsum("...im,mo->...io", first, second.reshape(second.shape[-2:])),
        second.kernel,
        shape=(*first.size, first.kernel.shape[-2], second.kernel.shape[-1]),
    )
    return kernel, dataclasses.replace(a, axes=b.axes)


def _through(kernel: Constant, bias: Constant) -> Constant:
    """Return what a convolution without padding makes of a bias before it."""

    def convolved(kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
        products = np.einsum("...mo,m->...o", kernel, np.broadcast_to(bias, kernel.shape[-2:-1]))
        return products.sum(tuple(range(kernel.ndim - 2)))

    return kernel.map("bias through", convolved, bias, shape=kernel.shape[-1:])


def reads_between(outer: Term) -> bool:
    """Whether every pixel of the result reads at least one of the value in between, however small that is.

    From the window alone, so that images of every size are merged alike.
    """
    window = outer.window
    reach = [(size - 1) * step for size, step in zip(outer.size, window.dilation, strict=True)]
    return all(low + high <= span for (low, high), span in zip(window.padding, reach, strict=True))


def _pads(window: Window) -> bool:
    return any(low > 0 or high > 0 for low, high in window.padding)


def _crops(window: Window) -> bool:
    return any(low < 0 or high < 0 for low, high in window.padding)
