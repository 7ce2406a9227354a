"""Networks written without a thought of RepVGG, some of them in no library at all."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from jax import lax

norm = partial(nn.BatchNorm, use_running_average=True, epsilon=1e-3, param_dtype=jnp.float64)
conv = partial(nn.Conv, use_bias=False, param_dtype=jnp.float64)


def convolve(x, kernel, padding="SAME", stride=1, **settings):
    """Of NHWC images with an HWIO kernel."""
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **settings
    )


class Residual(nn.Module):
    """The basic block of a ResNet, or, with `bottleneck`, that of ResNet-50."""

    features: int
    stride: int = 1
    bottleneck: bool = False

    @nn.compact
    def __call__(self, x):
        shortcut, width = x, self.features * (4 if self.bottleneck else 1)
        if self.bottleneck:
            x = nn.relu(norm()(conv(self.features, (1, 1))(x)))
        x = nn.relu(norm()(conv(self.features, (3, 3), self.stride)(x)))
        last = (1, 1) if self.bottleneck else (3, 3)
        x = norm()(conv(width, last)(x))
        if shortcut.shape != x.shape:
            shortcut = norm()(conv(width, (1, 1), self.stride)(shortcut))
        return nn.relu(x + shortcut)


class ResNet(nn.Module):
    depths: tuple = (2, 2, 2, 2)
    bottleneck: bool = False
    width: int = 4

    @nn.compact
    def __call__(self, x):
        x = nn.relu(norm()(conv(self.width, (7, 7), 2)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, depth in enumerate(self.depths):
            for number in range(depth):
                x = Residual(self.width << stage, 2 if stage and not number else 1, self.bottleneck)(x)
        return nn.Dense(5, param_dtype=jnp.float64)(x.mean((1, 2)))


class MobileOne(nn.Module):
    """Depthwise: three 3×3 branches, a 1×1 and a norm; then pointwise, in groups: two 1×1 branches and a norm."""

    groups: int = 1

    @nn.compact
    def __call__(self, x):
        for stride, features in ((2, 8), (1, 8), (2, 16)):
            channels = x.shape[-1]
            depthwise = partial(conv, channels, strides=stride, feature_group_count=channels)
            y = sum(norm()(depthwise(kernel_size=(3, 3), padding=((1, 1), (1, 1)))(x)) for _ in range(3))
            y += norm()(depthwise(kernel_size=(1, 1))(x))
            x = nn.relu(y + norm()(x)) if stride == 1 else nn.relu(y)
            y = sum(norm()(conv(features, (1, 1), feature_group_count=self.groups)(x)) for _ in range(2))
            x = nn.relu(y + norm()(x)) if features == channels else nn.relu(y)
        return x


class DiverseBranch(nn.Module):
    """Ding et al., CVPR 2021, arXiv:2103.13425: 3×3, 1×1, 1×1 → 3×3, 1×1 → mean; padded before the 1×1 norms."""

    features: int = 6

    @nn.compact
    def __call__(self, x):
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        y = norm()(conv(self.features, (3, 3), padding="VALID")(padded))
        y += norm()(conv(self.features, (1, 1))(x))
        y += norm()(conv(self.features, (3, 3), padding="VALID")(norm()(conv(self.features, (1, 1))(padded))))
        y += norm()(nn.avg_pool(norm()(conv(self.features, (1, 1))(padded)), (3, 3), padding="VALID"))
        return nn.relu(y)


class Asymmetric(nn.Module):
    """ACNet, Ding et al., ICCV 2019, arXiv:1908.03930: 3×3 + 1×3 + 3×1."""

    @nn.compact
    def __call__(self, x):
        for stride in (1, 2):
            sizes = {(3, 3): (1, 1), (1, 3): (0, 1), (3, 1): (1, 0)}
            x = nn.relu(
                sum(norm()(conv(6, size, stride, [(pad, pad) for pad in pads])(x)) for size, pads in sizes.items())
            )
        return x


class QARepVGG(nn.Module):
    """Chu et al., arXiv:2212.01593: a norm in the 3×3 branch alone, and one after the sum."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(norm()(norm()(conv(6, (3, 3))(x)) + conv(6, (1, 1))(x)))
        return nn.relu(norm()(norm()(conv(6, (3, 3))(x)) + conv(6, (1, 1))(x) + x))


