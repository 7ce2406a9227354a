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
    """Return the constructors of a block's layers, all with the same settings.

    They are arguments of the modules here, e.g. `RepVGGBlock(8, **layers(dtype=jnp.bfloat16))`.

    Args:
      epsilon: The epsilon of the batch norms.
      momentum: Momentum of the running statistics: new = momentum · old + (1 − momentum) · batch. PyTorch's 0.1 is 0.9
        here.
      dtype: Dtype of the computation. None computes in the dtype of images and parameters. Statistics are computed in
        at least float32.
      param_dtype: Dtype of the parameters. Statistics have it too, but are at least float32.
      ops: Which operations the layers use, "auto" or "xla"; see `RepVGG`.

    Returns:
      The constructors by their names 'conv', 'norm' and 'dense'.
    """
    dtypes: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
    return {
        "conv": partial(Conv, ops=ops, **dtypes),
        "norm": partial(BatchNorm, epsilon=epsilon, momentum=momentum, ops=ops, **dtypes),
        "dense": partial(Dense, **dtypes),
    }


class ConvBN(nn.Module):
    """A convolution without bias, followed by a batch norm.

    Attributes:
      features: Number of output channels.
      kernel_size: Odd side length of the square kernel. The input is padded by half of it, times the dilation, on every
        side.
      conv: Constructor of the convolution, see `layers`.
      norm: Constructor of the batch norm, see `layers`.
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

    In jaxlib 0.10.2 to 0.12.0, XLA:CPU gives `relu(x).sum()` to YNNPACK as one operation, for which `max(nan, 0)` is 0.
    A network that is broken would answer as if it were not.
    """
    return jax.lax.optimization_barrier(x)


def spatial_mean(x: jax.Array) -> jax.Array:
    """Return the mean over height and width, in at least float32."""
    return whole(x).mean(axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))


class SqueezeExcite(nn.Module):
    """A unit that scales each channel by a sigmoid gate, which it computes from the means of all channels.

    Attributes:
      reduced_features: Width of the bottleneck.
      dense: Constructor of the dense layers, see `layers`.

    References:
      Hu et al., *Squeeze-and-Excitation Networks*, CVPR 2018, arXiv:1709.01507, section 3.
    """

    reduced_features: int
    dense: Layer = Dense

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scale the channels of `(batch, height, width, channels)`."""
        gate = whole(x).mean(axis=(1, 2))
        gate = nn.relu(self.dense(self.reduced_features, name="down")(gate))
        gate = nn.sigmoid(self.dense(x.shape[-1], name="up")(gate))
        return x * gate[:, None, None, :]


class RepVGGBlock(nn.Module):
    """A block of RepVGG, in its training form or its deploy form.

    The training form sums a 3×3 branch, a 1×1 branch and, where it exists, an identity branch, each with a batch norm.
    The deploy form is one 3×3 convolution. A ReLU follows in both.

    Attributes:
      features: Number of output channels.
      stride: Stride, 1 or 2. The identity branch exists where the stride is 1 and the number of channels stays the
        same.
      dilation: Dilation of the 3×3 convolution.
      groups: Groups of the 3×3 and the 1×1 convolution.
      squeeze_excite: Place of the squeeze-excite unit, "before_relu" (RepVGG-D2se) or "after_relu" (RepVGGplus), or
        None for no unit.
      squeeze_excite_reduction: `features` over the width of the unit's bottleneck.
      deploy: Whether the block is in its deploy form.
      conv: Constructor of the convolutions, see `layers`.
      norm: Constructor of the batch norms, see `layers`.
      dense: Constructor of the dense layers, see `layers`.

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
    """A classifier on an inner stage, for training only.

    It consists of a 3×3 convolution of stride 2 with a batch norm, a ReLU, the mean over all pixels, and a dense layer.

    Attributes:
      num_classes: Number of classes, the width of the logits. The logits are in at least float32.
      conv: Constructor of the convolution, see `layers`.
      norm: Constructor of the batch norm, see `layers`.
      dense: Constructor of the dense layer, see `layers`.
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
