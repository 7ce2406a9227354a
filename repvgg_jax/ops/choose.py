"""Which lowering is fastest on which platform, by static shape.

On CPU measured by `python -m benchmarks.tune`, on CUDA as docs/performance.md tells.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from repvgg_jax.ops.lowerings import block_diagonal, depthwise, im2col, plain, pointwise, space_to_depth, winograd
from repvgg_jax.ops.lowerings.base import Lowering, Shape, Window
from repvgg_jax.ops.lowerings.grouped import FEW_GROUPS, by_group

LOWERINGS: dict[str, Lowering] = {
    "plain": plain.lowering,
    "depthwise": depthwise.lowering,
    "pointwise": by_group(pointwise.lowering),
    "im2col": by_group(im2col.lowering),
    "winograd_f2": by_group(winograd.f2),
    "winograd_f4": by_group(winograd.f4),
    "space_to_depth": space_to_depth.lowering,
    "block_diagonal": block_diagonal.lowering,
}


class Choice(NamedTuple):
    """The names of the lowerings of the forward pass and of the two gradients."""

    forward: str
    input_gradient: str
    kernel_gradient: str


_PLAIN = Choice("plain", "plain", "plain")


def choose(
    input_shape: Shape,
    kernel_shape: Shape,
    window: Window,
    dtype: jax.typing.DTypeLike = jnp.float32,
    exact: bool = False,
    kernel_ahead: bool = False,
) -> dict[str, Choice]:
    """The fastest known lowerings for one convolution, by platform; a platform that is missing takes the plain one.

    Args:
        input_shape: NHWC.
        kernel_shape: HWIO.
        window: of the convolution.
        dtype: of images and kernel.
        exact: no Winograd, which rounds more.
        kernel_ahead: what the kernel alone determines costs nothing, because it is computed ahead of time.
    """
    if dtype == jnp.float32:
        return {"cpu": _choose_on_cpu(input_shape, kernel_shape, window, exact, kernel_ahead)}
    if dtype in (jnp.bfloat16, jnp.float16):
        choice = _choose_on_cuda(input_shape, kernel_shape, window)
        return {} if choice == _PLAIN else {"cuda": choice}
    return {}


def _choose_on_cuda(input_shape: Shape, kernel_shape: Shape, window: Window) -> Choice:
    """For 16 bits; in float32 cuDNN has a kernel of its own for few channels."""
    pixels = input_shape[0] * math.prod(window.output_size(input_shape, kernel_shape))
    if space_to_depth.supports(input_shape, kernel_shape, window) and pixels >= 2**16:
        return Choice("space_to_depth", "plain", "space_to_depth")
    channels = kernel_shape[2], kernel_shape[3] // window.groups
    if window.groups > FEW_GROUPS:  # not measured, and every zero between the groups is multiplied
        return _PLAIN
    power_of_two = all(count & (count - 1) == 0 for count in channels)
    if window.groups > 1 and (pixels < 2**12 or not power_of_two):
        return Choice("block_diagonal", "plain", "plain")
    return _PLAIN


def _choose_on_cpu(input_shape: Shape, kernel_shape: Shape, window: Window, exact: bool, kernel_ahead: bool) -> Choice:
    def supported(name: str) -> bool:
        return LOWERINGS[name].supports(input_shape, kernel_shape, window)

    for name in ("depthwise", "pointwise"):
        if supported(name):
            return Choice(name, name, name)
    if not supported("im2col") or math.prod(kernel_shape[:2]) > 9:
        return _PLAIN
    rows, columns = window.output_size(input_shape, kernel_shape)
    if window.groups > FEW_GROUPS:
        return _choose_for_many_groups(rows * columns, kernel_shape, window, supported("winograd_f4") and not exact)
    pixels = input_shape[0] * rows * columns  # below a few hundred, transforming the kernel costs more than it saves
    tiny = rows * columns <= 4  # where the plain convolution is at its worst, however little there is to do
    if 2 * pixels * math.prod(kernel_shape) < 4e7 and not tiny:
        return _PLAIN if window.groups == 1 else _PLAIN._replace(kernel_gradient="im2col")
    narrowest = min(kernel_shape[2], kernel_shape[3] // window.groups)
    if not exact and narrowest >= 16 and supported("winograd_f4"):
        if pixels >= 512 or tiny:
            return Choice("winograd_f4", "winograd_f4", "winograd_f4")
        if kernel_ahead and pixels >= 128:  # reading the larger kernels of F(4×4) would take longer
            return Choice("winograd_f2", "winograd_f2", "winograd_f2")
    small = rows * columns < 64
    return Choice(
        "im2col" if small else "plain",
        "im2col" if small or window.strides != (1, 1) else "plain",
        "im2col",
    )


def _choose_for_many_groups(pixels: int, kernel_shape: Shape, window: Window, winograd: bool) -> Choice:
    """XLA's own kernel gradient of a grouped convolution takes a hundred times as long as a product."""
    forward = "plain"
    if kernel_shape[2] <= 4 or pixels <= 4:
        forward = "winograd_f4" if winograd and pixels >= 100 else "im2col"
    return Choice(
        forward,
        forward if window.strides == (1, 1) else "im2col",
        "winograd_f4" if winograd else "im2col",
    )
