"""The block of QARepVGG against its formula, in both forms, and the networks that are made of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import create_model, fuse, fuse_model, reopen_model, reparameterize
from repvgg_jax.models import QuantizableBlock, layers, summarize
from repvgg_jax.reparam import EquivalenceError, assert_equivalent
from tests.random_variables import random_images, random_variables

SMALL = dict(num_classes=11, depths=(1, 2, 2, 1), width_multiplier=(0.25, 0.25, 0.125, 0.125), strides=(1, 1, 2, 2, 1))


def network(name="repvgg_a0", dtype=np.float64, **settings):
    model = create_model(name, block="quantizable", param_dtype=dtype, **SMALL | settings)
    return model, random_variables(model, dtype=dtype)


def convolve(x, kernel, stride, groups):
    padding = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(padding, padding)] * 2, feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def normalize(x, affine, statistics):
    return (x - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5) * affine["scale"] + affine["bias"]


def by_formula(x, variables, stride, groups, *, with_identity):
    params, statistics = variables["params"], variables["batch_stats"]
    dense = params["branch_3x3"]
    y = normalize(convolve(x, dense["conv"]["kernel"], stride, groups), dense["bn"], statistics["branch_3x3"]["bn"])
    y += convolve(x, params["branch_1x1"]["kernel"], stride, groups)
    (norm,) = set(params) - {"branch_3x3", "branch_1x1"}
    y = normalize(y + x if with_identity else y, params[norm], statistics[norm])
    return np.maximum(y, 0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("stride", "features", "groups"), [(1, 16, 1), (1, 16, 4), (2, 16, 1), (1, 32, 2)])
def test_both_forms_of_a_block_compute_the_formula(stride, features, groups):
    block = QuantizableBlock(features, stride, groups=groups, **layers(param_dtype=jnp.float64))
    images = random_images((3, 10, 9, 16))
    variables = random_variables(block, images.shape)
    identity = stride == 1 and features == 16
    expected = by_formula(images, variables, stride, groups, with_identity=identity)
    found = block.apply(variables, images, train=False)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
    fused = block.clone(deploy=True).apply(fuse(variables), images, train=False)
    np.testing.assert_allclose(fused, expected, rtol=1e-12, atol=1e-13)
    if identity:
        mistaken = by_formula(images, variables, stride, groups, with_identity=False)
        assert np.abs(mistaken - expected).max() > 1e-2


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_b1g4"])
def test_fusing_preserves_logits_and_a_wrong_norm_does_not(name):
    model, variables = network(name)
    images = random_images((4, 33, 32, 3))
    logits = model.apply(variables, images, train=False)
    deploy_model, deployed = fuse_model(model, variables)
    assert_equivalent(logits, deploy_model.apply(deployed, images, train=False), rtol=1e-12)
    assert jax.tree.map(jnp.shape, deployed) == jax.tree.map(
        jnp.shape, random_variables(create_model(name, deploy=True, **SMALL))
    )
    with pytest.raises(EquivalenceError):
        wrong = deploy_model.apply(fuse(variables, epsilon=1e-3), images, train=False)
        assert_equivalent(logits, wrong, rtol=1e-6)


@pytest.mark.usefixtures("float64")
def test_reparameterize_merges_a_block_to_the_kernel_of_fuse():
    model, variables = network()
    images = random_images((2, 16, 16, 3))
    merged = reparameterize(lambda v, x: model.apply(v, x, train=False), variables, images)
    assert len(merged.params) == 2 * len(model.blocks) + 2  # kernel and bias of each block, and of the head
    deploy_model, deployed = fuse_model(model, variables)
    assert_equivalent(deploy_model.apply(deployed, images, train=False), merged(merged.params, images), rtol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_b1g4"])
def test_reopening_preserves_logits_and_fusing_gives_the_kernels_back(name):
    model, deployed = fuse_model(*network(name))
    images, others = random_images((4, 33, 32, 3)), 2 * random_images((4, 33, 32, 3), seed=2)
    training, opened = reopen_model(model, deployed, images, key=jax.random.key(0))
    assert training.block == "quantizable"
    for batch in (images, others):
        expected = model.apply(deployed, batch, train=False)
        assert_equivalent(expected, training.apply(opened, batch, train=False), rtol=1e-11)
    trained, _ = training.apply(opened, images, train=True, mutable=["batch_stats"])
    assert_equivalent(model.apply(deployed, images, train=False), trained, rtol=1e-11)
    with pytest.raises(EquivalenceError):
        trained, _ = training.apply(opened, others, train=True, mutable=["batch_stats"])
        assert_equivalent(model.apply(deployed, others, train=False), trained, rtol=1e-3)
    again = fuse(opened)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11), again, deployed)


@pytest.mark.usefixtures("float64")
def test_a_plain_deploy_form_is_reopened_as_quantizable_blocks():
    plain = create_model("repvgg_a0", param_dtype=jnp.float64, **SMALL)
    model, deployed = fuse_model(plain, random_variables(plain))
    images = random_images((4, 33, 32, 3))
    training, opened = reopen_model(model.clone(block="quantizable"), deployed, images, key=jax.random.key(0))
    assert jax.tree.structure(opened) == jax.tree.structure(network()[1])
    assert_equivalent(
        model.apply(deployed, images, train=False), training.apply(opened, images, train=False), rtol=1e-11
    )


def test_the_summary_counts_a_norm_less_and_the_same_deploy_form():
    shape = (32, 32, 3)
    quantizable, plain = (
        summarize(create_model("repvgg_a0", block=block, **SMALL), shape) for block in ("quantizable", "repvgg")
    )
    # Scale and bias of two norms, where the plain block has three, or two without an identity.
    with_identity = {"stage1_block1", "stage2_block2", "stage3_block2"}
    for ours, theirs in zip(quantizable.rows, plain.rows, strict=True):
        fewer = 2 * theirs.output_shape[-1] if theirs.name in with_identity else 0
        assert theirs.training_parameters - ours.training_parameters == fewer
        assert ours.deploy_parameters == theirs.deploy_parameters


@pytest.mark.parametrize("name", ["repvgg_d2se", "repvggplus_l2pse"])
def test_networks_with_other_units_refuse_the_block(name):
    with pytest.raises(ValueError, match="block is 'quantizable': expected 'repvgg' in a network with squeeze-excite"):
        create_model(name, block="quantizable")


def test_an_unknown_block_is_refused():
    with pytest.raises(ValueError, match="block is 'qa': expected one of repvgg, quantizable"):
        create_model("repvgg_a0", block="qa")


def broken(variables, change):
    params = dict(variables["params"])
    params["stage1_block1"] = change(dict(params["stage1_block1"]))
    return {**variables, "params": params}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda block: {**block, "bn_with_identity": block["bn"]},
            "stage1_block1: found the norms \\['bn', 'bn_with_identity'\\] behind the branches, expected one",
        ),
        (
            lambda block: {**block, "branch_1x1": {"kernel": jnp.ones((1, 1, 8, 16))}},
            "stage1_block1: the kernels of the branches are \\(3, 3, 16, 16\\), \\(1, 1, 8, 16\\): expected the same",
        ),
        (
            lambda block: {**block, "branch_1x1": {"kernel": jnp.ones((1, 16, 16))}},
            "stage1_block1: branch_1x1/kernel has shape \\(1, 16, 16\\), expected rank 4",
        ),
    ],
)
def test_a_malformed_block_is_named(change, message):
    model = create_model("repvgg_a0", block="quantizable", **SMALL | {"strides": (2, 2, 2, 2, 1)})
    with pytest.raises(ValueError, match=message):
        fuse(broken(random_variables(model, dtype=np.float32), change))


def test_statistics_that_are_missing_are_named():
    _, variables = network(dtype=np.float32)
    statistics = {name: dict(block) for name, block in variables["batch_stats"].items()}
    del statistics["stem"]["bn"]
    with pytest.raises(ValueError, match="stem: batch_stats of bn lack mean and var"):
        fuse({**variables, "batch_stats": statistics})
