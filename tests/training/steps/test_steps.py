from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from repvgg_jax.preprocess import Normalization
from repvgg_jax.training import TrainConfig
from repvgg_jax.training.steps.augmentation import augment
from repvgg_jax.training.steps.eval_step import make_eval_step
from repvgg_jax.training.steps.mesh import abstract_batch, create_mesh, require_divisible, shard_batch
from repvgg_jax.training.steps.optimizer import create_optimizer
from repvgg_jax.training.steps.state import TrainState, abstract_state, create_state
from repvgg_jax.training.steps.train_step import make_train_step

CONFIG = TrainConfig().replace(
    depths=(1, 2, 1, 1),
    width_multiplier=(0.25, 0.125, 0.0625, 0.0625),
    strides=(1, 1, 2, 2, 1),
    image_size=8,
    mean=(0.5,),
    std=(0.25,),
    crop_padding=1,
    batch_size=16,
    learning_rate=0.05,
    learning_rate_batch_size=16,
    label_smoothing=0.1,
)


def batch(count=16, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count).astype(np.int32)
    images = rng.integers(0, 50, (count, 8, 8, 1), dtype=np.uint8)
    images[np.arange(count), 2 * (labels // 2), :, 0] += 150
    images[:, :, 7, 0] += (100 * (labels % 2)).astype(np.uint8)[:, None]
    return {"image": images, "label": labels, "index": rng.permutation(1000)[:count].astype(np.int32)}


# For what does not depend on the network: one block a stage, the first of them with an identity.
SMALL = CONFIG.replace(depths=(1, 1, 1, 1))


@cache
def compiled(config, count):
    """On so many devices: the mesh, a fresh state, and the training step; compiled once for all tests."""
    mesh = create_mesh(jax.devices()[:count])
    model, optimizer = config.network.create_model(4), create_optimizer(config.optimization, steps_per_epoch=3)
    state = jax.device_get(create_state(model, optimizer, config, 1, mesh))
    return mesh, state, make_train_step(model, optimizer, config, config.data.normalization, mesh, steps_per_epoch=2)


def run(config, steps, count):
    """The state after each step on so many devices, and the losses."""
    mesh, state, step = compiled(config, count)
    states, losses = [], []
    for number in range(steps):
        state, metrics = step(state, shard_batch(batch(seed=number), mesh))
        states.append(jax.device_get(state))
        losses.append(float(metrics["loss"]))
    return states, losses


@pytest.mark.usefixtures("float32")
def test_the_loss_falls():
    _, losses = run(SMALL, 30, 1)
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:3])


def test_images_are_mirrored_in_turn_by_the_epoch_of_the_step():
    config = CONFIG.replace(crop_padding=0, flip=True, alternate_flip=True)
    step = rigged_step(config, OfPixels())
    losses = [float(step(np.ones(4), number)[2]["loss"]) for number in range(5)]
    assert losses[0] == losses[1] == losses[4]
    assert losses[2] == losses[3] != losses[0]


