"""RepVGG as the backbone of a segmentation network: train, fuse, compare.

    python examples/segmentation.py

A pyramid-pooling head (Zhao et al., *Pyramid Scene Parsing Network*, CVPR 2017, arXiv:1612.01105) on a small RepVGG of
output stride 4 learns to find disks and squares in noise. `fuse` then folds the blocks of the backbone, wherever they
stand in the tree, and leaves the head and the batch norms of its own as they are.
"""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from repvgg_jax import RepVGG, create_model, fuse

SIZE, CLASSES = 64, ("background", "disk", "square")


class PyramidHead(nn.Module):
    """The mean over grids of 1, 2 and 4 cells a side, beside the features; then a convolution and a classifier."""

    features: int = 32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map `(batch, height, width, channels)` to logits of the same height and width."""
        batch, height, width, _ = x.shape
        pyramid = [x]
        for cells in (1, 2, 4):
            pooled = nn.avg_pool(x, (height // cells, width // cells), (height // cells, width // cells))
            pooled = nn.relu(nn.Conv(self.features // 4, (1, 1), name=f"pool{cells}")(pooled))
            pyramid.append(jax.image.resize(pooled, (batch, height, width, pooled.shape[-1]), "bilinear"))
        x = nn.Conv(self.features, (3, 3), use_bias=False, name="conv")(jnp.concatenate(pyramid, -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x))
        return nn.Conv(len(CLASSES), (1, 1), name="classifier")(x)


class Segmenter(nn.Module):
    """A backbone in either form, and the head."""

    backbone: RepVGG

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Map images `(batch, height, width, 3)` to logits `(batch, height, width, classes)`."""
        features = self.backbone(images, train=train, features=True)["stage4"]
        logits = PyramidHead(name="head")(features, train=train)
        return jax.image.resize(logits, (*images.shape[:3], len(CLASSES)), "bilinear")


@partial(jax.jit, static_argnums=1)
def draw_scenes(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """A disk and a square each, of random place and colour, in noise; and the class of every pixel."""
    places, colours, noise = jax.random.split(key, 3)
    centres = jax.random.uniform(places, (count, 2, 2), minval=10, maxval=SIZE - 10)[..., None, None]
    down, across = (jnp.arange(SIZE)[:, None] - centres[:, :, 0], jnp.arange(SIZE)[None, :] - centres[:, :, 1])
    disk = (down**2 + across**2 < 9**2)[:, 0]
    square = (jnp.maximum(abs(down), abs(across)) < 8)[:, 1]
    masks = jnp.where(square, 2, jnp.where(disk, 1, 0))
    colour = jax.random.uniform(colours, (count, 3, 3), minval=-1, maxval=1)
    images = colour[jnp.arange(count)[:, None, None], masks]
    return images + 0.15 * jax.random.normal(noise, images.shape), masks


@partial(jax.jit, static_argnums=(0, 1))
def train_step(model, optimizer, variables, state, key):
    """One step on new scenes."""
    images, masks = draw_scenes(key, 16)

    def loss_fn(params):
        logits, updates = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, masks).mean(), updates

    (loss, updates), gradients = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
    changes, state = optimizer.update(gradients, state, variables["params"])
    return {"params": optax.apply_updates(variables["params"], changes), **updates}, state, loss


@dataclasses.dataclass(frozen=True)
class Settings:
    """Train a segmentation network on drawn scenes, fuse its backbone, and compare the two forms."""

    steps: int = 400
    """Training steps, 16 scenes each."""
    picture: str = "segmentation.png"
    """Where to draw four scenes, their classes and what both forms see in them."""


def main(settings: Settings) -> int:
    """Run the example.

    Returns:
      How many of the test pixels the two forms classify differently.
    """
    backbone = create_model(
        "repvgg_a0", depths=(1, 2, 2, 1), width_multiplier=(0.25,) * 4, strides=(1, 2, 2, 2, 2), output_stride=4
    )
    model = Segmenter(backbone)
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, settings.steps))
    state = optimizer.init(variables["params"])
    for step in range(settings.steps):
        variables, state, loss = train_step(model, optimizer, variables, state, jax.random.key(step + 1))
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss:.4f}")

    deploy_model = Segmenter(backbone.clone(deploy=True))
    deploy_variables = fuse(variables)
    images, masks = draw_scenes(jax.random.key(0), 32)
    logits, deploy_logits = (
        jax.jit(partial(network.apply, train=False))(trained, images)
        for network, trained in ((model, variables), (deploy_model, deploy_variables))
    )
    seen, deploy_seen = logits.argmax(-1), deploy_logits.argmax(-1)
    for number, name in enumerate(CLASSES):
        both, either = (seen == number) & (masks == number), (seen == number) | (masks == number)
        print(f"intersection over union, {name}: {both.sum() / either.sum():.3f}")
    changed = int((seen != deploy_seen).sum())
    difference = float(abs(logits - deploy_logits).max() / abs(logits).max())
    print(f"fused: largest difference {difference:.1e} of the largest logit, {changed} of {seen.size:,} pixels changed")
    assert deploy_variables["batch_stats"].keys() == {"head"}, "the head keeps the batch norm of its own"
    draw(settings.picture, images[:4], masks[:4], seen[:4], deploy_seen[:4])
    return changed


def draw(path: str, images: jax.Array, *classes: jax.Array) -> None:
    """Write scenes and maps of classes, a row each."""
    from PIL import Image

    palette = np.array([[30, 30, 40], [240, 160, 60], [80, 170, 250]], np.uint8)
    pixels = np.uint8(np.clip(np.asarray(images) * 80 + 128, 0, 255))
    rows = [np.concatenate(list(row), 1) for row in (pixels, *(palette[np.asarray(each)] for each in classes))]
    Image.fromarray(np.concatenate(rows)).resize((SIZE * 4 * 3, SIZE * len(rows) * 3), Image.Resampling.NEAREST).save(
        path
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
