"""The plain lowering: `lax.conv_general_dilated`, and its own transposes as gradients."""

from functools import partial

import jax
from jax import lax

from repvgg_jax.ops.lowerings.base import Lowering, Shape, Window, transposed


def supports(input_shape: Shape, kernel_shape: Shape, window: Window) -> bool:
    """Return True, for every convolution."""
    return True


def forward(x: jax.Array, kernel: jax.Array, window: Window, precision: lax.PrecisionLike = None) -> jax.Array:
    """Convolve NHWC `x` with HWIO `kernel`."""
    return lax.conv_general_dilated(
        x,
        kernel,
        window.strides,
        window.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=window.groups,
        precision=precision,
    )


def input_gradient(
    dy: jax.Array,
    kernel: jax.Array,
    window: Window,
    input_shape: Shape,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Compute what autodiff gives: a convolution of the dilated `dy` with the flipped kernel."""
    convolve = partial(forward, kernel=kernel, window=window, precision=precision)
    return transposed(convolve, input_shape, dy)


def kernel_gradient(
    x: jax.Array,
    dy: jax.Array,
    window: Window,
    kernel_shape: Shape,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Compute what autodiff gives: a convolution whose window is all of `dy`."""

    def convolve(kernel: jax.Array) -> jax.Array:
        return forward(x, kernel, window, precision)

    return transposed(convolve, kernel_shape, dy)


lowering = Lowering("plain", supports, forward, input_gradient, kernel_gradient)
