"""Depthwise convolutions as sums of shifted images, each tap weighted by channel.

A channel is read by its own outputs alone, so there is no matrix product to make, and XLA:CPU's convolutions, which
look for one, take ten to sixty times as long as the one loop over pixels and channels that it makes of such a sum.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from repvgg_jax.ops.lowerings.base import Lowering, Shape, Window, transposed
from repvgg_jax.ops.materialize import materialize

_MOST_TAPS = 49


def supports(input_shape: Shape, kernel_shape: Shape, window: Window) -> bool:
    """Return whether there is one group per channel, with up to 7×7 taps."""
    return (
        window.groups == input_shape[3] > 1
        and math.prod(kernel_shape[:2]) <= _MOST_TAPS
        and min(window.output_size(input_shape, kernel_shape)) > 0
    )


def _shifted(x: jax.Array, window: Window, kernel_shape: Shape, outputs: tuple[int, int]) -> list[jax.Array]:
    """Return the pixels that each tap meets, (N, rows, columns, out), with each channel as often as it has outputs."""
    if kernel_shape[3] != x.shape[3]:
        x = jnp.repeat(x, kernel_shape[3] // x.shape[3], axis=3)
    (top, bottom), (left, right) = window.padding
    if any((top, bottom, left, right)):
        x = materialize(jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0))))
    (rows, columns), (down, across) = outputs, window.strides
    return [
        x[:, i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * across + 1 : across]
        for i in range(kernel_shape[0])
        for j in range(kernel_shape[1])
    ]


def forward(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Sum over the taps. The sum is written to memory, since each of several readers would compute it anew."""
    taps = _shifted(x, window, kernel.shape, window.output_size(x.shape, kernel.shape))
    weights = kernel.reshape(-1, 1, 1, 1, kernel.shape[3])  # in the rank of the images
    weighted = [tap * weight for tap, weight in zip(taps, weights, strict=True)]
    return materialize(sum(weighted[1:], weighted[0]))


def input_gradient(dy: jax.Array, kernel: jax.Array, window: Window, input_shape: Shape) -> jax.Array:
    """Convolve `dy` with the flipped kernel at stride 1. Otherwise take the transpose, which adds shifted copies."""
    backwards = window.backwards(kernel.shape)
    if backwards is not None and kernel.shape[3] == input_shape[3]:
        return forward(dy, kernel[::-1, ::-1], backwards)
    convolve = partial(forward, kernel=kernel, window=window)
    return transposed(convolve, input_shape, dy)


def kernel_gradient(x: jax.Array, dy: jax.Array, window: Window, kernel_shape: Shape) -> jax.Array:
    """Multiply every tap by `dy`, and sum over the batch first: a sum over all axes at once is not vectorised."""
    taps = _shifted(x, window, kernel_shape, (dy.shape[1], dy.shape[2]))
    sums = [materialize((tap * dy).sum(0)).sum((0, 1)) for tap in taps]
    return jnp.stack(sums).reshape(kernel_shape)


lowering = Lowering("depthwise", supports, forward, input_gradient, kernel_gradient)
