"""A convolution with the interface of `lax.conv_general_dilated`, in forms that XLA computes fast."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax import lax

from repvgg_jax.ops.choose import Choice, choose
from repvgg_jax.ops.lowerings import plain
from repvgg_jax.ops.lowerings.base import Window
from repvgg_jax.ops.manual_axes import varying_alike
from repvgg_jax.ops.materialize import materialize
from repvgg_jax.ops.platform import by_platform, known_platform
from repvgg_jax.ops.reverse_mode import reverse_mode_only

# As `lax.conv_dimension_numbers` gives them: batch, channels, height and width of image, kernel and result.
_NHWC_HWIO = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """Convolve images with a kernel, with the arguments and the result of `lax.conv_general_dilated`.

    A *lowering* is one way to compute a convolution. Where a faster one than XLA's is known, as `repvgg_jax.ops.choose`
    says, it is taken, with gradients of its own. It is known for some convolutions of NHWC images with undilated HWIO
    kernels of 1×1 or 3×3 taps, or of up to 7×7 taps in one group per channel:

    - In float32 on CPU they become matrix products, im2col, Winograd or, in one group per channel, sums of shifted
      images.
    - In bfloat16 and float16 on CUDA, 3×3 convolutions of many pixels and few channels at stride 2 are lowered by space
      to depth. Grouped convolutions for which cuDNN's kernels are slow become ungrouped, with zeros between the groups.

    Every other call, and every other platform, is `lax.conv_general_dilated` itself. The platform is the one that the
    program is lowered for. Under a sharded batch the choice sees the global shape.

    Winograd stays within 2e-5 of the largest output. It is never taken in float64, or where the argument `precision` or
    `jax.default_matmul_precision` asks for more than the default.

    The lowerings can be differentiated once, in reverse mode. Forward mode raises a TypeError.

    Args:
      lhs: Images, e.g. `(batch, height, width, in)`.
      rhs: Kernel, e.g. `(height, width, in / groups, out)`.
      window_strides: One stride for each spatial dimension.
      padding: "SAME", "VALID" or `(low, high)` for each spatial dimension.
      lhs_dilation: Dilation of the images.
      rhs_dilation: Dilation of the kernel.
      dimension_numbers: As in `lax.conv_general_dilated`, whose default is NCHW.
      feature_group_count: Number of groups of channels.
      batch_group_count: Number of groups of the batch.
      precision: As in `lax.conv_general_dilated`.
      preferred_element_type: As in `lax.conv_general_dilated`.

    Returns:
      The convolved images, e.g. `(batch, height, width, out)`.

    Raises:
      TypeError: If `lax.conv_general_dilated` raises one.
      ValueError: If `lax.conv_general_dilated` raises one.

    Example:
      >>> import flax.linen as nn
      >>> from repvgg_jax.ops import conv_general_dilated
      >>> layer = nn.Conv(48, (3, 3), padding=((1, 1), (1, 1)), conv_general_dilated=conv_general_dilated)
    """
    xla = partial(
        lax.conv_general_dilated,
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        precision,
        preferred_element_type,
    )
    if not (
        lhs.ndim == rhs.ndim == 4
        and lhs.dtype == rhs.dtype
        and preferred_element_type in (None, lhs.dtype)
        and (rhs.shape[:2] in ((1, 1), (3, 3)) or feature_group_count == lhs.shape[3])
        and batch_group_count == 1
        and all(step == 1 for step in (*(lhs_dilation or ()), *(rhs_dilation or ())))
        and tuple(lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers))[:3] == _NHWC_HWIO
        # A symbolic size stands for all sizes at once, and no lowering is the fastest for all.
        and all(isinstance(size, int) for size in (*lhs.shape, *rhs.shape))
    ):
        return xla()
    jax.eval_shape(xla)  # the same errors for wrong shapes
    strides = (int(window_strides[0]), int(window_strides[1]))
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding)
    (top, bottom), (left, right) = ((int(low), int(high)) for low, high in padding)
    if min(top, bottom, left, right) < 0 or 0 in lhs.shape or 0 in rhs.shape:
        return xla()
    window = Window(strides, ((top, bottom), (left, right)), feature_group_count)
    exact = _beyond_default(precision)
    if not choose(lhs.shape, rhs.shape, window, lhs.dtype, exact):
        return xla()
    convolve = _convolve if known_platform() is None else _forward
    lhs, rhs = map(reverse_mode_only, varying_alike(lhs, rhs))
    return convolve(lhs, rhs, window, precision, exact)


def _beyond_default(precision: lax.PrecisionLike) -> bool:
    """Whether the argument or, where it is None, the configuration asks for more than the default precision."""
    asked: Any = precision
    if precision is None:
        asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    names = asked if isinstance(asked, tuple) else (asked,)
    return any(name not in (None, "default", lax.Precision.DEFAULT) for name in names)


def _fastest(direction: str, chosen: dict[str, Choice], **static: Any) -> dict[str, Callable[..., jax.Array]]:
    """Return the lowerings of one direction by platform, with their static arguments bound."""
    lowerings = {platform: getattr(choice, direction) for platform, choice in chosen.items()}
    return {
        platform: partial(getattr(lowering, direction), **static)
        for platform, lowering in lowerings.items()
        if lowering is not plain.lowering
    }


def _forward(x: jax.Array, kernel: jax.Array, window: Window, precision: lax.PrecisionLike, exact: bool) -> jax.Array:
    chosen = choose(x.shape, kernel.shape, window, x.dtype, exact, kernel_ahead=known_platform() is not None)
    return by_platform(
        materialize(x),
        kernel,
        default=lambda x, kernel: plain.forward(x, kernel, window, precision),
        **_fastest("forward", chosen, window=window),
    )


_convolve = jax.custom_vjp(jax.jit(_forward, static_argnums=(2, 3, 4)), nondiff_argnums=(2, 3, 4))


def _convolve_forward(
    x: jax.Array, kernel: jax.Array, window: Window, precision: lax.PrecisionLike, exact: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(x, kernel, window, precision, exact), (x, kernel)


def _convolve_backward(
    window: Window,
    precision: lax.PrecisionLike,
    exact: bool,
    residuals: tuple[jax.Array, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    (x, kernel), dy = residuals, materialize(dy)
    chosen = choose(x.shape, kernel.shape, window, x.dtype, exact)
    dx = by_platform(
        dy,
        kernel,
        default=lambda dy, kernel: plain.input_gradient(dy, kernel, window, x.shape, precision),
        **_fastest("input_gradient", chosen, window=window, input_shape=x.shape),
    )
    dkernel = by_platform(
        materialize(x),
        dy,
        default=lambda x, dy: plain.kernel_gradient(x, dy, window, kernel.shape, precision),
        **_fastest("kernel_gradient", chosen, window=window, kernel_shape=kernel.shape),
    )
    return dx, dkernel


_convolve.defvjp(_convolve_forward, _convolve_backward)
