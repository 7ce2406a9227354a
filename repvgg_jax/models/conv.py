"""Convolution with a square kernel, computed by the lowerings of `repvgg_jax.ops` or by XLA's own."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from repvgg_jax.ops import conv_general_dilated

Operations = Literal["auto", "xla"]

# PyTorch's default for convolutions, which the official implementation trains with: U(-1/√fan_in, 1/√fan_in).
kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Conv(nn.Module):
    """A convolution with a square kernel. The variables are those of `flax.linen.Conv`.

    Attributes:
      features: Number of output channels.
      kernel_size: Odd side length of the kernel. The input is padded so that windows are centred on its pixels: by half
        of the kernel, times the dilation, on every side.
      use_bias: Whether to add a bias.
      dtype: Dtype of the computation. None computes in the dtype of images and parameters.
      ops: "auto" uses `repvgg_jax.ops.conv_general_dilated`, "xla" XLA's own convolution.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    ops: Operations = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(batch, height, width, channels)` to `(batch, ⌈height/stride⌉, ⌈width/stride⌉, features)`."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", kernel_init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:], self.param_dtype) if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        # Initialisation throws its output away; compiling fast lowerings for it would be the slowest part.
        fast = self.ops == "auto" and not self.is_initializing()
        convolve = conv_general_dilated if fast else jax.lax.conv_general_dilated
        padding = self.kernel_size // 2 * self.dilation
        y = convolve(
            x,
            kernel,
            (self.stride, self.stride),
            # 'SAME' would centre a strided window on odd pixels where the size is even; the 1×1 samples even ones.
            ((padding, padding), (padding, padding)),
            lhs_dilation=(1, 1),
            rhs_dilation=(self.dilation, self.dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )
        return y if bias is None else y + bias.reshape(1, 1, 1, -1)
