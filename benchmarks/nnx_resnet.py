"""ResNet-18 in Flax NNX, to merge.

Source: He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385.
"""

from flax import nnx


class Unit(nnx.Module):
    """A convolution and a batch norm."""

    def __init__(self, before: int, after: int, side: int, stride: int, rngs: nnx.Rngs):
        self.convolution = nnx.Conv(
            before, after, (side, side), stride, padding=((side // 2, side // 2),) * 2, use_bias=False, rngs=rngs
        )
        self.norm = nnx.BatchNorm(after, rngs=rngs)

    def __call__(self, x):
        """Map `(batch, height, width, channels)` to the same, or to half the height and width."""
        return self.norm(self.convolution(x))


class Block(nnx.Module):
    """Two 3×3 convolutions with batch norms, and a shortcut."""

    def __init__(self, before: int, after: int, stride: int, rngs: nnx.Rngs):
        self.first, self.second = Unit(before, after, 3, stride, rngs), Unit(after, after, 3, 1, rngs)
        self.shortcut = Unit(before, after, 1, stride, rngs) if (before, stride) != (after, 1) else None

    def __call__(self, x):
        """Map `(batch, height, width, channels)` to the same, or to half the height and width."""
        y = self.second(nnx.relu(self.first(x)))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet18(nnx.Module):
    """ResNet-18 for images `(batch, height, width, 3)`."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = Unit(3, 64, 7, 2, rngs)
        shapes = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
        self.blocks = nnx.List([Block(*shape, rngs) for shape in [*shapes, (512, 512, 1)]])
        self.head = nnx.Linear(512, 1000, rngs=rngs)

    def __call__(self, images):
        """Return the logits."""
        x = nnx.max_pool(nnx.relu(self.stem(images)), (3, 3), (2, 2), ((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))
