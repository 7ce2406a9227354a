"""Which lowering is fastest on XLA:CPU, by static shape. Measured by `python -m benchmarks.tune`."""

import math
from typing import NamedTuple

from repvgg_jax.ops import im2col, plain, pointwise, winograd
from repvgg_jax.ops.grouped import by_group
from repvgg_jax.ops.lowering import Lowering, Shape, Window

LOWERINGS: dict[str, Lowering] = {
    "plain": plain.lowering,
    "pointwise": by_group(pointwise.lowering),
    "im2col": by_group(im2col.lowering),
    "winograd_f2": by_group(winograd.f2),
    "winograd_f4": by_group(winograd.f4),
}


class Choice(NamedTuple):
    """The names of the lowerings of the forward pass and of the two gradients."""

    forward: str
    input_gradient: str
    kernel_gradient: str


def choose(input_shape: Shape, kernel_shape: Shape, window: Window, exact: bool = False) -> Choice:
    """The fastest known lowerings for one convolution; without Winograd where it must be `exact`."""

    def supported(name: str) -> bool:
        return LOWERINGS[name].supports(input_shape, kernel_shape, window)

    if supported("pointwise"):
        return Choice("pointwise", "pointwise", "pointwise")
    rows, columns = window.output_size(input_shape, kernel_shape)
    pixels = input_shape[0] * rows * columns  # below a few hundred, transforming the kernel costs more than it saves
    tiny = rows * columns <= 4  # where the plain convolution is at its worst, however little there is to do
    if not supported("im2col") or (2 * pixels * math.prod(kernel_shape) < 4e7 and not tiny):
        return Choice("plain", "plain", "plain")
    narrowest = min(kernel_shape[2], kernel_shape[3] // window.groups)
    if not exact and narrowest >= 16 and (pixels >= 512 or tiny) and supported("winograd_f4"):
        return Choice("winograd_f4", "winograd_f4", "winograd_f4")
    small = rows * columns < 64
    return Choice(
        "im2col" if small else "plain",
        "im2col" if small or window.strides != (1, 1) else "plain",
        "im2col",
    )
