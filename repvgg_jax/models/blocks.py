"""The RepVGG block and its parts, in both forms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from repvgg_jax.models.conv import Conv, Operations, kernel_init
from repvgg_jax.models.norm import BatchNorm

SqueezeExcitePosition = Literal["before_relu", "after_relu"]
Layer = Callable[..., nn.Module]
Dense = partial(nn.Dense, kernel_init=kernel_init)


def layers(
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    ops: Operations = "auto",
) -> dict[str, Any]:
    """The layers that a block is made of, all of one kind: `RepVGGBlock(8, **layers(dtype=jnp.bfloat16))`.

    Args:
      epsilon: of the batch norms.
      momentum: of the running statistics: new = momentum · old + (1 − momentum) · batch (PyTorch's 0.1 is 0.9).
      dtype: of the computation; None computes in the dtype of images and parameters. Statistics are taken in at
        least float32.
      param_dtype: of parameters and statistics.
      ops: which lowerings compute it, see `RepVGG`.
    """
    dtypes: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
    return {
        "conv": partial(Conv, ops=ops, **dtypes),
        "norm": partial(BatchNorm, epsilon=epsilon, momentum=momentum, ops=ops, **dtypes),
        "dense": partial(Dense, **dtypes),
    }


class ConvBN(nn.Module):
    """A convolution without bias, then batch norm.

    Attributes:
      features: output channels.
      kernel_size: odd side length of the square kernel; the input is padded by half of it on every side.
      conv, norm: make its layers, see `layers`.
    """

    features: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    conv: Layer = Conv
    norm: Layer = BatchNorm

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map `(batch, height, width, channels)` to `(batch, ⌈height/stride⌉, ⌈width/stride⌉, features)`."""
        shape = (self.features, self.kernel_size, self.stride, self.dilation, self.groups)
        x = self.conv(*shape, use_bias=False, name="conv")(x)
        return self.norm(use_running_average=not train, name="bn")(x)


def whole(x: jax.Array) -> jax.Array:
    """Return `x`, computed before any sum over it.

    In jaxlib 0.10.2 to 0.12.0 XLA:CPU gives `relu(x).sum()` to YNNPACK as one, for which `max(nan, 0)` is 0: a network
    that is broken would answer as if it were not.
    """
    return jax.lax.optimization_barrier(x)


def spatial_mean(x: jax.Array) -> jax.Array:
    """The mean over height and width, in at least float32."""
    return whole(x).mean(axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))


class SqueezeExcite(nn.Module):
    """Scale each channel by a sigmoid gate computed from the channel means.

    Attributes:
      reduced_features: width of the bottleneck.
      dense: makes its layers, see `layers`.

    References:
      Hu et al., *Squeeze-and-Excitation Networks*, CVPR 2018, arXiv:1709.01507, section 3.
    """

    reduced_features: int
    dense: Layer = Dense

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(batch, height, width, channels)` to the same shape."""
        gate = whole(x).mean(axis=(1, 2))
        gate = nn.relu(self.dense(self.reduced_features, name="down")(gate))
        gate = nn.sigmoid(self.dense(x.shape[-1], name="up")(gate))
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
      conv, norm, dense: make its layers, see `layers`.

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
    conv: Layer = Conv
    norm: Layer = BatchNorm
    dense: Layer = Dense

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map `(batch, height, width, channels)` to `(batch, ⌈height/stride⌉, ⌈width/stride⌉, features)`."""
        y = self._fused(x) if self.deploy else self._branches(x, train=train)
        if self.squeeze_excite is None:
            return nn.relu(y)
        unit = SqueezeExcite(self.features // self.squeeze_excite_reduction, self.dense, name="se")
        return nn.relu(unit(y)) if self.squeeze_excite == "before_relu" else unit(nn.relu(y))

    def _branches(self, x: jax.Array, *, train: bool) -> jax.Array:
        branch = partial(ConvBN, self.features, stride=self.stride, groups=self.groups, conv=self.conv, norm=self.norm)
        y = branch(kernel_size=3, dilation=self.dilation, name="branch_3x3")(x, train=train)
        y += branch(kernel_size=1, name="branch_1x1")(x, train=train)
        if self.stride == 1 and x.shape[-1] == self.features:
            y += self.norm(use_running_average=not train, name="branch_identity")(x)
        return y

    def _fused(self, x: jax.Array) -> jax.Array:
        return self.conv(self.features, 3, self.stride, self.dilation, self.groups, name="reparam")(x)


class AuxiliaryHead(nn.Module):
    """A classifier on an inner stage, for training only: 3×3 stride-2 ConvBN, ReLU, mean, dense.

    Attributes:
      num_classes: width of the logits, which are in at least float32.
      conv, norm, dense: make its layers, see `layers`.
    """

    num_classes: int
    conv: Layer = Conv
    norm: Layer = BatchNorm
    dense: Layer = Dense

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map `(batch, height, width, channels)` to logits `(batch, num_classes)`."""
        x = ConvBN(x.shape[-1], 3, 2, conv=self.conv, norm=self.norm, name="conv_bn")(x, train=train)
        return self.dense(self.num_classes, dtype=None, name="head")(spatial_mean(nn.relu(x)))
