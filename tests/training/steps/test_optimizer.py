import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import create_model
from repvgg_jax.training.config import OptimizationConfig
from repvgg_jax.training.steps.optimizer import create_optimizer, learning_rate_schedule, weight_decay_mask
from tests.random_variables import random_variables


def test_the_rate_warms_up_linearly_and_falls_as_a_cosine_to_zero():
    schedule = learning_rate_schedule(
        OptimizationConfig(epochs=10, warmup_epochs=2, learning_rate=0.4), steps_per_epoch=5
    )
    rates = [float(schedule(step)) for step in range(51)]
    np.testing.assert_allclose(rates[:11], np.linspace(0, 0.4, 11), rtol=1e-5)
    np.testing.assert_allclose(rates[10:], 0.2 * (1 + np.cos(np.linspace(0, np.pi, 41))), rtol=1e-5, atol=1e-7)


def test_a_linear_schedule_warms_up_as_the_cosine_does_and_falls_in_a_straight_line_to_zero():
    config = OptimizationConfig(epochs=10, warmup_epochs=2, learning_rate=0.4, schedule="linear")
    schedule = learning_rate_schedule(config, steps_per_epoch=5)
    rates = [float(schedule(step)) for step in range(51)]
    np.testing.assert_allclose(rates[:11], np.linspace(0, 0.4, 11), rtol=1e-5)
    np.testing.assert_allclose(rates[10:], np.linspace(0.4, 0, 41), rtol=1e-5, atol=1e-7)


def test_a_short_run_of_a_long_recipe_warms_up_for_half_of_it():
    schedule = learning_rate_schedule(
        OptimizationConfig(epochs=2, warmup_epochs=5, learning_rate=0.4), steps_per_epoch=10
    )
    assert [float(schedule(step)) for step in (0, 10, 20)] == pytest.approx([0, 0.4, 0])


def test_warm_up_may_take_a_part_of_an_epoch():
    schedule = learning_rate_schedule(
        OptimizationConfig(epochs=2, warmup_epochs=0.5, learning_rate=0.4), steps_per_epoch=10
    )
    assert [float(schedule(step)) for step in range(6)] == pytest.approx([0, 0.08, 0.16, 0.24, 0.32, 0.4])
    assert float(schedule(6)) < 0.4


def test_without_warm_up_the_rate_starts_at_its_peak():
    schedule = learning_rate_schedule(OptimizationConfig(epochs=10, learning_rate=0.4), steps_per_epoch=5)
    assert float(schedule(0)) == pytest.approx(0.4)


@pytest.mark.parametrize(("batch_size", "peak"), [(128, 0.2), (256, 0.4), (1024, 1.6)])
def test_the_rate_grows_linearly_with_the_batch_size(batch_size, peak):
    config = OptimizationConfig(epochs=10, warmup_epochs=1, learning_rate=0.1, batch_size=batch_size)
    schedule = learning_rate_schedule(dataclasses.replace(config, learning_rate_batch_size=64), steps_per_epoch=10)
    assert max(float(schedule(step)) for step in range(100)) == pytest.approx(peak)