@pytest.mark.usefixtures("float32")
def test_eight_devices_train_as_one_does_with_statistics_of_the_global_batch():
    one, losses_of_one = run(SMALL, 3, 1)
    eight, losses_of_eight = run(SMALL, 3, 8)
    assert len(jax.devices()) == 8
    np.testing.assert_allclose(losses_of_eight, losses_of_one, rtol=1e-3)
    # After one step statistics differ by rounding alone; a per-device batch of 2 images would give others.
    chex.assert_trees_all_close(eight[0].batch_stats, one[0].batch_stats, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(one, eight)


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize(
    "further",
    [
        pytest.param(dict(alternate_flip=True), marks=pytest.mark.long),
        pytest.param(dict(trivial_augment=True, color_jitter=0.4, mixup=0.2, cutmix=1.0), marks=pytest.mark.long),
    ],
    ids=["cut out, mirrored in turn", "distort and mix besides"],
)
def test_eight_devices_augment_mix_and_accumulate_as_one_does(further):
    config = SMALL.replace(accumulate_steps=2, cutout=4, ema_decay=0.9, **further)
    (one,), losses_of_one = run(config, 1, 1)
    (eight,), losses_of_eight = run(config, 1, 8)
    np.testing.assert_allclose(losses_of_eight, losses_of_one, rtol=1e-3)
    chex.assert_trees_all_close(eight.batch_stats, one.batch_stats, rtol=1e-4, atol=1e-5)
    (plain,), _ = run(SMALL, 1, 1)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(plain.batch_stats, one.batch_stats, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("float32")
def test_the_first_loss_is_the_smoothed_cross_entropy_of_the_normalised_images():
    config = CONFIG.replace(crop_padding=0, flip=False)
    data = batch()
    images = (data["image"].astype(np.float32) / 255 - 0.5) / 0.25
    _, _, metrics = rigged_step(config, OfPixels())([1, 2, 3, 4])
    np.testing.assert_allclose(metrics["loss"], smoothed_loss(images[:, 0, :4, 0] * [1, 2, 3, 4], data), rtol=1e-5)


def smoothed_loss(logits, data):
    targets = np.eye(4)[data["label"]] * 0.9 + 0.1 / 4
    return -(targets * (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))).sum(-1).mean()


@pytest.mark.usefixtures("float32")
def test_auxiliary_heads_add_their_weighted_losses():
    class WithHeads(OfPixels):
        def apply(self, variables, images, *, train, mutable):
            logits, updates = super().apply(variables, images, train=train, mutable=mutable)
            return (logits, {"one": 2 * logits, "other": logits[:, ::-1]}), updates

    config = CONFIG.replace(crop_padding=0, flip=False, mean=(0.0,), std=(1.0,), auxiliary_weight=0.3)
    _, _, metrics = rigged_step(config, WithHeads())(np.ones(4))
    data = batch()
    logits = data["image"][:, 0, :4, 0] / 255
    losses = [smoothed_loss(head, data) for head in (logits, 2 * logits, logits[:, ::-1])]
    np.testing.assert_allclose(metrics["loss"], losses[0] + 0.3 * (losses[1] + losses[2]), rtol=1e-5)


def test_a_network_with_auxiliary_heads_trains_them():
    config = CONFIG.replace(variant="repvggplus_l2pse", depths=(1, 1, 2, 1))
    after, metrics = abstract_step(config)
    assert "stage3_first_aux" in after.params
    assert metrics["loss"].shape == ()


@pytest.mark.long
@pytest.mark.usefixtures("float32")
def test_auxiliary_heads_of_a_fresh_network_are_worth_their_weighted_losses():
    losses = {}
    for weight in (0.0, 0.1):
        config = CONFIG.replace(variant="repvggplus_l2pse", depths=(1, 1, 2, 1), auxiliary_weight=weight)
        _, (losses[weight],) = run(config, 1, 1)
    # Three heads over four classes start near log 4 each.
    assert losses[0.1] - losses[0.0] == pytest.approx(0.1 * 3 * np.log(4), rel=0.5)


@pytest.mark.usefixtures("float32")
def test_accumulating_averages_gradients_and_updates_statistics_in_turn():
    config = SMALL.replace(crop_padding=0, flip=False, accumulate_steps=2)
    mesh = create_mesh(jax.devices()[:1])
    model, optimizer = config.network.create_model(4), optax.sgd(1.0)
    initial = jax.device_get(create_state(model, optimizer, config, 1, mesh))
    data = batch()
    images = (data["image"].astype(np.float32) / 255 - 0.5) / 0.25
    targets = (np.eye(4)[data["label"]] * 0.9 + 0.1 / 4).astype(np.float32)
    stats, gradients, losses = initial.batch_stats, [], []

    def loss_fn(params, stats, images, targets):
        variables = {"params": params, "batch_stats": stats}
        logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy(logits, targets).mean(), updates["batch_stats"]

    gradient_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    for first in (0, 1):
        rows = slice(first, None, 2)
        (loss, stats), gradient = gradient_fn(initial.params, stats, images[rows], targets[rows])
        gradients.append(gradient)
        losses.append(float(loss))
    expected = jax.tree.map(lambda p, a, b: p - (a + b) / 2, initial.params, *gradients)
    state, metrics = make_train_step(model, optimizer, config, config.data.normalization, mesh, steps_per_epoch=2)(
        initial, shard_batch(data, mesh)
    )
    assert float(metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-4)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_close(state.batch_stats, stats, rtol=1e-3, atol=1e-4)
    # Those of the whole batch, and of two halves that are not interleaved, are others.
    _, of_whole = jax.jit(loss_fn)(initial.params, initial.batch_stats, images, targets)
    of_halves = initial.batch_stats
    for rows in (slice(8), slice(8, None)):
        (_, of_halves), _ = gradient_fn(initial.params, of_halves, images[rows], targets[rows])
    for others in (of_whole, of_halves):
        with pytest.raises(AssertionError):
            chex.assert_trees_all_close(state.batch_stats, others, rtol=1e-3, atol=1e-4)


def test_masked_rows_count_in_no_sum():
    mesh = create_mesh(jax.devices()[:1])
    model = SMALL.network.create_model(4)
    state = create_state(model, optax.identity(), SMALL, 1, mesh)
    step = make_eval_step(model, SMALL.data.normalization, mesh)
    data = {**batch(), "mask": np.arange(16) < 5}
    result = step(state.variables, shard_batch(data, mesh))
    first_five = {key: value[:5] for key, value in data.items()}
    alone = step(state.variables, shard_batch(first_five, mesh))
    assert int(result["count"]) == 5
    assert int(result["correct"]) == int(alone["correct"])
    np.testing.assert_allclose(result["loss"], alone["loss"], rtol=1e-5)


class Pixels:
    """In place of a network: the logits are the first pixels, and the weights are drawn from the key alone."""

    num_classes = 4

    def init(self, key, images, *, train):
        return {"params": {"vector": jax.random.normal(key, (3,))}, "batch_stats": {"seen": jnp.ones(1)}}

    def apply(self, variables, images, *, train):
        pixels = images[:, 0, :4, 0]
        return jnp.where(pixels > 100, jnp.inf, pixels)


def test_evaluation_sums_over_the_rows_that_are_there_whatever_the_others_hold():
    mesh = create_mesh(jax.devices()[:1])
    images = np.zeros((4, 8, 8, 1), np.uint8)
    images[:, 0, :4, 0] = [[3, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0], [200, 200, 0, 0]]
    data = {"image": images, "label": np.array([0, 1, 3, 0], np.int32), "mask": np.array([True, True, True, False])}
    found = jax.device_get(
        make_eval_step(Pixels(), Normalization((0.0,), (1 / 255,)), mesh)({}, shard_batch(data, mesh))
    )
    assert (found["correct"], found["count"]) == (2, 3)
    np.testing.assert_allclose(found["loss"], 3 * np.log(3 + np.exp(3.0)) - 6, rtol=1e-5)
    np.testing.assert_allclose(found["logits"][:3], images[:3, 0, :4, 0], rtol=1e-6)
    for name in ("label", "mask"):
        np.testing.assert_array_equal(found[name], data[name])


def test_initial_weights_are_drawn_from_the_seed_and_begin_the_average():
    mesh = create_mesh(jax.devices()[:1])
    states = {}
    for seed, decay in ((0, 0.0), (0, 0.9), (1, 0.0)):
        config = CONFIG.replace(seed=seed, ema_decay=decay)
        states[seed, decay] = create_state(Pixels(), optax.sgd(0.1, momentum=0.9), config, 1, mesh)
    chex.assert_trees_all_equal(states[0, 0.0].variables, states[0, 0.9].variables, states[0, 0.9].ema)
    assert np.abs(states[0, 0.0].params["vector"] - states[1, 0.0].params["vector"]).max() > 0.1
    assert states[0, 0.0].ema is None
    assert all(int(state.step) == 0 for state in states.values())


@pytest.mark.parametrize(("batch_size", "accumulate_steps", "fits"), [(16, 2, True), (24, 1, True), (24, 2, False)])
def test_microbatches_divide_the_training_batch_and_not_the_evaluations(batch_size, accumulate_steps, fits):
    config = CONFIG.replace(batch_size=batch_size, accumulate_steps=accumulate_steps, eval_batch_size=8)
    mesh = create_mesh()
    require_divisible(config, mesh, "eval_batch_size")
    if fits:
        require_divisible(config, mesh, "batch_size")
    else:
        with pytest.raises(ValueError, match=r"batch_size is 24: .*, e\.g\. 32"):
            require_divisible(config, mesh, "batch_size")


def test_augmentation_changes_with_the_step_and_the_seed():
    def first_losses(config, steps):
        step = rigged_step(config, OfPixels())
        return [float(step(np.ones(4), number)[2]["loss"]) for number in steps]

    base, again, later = first_losses(CONFIG, [0, 0, 1])
    (another_seed,) = first_losses(CONFIG.replace(seed=1), [0])
    assert base == again
    assert len({base, later, another_seed}) == 3


class Rigged:
    """In place of a network: its logits are a function of one vector of parameters."""

    num_classes = 4

    def __init__(self, logits):
        self.logits = logits

    def apply(self, variables, images, *, train, mutable=None):
        logits = jnp.broadcast_to(self.logits(variables["params"]["vector"]), (len(images), 4))
        return (logits, {"batch_stats": {"seen": images.mean((0, 1, 2))}}) if train else logits


class OfPixels(Rigged):
    """Its logits are the first pixels of an image, each times a parameter."""

    def __init__(self):
        super().__init__(None)

    def apply(self, variables, images, *, train, mutable=None):
        return images[:, 0, :4, 0] * variables["params"]["vector"], {"batch_stats": {"seen": images.mean((0, 1, 2))}}


def rigged_step(config, network):
    """A training step of `vector` alone: (vector, step's number) -> state before, state after, metrics."""
    mesh = create_mesh(jax.devices()[:1])
    optimizer = create_optimizer(config.optimization, steps_per_epoch=2)
    step = make_train_step(network, optimizer, config, config.data.normalization, mesh, steps_per_epoch=2)

    def run(vector, number=0):
        params = {"vector": jnp.asarray(vector, jnp.float32)}
        average = {"params": {"vector": jnp.ones(4)}, "batch_stats": {"seen": jnp.ones(1)}}
        ema = average if config.optimization.ema_decay else None
        state = TrainState(jnp.int32(number), params, {"seen": jnp.zeros(1)}, optimizer.init(params), ema)
        before = jax.device_get(state)
        return before, *step(jax.device_put(state, NamedSharding(mesh, PartitionSpec())), shard_batch(batch(), mesh))

    return run


@pytest.mark.parametrize(
    ("logits", "vector", "loss_is_finite", "gradient_is_finite"),
    [
        (lambda vector: vector, [0, 1, 2, 3], True, True),
        (jnp.sqrt, [0, 1, 2, 3], True, False),
        (lambda vector: vector, [3e38, -3e38, 0, 0], False, True),
        (lambda vector: vector, [jnp.nan, 0, 0, 0], False, False),
    ],
    ids=["neither", "gradient", "loss", "both"],
)
def test_a_loss_or_a_gradient_that_is_not_finite_is_enough_to_leave_a_step_out(
    logits, vector, loss_is_finite, gradient_is_finite
):
    config = CONFIG.replace(crop_padding=0, flip=False)
    _, taken, metrics = rigged_step(config, Rigged(logits))(vector)
    assert np.isfinite(metrics["loss"]) == loss_is_finite
    assert np.isfinite(taken.opt_state[1][0].trace["vector"]).all() == gradient_is_finite
    assert "skipped" not in metrics

    before, after, metrics = rigged_step(config.replace(skip_nonfinite=True), Rigged(logits))(vector)
    left_out = not (loss_is_finite and gradient_is_finite)
    assert metrics["skipped"] == left_out
    assert int(after.step) == 1
    if left_out:
        chex.assert_trees_all_equal(leaves_by_kind(after)[1], leaves_by_kind(before)[1])
    else:
        chex.assert_trees_all_equal(after, taken)


def test_the_loss_is_to_the_mixed_targets_and_the_accuracy_to_the_labels():
    data = batch()
    guesses = np.where(np.arange(16) < 4, (data["label"] + 1) % 4, data["label"])
    config = CONFIG.replace(crop_padding=0, flip=False, mixup=0.5, cutmix=0.5)
    step = rigged_step(config, Rigged(lambda vector: jax.nn.one_hot(guesses, 4) * vector))
    mixed = jax.jit(
        lambda key: augment(
            key, data, config.augmentation, config.data.normalization, num_classes=4, seed=config.seed, epoch=0
        )[1]
    )
    by_targets = set()
    for number in range(6):
        _, _, metrics = step(np.full(4, 2.0), number)
        targets = mixed(jax.random.fold_in(jax.random.key(config.seed), number))
        expected = optax.softmax_cross_entropy(2 * jax.nn.one_hot(guesses, 4), targets).mean()
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
        assert metrics["accuracy"] == 12 / 16
        by_targets.add(float((targets.argmax(-1) == guesses).mean()))
    assert len(by_targets) > 1


@pytest.mark.parametrize(("ema_decay", "accumulate_steps"), [(0.0, 1), (0.9, 2)])
def test_parameters_statistics_and_averages_are_float32_where_the_compute_is_bfloat16(ema_decay, accumulate_steps):
    config = CONFIG.replace(
        dtype="bfloat16", ema_decay=ema_decay, accumulate_steps=accumulate_steps, muon_learning_rate=0.1
    )
    after, metrics = abstract_step(config)
    assert {leaf.dtype for leaf in leaves_by_kind(after)[1]} == {np.dtype(np.float32)}
    assert metrics["loss"].dtype == np.float32


def abstract_step(config):
    """What a training step returns; its state is of the shapes and dtypes of the one before."""
    mesh = create_mesh(jax.devices()[:1])
    model, optimizer = config.network.create_model(4), create_optimizer(config.optimization, steps_per_epoch=2)
    before = abstract_state(model, optimizer, config, 1, mesh)
    step = make_train_step(model, optimizer, config, config.data.normalization, mesh, steps_per_epoch=2)
    after, metrics = jax.eval_shape(step, before, abstract_batch(config, 1, mesh))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
    return after, metrics


def leaves_by_kind(tree):
    """Integers, and all others."""
    leaves = jax.tree.leaves(tree)
    return [[leaf for leaf in leaves if (leaf.dtype.kind in "iu") == integer] for integer in (True, False)]


def test_a_step_left_out_changes_counts_alone_also_where_there_is_an_average():
    config = CONFIG.replace(skip_nonfinite=True, ema_decay=0.9)
    step = rigged_step(config, Rigged(lambda vector: vector))
    before, after, metrics = step([0, 1, 2, 3], 5)
    assert metrics["skipped"] == 0
    for each in ("params", "batch_stats", "ema"):
        assert not all(map(np.array_equal, *map(jax.tree.leaves, (getattr(before, each), getattr(after, each))))), each
    before, after, metrics = step([np.inf, 1, 2, 3], 5)
    assert metrics["skipped"] == 1
    counts, others = leaves_by_kind(after)
    chex.assert_trees_all_equal(others, leaves_by_kind(before)[1])
    # Those of the run and of the learning rate's schedule.
    assert [int(count) for count in counts] == [6, 1]
