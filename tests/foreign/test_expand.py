"""Networks of other libraries train as branches, and collapse into the variables that their library knows.

`pytest -m long tests/foreign`. They are small ones, in float64 but for Keras, whose batch norms compute in float32.
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks import linen_resnet, nnx_resnet
from benchmarks.expand_libraries import distance, train
from benchmarks.foreign import import_keras
from benchmarks.trained_networks import of_equinox, of_haiku, of_keras, of_lax, of_linen, of_nnx, random_images
from repvgg_jax import expand

pytestmark = pytest.mark.long
SIDE = 16


class Small(nnx.Module):
    """A stem and two blocks of NNX."""

    def __init__(self, rngs):
        self.stem = nnx_resnet.Unit(3, 8, 7, 2, rngs)
        self.blocks = nnx.List([nnx_resnet.Block(8, 8, 1, rngs), nnx_resnet.Block(8, 16, 2, rngs)])
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.stem(images))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def haiku():
    import haiku

    def call(images):
        network = haiku.nets.ResNet(
            blocks_per_group=(1, 1, 1, 1),
            num_classes=10,
            bottleneck=False,
            channels_per_group=(8, 8, 16, 16),
            use_projection=(False, False, True, False),
            strides=(1, 1, 2, 1),
            initial_conv_config={"output_channels": 8},
        )
        return network(images, is_training=True)

    return of_haiku(haiku.transform_with_state(call), random_images(SIDE))


def keras():
    library = import_keras()
    layers, source = library.layers, library.Input((SIDE, SIDE, 3))
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(8, 3, 2, "same", use_bias=False)(source)))
    y = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    y = layers.Conv2D(8, 1, use_bias=False)(layers.ReLU()(layers.BatchNormalization()(y)))
    x = layers.Add()([x, layers.BatchNormalization()(y)])
    x = layers.Dropout(0.2, seed=0)(layers.GlobalAveragePooling2D()(layers.SeparableConv2D(16, 3)(x)))
    return of_keras(library.Model(source, layers.Dense(10)(x)), random_images(SIDE))


def equinox():
    import equinox as eqx

    from benchmarks import equinox_resnet

    class Network(eqx.Module):
        stem: equinox_resnet.Unit
        blocks: list[equinox_resnet.Block]
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 4)
            self.stem = equinox_resnet.Unit(3, 8, 7, 2, keys[0])
            self.blocks = [equinox_resnet.Block(8, 8, 1, keys[1]), equinox_resnet.Block(8, 16, 2, keys[2])]
            self.head = eqx.nn.Linear(16, 10, key=keys[3])

        def __call__(self, image, state):
            x, state = self.stem(image, state)
            x = jax.nn.relu(x)
            for block in self.blocks:
                x, state = block(x, state)
            return self.head(x.mean((1, 2))), state

    return of_equinox(*eqx.nn.make_with_state(Network)(jax.random.key(0)), random_images(SIDE, channels_first=True))


def flaxmodels():
    from flaxmodels.resnet.resnet import BasicBlock

    class Network(nn.Module):
        @nn.compact
        def __call__(self, images, train):
            options = dict(kernel_init=nn.initializers.lecun_normal(), bias_init=nn.initializers.zeros, dtype="float64")
            x = nn.Conv(8, (3, 3), dtype="float64")(images)
            for features, down in ((8, False), (16, True)):
                block = BasicBlock(features=features, downsample=down, **options)
                x = block(x, {}, train)
            return nn.Dense(10)(x.mean((1, 2)))

    return of_linen(Network(), random_images(SIDE))


# Library → how a network of it is made, the module that it needs, how many convolutions it has, and how many of them
# become branches. A 1×1 convolution between different numbers of channels has none of RepVGG's.
NETWORKS = {
    "linen": (lambda: of_linen(linen_resnet.ResNet18((1, 1), 8), random_images(SIDE)), "flax", 6, 5),
    "nnx": (lambda: of_nnx(Small(nnx.Rngs(0)), random_images(SIDE)), "flax", 6, 5),
    "haiku": (haiku, "haiku", 10, 9),
    "keras": (keras, "keras", 5, 4),
    "equinox": (equinox, "equinox", 6, 5),
    "flaxmodels": (flaxmodels, "flaxmodels", 6, 5),
    "jax.lax": (lambda: of_lax((8, 8, 16, 16), random_images(SIDE, channels_first=True)), "jax", 4, 4),
}


@pytest.mark.parametrize("library", NETWORKS)
def test_ten_steps_as_branches_collapse_into_the_variables_of_the_library(library, require):
    make, module, convolutions, expanded = NETWORKS[library]
    require(module)
    dtype, tolerance = ("float32", 1e-5) if library == "keras" else ("float64", 1e-12)
    with jax.enable_x64(dtype == "float64"):
        network = make()
        function, variables, statistics, images = network
        assert {leaf.dtype for leaf in jax.tree.leaves((variables, images))} == {jnp.dtype(dtype)}
        wide = expand(function, variables, images, statistics)
        assert repr(wide) == f"<expanded function, {expanded} of {convolutions} convolutions have branches>"
        plain, apart = jax.jit(function), jax.jit(wide, static_argnames="train")
        start, _ = plain(variables, images, statistics)
        (found, _), _ = apart(wide.params, wide.state, images, statistics, train=True)
        assert distance(found, start) < tolerance

        params, state, statistics = train(wide, network)
        collapsed = wide.collapse(params, state)
        chex.assert_trees_all_equal_structs(collapsed, variables)
        chex.assert_trees_all_equal_shapes_and_dtypes(collapsed, variables)
        (found, _), _ = apart(params, state, images, statistics, train=False)
        assert found.dtype == dtype
        assert distance(plain(collapsed, images, statistics)[0], found) < tolerance
        # Negative controls: training has changed the function, by the kernels of the branches and by their variances.
        assert distance(start, found) > 1e-2
        assert distance(plain(params["variables"], images, statistics)[0], found) > 1e-2
        assert distance(plain(wide.collapse(params, wide.state), images, statistics)[0], found) > 1e-4