def test_weight_decay_spares_biases_and_the_scales_behind_convolutions():
    model = create_model("repvgg_d2se", depths=(2, 1, 1, 1), width_multiplier=(0.25,) * 4, num_classes=5)
    mask = weight_decay_mask(random_variables(model, dtype=np.float32)["params"])
    decayed = {
        "/".join(entry.key for entry in path)
        for path, decays in jax.tree_util.tree_flatten_with_path(mask["stage1_block2"])[0]
        if decays
    }
    assert decayed == {
        "branch_3x3/conv/kernel", "branch_1x1/conv/kernel", "branch_identity/scale", "se/down/kernel", "se/up/kernel",
    }  # fmt: skip
    assert mask["head"] == {"kernel": True, "bias": False}


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_those_of_pytorchs_sgd_with_weight_decay(momentum, nesterov):
    config = OptimizationConfig(epochs=1000, learning_rate=0.5, momentum=momentum, nesterov=nesterov, weight_decay=0.1)
    optimizer = create_optimizer(config, steps_per_epoch=1000)
    params = {"head": {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}}
    state = optimizer.init(params)
    expected = {"kernel": 2.0, "bias": 2.0}
    velocity = {"kernel": 0.0, "bias": 0.0}
    for step in range(3):
        gradient = float(step + 1)
        gradients = jax.tree.map(lambda leaf, g=gradient: jnp.full_like(leaf, g), params)
        updates, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for name, decay in (("kernel", 0.1), ("bias", 0.0)):
            total = gradient + decay * expected[name]
            velocity[name] = momentum * velocity[name] + total
            expected[name] -= 0.5 * (total + momentum * velocity[name] if nesterov else velocity[name])
            np.testing.assert_allclose(params["head"][name], expected[name], rtol=1e-5)


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_clipping_bounds_the_norm_of_the_gradient_and_leaves_weight_decay_whole(scale):
    config = OptimizationConfig(epochs=1000, learning_rate=1.0, momentum=0.0, nesterov=False, weight_decay=0.1)
    params = {"head": {"kernel": jnp.array([2.0, 0.0]), "bias": jnp.array([5.0])}}
    gradients = {"head": {"kernel": scale * jnp.array([0.48, 0.64]), "bias": scale * jnp.array([0.6])}}
    updates = {}
    for norm in (0.0, 1.0):
        optimizer = create_optimizer(dataclasses.replace(config, grad_clip_norm=norm), steps_per_epoch=1000)
        updates[norm], _ = optimizer.update(gradients, optimizer.init(params), params)
    clipped = min(scale, 1.0)
    np.testing.assert_allclose(updates[1.0]["head"]["kernel"], [-0.48 * clipped - 0.2, -0.64 * clipped], rtol=1e-5)
    np.testing.assert_allclose(updates[1.0]["head"]["bias"], [-0.6 * clipped], rtol=1e-5)
    unclipped = np.allclose(updates[0.0]["head"]["kernel"], updates[1.0]["head"]["kernel"])
    assert unclipped == (scale < 1)


def test_muon_moves_kernels_by_orthogonal_matrices_and_leaves_the_rest_to_sgd():
    config = OptimizationConfig(epochs=1000, learning_rate=0.5, momentum=0.9, weight_decay=0.1)
    muon = dataclasses.replace(config, muon_learning_rate=0.02, muon_weight_decay=0.5)
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "stem": {"branch_3x3": {"conv": {"kernel": jax.random.normal(keys[0], (3, 3, 4, 6))}}},
        "head": {"kernel": jax.random.normal(keys[1], (6, 5)), "bias": jnp.ones(5)},
    }
    gradients = jax.tree.map(lambda leaf: jax.random.normal(keys[2], leaf.shape), params)
    # One direction of the gradient outweighs the rest a hundredfold.
    gradients["stem"]["branch_3x3"]["conv"]["kernel"] += 100 * jax.random.normal(keys[3], (3, 3, 4, 1))
    found = {}
    for name, setting in (("sgd", config), ("muon", muon)):
        optimizer = create_optimizer(setting, steps_per_epoch=1000)
        found[name], _ = optimizer.update(gradients, optimizer.init(params), params)
    for leaf in ("kernel", "bias"):
        np.testing.assert_allclose(found["muon"]["head"][leaf], found["sgd"]["head"][leaf], rtol=1e-6)
    kernel, step = params["stem"]["branch_3x3"]["conv"]["kernel"], found["muon"]["stem"]["branch_3x3"]["conv"]["kernel"]
    decayed = step + 0.02 * 0.5 * kernel
    # Newton and Schulz's iteration leaves the singular values near 1, not at it.
    sizes = np.linalg.svd(np.asarray(decayed).reshape(36, 6), compute_uv=False) / 0.02
    assert sizes.min() > 0.5
    assert sizes.max() < 1.5
    plain = np.linalg.svd(
        np.asarray(found["sgd"]["stem"]["branch_3x3"]["conv"]["kernel"]).reshape(36, 6), compute_uv=False
    )
    assert plain.max() / plain.min() > 20


