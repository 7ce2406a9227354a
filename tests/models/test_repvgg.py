from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from repvgg_jax import create_model, fuse
from tests.random_variables import random_images, random_variables

SHAPE = (4, 16, 16, 3)


def small(variant="repvgg_a0", **fields):
    settings = dict(depths=(1, 1, 2, 1), width_multiplier=(0.25, 0.25, 0.25, 0.25), num_classes=5, ops="xla")
    return create_model(variant, **{**settings, **fields})


def test_the_tree_has_the_documented_names():
    variables = random_variables(small(depths=(1, 2, 1, 1)), dtype=np.float32)
    params, stats = variables["params"], variables["batch_stats"]
    assert params["stem"]["branch_3x3"]["conv"]["kernel"].shape == (3, 3, 3, 16)
    assert params["stage1_block1"]["branch_1x1"]["bn"]["scale"].shape == (16,)
    assert stats["stage2_block2"]["branch_identity"]["mean"].shape == (32,)
    assert params["head"]["kernel"].shape == (128, 5)
    assert "branch_identity" not in params["stem"]
    assert "branch_identity" not in params["stage2_block1"]


def test_features_returns_the_endpoints_in_order_and_the_same_logits():
    model, images = small(), random_images(SHAPE, np.float32)
    variables = random_variables(model, dtype=np.float32)
    ends = model.apply(variables, images, train=False, features=True)
    assert list(ends) == ["stem", "stage1", "stage2", "stage3", "stage4", "pooled", "logits"]
    assert [end.shape[1:] for end in ends.values()] == [
        (8, 8, 16), (4, 4, 16), (2, 2, 32), (1, 1, 64), (1, 1, 128), (128,), (5,),
    ]  # fmt: skip
    chex.assert_trees_all_equal(ends["logits"], model.apply(variables, images, train=False))


def test_train_is_keyword_only_and_has_no_default():
    model, images = small(), random_images(SHAPE, np.float32)
    variables = random_variables(model, dtype=np.float32)
    with pytest.raises(TypeError, match="train"):
        model.apply(variables, images)
    with pytest.raises(TypeError, match="positional"):
        model.apply(variables, images, True)


@pytest.mark.usefixtures("float64")
def test_training_updates_running_statistics_with_pytorchs_momentum():
    model, images = small(param_dtype=jnp.float64), random_images(SHAPE) * 2 + 1
    variables = random_variables(model)
    updates = jax.jit(lambda v: model.apply(v, images, train=True, mutable=["batch_stats"])[1])(variables)
    kernel = variables["params"]["stem"]["branch_1x1"]["conv"]["kernel"][0, 0]
    y = images[:, ::2, ::2] @ kernel
    old = variables["batch_stats"]["stem"]["branch_1x1"]["bn"]
    new = updates["batch_stats"]["stem"]["branch_1x1"]["bn"]
    chex.assert_trees_all_close(new["mean"], 0.9 * old["mean"] + 0.1 * y.mean((0, 1, 2)), rtol=1e-12)
    chex.assert_trees_all_close(new["var"], 0.9 * old["var"] + 0.1 * y.var((0, 1, 2)), rtol=1e-12)


def test_training_normalises_by_the_batch_and_evaluation_does_not():
    model, images = small(), random_images(SHAPE, np.float32)
    variables = random_variables(model, dtype=np.float32)

    @jax.jit
    def logits(variables, images):
        train, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return train, *(model.apply(variables, each, train=False) for each in (images, images[:1]))

    train, evaluated, alone = logits(variables, images)
    assert not np.allclose(train, evaluated, rtol=1e-2)
    chex.assert_trees_all_close(alone, evaluated[:1], rtol=1e-4, atol=1e-5)


def test_bfloat16_compute_keeps_parameters_statistics_and_logits_in_float32():
    with jax.enable_x64(False):
        model, images = small(dtype=jnp.bfloat16), random_images(SHAPE, np.float32)
        variables = jax.jit(lambda key: model.init(key, images, train=False))(jax.random.key(0))
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}

        def train(model):
            apply = partial(model.apply, train=True, features=True, mutable=["batch_stats"])
            return jax.jit(apply)(variables, images)

        ends, updates = train(model)
        assert ends["stage3"].dtype == jnp.bfloat16
        assert ends["logits"].dtype == ends["pooled"].dtype == np.float32
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {np.dtype(np.float32)}
        full = train(small())[0]
        np.testing.assert_allclose(ends["stem"].astype(np.float32), full["stem"], atol=0.1)


def test_repvggplus_returns_auxiliary_logits_in_training_alone():
    model, images = small("repvggplus_l2pse"), random_images(SHAPE, np.float32)
    variables = random_variables(model, dtype=np.float32)
    train = partial(model.apply, train=True, mutable=["batch_stats"])
    (logits, auxiliary), _ = jax.eval_shape(train, variables, images)
    assert logits.shape == (4, 5)
    assert {name: head.shape for name, head in auxiliary.items()} == {
        "stage1_aux": (4, 5), "stage2_aux": (4, 5), "stage3_first_aux": (4, 5),
    }  # fmt: skip
    assert jax.eval_shape(partial(model.apply, train=False), variables, images).shape == (4, 5)


