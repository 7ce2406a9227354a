"""A plain Flax ResNet: `reparameterize` folds its batch norms, and it need not know.

python examples/resnet.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax import reparameterize


class Block(nn.Module):
    """Two 3×3 convolutions with batch norms, and a shortcut."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(batch, height, width, channels)` to the same, or to half the height and width."""
        y = nn.Conv(self.features, (3, 3), self.stride, use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=True)(y))
        y = nn.Conv(self.features, (3, 3), use_bias=False)(y)
        y = nn.BatchNorm(use_running_average=True)(y)
        if x.shape != y.shape:
            x = nn.Conv(self.features, (1, 1), self.stride, use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=True)(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet-18 in evaluation (He et al., *Deep Residual Learning for Image Recognition*, arXiv:1512.03385)."""

    depths: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images `(batch, height, width, 3)` to logits."""
        x = nn.Conv(self.width, (7, 7), 2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, depth in enumerate(self.depths):
            for number in range(depth):
                x = Block(self.width << stage, 2 if stage and not number else 1)(x)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


def main() -> None:
    """Merge a ResNet-18 whose batch norms are random, and compare."""
    resnet, images = ResNet(), jax.random.normal(jax.random.key(0), (2, 64, 64, 3))
    variables = jax.jit(resnet.init)(jax.random.key(1), images)
    random = np.random.default_rng(0)

    def draw(path, leaf):
        return jnp.asarray(random.uniform(0.5, 1.5, leaf.shape), leaf.dtype) if path[-1].key != "kernel" else leaf

    variables = jax.tree_util.tree_map_with_path(draw, variables)
    fused = reparameterize(resnet.apply, variables, images)
    print(fused.report())
    expected, found = jax.jit(resnet.apply)(variables, images), jax.jit(fused)(fused.params, images)
    print(f"\nlargest difference: {abs(found - expected).max() / abs(expected).max():.1e} of the largest logit")


if __name__ == "__main__":
    main()
