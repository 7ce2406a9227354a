"""ResNet-18 in Equinox, to merge: one image `(channels, height, width)` at a time, statistics in a state.

Source: He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385.
"""

import equinox as eqx
import jax


class Unit(eqx.Module):
    """A convolution and a batch norm."""

    convolution: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm

    def __init__(self, before: int, after: int, side: int, stride: int, key: jax.Array):
        self.convolution = eqx.nn.Conv2d(before, after, side, stride, side // 2, use_bias=False, key=key)
        self.norm = eqx.nn.BatchNorm(after, axis_name="batch", mode="batch")

    def __call__(self, x, state):
        """Return the result and the state."""
        return self.norm(self.convolution(x), state)


class Block(eqx.Module):
    """Two 3×3 convolutions with batch norms, and a shortcut."""

    first: Unit
    second: Unit
    shortcut: Unit | None

    def __init__(self, before: int, after: int, stride: int, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.first = Unit(before, after, 3, stride, keys[0])
        self.second = Unit(after, after, 3, 1, keys[1])
        self.shortcut = Unit(before, after, 1, stride, keys[2]) if (before, stride) != (after, 1) else None

    def __call__(self, x, state):
        """Return the result and the state."""
        y, state = self.first(x, state)
        y, state = self.second(jax.nn.relu(y), state)
        if self.shortcut is not None:
            x, state = self.shortcut(x, state)
        return jax.nn.relu(x + y), state


class ResNet18(eqx.Module):
    """ResNet-18 for images `(3, height, width)`."""

    stem: Unit
    blocks: list[Block]
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 10)
        self.stem = Unit(3, 64, 7, 2, keys[8])
        shapes = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
        self.blocks = [Block(*shape, key) for shape, key in zip([*shapes, (512, 512, 1)], keys[:8], strict=True)]
        self.head = eqx.nn.Linear(512, 1000, key=keys[9])

    def __call__(self, image, state):
        """Return the logits and the state."""
        x, state = self.stem(image, state)
        x = eqx.nn.MaxPool2d(3, 2, 1)(jax.nn.relu(x))
        for block in self.blocks:
            x, state = block(x, state)
        return self.head(x.mean((1, 2))), state
