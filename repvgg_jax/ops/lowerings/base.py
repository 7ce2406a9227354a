"""The parts of a lowering: three functions that agree on one convolution, and the windows that they support."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from repvgg_jax.ops.manual_axes import varying_alike

Shape = tuple[int, ...]


class Window(NamedTuple):
    """The static part of a 2-D convolution: everything but the two arrays.

    Attributes:
      strides: Strides of rows and columns.
      padding: Zeros around the image, `((top, bottom), (left, right))`, never negative.
      groups: Number of independent convolutions that the input channels are split into.
    """

    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    groups: int = 1

    def output_size(self, input_shape: Shape, kernel_shape: Shape) -> tuple[int, int]:
        """Return the rows and columns of the output for NHWC and HWIO shapes."""
        rows, columns = (
            (size + low + high - kernel) // stride + 1
            for size, kernel, stride, (low, high) in zip(
                input_shape[1:3], kernel_shape[:2], self.strides, self.padding, strict=True
            )
        )
        return rows, columns

    def backwards(self, kernel_shape: Shape) -> "Window | None":
        """Return the window of the input gradient as a convolution of `dy` with the flipped kernel.

        It is None where the gradient is no such convolution: at other strides than 1, or with more padding than taps to
        fill it.
        """
        rows, columns = (
            (taps - 1 - low, taps - 1 - high) for taps, (low, high) in zip(kernel_shape[:2], self.padding, strict=True)
        )
        if self.strides != (1, 1) or min(*rows, *columns) < 0:
            return None
        return self._replace(padding=(rows, columns))


def transposed(function: Callable[[jax.Array], jax.Array], shape: Shape, dy: jax.Array) -> jax.Array:
    """Return the transpose of a linear function at `dy`, in the given shape; dtype and mesh axes are those of `dy`."""
    x, _ = varying_alike(jnp.zeros(shape, dy.dtype), dy)  # a shape alone could not say that it varies
    (dx,) = jax.linear_transpose(function, x)(dy)
    return dx


class Lowering(NamedTuple):
    """One way to compute a convolution and its two gradients, for NHWC images and HWIO kernels.

    Attributes:
      name: The name in tables and messages.
      supports: `(input_shape, kernel_shape, window) -> bool`. Where it is false, the functions below may be wrong.
      forward: `(x, kernel, window) -> y`.
      input_gradient: `(dy, kernel, window, input_shape) -> dx`.
      kernel_gradient: `(x, dy, window, kernel_shape) -> dkernel`.
    """

    name: str
    supports: Callable[[Shape, Shape, Window], bool]
    forward: Callable[[jax.Array, jax.Array, Window], jax.Array]
    input_gradient: Callable[[jax.Array, jax.Array, Window, Shape], jax.Array]
    kernel_gradient: Callable[[jax.Array, jax.Array, Window, Shape], jax.Array]
