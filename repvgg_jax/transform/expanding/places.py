"""The place that a branch takes: the kernel that it becomes a part of, and how that kernel reads its source."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from repvgg_jax.reparam.kernels import identity_kernel
from repvgg_jax.transform.windows import Window


@dataclasses.dataclass(frozen=True)
class Place:
    """A convolution, as its branches see it. Kernels are `(spatial…, in/groups, out)`.

    Attributes:
      size: Taps of its kernel along each spatial dimension.
      within: Input channels in a group.
      out: Output channels.
      window: How it reads its source.
      dtype: Dtype of the kernel that it takes.
      result_dtype: Dtype of its result.
      convolution: The function that computes it, with the arguments of `lax.conv_general_dilated`.
    """

    size: tuple[int, ...]
    within: int
    out: int
    window: Window
    dtype: Any
    result_dtype: Any
    convolution: Callable[..., jax.Array]

    @property
    def channels(self) -> int:
        """Input channels in all groups."""
        return self.within * self.window.groups

    def before(self, size: Sequence[int], dilation: int = 1) -> tuple[int, ...]:
        """Return how many taps come before those of a smaller kernel at the centre."""
        return tuple((whole - dilation * (part - 1) - 1) // 2 for whole, part in zip(self.size, size, strict=True))

    def part(self, size: Sequence[int], dilation: int = 1) -> Window:
        """Return the window in which a smaller kernel reads what those taps at the centre of the whole one read."""
        before = self.before(size, dilation)
        padding = tuple(
            (low - step * first, high - step * (whole - first - dilation * (part - 1) - 1))
            for (low, high), step, first, whole, part in zip(
                self.window.padding, self.window.dilation, before, self.size, size, strict=True
            )
        )
        steps = tuple(dilation * step for step in self.window.dilation)
        return dataclasses.replace(self.window, padding=padding, dilation=steps)

    def widened(self, kernel: jax.Array, dilation: int = 1) -> jax.Array:
        """Return a smaller kernel with zeros around it, and between its taps, in the size of the whole one."""
        size = kernel.shape[:-2]
        config = [
            (first, whole - first - dilation * (part - 1) - 1, dilation - 1)
            for first, whole, part in zip(self.before(size, dilation), self.size, size, strict=True)
        ]
        return lax.pad(kernel, jnp.zeros((), kernel.dtype), [*config, (0, 0, 0), (0, 0, 0)])

    def identity(self) -> jax.Array:
        """Return the kernel of one tap that passes each channel on."""
        single = (1,) * len(self.size)
        return jnp.asarray(identity_kernel(self.out, groups=self.window.groups, size=single))

    def pointwise(self, out: int) -> Place:
        """Return the place of a convolution of one tap that comes before this one, of the source as it is."""
        spatial = len(self.size)
        window = dataclasses.replace(
            self.window,
            strides=(1,) * spatial,
            padding=((0, 0),) * spatial,
            source_dilation=(1,) * spatial,
            dilation=(1,) * spatial,
            axes=self.window.source_axes,
        )
        return dataclasses.replace(self, size=(1,) * spatial, out=out, window=window)

    def after(self, channels: int) -> Place:
        """Return this place with another number of input channels."""
        return dataclasses.replace(self, within=channels // self.window.groups)

    def in_order(self, x: jax.Array) -> jax.Array:
        """Return a value whose axes are the source's with the axes of the result, in the dtype of the result."""
        axes, source_axes = self.window.axes, self.window.source_axes
        order = [source_axes[axes.index(axis)] for axis in range(len(axes))]
        return x.transpose(order).astype(self.result_dtype)


def composed(first: jax.Array, second: jax.Array, groups: int) -> jax.Array:
    """Return the kernel of a convolution with one tap and one after it. Nothing is lost at edges: neither has a bias.

    Args:
      first: `(1…, in/groups, between)`.
      second: `(spatial…, between/groups, out)`.
      groups: Groups of both.

    Returns:
      `(spatial…, in/groups, out)`.
    """
    first = first.reshape(first.shape[-2], groups, -1)
    second = second.reshape(*second.shape[:-1], groups, -1)
    both = jnp.einsum("igm,...mgo->...igo", first, second, precision=lax.Precision.HIGHEST)
    return both.reshape(*both.shape[:-2], -1)
