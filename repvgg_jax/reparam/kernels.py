"""The algebra of structural re-parameterization: every branch is one affine convolution `(kernel, bias)`.

Kernels are HWIO, `(kh, kw, in_channels / groups, out_channels)`. The functions take NumPy arrays, JAX arrays or
tracers. NumPy arrays give NumPy arrays, so that a fold can run in float64 on the host even where JAX is limited to
float32. `fold_batch_norm` computes in at least float32; rounding to a narrower parameter dtype is the caller's last
step.

References:
  Ding et al., *RepVGG: Making VGG-style ConvNets Great Again*, CVPR 2021, arXiv:2101.03697, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


class Convolution(NamedTuple):
    """An affine convolution.

    Attributes:
      kernel: HWIO, `(kh, kw, in_channels / groups, out_channels)`.
      bias: `(out_channels,)`.
    """

    kernel: Array
    bias: Array


def fold_batch_norm(
    kernel: Array,
    *,
    mean: Array,
    var: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    conv_bias: Array | None = None,
    epsilon: float = 1e-5,
) -> Convolution:
    """Fold a batch norm in inference mode into the convolution before it.

    With `factor = scale / √(var + epsilon)`, the folded kernel is `kernel · factor` by output channel, and the folded
    bias is `(conv_bias − mean) · factor + bias`.

    Args:
      kernel: `(kh, kw, in / groups, out)`; another number of spatial dimensions works too.
      mean: Running mean, `(out,)`.
      var: Running variance (not the standard deviation), `(out,)`.
      scale: Scale of the norm, `(out,)`, or None where the norm has none.
      bias: Bias of the norm, `(out,)`, or None where the norm has none.
      conv_bias: Bias of the convolution before the norm, `(out,)`, or None where the convolution has none.
      epsilon: The epsilon of the norm, which is added to the variance.

    Returns:
      The convolution that computes `norm(conv(x))`, in at least float32.

    Raises:
      ValueError: If a vector has another shape than `(out,)`.

    Example:
      >>> import numpy as np
      >>> from repvgg_jax.reparam import fold_batch_norm
      >>> kernel = np.ones((1, 1, 1, 2))
      >>> folded = fold_batch_norm(kernel, mean=np.array([1.0, 4.0]), var=np.array([3.0, 15.0]), epsilon=1.0)
      >>> folded.kernel.ravel().tolist(), folded.bias.tolist()
      ([0.5, 0.25], [-0.5, -1.0])
    """
    vectors = {"mean": mean, "var": var, "scale": scale, "bias": bias, "conv_bias": conv_bias}
    out_channels = kernel.shape[-1]
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (out_channels,):
            raise ValueError(
                f"{name} has shape {tuple(vector.shape)}, expected ({out_channels},): one value for each output "
                f"channel of the kernel {tuple(kernel.shape)}"
            )
    kernel, mean, var = (_at_least_float32(array) for array in (kernel, mean, var))
    factor = (var + epsilon) ** -0.5
    if scale is not None:
        factor = factor * _at_least_float32(scale)
    offset = -mean if conv_bias is None else _at_least_float32(conv_bias) - mean
    folded_bias = offset * factor
    if bias is not None:
        folded_bias = folded_bias + _at_least_float32(bias)
    # In the rank of the kernel, as `jax_numpy_rank_promotion="raise"` asks for.
    return Convolution(kernel * factor.reshape([1] * (kernel.ndim - 1) + [-1]), folded_bias)


def pad_kernel(kernel: Array, size: tuple[int, ...]) -> Array:
    """Pad a kernel with zeros around its centre to a larger spatial size.

    Args:
      kernel: `(kh, kw, in / groups, out)`; another number of spatial dimensions works too.
      size: The spatial size `(kh, kw)` to reach.

    Returns:
      The kernel, `(*size, in / groups, out)`. Where each side of the images is padded by half of the growth more, it
      computes what the small kernel computed, at any stride.

    Raises:
      ValueError: If `size` has another number of dimensions than the kernel, is smaller, or differs by an odd number,
        which leaves no centre.
    """
    current = kernel.shape[:-2]
    growth = [after - before for after, before in zip(size, current, strict=False)]
    if len(size) != len(current) or any(g < 0 or g % 2 for g in growth):
        raise ValueError(
            f"cannot pad a {'x'.join(map(str, current))} kernel to {'x'.join(map(str, size))} around its "
            "centre: the target must be larger by an even number in every direction"
        )
    if not any(growth):
        return kernel
    widths = [(g // 2, g // 2) for g in growth] + [(0, 0), (0, 0)]
    return _namespace(kernel).pad(kernel, widths)


def identity_kernel(
    channels: int, *, groups: int = 1, size: tuple[int, ...] = (1, 1), dtype: Any = np.float64
) -> np.ndarray:
    """Return the kernel of a convolution that returns its input.

    Args:
      channels: Number of input channels, and of output channels.
      groups: Groups of the convolution. They must divide `channels`.
      size: Odd spatial size `(kh, kw)`. The ones are at the centre.
      dtype: Dtype of the kernel.

    Returns:
      The kernel, `(*size, channels / groups, channels)`.

    Raises:
      ValueError: If `groups` does not divide `channels`, or `size` is not odd.

    Example:
      >>> from repvgg_jax.reparam import identity_kernel
      >>> identity_kernel(4, groups=2)[0, 0].tolist()
      [[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]
    """
    if channels % groups:
        raise ValueError(f"channels (={channels}) must be divisible by groups (={groups})")
    block = np.eye(channels // groups, dtype=dtype)
    kernel = np.tile(block, (1, groups)).reshape(*[1] * len(size), channels // groups, channels)
    return np.asarray(pad_kernel(kernel, size))


def merge_branches(branches: Sequence[Convolution]) -> Convolution:
    """Merge parallel branches into the one convolution that computes their sum.

    The branches read the same input at the same stride, and each pads it by half of its kernel, so that all windows are
    centred on the same pixels.

    Args:
      branches: Convolutions of equal `in / groups` and `out`. Smaller kernels are padded with zeros to the largest.

    Returns:
      The convolution that computes the sum of all branches.

    Raises:
      ValueError: If there is no branch, the numbers of channels differ, or the sizes of the kernels differ by an odd
        number.
    """
    if not branches:
        raise ValueError("there is no branch to merge: expected at least one convolution")
    shapes = [tuple(branch.kernel.shape) for branch in branches]
    if len({shape[2:] for shape in shapes}) != 1:
        raise ValueError(
            f"the kernels of the branches are {', '.join(map(str, shapes))}: expected the same in/groups and out "
            "channels (the last two numbers) in every branch"
        )
    size = (max(shape[0] for shape in shapes), max(shape[1] for shape in shapes))
    kernel: Any = 0
    bias: Any = 0
    for branch in branches:
        kernel = kernel + pad_kernel(branch.kernel, size)
        bias = bias + branch.bias
    return Convolution(kernel, bias)


def _at_least_float32(array: Array) -> Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _namespace(array: Array) -> ModuleType:
    return np if isinstance(array, np.ndarray) else jnp
