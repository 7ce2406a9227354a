"""A 1×1 convolution is a matrix product over the channels; a stride only drops pixels first."""

import jax
import jax.numpy as jnp
from jax import lax

from repvgg_jax.ops.lowerings.base import Lowering, Shape, Window
from repvgg_jax.ops.materialize import materialize


def supports(input_shape: Shape, kernel_shape: Shape, window: Window) -> bool:
    """Return whether a kernel is 1×1, without padding or groups."""
    return kernel_shape[:2] == (1, 1) and window.padding == ((0, 0), (0, 0)) and window.groups == 1


def _sampled(x: jax.Array, window: Window) -> jax.Array:
    return lax.slice(x, (0, 0, 0, 0), x.shape, (1, *window.strides, 1))


def forward(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Sample the pixels, and multiply them by the (in, out) matrix."""
    return materialize(jnp.einsum("nhwi,io->nhwo", _sampled(x, window), kernel[0, 0]))


def input_gradient(dy: jax.Array, kernel: jax.Array, window: Window, input_shape: Shape) -> jax.Array:
    """Multiply by the transposed matrix, and put zeros where no pixel was sampled."""
    dx = jnp.einsum("nhwo,io->nhwi", dy, kernel[0, 0])
    if window.strides == (1, 1):
        return dx
    gaps = [
        (0, size - (sampled - 1) * stride - 1, stride - 1)
        for size, sampled, stride in zip(input_shape[1:3], dy.shape[1:3], window.strides, strict=True)
    ]
    return lax.pad(dx, jnp.zeros((), dx.dtype), ((0, 0, 0), *gaps, (0, 0, 0)))


def kernel_gradient(x: jax.Array, dy: jax.Array, window: Window, kernel_shape: Shape) -> jax.Array:
    """Multiply the sampled pixels, transposed, by `dy`."""
    return jnp.einsum("nhwi,nhwo->io", _sampled(x, window), dy)[None, None]


lowering = Lowering("pointwise", supports, forward, input_gradient, kernel_gradient)
