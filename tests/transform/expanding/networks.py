"""Networks as they are trained, in float64: a function, its variables and example inputs. None knows of branches."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.random_variables import random_images
from tests.transform.merging.networks import convolve

conv = partial(nn.Conv, use_bias=False, param_dtype=jnp.float64)
norm = partial(nn.BatchNorm, param_dtype=jnp.float64)


class Case(NamedTuple):
    """A function, its variables, an example of its inputs, and how many convolutions it has."""

    function: Any
    variables: Any
    images: jax.Array
    convolutions: int

    def loss(self, outputs):
        """A number of the first output, so that there is something to train."""
        logits = jax.tree.leaves(outputs)[0]
        return jnp.mean((logits - jnp.arange(logits.shape[-1])) ** 2)


class Residual(nn.Module):
    """A small ResNet, of basic blocks."""

    @nn.compact
    def __call__(self, x, train=True):
        bn = partial(norm, use_running_average=not train)
        x = nn.relu(bn()(conv(4, (3, 3))(x)))
        for features, stride in ((4, 1), (8, 2)):
            y = nn.relu(bn()(conv(features, (3, 3), stride)(x)))
            y = bn()(conv(features, (3, 3))(y))
            if x.shape != y.shape:
                x = bn()(conv(features, (1, 1), stride)(x))
            x = nn.relu(x + y)
        return nn.Dense(3, param_dtype=jnp.float64)(x.mean((1, 2)))


class Mobile(nn.Module):
    """Inverted bottlenecks, as in MobileNetV2."""

    @nn.compact
    def __call__(self, x, train=True):
        bn = partial(norm, use_running_average=not train)
        for stride in (1, 2):
            y = nn.relu6(bn()(conv(12, (1, 1))(x)))
            y = nn.relu6(bn()(conv(12, (3, 3), stride, feature_group_count=12)(y)))
            y = bn()(conv(4, (1, 1))(y))
            x = x + y if x.shape == y.shape else y
        return nn.Dense(3, param_dtype=jnp.float64)(x.mean((1, 2)))


class Grouped(nn.Module):
    """Groups, a dilation, a bias behind a convolution, a convolution with neither, and one that is transposed."""

    @nn.compact
    def __call__(self, x, train=True):
        bn = partial(norm, use_running_average=not train)
        x = nn.relu(bn()(conv(8, (3, 3), feature_group_count=2)(x)))
        x = nn.relu(conv(8, (5, 5), kernel_dilation=2, use_bias=True)(x))
        x = jnp.tanh(conv(8, (3, 3), feature_group_count=4, padding="VALID")(x))
        x = nn.ConvTranspose(4, (3, 3), (2, 2), param_dtype=jnp.float64)(x)
        return x.mean((1, 2))


class Volumetric(nn.Module):
    """Volumes, and then lines."""

    @nn.compact
    def __call__(self, x, train=True):
        bn = partial(norm, use_running_average=not train)
        x = nn.relu(bn()(conv(3, (3, 3, 3))(x)))
        x = nn.relu(bn()(conv(4, (3, 3, 3), (1, 2, 2))(x)))
        x = nn.relu(bn()(conv(4, (3,))(x.mean((2, 3)))))
        return x.mean(1)


def of_linen(module, shape, convolutions):
    """Train a linen module with its statistics among the variables, all of them drawn at random."""
    images = random_images(shape)
    template = jax.eval_shape(module.init, jax.random.key(0), images)
    return Case(
        lambda variables, x: module.apply(variables, x, mutable=["batch_stats"]),
        randomised(template),
        images,
        convolutions,
    )


def randomised(template, seed=0):
    """Draw variables by shape and name."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if name in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape))
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 10
        return jnp.asarray(rng.normal(0, fan_in**-0.5, leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, template)


class NNX(nnx.Module):
    """A residual block between two convolutions."""

    def __init__(self, rngs):
        make = partial(nnx.Conv, kernel_size=(3, 3), use_bias=False, param_dtype=jnp.float64, rngs=rngs)
        self.convs = nnx.List([make(3, 4), make(4, 4), make(4, 6, strides=2)])
        self.norms = nnx.List([nnx.BatchNorm(size, param_dtype=jnp.float64, rngs=rngs) for size in (4, 4, 6)])

    def __call__(self, x):
        x = nnx.relu(self.norms[0](self.convs[0](x)))
        x = nnx.relu(x + self.norms[1](self.convs[1](x)))
        return nnx.relu(self.norms[2](self.convs[2](x))).mean((1, 2))


def of_nnx():
    """Train an NNX module: its parameters are the variables, its statistics are held and returned."""
    model = NNX(nnx.Rngs(0))
    graph, params, statistics = nnx.split(model, nnx.Param, ...)
    # They begin in float32.
    statistics = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), nnx.to_pure_dict(statistics))

    def function(variables, x):
        merged = nnx.merge(graph, variables, statistics)
        return merged(x), nnx.state(merged, nnx.BatchStat)

    return Case(function, nnx.to_pure_dict(params), random_images((4, 8, 7, 3)), 3)


def bare():
    """`jax.lax` alone, in NCHW with OIHW kernels, and a list of them."""
    rng = np.random.default_rng(0)
    variables = [
        {"kernel": jnp.asarray(rng.normal(0, 0.3, shape)), "shift": jnp.asarray(rng.normal(0, 0.3, shape[:1]))}
        for shape in ((4, 3, 3, 3), (4, 4, 3, 3), (5, 4, 4, 4))
    ]

    def function(variables, x):
        for each in variables:
            x = jnp.tanh(jax.lax.conv(x, each["kernel"], (1, 1), "SAME") + each["shift"][None, :, None, None])
        return x.mean((2, 3))

    return Case(function, variables, random_images((4, 3, 7, 6)), 3)


def single(kernel, **settings):
    """One convolution of NHWC images and no more."""
    return lambda variables, x: convolve(x, variables["kernel"] if kernel is None else kernel(variables), **settings)


CASES = {
    "residual": lambda: of_linen(Residual(), (4, 8, 9, 3), 6),
    "mobile": lambda: of_linen(Mobile(), (4, 8, 8, 4), 6),
    "grouped": lambda: of_linen(Grouped(), (4, 12, 11, 8), 4),
    "volumetric": lambda: of_linen(Volumetric(), (4, 5, 6, 6, 3), 3),
    "nnx": of_nnx,
    "bare": bare,
}
