"""Who computes convolution and batch norm: the lowerings of `repvgg_jax.ops`, or XLA's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from jax import lax

from repvgg_jax.ops import conv_general_dilated

Operations = Literal["auto", "xla"]


def convolution(operations: Operations, initializing: bool) -> Callable[..., Any]:
    """The function to inject as `flax.linen.Conv(conv_general_dilated=…)`."""
    # Initialisation throws its output away; compiling fast lowerings for it would be the slowest part.
    return conv_general_dilated if operations == "auto" and not initializing else lax.conv_general_dilated
