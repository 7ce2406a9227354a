"""The branches that a convolution can be trained as: linear maps of its source that its own kernel could compute.

A branch has no bias, and its norm only scales. So it is a kernel and nothing else::

  y  =  Σ_b s_b (K_b ∗ x)        s_b = gain_b / √(var_b + ε), by output channel
     =  (Σ_b s_b K_b) ∗ x        every K_b padded to the size of the kernel

In a chain the first convolution has one tap, and the padding by zeros commutes with it::

  K₂ ∗ (s₁ (K₁ ∗ x))  =  (K₂ s₁ K₁) ∗ x
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from repvgg_jax.transform.expanding.places import Place

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The convolution as it is, with the caller's own kernel.

    Attributes:
      gain: Gain of the branch, where it begins as published, or where it is constant.
    """

    gain: float = 1.0

    def name(self, place: Place) -> str:
        """Return the name of the branch at a place."""
        return "kernel"

    def refusal(self, place: Place) -> str | None:
        """Return why the branch does not fit a place, or None."""
        return None

    def create(self, place: Place, draw: np.random.Generator, dtype: Any) -> Params:
        """Return parameters to begin with: none, its kernel is the caller's."""
        return {}

    def apply(self, place: Place, params: Params, x: jax.Array) -> jax.Array:
        """Map the source."""
        return place.window.convolve(place.convolution, x, params["kernel"].astype(place.dtype))

    def kernel(self, place: Place, params: Params) -> jax.Array:
        """Return the kernel that computes `apply`, in the size of the place."""
        return params["kernel"]

    def trained(self, place: Place) -> jax.Array:
        """Return ones where a step of the parameters moves that kernel."""
        return jnp.ones((*place.size, place.within, place.out))


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution with a kernel of its own, centred on the caller's.

    Attributes:
      size: Its taps: None for as many as the caller's kernel has, one number for all spatial dimensions, or a number or
        None for each.
      dilation: Taps of the caller's kernel from one of its own to the next.
      gain: Gain of the branch, where it begins as published, or where it is constant.
    """

    size: int | tuple[int | None, ...] | None = None
    dilation: int = 1
    gain: float = 1.0

    def __post_init__(self) -> None:
        sizes = self.size if isinstance(self.size, tuple) else (self.size,)
        if any(size is not None and size < 1 for size in sizes) or not sizes:
            raise ValueError(
                f"size is {self.size}: expected positive numbers of taps, or None for as many as there are"
            )
        if self.dilation < 1:
            raise ValueError(f"dilation is {self.dilation}: expected at least 1")

    def name(self, place: Place) -> str:
        """Return the name of the branch at a place."""
        taps = "x".join(map(str, self._taps(place)))
        return taps if self.dilation == 1 else f"{taps}_dilated_{self.dilation}"

    def refusal(self, place: Place) -> str | None:
        """Return why the branch does not fit a place, or None."""
        if isinstance(self.size, tuple) and len(self.size) != len(place.size):
            return f"{self.size} has {len(self.size)} dimensions, the kernel {len(place.size)}"
        taps = self._taps(place)
        if any(self.dilation * (part - 1) + 1 > whole for part, whole in zip(taps, place.size, strict=True)):
            return f"{self.name(place)} is larger than the kernel"
        if self.size is not None and taps == place.size:
            return f"{self.name(place)} is the size of the kernel itself"
        if isinstance(self.size, tuple) and math.prod(taps) == 1:
            return "the kernel has one tap along it"
        return None

    def create(self, place: Place, draw: np.random.Generator, dtype: Any) -> Params:
        """Return parameters to begin with: a kernel, drawn as by He et al., arXiv:1502.01852."""
        shape = (*self._taps(place), place.within, place.out)
        return {"kernel": jnp.asarray(draw.normal(0, (2 / math.prod(shape[:-1])) ** 0.5, shape), dtype)}

    def apply(self, place: Place, params: Params, x: jax.Array) -> jax.Array:
        """Map the source."""
        window = place.part(self._taps(place), self.dilation)
        return window.convolve(place.convolution, x, params["kernel"].astype(place.dtype))

    def kernel(self, place: Place, params: Params) -> jax.Array:
        """Return the kernel that computes `apply`, in the size of the place."""
        return place.widened(params["kernel"], self.dilation)

    def trained(self, place: Place) -> jax.Array:
        """Return ones where a step of the parameters moves that kernel."""
        return place.widened(jnp.ones((*self._taps(place), place.within, place.out)), self.dilation)

    def _taps(self, place: Place) -> tuple[int, ...]:
        sizes = self.size if isinstance(self.size, tuple) else (self.size,) * len(place.size)
        return tuple(whole if size is None else size for size, whole in zip(sizes, place.size, strict=False))


@dataclasses.dataclass(frozen=True)
class Identity:
    """The source itself, where a convolution has as many output channels as input channels, and stride 1.

    Attributes:
      gain: Gain of the branch, where it begins as published, or where it is constant.
    """

    gain: float = 1.0

    def name(self, place: Place) -> str:
        """Return the name of the branch at a place."""
        return "identity"

    def refusal(self, place: Place) -> str | None:
        """Return why the branch does not fit a place, or None."""
        if place.channels != place.out:
            return "no identity where the number of channels changes"
        if any(step != 1 for step in (*place.window.strides, *place.window.source_dilation)):
            return "no identity where it strides"
        return None

    def create(self, place: Place, draw: np.random.Generator, dtype: Any) -> Params:
        """Return parameters to begin with. Without a norm the scale of each channel is trained, as in RepOptimizer."""
        return {"scale": jnp.ones(place.out, dtype)}

    def apply(self, place: Place, params: Params, x: jax.Array) -> jax.Array:
        """Map the source."""
        widths = dict(zip(place.window.source_axes[2:], place.part((1,) * len(place.size)).padding, strict=True))
        config = [(*widths.get(axis, (0, 0)), 0) for axis in range(x.ndim)]
        y = place.in_order(lax.pad(x, jnp.zeros((), x.dtype), config))
        return by_channel(y, params["scale"], place.window.axes[1]) if "scale" in params else y

    def kernel(self, place: Place, params: Params) -> jax.Array:
        """Return the kernel that computes `apply`, in the size of the place."""
        kernel = place.widened(place.identity())
        return by_channel(kernel, params["scale"], kernel.ndim - 1) if "scale" in params else kernel

    def trained(self, place: Place) -> jax.Array:
        """Return ones where a step of the parameters moves that kernel."""
        return place.widened(place.identity())


@dataclasses.dataclass(frozen=True)
class Average:
    """The mean over the window of the kernel, zeros around the source included. It ends a `Chain`.

    Attributes:
      gain: Gain of the branch, where it begins as published, or where it is constant.
    """

    gain: float = 1.0

    def name(self, place: Place) -> str:
        """Return the name of the branch at a place."""
        return "average"

    def refusal(self, place: Place) -> str | None:
        """Return why the branch does not fit a place, or None."""
        if any(width < 0 for widths in place.window.padding for width in widths):
            return "no average where the convolution crops its source"
        return None

    def create(self, place: Place, draw: np.random.Generator, dtype: Any) -> Params:
        """Return parameters to begin with: none."""
        return {}

    def apply(self, place: Place, params: Params, x: jax.Array) -> jax.Array:
        """Map the source."""

        def along(values: Any, default: Any) -> list[Any]:
            placed = dict(zip(place.window.source_axes[2:], values, strict=True))
            return [placed.get(axis, default) for axis in range(x.ndim)]

        window = place.window
        total = lax.reduce_window(
            x,
            np.zeros((), x.dtype),
            lax.add,
            along(place.size, 1),
            along(window.strides, 1),
            along(window.padding, (0, 0)),
            along(window.source_dilation, 1),
            along(window.dilation, 1),
        )
        return place.in_order(total / math.prod(place.size))

    def kernel(self, place: Place, params: Params) -> jax.Array:
        """Return the kernel that computes `apply`, in the size of the place."""
        one = place.identity() / math.prod(place.size)
        return jnp.broadcast_to(one, (*place.size, *one.shape[-2:]))


Single = Kernel | Conv | Identity
Map = Single | Average


@dataclasses.dataclass(frozen=True)
class Chain:
    """A convolution of one tap and then a `Conv` or an `Average`, as in the Diverse Branch Block.

    Between them are as many channels as go in, or, before an average, as come out.

    Attributes:
      last: What comes after the convolution of one tap.
    """

    last: Conv | Average

    def __post_init__(self) -> None:
        if not isinstance(self.last, Conv | Average):
            raise ValueError(f"last is {self.last!r}: expected a Conv or an Average")


Branch = Single | Chain

PUBLISHED: dict[str, tuple[Branch, ...]] = {
    "repvgg": (Kernel(), Conv(1), Identity()),
    "acnet": (
        Kernel(),
        *(Conv(size) for size in ((None, 1), (1, None))),
        *(Conv(size) for size in ((None, 1, 1), (1, None, 1), (1, 1, None))),
    ),
    "dbb": (Kernel(), Conv(1), Chain(Conv()), Chain(Average())),
    "mobileone": (Kernel(), Conv(), Conv(), Conv(), Conv(1), Identity()),
}
"""Published sets of branches by name.

RepVGG: Ding et al., arXiv:2101.03697, figure 4. ACNet: Ding et al., arXiv:1908.03930, figure 1, and its like in three
dimensions. Diverse Branch Block: Ding et al., arXiv:2103.13425, figure 2. MobileOne: Vasu et al., arXiv:2206.04040,
figure 3, with four kernels.
"""


def by_channel(x: jax.Array, vector: jax.Array, axis: int) -> jax.Array:
    """Return an array multiplied by a number for each channel."""
    shape = [1] * x.ndim
    shape[axis] = vector.shape[0]
    return x * vector.reshape(shape)