def test_the_kernel_without_a_norm_of_its_own_is_left_to_sgd():
    """In a quantizable block: by Muon's steps of one size, three epochs on CIFAR-10 lost 3 points."""
    config = OptimizationConfig(epochs=1000, learning_rate=0.5, weight_decay=0.1)
    small = dict(num_classes=5, width_multiplier=(0.25,) * 4, depths=(1, 1, 1, 1))
    params = random_variables(create_model("repvgg_a0", **small, block="quantizable"), dtype=np.float32)["params"]
    gradients = jax.tree.map(jnp.ones_like, params)
    found = {}
    for rate in (0.0, 0.02):
        optimizer = create_optimizer(dataclasses.replace(config, muon_learning_rate=rate), steps_per_epoch=1000)
        found[rate], _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    alike = jax.tree.map(lambda one, other: bool(jnp.allclose(one, other, rtol=1e-5)), *found.values())
    for name in ("stem", "stage1_block1"):
        assert alike[name]["branch_1x1"]["kernel"]
        assert not alike[name]["branch_3x3"]["conv"]["kernel"]


PEAK, STEPS = 0.02, 20


def muon(**fields):
    """Muon, two epochs of ten steps, one of them warm-up."""
    config = OptimizationConfig(
        epochs=2, warmup_epochs=1, learning_rate=0.5, batch_size=64, momentum=0.0, nesterov=False
    )
    return dataclasses.replace(config, **{"muon_learning_rate": PEAK, **fields})


