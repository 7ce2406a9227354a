"""Grouped convolutions by lowerings of ungrouped ones: one after the other, or all as one batched product."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from repvgg_jax.ops.lowerings.base import Lowering, Shape, Window

# One by one, XLA:CPU's products run faster than batched, but every group is compiled.
FEW_GROUPS = 8


def by_group(lowering: Lowering) -> Lowering:
    """Turn a lowering of ungrouped convolutions into one of grouped convolutions.

    Args:
      lowering: It is called with `groups=1`: once per group up to eight groups, and once under `jax.vmap` beyond, so
        that the time to compile does not grow with the groups.

    Returns:
      The lowering of the whole. Where there is one group, `lowering` itself does the work.
    """

    def one(window: Window) -> Window:
        return window._replace(groups=1)

    def supports(input_shape: Shape, kernel_shape: Shape, window: Window) -> bool:
        shapes = _channels(input_shape, window.groups), _channels(kernel_shape, window.groups)
        return lowering.supports(*shapes, one(window))

    def forward(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
        def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return lowering.forward(x, kernel, one(window))

        return _each(convolve, x, kernel, window.groups)

    def input_gradient(dy: jax.Array, kernel: jax.Array, window: Window, input_shape: Shape) -> jax.Array:
        def convolve(dy: jax.Array, kernel: jax.Array) -> jax.Array:
            return lowering.input_gradient(dy, kernel, one(window), _channels(input_shape, window.groups))

        return _each(convolve, dy, kernel, window.groups)

    def kernel_gradient(x: jax.Array, dy: jax.Array, window: Window, kernel_shape: Shape) -> jax.Array:
        def convolve(x: jax.Array, dy: jax.Array) -> jax.Array:
            return lowering.kernel_gradient(x, dy, one(window), _channels(kernel_shape, window.groups))

        return _each(convolve, x, dy, window.groups)

    return Lowering(lowering.name, supports, forward, input_gradient, kernel_gradient)


def _channels(shape: Shape, groups: int) -> Shape:
    return *shape[:3], shape[3] // groups


def _each(
    function: Callable[[jax.Array, jax.Array], jax.Array], left: jax.Array, right: jax.Array, groups: int
) -> jax.Array:
    """Compute a function of the parts of two arrays that belong to each group, side by side along the last axis."""
    if groups <= FEW_GROUPS:
        pairs = zip(jnp.split(left, groups, 3), jnp.split(right, groups, 3), strict=True)
        return jnp.concatenate([function(*pair) for pair in pairs], 3)
    split = [array.reshape(*array.shape[:3], groups, -1) for array in (left, right)]
    together = jax.vmap(function, in_axes=3, out_axes=3)(*split)
    return together.reshape(*together.shape[:3], -1)
