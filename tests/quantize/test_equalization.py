"""Equalization changes no logit, and makes the channels of each layer alike."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import create_model, fuse_model
from repvgg_jax.quantize import activation_ranges, equalize
from tests.random_variables import random_variables

SMALL = dict(num_classes=5, depths=(1, 1, 2, 1), width_multiplier=(0.25, 0.25, 0.125, 0.0625))
VARIANTS = ["repvgg_a0", "repvgg_b1g4"]

pytestmark = pytest.mark.usefixtures("float64")


@cache
def deployed(variant):
    """A deploy form with random weights of very unequal channels, images, logits and ranges, in float64."""
    model = create_model(variant, **SMALL)
    model, variables = fuse_model(model, random_variables(model, dtype=np.float64))
    rng = np.random.default_rng(0)
    params = dict(variables["params"])
    for name, node in params.items():
        if "reparam" in node:
            size = 10 ** rng.uniform(-3, 3, node["reparam"]["bias"].shape)
            params[name] = {"reparam": {each: leaf * size / 30 for each, leaf in node["reparam"].items()}}
    variables = {"params": params}
    images = rng.normal(size=(4, 33, 33, 3))
    return model, variables, images, logits(model, variables, images), activation_ranges(model, variables, images)


def logits(model, variables, images):
    return model.apply(variables, images, train=False)


def assert_same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_equalized_network_is_the_same_function(variant, by):
    model, variables, images, expected, ranges = deployed(variant)
    equal = equalize(model, variables, ranges=ranges if by == "activations" else None)
    chex.assert_trees_all_equal_shapes_and_dtypes(equal, variables)
    assert_same(logits(model, equal, images), expected)
    # Neither is this the old network, nor would it be the same function with its old biases.
    assert (
        np.abs(equal["params"]["stem"]["reparam"]["kernel"] - variables["params"]["stem"]["reparam"]["kernel"]).max()
        > 0.1
    )
    bias = variables["params"]["stage2_block1"]["reparam"]["bias"]
    equal["params"]["stage2_block1"]["reparam"]["bias"] = bias
    with pytest.raises(AssertionError):
        assert_same(logits(model, equal, images), expected)


def written_and_read(model, variables):
    """For each channel between two layers: its largest weight where it is written, and where it is read."""
    params = variables["params"]
    for block, following in zip(model.blocks, [*model.blocks[1:], None], strict=True):
        written = np.abs(params[block.name]["reparam"]["kernel"]).max((0, 1, 2))
        if following is None:
            read = np.abs(params["head"]["kernel"]).max(1)
        else:
            kernel = np.abs(params[following.name]["reparam"]["kernel"]).max((0, 1))
            share = kernel.shape[1] // following.groups
            read = np.concatenate([kernel[:, n * share :][:, :share].max(1) for n in range(following.groups)])
        yield block.name, written, read


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_channel_is_written_and_read_by_equal_weights(variant):
    model, variables, *_ = deployed(variant)
    for _, written, read in written_and_read(model, equalize(model, variables)):
        np.testing.assert_allclose(written, read, rtol=1e-2)
    _, written, read = next(written_and_read(model, variables))
    assert (np.maximum(written / read, read / written) > 10).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_channel_has_values_as_large_as_the_weights_that_read_it(variant):
    model, variables, images, _, ranges = deployed(variant)
    equal = equalize(model, variables, ranges=ranges)
    values = activation_ranges(model, equal, images)
    for name, _, read in written_and_read(model, equal):
        alive = np.asarray(ranges[name]) > 0
        np.testing.assert_allclose(values[name][alive], read[alive], rtol=1e-2)


def with_stem(variables, **leaves):
    stem = variables["params"]["stem"]["reparam"]
    return {"params": {**variables["params"], "stem": {"reparam": {**stem, **leaves}}}}


@pytest.mark.parametrize("value", [0.0, 1e-30], ids=["dead", "almost dead"])
@pytest.mark.parametrize("by", ["weights", "activations"])
def test_a_channel_without_values_or_readers_is_left_alone(by, value):
    model, variables, images, _, _ = deployed("repvgg_a0")
    stem = variables["params"]["stem"]["reparam"]
    dead = with_stem(
        variables,
        kernel=stem["kernel"].at[..., 0].set(value),
        bias=stem["bias"].at[0].set(value).at[1].set(-1e9),
    )
    # The first channel of the stem is written by nothing, the second never fires, the third is read by nothing.
    first = dead["params"]["stage1_block1"]["reparam"]
    dead["params"]["stage1_block1"] = {"reparam": {**first, "kernel": first["kernel"].at[:, :, 2].set(0.0)}}
    expected = logits(model, dead, images)
    ranges = activation_ranges(model, dead, images)
    assert ranges["stem"][1] == 0
    equal = equalize(model, dead, ranges=ranges if by == "activations" else None)
    chex.assert_tree_all_finite(equal)
    assert_same(logits(model, equal, images), expected)
    if value == 0 or by == "activations":
        unchanged = equal["params"]["stem"]["reparam"]["bias"][1 if by == "activations" else 2]
        assert unchanged == dead["params"]["stem"]["reparam"]["bias"][1 if by == "activations" else 2]


def test_it_is_pure_under_jit_and_vmap():
    model, variables, *_ = deployed("repvgg_a0")
    before = jax.tree.map(np.array, variables)
    expected = equalize(model, variables)
    chex.assert_trees_all_equal(variables, before)
    ensemble = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), variables)
    found = jax.jit(jax.vmap(partial(equalize, model)))(ensemble)
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[0], found), expected, rtol=1e-12)


def test_float32_loses_nothing_but_rounding_and_bfloat16_stays_bfloat16():
    model, variables, images, *_ = deployed("repvgg_a0")
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), variables)
    images = images.astype(np.float32)
    equal = equalize(model, single)
    with jax.default_matmul_precision("float32"):
        compute = jax.jit(partial(logits, model))
        expected, found = compute(single, images), compute(equal, images)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    found = jax.eval_shape(partial(equalize, model), half)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("function", [equalize, lambda model, variables: activation_ranges(model, variables, None)])
def test_what_is_no_chain_of_convolutions_is_refused(function):
    with pytest.raises(ValueError, match="the model is in its training form: fuse first"):
        function(create_model("repvgg_a0", **SMALL), {})
    with pytest.raises(ValueError, match="squeeze_excite is 'before_relu': expected None, a plain variant"):
        function(create_model("repvgg_d2se", deploy=True, **SMALL), {})
