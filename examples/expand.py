"""A plain Flax ResNet that trains with the branches of RepVGG, and is the plain ResNet again afterwards.

python examples/expand.py     trains for four epochs on scikit-learn's digits
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from repvgg_jax import expand

BATCH, EPOCHS = 128, 4


class Block(nn.Module):
    """Two 3×3 convolutions with batch norms, and a shortcut."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map `(batch, height, width, channels)` to the same, or to half the height and width."""
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        y = nn.relu(norm()(nn.Conv(self.features, (3, 3), self.stride, use_bias=False)(x)))
        y = norm()(nn.Conv(self.features, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = norm()(nn.Conv(self.features, (1, 1), self.stride, use_bias=False)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A small ResNet (He et al., *Deep Residual Learning for Image Recognition*, arXiv:1512.03385)."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map images `(batch, height, width, channels)` to logits."""
        x = nn.Conv(16, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        for features, stride in ((16, 1), (32, 2)):
            x = Block(features, stride)(x, train=train)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


def digits() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return 1,437 images and their labels to train on, and 360 to test with."""
    data = load_digits()
    images, labels = jnp.asarray(data.images[..., None] / 16, jnp.float32), jnp.asarray(data.target)
    return images[:1437], labels[:1437], images[1437:], labels[1437:]


def main() -> None:
    """Expand a ResNet, train it, collapse it, and run the plain ResNet with what it learned."""
    images, labels, test_images, test_labels = digits()
    resnet = ResNet()
    variables = resnet.init(jax.random.key(0), images[:1], train=False)

    def apply(params: Any, batch_stats: Any, images: jax.Array) -> Any:
        """The network as it is trained; its own batch norms return what they have counted."""
        both = {"params": params, "batch_stats": batch_stats}
        return resnet.apply(both, images, train=True, mutable=["batch_stats"])

    wide = expand(apply, variables["params"], variables["batch_stats"], images[:BATCH], branches="repvgg")
    print(wide.report())
    batches = len(images) // BATCH
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.1, EPOCHS * batches), momentum=0.9, nesterov=True)

    @jax.jit
    def step(params: Any, state: Any, batch_stats: Any, memory: Any, images: jax.Array, labels: jax.Array) -> Any:
        """One step of training; two states go through it, that of the branches and that of the network."""

        def loss(params: Any) -> Any:
            (logits, updates), after = wide(params, state, batch_stats, images, train=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), (after, updates["batch_stats"])

        slope, (state, batch_stats) = jax.grad(loss, has_aux=True)(params)
        updates, memory = optimizer.update(slope, memory, params)
        return optax.apply_updates(params, updates), state, batch_stats, memory

    params, state, batch_stats = wide.params, wide.state, variables["batch_stats"]
    memory = optimizer.init(params)
    for epoch in range(EPOCHS):
        order = jax.random.permutation(jax.random.key(epoch), len(images))
        for chosen in order[: batches * BATCH].reshape(batches, BATCH):
            batch = images[chosen], labels[chosen]
            params, state, batch_stats, memory = step(params, state, batch_stats, memory, *batch)

    # From here on there are no branches: the tree is that of `resnet.init`.
    trained = {"params": wide.collapse(params, state), "batch_stats": batch_stats}
    logits = resnet.apply(trained, test_images, train=False)
    print(f"\ntest accuracy of the plain ResNet: {100 * float(jnp.mean(logits.argmax(-1) == test_labels)):.2f} %")


if __name__ == "__main__":
    main()
