"""How a convolution reads its source, in an order of axes of our own: spatial axes, in/groups, out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import lax


@dataclasses.dataclass(frozen=True)
class Window:
    """How a convolution reads its source; one entry for each spatial dimension."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    source_dilation: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    batch_groups: int
    source_axes: tuple[int, ...]
    """Batch axis, channel axis and spatial axes of the source."""
    axes: tuple[int, ...]
    """Batch axis, channel axis and spatial axes of the result."""
    precision: Any
    preferred: Any

    def convolve(self, convolution: Callable[..., jax.Array], source: jax.Array, kernel: jax.Array) -> jax.Array:
        """Convolve a source with a kernel in our order.

        Args:
          convolution: A function with the arguments of `lax.conv_general_dilated`.
          source: The source, with its axes as `source_axes` says.
          kernel: The kernel, `(spatial…, in/groups, out)`.

        Returns:
          The result, with its axes as `axes` says.
        """
        spatial = len(self.strides)
        return convolution(
            source,
            kernel,
            window_strides=self.strides,
            padding=self.padding,
            lhs_dilation=self.source_dilation,
            rhs_dilation=self.dilation,
            dimension_numbers=lax.ConvDimensionNumbers(
                self.source_axes, (spatial + 1, spatial, *range(spatial)), self.axes
            ),
            feature_group_count=self.groups,
            batch_group_count=self.batch_groups,
            precision=self.precision,
            preferred_element_type=self.preferred,
        )


def kernel_order(params: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the axes of the kernel of a traced convolution in our order."""
    out, within, *spatial = params["dimension_numbers"].rhs_spec
    return (*spatial, within, out)


def read_window(params: Mapping[str, Any]) -> Window:
    """Return the window of a traced convolution, whose padding holds no symbol."""
    numbers = params["dimension_numbers"]
    return Window(
        strides=tuple(params["window_strides"]),
        padding=tuple((int(low), int(high)) for low, high in params["padding"]),
        source_dilation=tuple(params["lhs_dilation"]),
        dilation=tuple(params["rhs_dilation"]),
        groups=params["feature_group_count"],
        batch_groups=params["batch_group_count"],
        source_axes=tuple(numbers.lhs_spec),
        axes=tuple(numbers.out_spec),
        precision=params["precision"],
        preferred=params["preferred_element_type"],
    )