def kernel_updates(config, params, gradients):
    """Each step's update of the stem's kernel, `params` staying as they are."""
    optimizer = create_optimizer(config, steps_per_epoch=STEPS // 2)
    state, found = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for _ in range(STEPS):
        updates, state = update(gradients, state, params)
        found.append(np.asarray(updates["stem"]["kernel"], np.float64))
    return found


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_muon_follows_the_one_schedule_to_a_peak_of_its_own_whatever_the_batch(schedule):
    params = {"stem": {"kernel": jax.random.normal(jax.random.key(0), (1, 1, 2, 2))}}
    config = muon(schedule=schedule, muon_weight_decay=0.0)
    sizes = np.array([np.linalg.norm(step) for step in kernel_updates(config, params, params)])
    whole = learning_rate_schedule(config, STEPS // 2)
    shares = np.array([float(whole(step)) for step in range(STEPS)]) / config.peak_learning_rate
    assert sizes[0] == 0
    assert shares[-1] < 0.2
    np.testing.assert_allclose(sizes, sizes[10] * shares, rtol=1e-5)
    # An orthogonal 2×2 matrix times the peak, as near as five of Newton and Schulz's iterations come to one.
    assert sizes[10] == pytest.approx(PEAK * np.sqrt(2), rel=0.3)
    another_batch = kernel_updates(dataclasses.replace(config, batch_size=256), params, params)
    np.testing.assert_allclose(another_batch[10], kernel_updates(config, params, params)[10], rtol=1e-5)


@pytest.mark.parametrize(
    ("momentum", "nesterov", "goes_on"), [(0.0, True, False), (0.5, True, False), (0.5, False, True), (0.9, True, True)]
)
def test_muon_goes_on_against_a_small_gradient_as_its_momentum_says(momentum, nesterov, goes_on):
    """The second gradient is -0.3 of the first; Nesterov's momentum sees it sooner."""
    config = muon(warmup_epochs=0, momentum=momentum, nesterov=nesterov, muon_weight_decay=0.0)
    optimizer = create_optimizer(config, steps_per_epoch=1000)
    params = {"stem": {"kernel": jnp.zeros((1, 1, 1, 1))}}
    state, steps = optimizer.init(params), []
    for gradient in (1.0, -0.3):
        updates, state = optimizer.update({"stem": {"kernel": jnp.full((1, 1, 1, 1), gradient)}}, state, params)
        steps.append(float(updates["stem"]["kernel"][0, 0, 0, 0]))
    assert steps[0] < 0
    assert (steps[1] < 0) == goes_on


def test_the_gradient_is_clipped_as_one_where_muon_takes_a_part_of_it():
    config = muon(warmup_epochs=0, grad_clip_norm=1.0, weight_decay=0.0, learning_rate_batch_size=64)
    params = {"stem": {"kernel": jnp.ones((1, 1, 1, 1))}, "head": {"kernel": jnp.ones((1, 1))}}
    gradients = {"stem": {"kernel": jnp.full((1, 1, 1, 1), 4.0)}, "head": {"kernel": jnp.full((1, 1), 3.0)}}
    optimizer = create_optimizer(config, steps_per_epoch=1000)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates["head"]["kernel"], [[-0.5 * 3 / 5]], rtol=1e-5)


@pytest.mark.parametrize("frozen", [None, "stem", "stage1"])
@pytest.mark.parametrize("rate", [0.0, PEAK], ids=["sgd", "muon"])
def test_without_gradients_all_that_is_trained_decays_and_nothing_else_moves(rate, frozen):
    """For SGD and for Muon alike; auxiliary heads are trained even at a part that is not."""
    kernel, vector = jnp.ones((1, 1, 2, 2)), jnp.ones(2)
    block = {
        "branch_3x3": {"conv": {"kernel": kernel}, "bn": {"scale": vector, "bias": vector}},
        "branch_identity": {"scale": vector, "bias": vector},
    }
    auxiliary = {"conv_bn": {"conv": {"kernel": kernel}}, "head": {"kernel": jnp.ones((2, 2)), "bias": vector}}
    params = {
        "stem": block, "stage1_block1": block, "stage10_block1": block, "stage2_block1": block,
        "stage1_aux": auxiliary, "head": auxiliary["head"],
    }  # fmt: skip
    config = muon(warmup_epochs=0, muon_learning_rate=rate)
    optimizer = create_optimizer(config, steps_per_epoch=10, frozen=frozen)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, update in jax.tree_util.tree_leaves_with_path(updates)
        if np.asarray(update).any()
    }
    still = {None: (), "stem": ("stem",), "stage1": ("stem", "stage1_block1")}[frozen]
    expected = {"stage1_aux/conv_bn/conv/kernel", "stage1_aux/head/kernel", "head/kernel"}
    for name in {"stem", "stage1_block1", "stage10_block1", "stage2_block1"}.difference(still):
        expected |= {f"{name}/branch_3x3/conv/kernel", f"{name}/branch_identity/scale"}
    assert moved == expected


def test_the_auxiliary_heads_of_repvggplus_decay_beside_a_frozen_body():
    model = create_model(
        "repvggplus_l2pse", depths=(1, 1, 2, 1), width_multiplier=(0.0625,) * 4, num_classes=5, frozen="stage4"
    )
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    params = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)["params"]
    for frozen, names in ((None, set(params)), ("stage4", {name for name in params if "aux" in name} | {"head"})):
        mask = weight_decay_mask(params, frozen)
        assert {name for name, leaves in mask.items() if any(jax.tree.leaves(leaves))} == names
    assert {name for name in params if "aux" in name} == {"stage1_aux", "stage2_aux", "stage3_first_aux"}


def test_the_state_without_muon_is_the_tree_that_earlier_checkpoints_hold():
    """(clip,) decay, SGD's (momentum, schedule) in one chain: another tree could not resume a run or fuse it."""
    params = {"head": {"kernel": jnp.ones((2, 2))}}
    for clip in (0.0, 1.0):
        state = create_optimizer(OptimizationConfig(grad_clip_norm=clip), steps_per_epoch=1).init(params)
        assert len(state) == (3 if clip else 2)
        trace, schedule = state[-1]
        assert trace.trace["head"]["kernel"].shape == (2, 2)
        assert schedule.count.shape == ()
