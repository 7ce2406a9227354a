"""im2col: shifted copies of the image side by side, then one matrix product.

Taps that meet nothing but padding (all but the centre, on a 1×1 map) are left out, which is where the small maps of a
network for small images gain most.

References:
  Chellapilla, Puri & Simard, *High Performance Convolutional Neural Networks for Document Processing*, 2006.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from repvgg_jax.ops.lowerings.base import Lowering, Shape, Window, transposed
from repvgg_jax.ops.materialize import materialize


def supports(input_shape: Shape, kernel_shape: Shape, window: Window) -> bool:
    """Return whether kernels, ungrouped and of any size, fit into the padded image and touch it somewhere."""
    rows, columns = window.output_size(input_shape, kernel_shape)
    return (
        window.groups == 1
        and min(rows, columns) > 0
        and all(
            len(_live_taps(*axis)) > 0
            for axis in zip(
                input_shape[1:3],
                (rows, columns),
                kernel_shape[:2],
                window.strides,
                window.padding,
                strict=True,
            )
        )
    )


def _live_taps(size: int, outputs: int, taps: int, stride: int, padding: tuple[int, int]) -> range:
    """Return the taps of one axis that meet the image at some output. They are always neighbours."""
    live = [tap for tap in range(taps) if any(0 <= o * stride + tap - padding[0] < size for o in range(outputs))]
    return range(live[0], live[-1] + 1) if live else range(0)


def _taps(input_shape: Shape, kernel_shape: Shape, window: Window) -> tuple[range, range]:
    outputs = window.output_size(input_shape, kernel_shape)
    rows, columns = (
        _live_taps(*axis)
        for axis in zip(input_shape[1:3], outputs, kernel_shape[:2], window.strides, window.padding, strict=True)
    )
    return rows, columns


def _patches(x: jax.Array, window: Window, outputs: tuple[int, int], taps: tuple[range, range]) -> jax.Array:
    """Return the patches as (N, rows, columns, live taps * channels), taps in the order of the kernel."""
    (top, bottom), (left, right) = window.padding
    padded = jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    (rows, columns), (down, across) = outputs, window.strides
    return jnp.concatenate(
        [
            padded[:, i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * across + 1 : across]
            for i in taps[0]
            for j in taps[1]
        ],
        axis=-1,
    )


def forward(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Compute one product of the patch matrix with the kernel as (live taps * in, out)."""
    down, across = taps = _taps(x.shape, kernel.shape, window)
    live = kernel[down.start : down.stop, across.start : across.stop]
    patches = _patches(x, window, window.output_size(x.shape, kernel.shape), taps)
    return materialize(jnp.einsum("nhwk,ko->nhwo", patches, live.reshape(-1, kernel.shape[-1])))


def input_gradient(dy: jax.Array, kernel: jax.Array, window: Window, input_shape: Shape) -> jax.Array:
    """Convolve `dy` with the flipped kernel at stride 1. Otherwise take the transpose, which adds shifted copies."""
    backwards = window.backwards(kernel.shape)
    if backwards is not None:
        return forward(dy, kernel[::-1, ::-1].swapaxes(2, 3), backwards)
    convolve = partial(forward, kernel=kernel, window=window)
    return transposed(convolve, input_shape, dy)


def kernel_gradient(x: jax.Array, dy: jax.Array, window: Window, kernel_shape: Shape) -> jax.Array:
    """Compute one product of the patch matrix, transposed, with `dy`. Taps left out are zeros."""
    down, across = taps = _taps(x.shape, kernel_shape, window)
    patches = _patches(x, window, (dy.shape[1], dy.shape[2]), taps)
    live = jnp.einsum("nhwk,nhwo->ko", patches, dy)
    live = live.reshape(len(down), len(across), *kernel_shape[2:])
    missing = [(used.start, size - used.stop, 0) for used, size in zip(taps, kernel_shape[:2], strict=True)]
    return lax.pad(live, jnp.zeros((), live.dtype), (*missing, (0, 0, 0), (0, 0, 0)))


lowering = Lowering("im2col", supports, forward, input_gradient, kernel_gradient)
