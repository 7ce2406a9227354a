"""The choice of the fastest lowering for a convolution by platform and static shape.

On CPU it was measured by `python -m benchmarks.tune`, on CUDA as docs/performance.md tells.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from repvgg_jax.ops.lowerings import block_diagonal, depthwise, im2col, plain, pointwise, space_to_depth, winograd
from repvgg_jax.ops.lowerings.base import Lowering, Shape, Window
from repvgg_jax.ops.lowerings.grouped import FEW_GROUPS, by_group

_PLAIN = plain.lowering
_DEPTHWISE = depthwise.lowering
_POINTWISE = by_group(pointwise.lowering)
_IM2COL = by_group(im2col.lowering)
_WINOGRAD_F2 = by_group(winograd.f2)
_WINOGRAD_F4 = by_group(winograd.f4)
_SPACE_TO_DEPTH = space_to_depth.lowering
_BLOCK_DIAGONAL = block_diagonal.lowering

_ALL = (_PLAIN, _DEPTHWISE, _POINTWISE, _IM2COL, _WINOGRAD_F2, _WINOGRAD_F4, _SPACE_TO_DEPTH, _BLOCK_DIAGONAL)
LOWERINGS = {lowering.name: lowering for lowering in _ALL}
"""All lowerings by name."""


class Choice(NamedTuple):
    """The lowerings of the forward pass and of the two gradients.

    Attributes:
      forward: Lowering of the forward pass.
      input_gradient: Lowering of the gradient by the images.
      kernel_gradient: Lowering of the gradient by the kernel.
    """

    forward: Lowering
    input_gradient: Lowering
    kernel_gradient: Lowering

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the three lowerings, in that order."""
        return tuple(lowering.name for lowering in self)


def _throughout(lowering: Lowering) -> Choice:
    return Choice(lowering, lowering, lowering)


def choose(
    input_shape: Shape,
    kernel_shape: Shape,
    window: Window,
    dtype: jax.typing.DTypeLike = jnp.float32,
    exact: bool = False,
    kernel_ahead: bool = False,
) -> dict[str, Choice]:
    """Return the fastest known lowerings for one convolution by platform.

    A platform that is missing takes the plain lowering.

    Args:
      input_shape: Shape of the images, NHWC.
      kernel_shape: Shape of the kernel, HWIO.
      window: Strides, padding and groups of the convolution.
      dtype: Dtype of images and kernel.
      exact: Whether to leave out Winograd, which rounds more than the others.
      kernel_ahead: Whether what the kernel alone determines costs nothing, because it is computed ahead of time.

    Returns:
      The choices by platform, 'cpu' or 'cuda'.
    """
    if dtype == jnp.float32:
        return {"cpu": _choose_on_cpu(input_shape, kernel_shape, window, exact, kernel_ahead)}
    if dtype in (jnp.bfloat16, jnp.float16):
        choice = _choose_on_cuda(input_shape, kernel_shape, window)
        return {} if choice == _throughout(_PLAIN) else {"cuda": choice}
    return {}


def _choose_on_cuda(input_shape: Shape, kernel_shape: Shape, window: Window) -> Choice:
    """Choose for 16 bits. In float32 cuDNN has a kernel of its own for few channels."""
    pixels = input_shape[0] * math.prod(window.output_size(input_shape, kernel_shape))
    if _SPACE_TO_DEPTH.supports(input_shape, kernel_shape, window) and pixels >= 2**16:
        return Choice(_SPACE_TO_DEPTH, _PLAIN, _SPACE_TO_DEPTH)
    channels = kernel_shape[2], kernel_shape[3] // window.groups
    if window.groups > FEW_GROUPS:  # not measured, and every zero between the groups is multiplied
        return _throughout(_PLAIN)
    power_of_two = all(count & (count - 1) == 0 for count in channels)
    if window.groups > 1 and (pixels < 2**12 or not power_of_two):
        return Choice(_BLOCK_DIAGONAL, _PLAIN, _PLAIN)
    return _throughout(_PLAIN)


def _choose_on_cpu(input_shape: Shape, kernel_shape: Shape, window: Window, exact: bool, kernel_ahead: bool) -> Choice:
    def supported(lowering: Lowering) -> bool:
        return lowering.supports(input_shape, kernel_shape, window)

    for lowering in (_DEPTHWISE, _POINTWISE):
        if supported(lowering):
            return _throughout(lowering)
    if not supported(_IM2COL) or math.prod(kernel_shape[:2]) > 9:
        return _throughout(_PLAIN)
    rows, columns = window.output_size(input_shape, kernel_shape)
    if window.groups > FEW_GROUPS:
        return _choose_for_many_groups(rows * columns, kernel_shape, window, supported(_WINOGRAD_F4) and not exact)
    pixels = input_shape[0] * rows * columns  # below a few hundred, transforming the kernel costs more than it saves
    tiny = rows * columns <= 4  # where the plain convolution is at its worst, however little there is to do
    if 2 * pixels * math.prod(kernel_shape) < 4e7 and not tiny:
        return Choice(_PLAIN, _PLAIN, _PLAIN if window.groups == 1 else _IM2COL)
    narrowest = min(kernel_shape[2], kernel_shape[3] // window.groups)
    if not exact and narrowest >= 16 and supported(_WINOGRAD_F4):
        if pixels >= 512 or tiny:
            return _throughout(_WINOGRAD_F4)
        if kernel_ahead and pixels >= 128:  # reading the larger kernels of F(4×4) would take longer
            return _throughout(_WINOGRAD_F2)
    small = rows * columns < 64
    return Choice(
        _IM2COL if small else _PLAIN,
        _IM2COL if small or window.strides != (1, 1) else _PLAIN,
        _IM2COL,
    )


def _choose_for_many_groups(pixels: int, kernel_shape: Shape, window: Window, winograd: bool) -> Choice:
    """Choose for more than `FEW_GROUPS` groups.

    XLA's own kernel gradient of a grouped convolution takes a hundred times as long as a product.
    """
    forward = _PLAIN
    if kernel_shape[2] <= 4 or pixels <= 4:
        forward = _WINOGRAD_F4 if winograd and pixels >= 100 else _IM2COL
    return Choice(
        forward,
        forward if window.strides == (1, 1) else _IM2COL,
        _WINOGRAD_F4 if winograd else _IM2COL,
    )
