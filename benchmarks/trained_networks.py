"""Networks of other libraries as they are trained: functions of variables, images and statistics, all at random."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.foreign import drawn, import_keras

BATCH = 8


class Training(NamedTuple):
    """A network as it is trained.

    Attributes:
        function: of variables, images and statistics; it returns the logits and the next statistics.
        variables: what is trained.
        statistics: what is kept beside them.
        images: a batch.
    """

    function: Callable[..., Any]
    variables: Any
    statistics: Any
    images: jax.Array


def of_linen(module: Any, images: jax.Array) -> Training:
    """Train a Flax linen module whose `__call__` has a flag `train`, as those of flaxmodels have."""

    def function(variables, images, statistics):
        both = {"params": variables, "batch_stats": statistics}
        logits, after = module.apply(both, images, train=True, mutable=["batch_stats"])
        return logits, after["batch_stats"]

    fresh = jax.eval_shape(partial(module.init, train=True), jax.random.key(0), images)
    return _at_random(function, fresh["params"], fresh["batch_stats"], images)


def of_nnx(model: Any, images: jax.Array) -> Training:
    """Train a Flax NNX module."""
    from flax import nnx

    model.train()
    graph, *kinds = nnx.split(model, nnx.Param, nnx.BatchStat)

    def function(variables, images, statistics):
        merged = nnx.merge(graph, variables, statistics)
        return merged(images), nnx.to_pure_dict(nnx.state(merged, nnx.BatchStat))

    return _at_random(function, *map(nnx.to_pure_dict, kinds), images)


def of_haiku(network: Any, images: jax.Array) -> Training:
    """Train what `hk.transform_with_state` returns, of a function that calls the network with `is_training=True`."""

    def function(variables, images, statistics):
        return network.apply(variables, statistics, None, images)

    return _at_random(function, *jax.eval_shape(network.init, jax.random.key(0), images), images)


def of_keras(model: Any, images: jax.Array) -> Training:
    """Train a Keras 3 model on the JAX backend. Its variables are named by their paths."""
    kinds = model.trainable_variables, model.non_trainable_variables

    def function(variables, images, statistics):
        given = zip(kinds, (variables, statistics), strict=True)
        lists = ([values[each.path] for each in kind] for kind, values in given)
        logits, after = model.stateless_call(*lists, images, training=True)
        return logits, dict(zip([each.path for each in kinds[1]], after, strict=True))

    return _at_random(function, *({each.path: each.value for each in kind} for kind in kinds), images)


def of_equinox(model: Any, state: Any, images: jax.Array) -> Training:
    """Train the two halves of `eqx.nn.make_with_state`, a model of an image `(channels, height, width)` and a state."""
    import equinox as eqx

    variables, rest = eqx.partition(model, eqx.is_inexact_array)
    statistics, others = eqx.partition(state, eqx.is_array)

    def function(variables, images, statistics):
        called = jax.vmap(eqx.combine(variables, rest), axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        logits, after = called(images, eqx.combine(statistics, others))
        return logits, eqx.filter(after, eqx.is_array)

    return _at_random(function, variables, statistics, images, channels_first=True)


def of_lax(widths: Sequence[int], images: jax.Array) -> Training:
    """Train 3×3 convolutions with biases, in `jax.lax` alone and channels first. They have no statistics."""

    def function(variables, images, statistics):
        x = images
        for number, (kernel, bias) in enumerate(variables):
            x = jax.nn.relu(jax.lax.conv(x, kernel, (1 + number % 2,) * 2, "SAME") + bias[:, None, None])
        return x.mean((2, 3)), statistics

    shapes = zip(widths, (images.shape[1], *widths), strict=False)
    variables = [(jnp.zeros((after, before, 3, 3)), jnp.zeros(after)) for after, before in shapes]
    return _at_random(function, variables, (), images, channels_first=True)


def _at_random(
    function: Callable[..., Any], variables: Any, statistics: Any, images: jax.Array, channels_first: bool = False
) -> Training:
    """Draw variables and statistics, in the dtype of the images."""
    random = np.random.default_rng(0)

    def draw(tree: Any) -> Any:
        def cast(leaf: jax.Array) -> jax.Array:
            return leaf.astype(images.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        return jax.tree.map(cast, drawn(tree, random, channels_first=channels_first))

    return Training(function, draw(variables), draw(statistics), images)


def random_images(side: int, channels_first: bool = False) -> jax.Array:
    """Draw a batch, in JAX's default precision."""
    shape = (BATCH, 3, side, side) if channels_first else (BATCH, side, side, 3)
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), float)


def _linen(name: str, side: int) -> Training:
    from benchmarks import linen_resnet

    return of_linen(getattr(linen_resnet, name)(), random_images(side))


def _nnx(name: str, side: int) -> Training:
    from flax import nnx

    from benchmarks import nnx_resnet

    return of_nnx(nnx.eval_shape(lambda: getattr(nnx_resnet, name)(nnx.Rngs(0))), random_images(side))


def _haiku(name: str, side: int) -> Training:
    import haiku

    def call(images):
        return getattr(haiku.nets, name)(1000)(images, is_training=True)

    return of_haiku(haiku.transform_with_state(call), random_images(side))


def _keras(name: str, side: int) -> Training:
    model = getattr(import_keras().applications, name)
    return of_keras(model(weights=None, input_shape=(side, side, 3), classifier_activation=None), random_images(side))


def _equinox(name: str, side: int) -> Training:
    import equinox as eqx

    from benchmarks import equinox_resnet

    halves = eqx.nn.make_with_state(getattr(equinox_resnet, name))(jax.random.key(0))
    return of_equinox(*halves, random_images(side, channels_first=True))


def _flaxmodels(name: str, side: int) -> Training:
    import flaxmodels

    return of_linen(getattr(flaxmodels, name)(output="logits", pretrained=None), random_images(side))


def _lax(name: str, side: int) -> Training:
    return of_lax((64, 64, 128, 128, 256, 256), random_images(side, channels_first=True))


# library/network → what makes it.
NETWORKS: dict[str, Callable[[str, int], Training]] = {
    "linen/ResNet18": _linen,
    "nnx/ResNet18": _nnx,
    "haiku/ResNet18": _haiku,
    "keras/MobileNetV2": _keras,
    "equinox/ResNet18": _equinox,
    "flaxmodels/ResNet18": _flaxmodels,
    "jax.lax/6 convolutions": _lax,
}
