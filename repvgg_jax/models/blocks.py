"""The RepVGG block and its parts, in both forms."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from repvgg_jax.models.norm import BatchNorm
from repvgg_jax.models.operations import Operations, convolution

# PyTorch's default for convolutions, which the official implementation trains with: U(-1/√fan_in, 1/√fan_in).
kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

SqueezeExcitePosition = Literal["before_relu", "after_relu"]


class ConvBN(nn.Module):
    """A convolution without bias, then batch norm.

    Attributes:
      features: output channels.
      kernel_size: odd side length of the square kernel; the input is padded by half of it on every side.
      stride: of the convolution.
      dilation: of the convolution.
      groups: of the convolution.
      epsilon: of the batch norm.
      momentum: of the running statistics: new = momentum · old + (1 − momentum) · batch (PyTorch's 0.1 is 0.9).
      dtype: of the computation; None computes in the dtype of images and parameters. Statistics are taken in at
        least float32.
      param_dtype: of parameters and statistics.
      ops: which lowerings compute it, see `RepVGG`.
    """

    features: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    epsilon: float = 1e-5
    momentum: float = 0.9
    dtype: Any = None
    param_dtype: Any = jnp.float32
    ops: Operations = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map `(batch, height, width, channels)` to `(batch, ⌈height/stride⌉, ⌈width/stride⌉, features)`."""
        padding = self.kernel_size // 2 * self.dilation
        x = nn.Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            strides=self.stride,
            # 'SAME' would centre a strided window on odd pixels where the size is even; the 1×1 samples even ones.
            padding=((padding, padding), (padding, padding)),
            kernel_dilation=self.dilation,
            feature_group_count=self.groups,
            use_bias=False,
            kernel_init=kernel_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            conv_general_dilated=convolution(self.ops, self.is_initializing()),
            name="conv",
        )(x)
        return BatchNorm(
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            ops=self.ops,
            name="bn",
        )(x)


def whole(x: jax.Array) -> jax.Array:
    """Return `x`, computed before any sum over it.

    In jaxlib 0.10.2 to 0.12.0 XLA:CPU gives `relu(x).sum()` to YNNPACK as one, for which `max(nan, 0)` is 0: a network
    that is broken would answer as if it were not.
    """
    return jax.lax.optimization_barrier(x)


class SqueezeExcite(nn.Module):
    """Scale each channel by a sigmoid gate computed from the channel means.

    Attributes:
      reduced_features: width of the bottleneck.
      dtype: of the computation.
      param_dtype: of the parameters.

    References:
      Hu et al., *Squeeze-and-Excitation Networks*, CVPR 2018, arXiv:1709.01507, section 3.
    """

    reduced_features: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(batch, height, width, channels)` to the same shape."""
        dense = partial(nn.Dense, kernel_init=kernel_init, dtype=self.dtype, param_dtype=self.param_dtype)
        gate = whole(x).mean(axis=(1, 2))
        gate = nn.relu(dense(self.reduced_features, name="down")(gate))
        gate = nn.sigmoid(dense(x.shape[-1], name="up")(gate))
        return x * gate[:, None, None, :]


class RepVGGBlock(nn.Module):
    """One block: 3×3 + 1×1 + identity branches in the training form, one 3×3 convolution in the deploy form.

    Attributes:
      features: output channels.
      stride: 1 or 2. The identity branch exists where the stride is 1 and the channels stay the same.
      dilation: of the 3×3 convolution.
      groups: of the 3×3 and the 1×1 convolution.
      squeeze_excite: None, or the place of the squeeze-excite unit: before the ReLU (RepVGG-D2se) or after it
        (RepVGGplus).
      squeeze_excite_reduction: `features` over the width of the unit's bottleneck.
      deploy: which form.
      epsilon: of the batch norms.
      momentum: of the running statistics.
      dtype: of the computation.
      param_dtype: of parameters and statistics.
      ops: which lowerings compute it, see `RepVGG`.

    References:
      RepVGG, section 3.2 and figure 4, https://arxiv.org/abs/2101.03697
    """

    features: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    squeeze_excite: SqueezeExcitePosition | None = None
    squeeze_excite_reduction: int = 16
    deploy: bool = False
    epsilon: float = 1e-5
    momentum: float = 0.9
    dtype: Any = None
    param_dtype: Any = jnp.float32
    ops: Operations = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map `(batch, height, width, channels)` to `(batch, ⌈height/stride⌉, ⌈width/stride⌉, features)`."""
        y = self._fused(x) if self.deploy else self._branches(x, train=train)
        if self.squeeze_excite is None:
            return nn.relu(y)
        unit = SqueezeExcite(
            self.features // self.squeeze_excite_reduction,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="se",
        )
        return nn.relu(unit(y)) if self.squeeze_excite == "before_relu" else unit(nn.relu(y))

    def _branches(self, x: jax.Array, *, train: bool) -> jax.Array:
        policy: dict[str, Any] = dict(
            epsilon=self.epsilon,
            momentum=self.momentum,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            ops=self.ops,
        )
        branch = partial(ConvBN, self.features, stride=self.stride, groups=self.groups, **policy)
        y = branch(kernel_size=3, dilation=self.dilation, name="branch_3x3")(x, train=train)
        y += branch(kernel_size=1, name="branch_1x1")(x, train=train)
        if self.stride == 1 and x.shape[-1] == self.features:
            y += BatchNorm(use_running_average=not train, name="branch_identity", **policy)(x)
        return y

    def _fused(self, x: jax.Array) -> jax.Array:
        return nn.Conv(
            self.features,
            (3, 3),
            strides=self.stride,
            padding=((self.dilation, self.dilation), (self.dilation, self.dilation)),
            kernel_dilation=self.dilation,
            feature_group_count=self.groups,
            kernel_init=kernel_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            conv_general_dilated=convolution(self.ops, self.is_initializing()),
            name="reparam",
        )(x)