@pytest.mark.usefixtures("float64")
def test_remat_changes_neither_tree_nor_gradients():
    images = random_images(SHAPE)
    variables = random_variables(small())

    def gradients(model):
        def loss(params):
            logits, _ = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return jnp.sum(logits**2)

        return jax.jit(jax.grad(loss))(variables["params"])

    chex.assert_trees_all_close(gradients(small(remat=True)), gradients(small()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("images", [np.zeros((2, 8, 8), np.float32), np.zeros((1, 8, 8, 3), np.uint8)])
def test_images_of_another_rank_or_dtype_are_refused(images):
    with pytest.raises(ValueError, match=r"images are .*expected floating point \(batch, height, width, channels\)"):
        small().init(jax.random.key(0), jnp.asarray(images), train=False)


def test_any_image_size_and_channel_count_works():
    for shape in [(1, 1, 1, 3), (2, 7, 19, 1)]:
        model = small()
        variables = random_variables(model, shape, np.float32)
        logits = jax.jit(partial(model.apply, train=False))(variables, random_images(shape, np.float32))
        assert logits.shape == (shape[0], 5)
        assert np.isfinite(logits).all()
        fast = partial(small(ops="auto").apply, train=False)
        assert jax.eval_shape(fast, variables, jax.ShapeDtypeStruct(shape, np.float32)).shape == logits.shape


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (2, 1, 28, 20), (1, 4, 64, 48)])
def test_images_with_the_channels_first_are_refused(shape):
    with pytest.raises(ValueError, match=r"transpose\(0, 2, 3, 1\)"):
        jax.eval_shape(lambda: small().init(jax.random.key(0), jnp.ones(shape), train=False))


@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (1, 3, 3, 3), (1, 3, 32, 4), (1, 32, 3, 3), (1, 4, 4, 16)])
def test_small_and_narrow_images_with_the_channels_last_are_taken(shape):
    variables = jax.eval_shape(lambda: small().init(jax.random.key(0), jnp.ones(shape), train=False))
    assert variables["params"]["stem"]["branch_1x1"]["conv"]["kernel"].shape[2] == shape[3]


def test_blocks_know_their_part_and_the_auxiliary_head_that_stands_on_them():
    model = create_model("repvggplus_l2pse")
    assert {block.auxiliary: block.name for block in model.blocks if block.auxiliary} == {
        "stage1_aux": "stage1_block8", "stage2_aux": "stage2_block14", "stage3_first_aux": "stage3_block12",
    }  # fmt: skip
    ends = {block.part: block.name for block in model.blocks if block.last}
    assert list(ends.items()) == [
        ("stem", "stem"), ("stage1", "stage1_block8"), ("stage2", "stage2_block14"), ("stage3", "stage3_block24"),
        ("stage4", "stage4_block1"),
    ]  # fmt: skip
    assert not any(block.auxiliary for block in create_model("repvgg_d2se").blocks)


def test_no_endpoint_has_a_gradient_for_a_frozen_part():
    model, images = small(frozen="stage2"), random_images(SHAPE, np.float32)
    variables = random_variables(model, dtype=np.float32)

    def loss(params):
        ends = model.apply({**variables, "params": params}, images, train=False, features=True)
        return sum(jnp.square(end).sum() for end in ends.values())

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    moved = {name for name, leaves in gradients.items() if any(leaf.any() for leaf in jax.tree.leaves(leaves))}
    assert moved == {"stage3_block1", "stage3_block2", "stage4_block1", "head"}


class TwoEyes(nn.Module):
    """Two networks, one of them dilated, as named parts of a module."""

    deploy: bool = False

    @nn.compact
    def __call__(self, images, *, train):
        near = small("repvggplus_l2pse", name="near", deploy=self.deploy)(images, train=train)
        far = small(name="far", deploy=self.deploy, output_stride=8)(images, train=train)
        return near + far


@pytest.mark.usefixtures("float64")
def test_a_network_is_a_named_part_of_another_module_and_fuses_there():
    images = random_images(SHAPE)
    variables = random_variables(TwoEyes())
    assert set(variables["params"]) == {"near", "far"}
    assert variables["params"]["near"].keys() == random_variables(small("repvggplus_l2pse"))["params"].keys()
    near, far = ({collection: tree[name] for collection, tree in variables.items()} for name in ("near", "far"))

    @jax.jit
    def logits(variables, fused, near, far):
        whole = TwoEyes().apply(variables, images, train=False)
        deployed = TwoEyes(deploy=True).apply(fused, images, train=False)
        alone = small("repvggplus_l2pse").apply(near, images, train=False)
        return whole, deployed, alone + small(output_stride=8).apply(far, images, train=False)

    whole, deployed, alone = logits(variables, fuse(variables), near, far)
    np.testing.assert_allclose(whole, alone, rtol=1e-12)
    np.testing.assert_allclose(deployed, whole, rtol=1e-10, atol=1e-12)