class LargeKernel(nn.Module):
    """RepLKNet, Ding et al., CVPR 2022, arXiv:2203.06717: a depthwise 13×13 beside a depthwise 5×5."""

    @nn.compact
    def __call__(self, x):
        depthwise = partial(conv, x.shape[-1], feature_group_count=x.shape[-1])
        return nn.gelu(norm()(depthwise((13, 13))(x)) + norm()(depthwise((5, 5))(x)))


class Dilated(nn.Module):
    """Dilated, transposed and strided, each with a norm; the sum of two dilations that no one kernel covers."""

    @nn.compact
    def __call__(self, x):
        dilated = partial(conv, 6, (3, 3), padding="SAME")
        x = nn.relu(norm()(dilated(kernel_dilation=2)(x)) + norm()(dilated(kernel_dilation=2)(x)))
        x = nn.relu(norm()(dilated(kernel_dilation=2)(x)) + norm()(dilated(kernel_dilation=3)(x)))
        x = nn.relu(norm()(nn.ConvTranspose(6, (3, 3), (2, 2), use_bias=False, param_dtype=jnp.float64)(x)))
        return norm()(conv(4, (3, 3), 2, "VALID")(x))


class Attention(nn.Module):
    """Nothing to merge: LayerNorm, attention, GELU."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x += nn.MultiHeadDotProductAttention(2, qkv_features=8, param_dtype=jnp.float64)(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1], param_dtype=jnp.float64)(nn.gelu(nn.LayerNorm(param_dtype=jnp.float64)(x)))


class Shared(nn.Module):
    """One convolution and one norm, used twice; two outputs in a dict."""

    @nn.compact
    def __call__(self, x):
        layer, after = conv(3, (3, 3)), norm()
        first = nn.relu(after(layer(x)))
        second = after(layer(first))
        return {"first": first, "both": second + first}


class NNXResidual(nnx.Module):
    def __init__(self, before, features, stride, bottleneck, rngs):
        def layer(inside, outside, side, stride=1):
            convolution = nnx.Conv(
                inside, outside, (side, side), stride, use_bias=False, param_dtype=jnp.float64, rngs=rngs
            )
            return nnx.List(
                [convolution, nnx.BatchNorm(outside, use_running_average=True, param_dtype=jnp.float64, rngs=rngs)]
            )

        after = 4 * features if bottleneck else features
        if bottleneck:
            layers = [layer(before, features, 1), layer(features, features, 3, stride), layer(features, after, 1)]
        else:
            layers = [layer(before, features, 3, stride), layer(features, after, 3)]
        self.layers = nnx.List(layers)
        self.shortcut = layer(before, after, 1, stride) if (before, stride) != (after, 1) else None

    def __call__(self, x):
        y = x
        for index, (convolution, batch_norm) in enumerate(self.layers):
            y = batch_norm(convolution(nnx.relu(y) if index else y))
        if self.shortcut is not None:
            convolution, batch_norm = self.shortcut
            x = batch_norm(convolution(x))
        return nnx.relu(y + x)


class NNXResNet(nnx.Module):
    """ResNet-18 or, with bottlenecks, -50: narrow."""

    def __init__(self, depths, bottleneck, rngs):
        self.stem = nnx.Conv(3, 4, (3, 3), use_bias=False, param_dtype=jnp.float64, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, param_dtype=jnp.float64, rngs=rngs)
        blocks, before = [], 4
        for stage, depth in enumerate(depths):
            for number in range(depth):
                stride = 2 if stage and not number else 1
                blocks.append(NNXResidual(before, 4 << stage, stride, bottleneck, rngs))
                before = (4 << stage) * (4 if bottleneck else 1)
        self.blocks = nnx.List(blocks)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return x.mean((1, 2))


def bare(weights, x):
    """A network of `jax.lax` alone, in NCHW: a convolution, a norm written by hand, a residual sum."""
    for kernel, mean, deviation in zip(weights["kernels"], weights["means"], weights["deviations"], strict=True):
        y = lax.conv(x, kernel, (1, 1), "SAME")
        y = (y - mean[None, :, None, None]) / deviation[:, None, None]
        x = jnp.tanh(y + x) if y.shape == x.shape else jnp.tanh(-y)
    return x
