"""The theorem: training form and deploy form are the same function. Statistics are random throughout."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from repvgg_jax import create_model, fuse, fuse_model
from repvgg_jax.models import RepVGGBlock, layers
from repvgg_jax.reparam import assert_equivalent, first_divergence
from tests.random_variables import random_images, random_variables


def small(name="repvgg_a0", **fields):
    settings = dict(depths=(1, 1, 2, 1), width_multiplier=(0.5, 0.5, 0.5, 0.5), num_classes=11)
    return create_model(name, **{**settings, **fields})


def both_forms(model, variables, images):
    """The logits of the training form and of the deploy form, compiled in one program."""
    deploy_model, deploy_variables = fuse_model(model, variables)

    @jax.jit
    def logits(variables, deploy_variables, images):
        expected = model.apply(variables, images, train=False)
        return expected, deploy_model.apply(deploy_variables, images, train=False)

    return logits(variables, deploy_variables, images)


def sizes_and_strides():
    """All of them for two networks; of the others, one size for either choice of strides is quick."""
    for name in ("repvgg_a0", "repvgg_b1g4", "repvgg_b1g2", "repvgg_d2se", "repvggplus_l2pse"):
        for strides, quick in (((2, 2, 2, 2, 2), 32), ((1, 1, 2, 2, 2), 33)):
            for size in (32, 33):
                marks = [] if size == quick or name in ("repvgg_a0", "repvgg_b1g4") else pytest.mark.long
                yield pytest.param(name, strides, size, marks=marks)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("name", "strides", "size"), list(sizes_and_strides()))
def test_fuse_preserves_logits_in_float64(name, strides, size):
    model = small(name, strides=strides)
    expected, found = both_forms(model, random_variables(model), random_images((2, size, size - 1, 3)))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    assert assert_equivalent(expected, found, rtol=1e-12).max_reference > 0.1
    chex.assert_trees_all_close(found, expected, rtol=0, atol=1e-12 * float(jnp.abs(expected).max()))


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_b1g4", "repvgg_d2se", "repvggplus_l2pse"])
def test_fuse_preserves_logits_to_rounding_in_float32(name):
    model = small(name)
    images = random_images((8, 32, 32, 3), np.float32)
    expected, found = both_forms(model, random_variables(model, dtype=np.float32), images)
    assert found.dtype == np.float32
    assert_equivalent(expected, found, rtol=1e-5)
    chex.assert_trees_all_close(found, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.usefixtures("float64")
def test_fuse_after_training_steps_preserves_logits():
    model = small(param_dtype=jnp.float64)
    variables = random_variables(model)
    step = jax.jit(lambda variables, images: model.apply(variables, images, train=True, mutable=["batch_stats"])[1])
    for seed in range(3):
        images = random_images((8, 32, 32, 3), seed=seed) * 3 + 1
        variables = {**variables, **step(variables, images)}
    assert_equivalent(*both_forms(model, variables, images), rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_a_wrong_epsilon_is_caught():
    model, images = small(), random_images((2, 32, 32, 3))
    variables = random_variables(model)

    def endpoints(model):
        found = jax.jit(lambda variables: model.apply(variables, images, train=False, features=True))
        return lambda variables: dict(sorted(found(variables).items(), key=lambda end: end[0] != "stem"))

    ends, deploy = endpoints(model)(variables), endpoints(model.clone(deploy=True))
    for epsilon in (1e-3, 1e-4, 0.0):
        wrong = deploy(fuse(variables, epsilon=epsilon))
        with pytest.raises(ValueError, match="not the same function"):
            assert_equivalent(ends["logits"], wrong["logits"], rtol=1e-7)
        assert first_divergence(ends, wrong, rtol=1e-7) == "stem", epsilon


class SamePaddingBlock(RepVGGBlock):
    """The classic mistake: 'SAME' centres a strided window on odd pixels where the size is even."""

    def _fused(self, x):
        return nn.Conv(self.features, (3, 3), self.stride, padding="SAME", param_dtype=jnp.float64, name="reparam")(x)


@pytest.mark.usefixtures("float64")
def test_same_padding_is_caught_at_even_sizes_and_hides_at_odd_ones():
    block = RepVGGBlock(8, stride=2, **layers(param_dtype=jnp.float64))
    same = SamePaddingBlock(8, stride=2, deploy=True)
    variables = random_variables(block, (1, 16, 16, 4))
    for size, equal in [(16, False), (17, True)]:
        images = random_images((2, size, size, 4))
        expected = block.apply(variables, images, train=False)
        chex.assert_trees_all_close(
            block.clone(deploy=True).apply(fuse(variables), images, train=False),
            expected,
            rtol=1e-12,
            atol=1e-13,
        )
        mistaken = same.apply(fuse(variables), images, train=False)
        assert mistaken.shape == expected.shape
        assert bool(jnp.allclose(mistaken, expected, rtol=1e-12, atol=1e-13)) is equal


@pytest.mark.usefixtures("float32")
def test_at_initialisation_even_a_fuse_without_batch_norm_would_pass():
    """Why every test here randomises the statistics: a fresh norm is x / √(1 + ε), nearly the identity."""
    block = RepVGGBlock(8, **layers(ops="xla"))
    images = random_images((2, 16, 16, 8), np.float32)

    def without_norms(variables):
        params = variables["params"]
        kernel = params["branch_3x3"]["conv"]["kernel"].at[1, 1].add(params["branch_1x1"]["conv"]["kernel"][0, 0])
        kernel = kernel.at[1, 1].add(jnp.eye(8))
        return {"params": {"reparam": {"kernel": kernel, "bias": jnp.zeros(8)}}}

    fresh = block.init(jax.random.key(0), images, train=False)
    for variables, passes in [(fresh, True), (random_variables(block, images.shape, np.float32), False)]:
        expected = block.apply(variables, images, train=False)
        found = block.clone(deploy=True).apply(without_norms(variables), images, train=False)
        assert bool(jnp.allclose(found, expected, rtol=1e-4, atol=1e-4)) is passes
