"""A training step for 8 bits has the loss of the fused network with rounded numbers, and gradients through `fuse`."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from repvgg_jax import fuse_model
from repvgg_jax.preprocess import normalize
from repvgg_jax.quantize import fake_quantize_weights, simulate, tensor_ranges
from repvgg_jax.training import TrainConfig
from repvgg_jax.training.steps.augmentation import augment
from repvgg_jax.training.steps.eval_step import make_eval_step
from repvgg_jax.training.steps.mesh import create_mesh, shard_batch
from repvgg_jax.training.steps.optimizer import create_optimizer
from repvgg_jax.training.steps.quantize_aware import first_ranges, no_ranges
from repvgg_jax.training.steps.state import create_state
from repvgg_jax.training.steps.train_step import make_train_step
from tests.random_variables import random_variables

CONFIG = TrainConfig().replace(
    depths=(1, 2, 1, 1),
    width_multiplier=(0.25, 0.125, 0.0625, 0.0625),
    strides=(1, 1, 2, 2, 1),
    image_size=8,
    mean=(0.5,),
    std=(0.25,),
    crop_padding=1,
    batch_size=16,
    learning_rate=5.0,  # a hundredth of it is used
    learning_rate_batch_size=16,
    momentum=0.0,
    nesterov=False,
    weight_decay=0.0,
    init_from="a run",
    quantize_aware=True,
    ema_decay=0.9,
)

pytestmark = pytest.mark.usefixtures("float32")


def batch(seed=0, count=16):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count).astype(np.int32)
    images = rng.integers(0, 50, (count, 8, 8, 1), dtype=np.uint8)
    images[np.arange(count), 2 * (labels // 2), :, 0] += 150
    return {"image": images, "label": labels, "index": rng.permutation(1000)[:count].astype(np.int32)}


@cache
def stepped(block, devices):
    """A state with random variables and ranges measured on a batch, and the state after one step, with its loss."""
    config = CONFIG.replace(block=block)
    mesh = create_mesh(jax.devices()[:devices])
    model, optimizer = config.network.create_model(4), create_optimizer(config.optimization, steps_per_epoch=1000)
    state = create_state(model, optimizer, config, 1, mesh)
    variables = random_variables(model, (1, 8, 8, 1), np.float32)
    images = normalize(jnp.asarray(batch()["image"]), *config.data.normalization)
    ranges = jax.jit(lambda v, x: first_ranges(model, v, x))(variables, images)
    # Half of what is there, so that 8 bits are far from float.
    state = state.replace(**variables, ranges=jax.tree.map(lambda end: end / 2, ranges))
    state = jax.device_get(state.replace(ema=jax.tree.map(jnp.copy, state.variables)))
    step = make_train_step(model, optimizer, config, config.data.normalization, mesh, steps_per_epoch=1000)
    after, metrics = step(state, shard_batch(batch(1), mesh))
    return config, model, mesh, state, jax.device_get(after), float(metrics["loss"])


def inputs_of(config, step=0):
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    return augment(
        key, batch(1), config.augmentation, config.data.normalization, num_classes=4, seed=config.seed, epoch=0
    )


@pytest.mark.parametrize("block", ["repvgg", "quantizable"])
def test_the_loss_is_that_of_the_fused_network_in_8_bits_and_gradients_pass_through_fuse(block):
    config, model, _, state, after, loss = stepped(block, 1)
    images, targets = inputs_of(config)

    def by_hand(params, forward=simulate):
        deploy_model, deployed = fuse_model(model, {"params": params, "batch_stats": state.batch_stats})
        logits = forward(deploy_model, deployed, images, state.ranges)
        return optax.softmax_cross_entropy(logits, targets).mean()

    expected, gradients = jax.jit(jax.value_and_grad(by_hand))(state.params)
    assert loss == pytest.approx(float(expected), rel=2e-3)
    floating = by_hand(state.params, lambda model, variables, x, _: model.apply(variables, x, train=False))
    assert abs(loss - floating) > 0.02 * loss
    rate = float(config.optimization.peak_learning_rate)
    assert rate == pytest.approx(0.05)
    expected = jax.tree.map(lambda leaf, gradient: leaf - rate * gradient, state.params, gradients)
    for found, wanted, start in zip(*map(jax.tree.leaves, (after.params, expected, state.params)), strict=True):
        np.testing.assert_allclose(found - start, wanted - start, rtol=0.05, atol=0.02 * np.abs(wanted - start).max())
    # Every branch is trained.
    for name in ("branch_3x3", "branch_1x1"):
        kernels = [jax.tree.leaves(params["stage2_block2"][name]) for params in (after.params, state.params)]
        assert all(np.abs(new - old).max() > 0 for new, old in zip(*kernels, strict=True))


def test_statistics_stay_and_ranges_move_towards_those_of_the_batch():
    config, model, _, state, after, _ = stepped("repvgg", 1)
    chex.assert_trees_all_equal(after.batch_stats, state.batch_stats)
    images, _ = inputs_of(config)
    deploy_model, deployed = fuse_model(model, {"params": state.params, "batch_stats": state.batch_stats})
    # The first ranges that are moved are those of the images and of what the first layer in 8 bits puts out.
    measured = tensor_ranges(deploy_model, fake_quantize_weights(deploy_model, deployed, state.ranges), images)
    for name in ("images", "stem"):
        for old, new, seen in zip(state.ranges[name], after.ranges[name], measured[name], strict=True):
            assert new == pytest.approx(0.99 * float(old) + 0.01 * float(seen), rel=2e-2, abs=1e-6)
    assert after.ranges["stem"].high != state.ranges["stem"].high
    # The average is of ranges too.
    assert set(after.ema) == {"params", "batch_stats", "ranges"}


def test_eight_devices_train_as_one_does():
    one, eight = stepped("repvgg", 1), stepped("repvgg", 8)
    assert one[-1] == pytest.approx(eight[-1], rel=1e-4)
    chex.assert_trees_all_close(one[4].ranges, eight[4].ranges, rtol=1e-4, atol=1e-5)
    for a, b, start in zip(*(jax.tree.leaves(each.params) for each in (one[4], eight[4], one[3])), strict=True):
        np.testing.assert_allclose(a - start, b - start, atol=0.05 * np.abs(a - start).max() + 1e-7)


def test_evaluation_is_in_8_bits():
    config, model, mesh, state, _, _ = stepped("repvgg", 1)
    test = {**batch(2), "mask": np.ones(16, bool)}
    del test["index"]
    step = make_eval_step(model, config.data.normalization, mesh)
    found = step(state.variables, shard_batch(test, mesh))["logits"]
    images = normalize(jnp.asarray(test["image"]), *config.data.normalization)
    deploy_model, deployed = fuse_model(model, {"params": state.params, "batch_stats": state.batch_stats})
    expected = jax.jit(lambda v, x, r: simulate(deploy_model, v, x, r))(deployed, images, state.ranges)
    span = float(state.ranges["logits"].high - state.ranges["logits"].low)
    np.testing.assert_allclose(found, expected, atol=1.01 * span / 255)
    floating = step({"params": state.params, "batch_stats": state.batch_stats}, shard_batch(test, mesh))["logits"]
    assert np.abs(found - floating).max() > 1e-3
    reduced = make_eval_step(model, config.data.normalization, mesh, reduce_range=True)
    of_7_bits = reduced(state.variables, shard_batch(test, mesh))["logits"]
    expected = jax.jit(lambda v, x, r: simulate(deploy_model, v, x, r, reduce_range=True))(
        deployed, images, state.ranges
    )
    np.testing.assert_allclose(of_7_bits, expected, atol=1.01 * span / 255)
    assert np.abs(of_7_bits - found).max() > 1.5 * span / 255


def test_ranges_have_the_names_of_what_is_measured():
    config, model, _, state, _, _ = stepped("repvgg", 1)
    chex.assert_trees_all_equal_shapes_and_dtypes(dict(no_ranges(model)), dict(state.ranges))
    assert config.optimization.peak_muon_learning_rate == 0
    assert config.replace(muon_learning_rate=0.03).optimization.peak_muon_learning_rate == pytest.approx(3e-4)


def test_what_cannot_be_trained_for_8_bits_is_refused():
    with pytest.raises(ValueError, match="quantize_aware is True: expected init_from as well"):
        CONFIG.replace(init_from=None)
    with pytest.raises(ValueError, match="weight_bits is 7: expected 8 without quantize_aware"):
        CONFIG.replace(quantize_aware=False, weight_bits=7)
    with pytest.raises(ValueError, match="squeeze_excite is 'before_relu': expected None, a plain variant"):
        CONFIG.replace(variant="repvgg_d2se", depths=None, width_multiplier=None)
