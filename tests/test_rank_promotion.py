"""Everything that users trace runs under `jax_numpy_rank_promotion="raise"`, as stock Flax does."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from repvgg_jax import create_model, expand, fuse, fuse_model, reparameterize
from repvgg_jax.models import reopen_model
from repvgg_jax.preprocess import Normalization
from repvgg_jax.quantize import activation_ranges, bias_errors, equalize, simulate, tensor_ranges
from repvgg_jax.reparam import equivalent_kernels
from repvgg_jax.training.config import AugmentationConfig
from repvgg_jax.training.start.near_identity import residual_start
from repvgg_jax.training.start.whitening import whiten_stem
from repvgg_jax.training.steps.augmentation import augment

IMAGES = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)


@pytest.fixture(autouse=True)
def _ranks_are_not_promoted():
    with jax.numpy_rank_promotion("raise"):
        yield


def small(variant="repvgg_a0", **options):
    return create_model(variant, num_classes=5, depths=(1, 1, 2, 1), width_multiplier=(0.25,) * 4, **options)


def variables_of(model):
    return jax.eval_shape(partial(model.init, train=False), jax.random.key(0), IMAGES)


def test_the_check_sees_a_promoted_rank():
    with pytest.raises(ValueError, match="rank_promotion"):
        jax.eval_shape(lambda images: images + jnp.zeros(3), IMAGES)


@pytest.mark.parametrize("ops", ["auto", "xla"])
@pytest.mark.parametrize("variant", ["repvgg_a0", "repvgg_b1g4", "repvgg_d2se", "repvggplus_l2pse"])
def test_a_network_is_initialised_trained_and_evaluated(variant, ops):
    model = small(variant, ops=ops)
    _, variables = jax.eval_shape(partial(model.init_with_output, train=False), jax.random.key(0), IMAGES)

    def loss(params, variables, images):
        outputs, updates = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        return sum(jnp.sum(each**2) for each in jax.tree.leaves(outputs)), updates

    jax.eval_shape(jax.grad(loss, has_aux=True), variables["params"], variables, IMAGES)
    jax.eval_shape(partial(model.apply, train=False), variables, IMAGES)


@pytest.mark.parametrize("function", [fuse, equivalent_kernels], ids=["fuse", "equivalent_kernels"])
def test_variables_are_fused_under_transformations(function):
    variables = variables_of(small())
    jax.eval_shape(function, variables)
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), variables)
    jax.eval_shape(jax.vmap(function), stacked)


def test_a_network_is_fused_reparameterized_and_opened_again():
    model = small()
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), variables_of(model))
    deploy_model, deploy_variables = fuse_model(model, variables)
    jax.eval_shape(partial(deploy_model.apply, train=False), deploy_variables, IMAGES)
    merged = reparameterize(partial(model.apply, train=False), variables, IMAGES)
    jax.eval_shape(merged, merged.params, IMAGES)
    reopen = partial(reopen_model, deploy_model, key=jax.random.key(0))
    jax.eval_shape(lambda *arguments: reopen(*arguments)[1], deploy_variables, IMAGES)


@pytest.mark.parametrize("branches", ["repvgg", "acnet", "dbb", "mobileone"])
def test_a_function_is_expanded_trained_and_collapsed(branches):
    kernels = {"full": (3, 3, 3, 8), "deep": (3, 3, 1, 8)}
    variables = {name: jnp.ones(shape) for name, shape in kernels.items()}

    def function(v, x):
        for name, groups in (("full", 1), ("deep", 8)):
            x = jax.lax.conv_general_dilated(
                x, v[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
            )
        return x

    for norms in (True, False):
        wide = expand(function, variables, IMAGES, branches=branches, norms=norms)
        loss = lambda params, wide=wide: wide(params, wide.state, jnp.ones(IMAGES.shape), train=True)[0].sum()  # noqa: E731
        jax.eval_shape(jax.grad(loss), wide.params)
        jax.eval_shape(wide.collapse, wide.params, wide.state)


def test_training_starts_whitened_and_near_the_identity():
    variables = variables_of(small())
    jax.eval_shape(whiten_stem, variables, IMAGES)
    jax.eval_shape(partial(residual_start, scale=0.25), variables)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_augmented(channels):
    everything = dict(
        crop_padding=2, flip=True, trivial_augment=True, color_jitter=0.4, cutout=4, mixup=0.2, cutmix=1.0
    )
    config = AugmentationConfig(**everything)
    normalization = Normalization((0.5,) * channels, (0.5,) * channels)
    pixels = jax.ShapeDtypeStruct((4, 16, 16, channels), jnp.uint8)
    integers = jax.ShapeDtypeStruct((4,), jnp.int32)
    batch = {"image": pixels, "label": integers, "index": integers}
    for each in (config, dataclasses.replace(config, alternate_flip=True)):
        settings = dict(config=each, normalization=normalization, num_classes=5, seed=0, epoch=0)
        jax.eval_shape(partial(augment, **settings), jax.random.key(0), batch)


@pytest.mark.parametrize("variant", ["repvgg_a0", "repvgg_b1g4"])
def test_a_network_is_prepared_for_8_bits_and_simulated_in_them(variant):
    model, variables = small(variant, deploy=True), jax.eval_shape(fuse, variables_of(small(variant)))
    largest = jax.eval_shape(partial(activation_ranges, model), variables, IMAGES)
    jax.eval_shape(lambda v, largest: equalize(model, v, ranges=largest), variables, largest)
    jax.eval_shape(partial(equalize, model), variables)
    ranges = jax.eval_shape(partial(tensor_ranges, model), variables, IMAGES)
    jax.eval_shape(partial(simulate, model), variables, IMAGES, ranges)
    jax.eval_shape(partial(bias_errors, model), variables, IMAGES, ranges)


def test_quantizable_blocks_are_trained_fused_and_opened_again():
    model = small(block="quantizable")
    variables = variables_of(model)
    jax.eval_shape(partial(model.apply, train=True, mutable=["batch_stats"]), variables, IMAGES)
    deployed = jax.eval_shape(fuse, variables)
    opened = partial(reopen_model, model.clone(deploy=True), key=jax.random.key(0))
    jax.eval_shape(lambda v, x: opened(v, x)[1], deployed, IMAGES)
    jax.eval_shape(partial(residual_start, scale=0.25), variables)
    jax.eval_shape(whiten_stem, variables, IMAGES)
