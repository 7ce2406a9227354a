"""Blocks against the formula, written out: the golden logits of the squeeze-excite networks carry no image.

Through 47 random gates the activations of RepVGG-D2se vanish, and what is left of its golden logits is the head's
bias. So squeeze-excite is proven here, block by block.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from repvgg_jax import fuse
from repvgg_jax.models import RepVGGBlock, layers
from repvgg_jax.models.conv import Conv
from tests.random_variables import random_images, random_variables


def convolve(x, kernel, stride):
    padding = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def normalize(x, affine, statistics):
    return (x - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5) * affine["scale"] + affine["bias"]


def squeeze_excite(x, params):
    gate = x.mean((1, 2)) @ params["down"]["kernel"] + params["down"]["bias"]
    gate = np.maximum(gate, 0) @ params["up"]["kernel"] + params["up"]["bias"]
    return x * (1 / (1 + np.exp(-gate)))[:, None, None, :]


def by_formula(x, variables, stride, position):
    params, statistics = variables["params"], variables["batch_stats"]
    y = sum(
        normalize(convolve(x, params[name]["conv"]["kernel"], stride), params[name]["bn"], statistics[name]["bn"])
        for name in ("branch_3x3", "branch_1x1")
    )
    if "branch_identity" in params:
        y += normalize(x, params["branch_identity"], statistics["branch_identity"])
    if position == "before_relu":
        return np.maximum(squeeze_excite(y, params["se"]), 0)
    y = np.maximum(y, 0)
    return squeeze_excite(y, params["se"]) if position == "after_relu" else y


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("position", [None, "before_relu", "after_relu"])
def test_both_forms_of_a_block_compute_the_formula(position, stride):
    block = RepVGGBlock(
        16, stride=stride, squeeze_excite=position, squeeze_excite_reduction=4, **layers(param_dtype=jnp.float64)
    )
    images = random_images((3, 10, 9, 16))
    variables = random_variables(block, images.shape)
    assert ("branch_identity" in variables["params"]) is (stride == 1)
    expected = by_formula(images, variables, stride, position)
    found = block.apply(variables, images, train=False)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
    fused = block.clone(deploy=True).apply(fuse(variables), images, train=False)
    np.testing.assert_allclose(fused, expected, rtol=1e-12, atol=1e-13)
    if position:
        other = {"before_relu": "after_relu", "after_relu": "before_relu"}[position]
        mistaken = by_formula(images, variables, stride, other)
        assert np.abs(mistaken - expected).max() > 1e-3


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("size", "stride", "dilation", "groups"), [(1, 2, 1, 1), (3, 2, 1, 2), (3, 1, 3, 4), (7, 2, 1, 1)]
)
@pytest.mark.parametrize("use_bias", [False, True])
def test_a_convolution_is_that_of_flax_padded_by_half_its_kernel(size, stride, dilation, groups, use_bias):
    images = random_images((2, 10, 9, 8))
    padding = size // 2 * dilation
    flax = nn.Conv(
        12, (size, size), stride, ((padding, padding),) * 2, kernel_dilation=dilation, feature_group_count=groups,
        use_bias=use_bias, bias_init=nn.initializers.normal(), param_dtype=jnp.float64,
    )  # fmt: skip
    variables = flax.init(jax.random.key(1), images)
    for ops in ("auto", "xla"):
        conv = Conv(12, size, stride, dilation, groups, use_bias, param_dtype=jnp.float64, ops=ops)
        fresh = conv.init(jax.random.key(0), images)
        assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, variables)
        found = conv.apply(variables, images)
        np.testing.assert_allclose(found, flax.apply(variables, images), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_a_block_has_the_layers_it_is_given(param_dtype, deploy):
    images = jax.ShapeDtypeStruct((2, 8, 8, 16), jnp.float32)
    made_of = layers(dtype=jnp.bfloat16, param_dtype=param_dtype)
    block = RepVGGBlock(16, squeeze_excite="after_relu", deploy=deploy, **made_of)
    y, variables = jax.eval_shape(lambda x: block.init_with_output(jax.random.key(0), x, train=False), images)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {np.dtype(param_dtype)}
