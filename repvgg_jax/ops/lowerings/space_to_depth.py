"""Space to depth: a 3×3 convolution of few channels at stride 2 as a 2×2 convolution of many at stride 1.

Cells of 2×2 pixels become channels. Tensor cores want channels in multiples of eight, and cuDNN pads an image of three
colours to eight in memory before a slow kernel. Four times three are nearly sixteen, on a quarter of the pixels.

References:
  Ying et al., *Image Classification at Supercomputer Scale*, arXiv:1811.06992, section on the first layer.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from repvgg_jax.ops.lowerings import plain
from repvgg_jax.ops.lowerings.base import Lowering, Shape, Window, transposed


def supports(input_shape: Shape, kernel_shape: Shape, window: Window) -> bool:
    """Return whether a 3×3 kernel is ungrouped, at stride 2, with at most four input channels."""
    return (
        kernel_shape[:2] == (3, 3)
        and kernel_shape[2] <= 4
        and window.strides == (2, 2)
        and window.groups == 1
        and min(window.output_size(input_shape, kernel_shape)) > 0
    )


def _fill(channels: int) -> int:
    return -(4 * channels) % 8


def _image_cells(x: jax.Array, window: Window, outputs: tuple[int, int]) -> jax.Array:
    """Turn (N, H, W, C) into (N, rows + 1, columns + 1, 4 C and zeros up to a multiple of eight)."""
    batch, *size, channels = x.shape
    edges = [
        (low, 2 * (count + 1) - pixels - low, 0)
        for pixels, count, (low, _) in zip(size, outputs, window.padding, strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
    rows, columns = (count + 1 for count in outputs)
    cells = x.reshape(batch, rows, 2, columns, 2, channels).swapaxes(2, 3).reshape(batch, rows, columns, -1)
    return jnp.pad(cells, ((0, 0), (0, 0), (0, 0), (0, _fill(channels))))


def _kernel_cells(kernel: jax.Array) -> jax.Array:
    """Turn (3, 3, C, out) into (2, 2, 4 C and zeros up to a multiple of eight, out)."""
    channels, out = kernel.shape[2:]
    even = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    cells = even.reshape(2, 2, 2, 2, channels, out).swapaxes(1, 2).reshape(2, 2, -1, out)
    return jnp.pad(cells, ((0, 0), (0, 0), (0, _fill(channels)), (0, 0)))


def forward(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Compute the 2×2 convolution of the cells, without padding."""
    cells = _image_cells(x, window, window.output_size(x.shape, kernel.shape))
    return plain.forward(cells, _kernel_cells(kernel), Window())


def kernel_gradient(x: jax.Array, dy: jax.Array, window: Window, kernel_shape: Shape) -> jax.Array:
    """Compute the transpose of the forward pass."""
    convolve = partial(forward, x, window=window)
    return transposed(convolve, kernel_shape, dy)


lowering = Lowering("space_to_depth", supports, forward, plain.input_gradient, kernel_gradient)
