"""The choice of the convolutions of one value that become one: exact, and as cheap as before unless asked otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from repvgg_jax.reparam.kernels import identity_kernel
from repvgg_jax.transform.merging.affine import Affine, Term
from repvgg_jax.transform.merging.reading.constants import Constant
from repvgg_jax.transform.windows import Window


def merge(affine: Affine, fewest: bool) -> tuple[list[Term], Constant | None]:
    """Merge the terms of a sum, as far as that costs nothing, or, for the fewest convolutions, as far as it is exact.

    Returns:
      The terms that remain, and what remains of the source itself, which is its scale or None.
    """
    merged: list[Term] = []
    for term in sorted(affine.terms, key=lambda term: -term.cost):
        for index, other in enumerate(merged):
            both = _union(other, term, affine)
            if both is not None and (fewest or both.cost <= other.cost + term.cost):
                merged[index] = both
                break
        else:
            merged.append(term)
    if affine.scale is None:
        return merged, None
    for index, term in enumerate(merged):
        own = _identity(affine, term)
        both = None if own is None else _union(term, own, affine)
        if both is not None and (fewest or both.cost <= term.cost):
            merged[index] = both
            return merged, None
    return merged, affine.scale


def _identity(affine: Affine, like: Term) -> Term | None:
    """Return the source itself, or a view of it, as a 1×1 convolution with the groups of another."""
    window, rank, spatial = like.window, len(affine.aval.shape), len(like.size)
    padding, strides = ((0, 0),) * spatial, (1,) * spatial
    if affine.view is not None:
        along = affine.view.of(window.axes)
        if along is None:
            return None
        padding, strides = along
    if (
        window.source_axes != window.axes
        or window.batch_groups != 1
        or any(step != 1 for step in window.source_dilation)
    ):
        return None
    assert affine.scale is not None
    vector = affine.scale.vector(rank, window.axes[1])
    assert vector is not None
    one = identity_kernel(affine.aval.shape[window.axes[1]], groups=window.groups, size=(1,) * spatial)
    kernel = vector.map("identity kernel", lambda scale: one * scale, shape=one.shape)
    return Term(kernel, dataclasses.replace(window, strides=strides, padding=padding, dilation=(1,) * spatial))


def _union(left: Term, right: Term, affine: Affine) -> Term | None:
    """Return one convolution for the sum of two, or None where no kernel covers both."""
    a, b = left.window, right.window
    if (a.strides, a.batch_groups, a.precision, a.preferred) != (b.strides, b.batch_groups, b.precision, b.preferred):
        return None
    if a.batch_groups != 1 or a.source_dilation != b.source_dilation:
        return None
    sizes, padding, dilations, places = [], [], [], []
    for axis, (n, m) in enumerate(zip(left.size, right.size, strict=True)):
        # A kernel of one tap has any dilation.
        dilation = a.dilation[axis] if n > 1 else b.dilation[axis] if m > 1 else 1
        if (n > 1 and a.dilation[axis] != dilation) or (m > 1 and b.dilation[axis] != dilation):
            return None
        (low_a, high_a), (low_b, high_b) = a.padding[axis], b.padding[axis]
        low = max(low_a, low_b)
        if (low - low_a) % dilation or (low - low_b) % dilation:
            return None
        first_a, first_b = (low - low_a) // dilation, (low - low_b) // dilation
        size = max(first_a + n, first_b + m)
        own = [high for n, at, high in ((n, low_a, high_a), (m, low_b, high_b)) if (n, at) == (size, low)]
        high = own[0] if own else _high(affine, a, axis, low, (size - 1) * dilation)
        sizes.append(size)
        padding.append((low, high))
        dilations.append(dilation)
        places.append((first_a, first_b))
    groups = int(np.gcd(a.groups, b.groups))
    window = dataclasses.replace(a, padding=tuple(padding), dilation=tuple(dilations), groups=groups)
    kernels = [
        _placed(_regrouped(term, groups), sizes, [place[side] for place in places])
        for side, term in enumerate((left, right))
    ]
    kernel = kernels[0].map("add", np.add, kernels[1], shape=kernels[0].shape)
    return Term(kernel, window, left.bias_with(right.bias))


def _high(affine: Affine, window: Window, axis: int, low: int, reach: int) -> int:
    """Return the padding behind the source for as many windows as there are; none, if that gives as many."""
    outputs, stride = affine.aval.shape[window.axes[2 + axis]], window.strides[axis]
    # Zeros stand between the pixels of the source of a transposed convolution.
    length = (affine.source_shape[window.source_axes[2 + axis]] - 1) * window.source_dilation[axis] + 1
    least = (outputs - 1) * stride - low + reach - (length - 1)
    return max(least, min(0, least + stride - 1))


def _placed(kernel: Constant, sizes: Sequence[int], firsts: Sequence[int]) -> Constant:
    """Return the kernel at its place among zeros."""
    spatial = len(sizes)
    widths = [
        (first, size - first - own) for size, first, own in zip(sizes, firsts, kernel.shape[:spatial], strict=True)
    ]
    shape = (*sizes, *kernel.shape[spatial:])
    return kernel.map("pad", lambda value: np.pad(value, [*widths, (0, 0), (0, 0)]), shape=shape, static=widths)


def _regrouped(term: Term, groups: int) -> Constant:
    """Return the kernel in fewer groups, with zeros for the channels that its own groups do not read."""
    before = term.window.groups
    if before == groups:
        return term.kernel
    *spatial, within, out = term.kernel.shape
    ratio = before // groups

    def regroup(value: np.ndarray) -> np.ndarray:
        wide = np.zeros((*spatial, within * ratio, out))
        per_group = out // before
        for group in range(before):
            first = group % ratio * within
            columns = slice(group * per_group, (group + 1) * per_group)
            wide[..., first : first + within, columns] = value[..., columns]
        return wide

    return term.kernel.map("regroup", regroup, shape=(*spatial, within * ratio, out), static=(before, groups))
