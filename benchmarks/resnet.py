"""ResNet-18, 50 and 101 in Flax, to compare with; torchvision's layout (stride in the 3×3 convolution).

Source: He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repvgg_jax.models.norm import BatchNorm
from repvgg_jax.models.operations import Operations, convolution

# (blocks in each stage, bottleneck?)
DEPTHS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
}


class ConvNorm(nn.Module):
    """A convolution and its batch norm, or with `deploy` the convolution with a bias that they fold to."""

    features: int
    kernel_size: int
    stride: int = 1
    deploy: bool = False
    dtype: Any = None
    ops: Operations = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map `(batch, height, width, channels)` to `(batch, ⌈height/stride⌉, ⌈width/stride⌉, features)`."""
        low = self.kernel_size // 2
        x = nn.Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            strides=self.stride,
            padding=((low, low), (low, low)),
            use_bias=self.deploy,
            dtype=self.dtype,
            conv_general_dilated=convolution(self.ops, self.is_initializing()),
            name="conv",
        )(x)
        if self.deploy:
            return x
        return BatchNorm(use_running_average=not train, dtype=self.dtype, ops=self.ops, name="bn")(x)


class ResNet(nn.Module):
    """A ResNet for 224×224 images; `deploy` as in `ConvNorm`."""

    depths: tuple[int, ...]
    bottleneck: bool
    num_classes: int
    deploy: bool = False
    dtype: Any = None
    ops: Operations = "auto"

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Map `(batch, height, width, channels)` to logits."""
        unit = partial(ConvNorm, deploy=self.deploy, dtype=self.dtype, ops=self.ops)
        x = nn.relu(unit(64, 7, 2, name="stem")(images, train=train))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, depth in enumerate(self.depths):
            width = 64 * 2**stage
            out = 4 * width if self.bottleneck else width
            for number in range(depth):
                stride = 2 if stage and not number else 1
                name = f"stage{stage + 1}_block{number + 1}"
                shapes = [(width, 1, 1), (width, 3, stride), (out, 1, 1)]
                if not self.bottleneck:
                    shapes = [(width, 3, stride), (out, 3, 1)]
                y = x
                for position, shape in enumerate(shapes, start=1):
                    y = unit(*shape, name=f"{name}_conv{position}")(y, train=train)
                    y = nn.relu(y) if position < len(shapes) else y
                if x.shape != y.shape:
                    x = unit(out, 1, stride, name=f"{name}_shortcut")(x, train=train)
                x = nn.relu(x + y)
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2), dtype=jnp.float32))


def create_resnet(name: str, **fields: Any) -> ResNet:
    """Build 'resnet18', 'resnet50' or 'resnet101'; `fields` are those of `ResNet`."""
    depths, bottleneck = DEPTHS[name]
    return ResNet(depths, bottleneck, **fields)
