"""NNX modules, bridged and native, fuse to what their training form computes."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from repvgg_jax import create_model, fuse
from repvgg_jax.interop.nnx import to_variables, update_module
from repvgg_jax.reparam import EquivalenceError, assert_equivalent
from tests.random_variables import random_images, random_variables

SMALL = dict(depths=(1, 2, 1, 1), width_multiplier=(0.125,) * 4, num_classes=5)


def bridged(model, shape=(1, 16, 16, 3)):
    return nnx.jit(lambda: nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(jnp.zeros(shape), train=False))()


@nnx.jit
def run(module, images):
    return module(images, train=False)


def test_a_bridged_network_gives_and_takes_the_variables_of_the_linen_one():
    model = create_model("repvgg_a0", **SMALL)
    variables = random_variables(model, dtype=np.float32)
    module = bridged(model)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(to_variables(module), variables)
    update_module(module, variables)
    chex.assert_trees_all_equal(to_variables(module), variables)
    chex.assert_trees_all_equal(to_variables(nnx.state(module)), variables)
    images = random_images((2, 16, 16, 3), np.float32)
    expected = jax.jit(partial(model.apply, train=False))(variables, images)
    chex.assert_trees_all_close(run(module, images), expected, rtol=1e-6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["repvgg_a0", pytest.param("repvgg_d2se", marks=pytest.mark.long)])
def test_a_bridged_network_is_fused(name):
    model = create_model(name, **{**SMALL, "width_multiplier": (0.25,) * 4}, param_dtype=jnp.float64)
    module, deploy = bridged(model), bridged(model.clone(deploy=True))
    update_module(module, random_variables(model))
    update_module(deploy, fuse(to_variables(module)))
    images = random_images((2, 16, 16, 3))
    assert_equivalent(run(module, images), run(deploy, images), rtol=1e-12)


class Branch(nnx.Module):
    def __init__(self, features, size, rngs):
        kernel = dict(use_bias=False, padding=size // 2, param_dtype=jnp.float64, rngs=rngs)
        self.conv = nnx.Conv(features, features, (size, size), **kernel)
        self.bn = nnx.BatchNorm(features, epsilon=1e-5, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        return self.bn(self.conv(x), use_running_average=True)


class Block(nnx.Module):
    def __init__(self, features, rngs):
        self.branch_3x3, self.branch_1x1 = Branch(features, 3, rngs), Branch(features, 1, rngs)
        self.branch_identity = nnx.BatchNorm(features, epsilon=1e-5, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.branch_3x3(x) + self.branch_1x1(x) + self.branch_identity(x, use_running_average=True))


class FusedBlock(nnx.Module):
    def __init__(self, features, rngs):
        self.reparam = nnx.Conv(features, features, (3, 3), padding=1, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.reparam(x))


class Net(nnx.Module):
    """Written in NNX: a list of blocks, and something that is not one."""

    def __init__(self, block, rngs):
        self.blocks = nnx.List([block(4, rngs) for _ in range(2)])
        self.head = nnx.Linear(4, 3, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


@pytest.mark.usefixtures("float64")
def test_a_network_written_in_nnx_is_fused():
    module, deploy = Net(Block, nnx.Rngs(0)), Net(FusedBlock, nnx.Rngs(1))
    variables = to_variables(module)
    assert set(variables["params"]["blocks"]) == {"0", "1"}
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape)), variables)
    update_module(module, drawn)
    update_module(deploy, fuse(to_variables(module)))
    images = random_images((2, 9, 9, 4))
    assert_equivalent(module(images), deploy(images), rtol=1e-12)
    # Statistics that the fold did not see: negative control.
    update_module(module, jax.tree.map(lambda leaf: leaf * 1.01, drawn))
    with pytest.raises(EquivalenceError):
        assert_equivalent(module(images), deploy(images), rtol=1e-6)


def test_variables_of_another_network_are_refused_by_path_and_change_nothing():
    model = create_model("repvgg_a0", **SMALL)
    module = bridged(model)
    before = to_variables(module)
    variables = random_variables(model, dtype=np.float32)
    del variables["params"]["stem"]["branch_1x1"]
    variables["params"]["head"]["bias"] = jnp.zeros(7)
    variables["params"]["extra"] = jnp.zeros(2)
    with pytest.raises(ValueError) as error:
        update_module(module, variables)
    for part in (
        "params/stem/branch_1x1/conv/kernel is missing, expected (1, 1, 3, 8)",
        "params/head/bias is (7,), expected (5,)",
        "params/extra is (2,), expected nothing",
    ):
        assert part in str(error.value)
    chex.assert_trees_all_equal(to_variables(module), before)


def test_a_module_without_parameters_says_so():
    model = create_model("repvgg_a0", **SMALL)
    with pytest.raises(ValueError, match=r"ToNNX holds no nnx.Param: .*lazy_init"):
        to_variables(nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)))
