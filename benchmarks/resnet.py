"""ResNet-18, 50 and 101 in Flax, to compare with; torchvision's layout (stride in the 3×3 convolution).

Source: He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repvgg_jax.models.blocks import ConvBN
from repvgg_jax.models.conv import Conv, Operations
from repvgg_jax.models.norm import BatchNorm

# (blocks in each stage, bottleneck?)
DEPTHS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
}


class ResNet(nn.Module):
    """A ResNet for 224×224 images; with `deploy` every batch norm is folded into its convolution."""

    depths: tuple[int, ...]
    bottleneck: bool
    num_classes: int
    deploy: bool = False
    dtype: Any = None
    ops: Operations = "auto"

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Map `(batch, height, width, channels)` to logits."""

        conv = partial(Conv, dtype=self.dtype, ops=self.ops)
        norm = partial(BatchNorm, dtype=self.dtype, ops=self.ops)

        def unit(features: int, side: int, stride: int, *, name: str) -> Callable[..., jax.Array]:
            if not self.deploy:
                return ConvBN(features, side, stride, conv=conv, norm=norm, name=name)
            convolve = conv(features, side, stride, name=name)
            return lambda x, *, train: convolve(x)

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
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32)))


def create_resnet(name: str, **fields: Any) -> ResNet:
    """Build 'resnet18', 'resnet50' or 'resnet101'; `fields` are those of `ResNet`."""
    depths, bottleneck = DEPTHS[name]
    return ResNet(depths, bottleneck, **fields)
