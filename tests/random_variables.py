"""Variables with all four batch-norm leaves random: at initialisation batch norm is nearly the identity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def random_variables(model, image_shape=(1, 16, 16, 3), dtype=np.float64, seed=0):
    """Draw variables of a model by shape alone; float64 needs x64 enabled."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            value = rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape)
        elif name in ("scale", "var"):
            value = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            value = rng.normal(0, 0.2, leaf.shape)
        return jnp.asarray(value, dtype)

    return jax.tree_util.tree_map_with_path(draw, template(model, tuple(image_shape)))


@functools.cache
def template(model, image_shape=(1, 16, 16, 3)):
    """Shapes of the variables; to read, not to change. Tracing a published network takes a second."""
    images = jax.ShapeDtypeStruct(image_shape, jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)


def random_images(shape, dtype=np.float64, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)
