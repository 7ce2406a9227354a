"""ResNet-18 in Flax linen, to expand: it has a flag `train`.

Source: He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385.
"""

from functools import partial

import flax.linen as nn
import jax


class ResNet18(nn.Module):
    """ResNet-18 for images `(batch, height, width, 3)`, or a smaller one of the kind."""

    depths: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Return the logits."""
        norm = partial(nn.BatchNorm, use_running_average=not train)
        conv = partial(nn.Conv, use_bias=False)
        x = nn.relu(norm()(conv(self.width, (7, 7), 2)(images)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, depth in enumerate(self.depths):
            for number in range(depth):
                features, stride = self.width << stage, 2 if stage and not number else 1
                y = nn.relu(norm()(conv(features, (3, 3), stride)(x)))
                y = norm()(conv(features, (3, 3))(y))
                if x.shape != y.shape:
                    x = norm()(conv(features, (1, 1), stride)(x))
                x = nn.relu(x + y)
        return nn.Dense(1000)(x.mean((1, 2)))
