"""Grouped convolutions as one ungrouped convolution per group."""

import jax
import jax.numpy as jnp

from repvgg_jax.ops.lowering import Lowering, Shape, Window


def by_group(lowering: Lowering) -> Lowering:
    """Lifts a lowering of ungrouped convolutions to one of grouped convolutions.

    Args:
        lowering: called once per group, with `groups=1`.

    Returns:
        The lowering of the whole; where there is one group, `lowering` itself does the work.
    """

    def channels(shape: Shape, groups: int) -> Shape:
        return *shape[:3], shape[3] // groups

    def supports(input_shape: Shape, kernel_shape: Shape, window: Window) -> bool:
        shapes = channels(input_shape, window.groups), channels(kernel_shape, window.groups)
        return lowering.supports(*shapes, window._replace(groups=1))

    def forward(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
        one, count = window._replace(groups=1), window.groups
        pairs = zip(jnp.split(x, count, 3), jnp.split(kernel, count, 3), strict=True)
        return jnp.concatenate([lowering.forward(*pair, one) for pair in pairs], 3)

    def input_gradient(dy: jax.Array, kernel: jax.Array, window: Window, input_shape: Shape) -> jax.Array:
        one, count = window._replace(groups=1), window.groups
        pairs = zip(jnp.split(dy, count, 3), jnp.split(kernel, count, 3), strict=True)
        shape = channels(input_shape, count)
        return jnp.concatenate([lowering.input_gradient(*pair, one, shape) for pair in pairs], 3)

    def kernel_gradient(x: jax.Array, dy: jax.Array, window: Window, kernel_shape: Shape) -> jax.Array:
        one, count = window._replace(groups=1), window.groups
        pairs = zip(jnp.split(x, count, 3), jnp.split(dy, count, 3), strict=True)
        shape = channels(kernel_shape, count)
        return jnp.concatenate([lowering.kernel_gradient(*pair, one, shape) for pair in pairs], 3)

    return Lowering(supports, forward, input_gradient, kernel_gradient)
