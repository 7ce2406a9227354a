from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import create_model
from repvgg_jax.data import normalize
from repvgg_jax.interop.safetensors import load_deploy
from repvgg_jax.preprocess import Normalization
from repvgg_jax.training import train_and_evaluate
from repvgg_jax.training.run.data_record import DataRecord
from repvgg_jax.training.start.warm_start import start_from
from repvgg_jax.training.steps.mesh import create_mesh
from repvgg_jax.training.steps.optimizer import create_optimizer
from repvgg_jax.training.steps.state import create_state

NORMALIZATION = Normalization((0.5,), (0.5,))


def fresh_variables(config, classes):
    model, optimizer = config.network.create_model(classes), create_optimizer(config.optimization, 1)
    return create_state(model, optimizer, config, 1, create_mesh()).variables


def normalization_of(run):
    return DataRecord.load(run).normalization


def without_head(variables):
    return {**variables, "params": {name: leaf for name, leaf in variables["params"].items() if name != "head"}}


def no_batch():
    pytest.fail("a run is started from without images")


def test_a_run_starts_from_the_weights_of_another_with_a_new_head_for_other_classes(tiny, finished):
    fresh = fresh_variables(tiny.replace(seed=1), 7)
    config = tiny.replace(init_from=str(finished.workdir))
    variables = start_from(config, NORMALIZATION, fresh, no_batch)
    chex.assert_trees_all_equal(without_head(variables), without_head(finished.state.variables))
    chex.assert_trees_all_equal(variables["params"]["head"], fresh["params"]["head"])
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(without_head(fresh), without_head(finished.state.variables))
    same_classes = start_from(config, NORMALIZATION, fresh_variables(tiny.replace(seed=1), 10), no_batch)
    chex.assert_trees_all_equal(same_classes, finished.state.variables)


def test_fine_tuning_begins_where_the_other_run_ended(tiny, finished, begin, tmp_path):
    config = tiny.replace(init_from=str(finished.workdir), frozen="stage2", ema_decay=0.9, seed=1)
    state, _ = begin(config, tmp_path / "run")
    chex.assert_trees_all_equal(state.variables, jax.device_get(finished.state.variables))
    chex.assert_trees_all_equal(state.ema, state.variables)
    assert int(state.step) == 0
    assert normalization_of(tmp_path / "run") == normalization_of(finished.workdir)


@pytest.mark.long
def test_fine_tuning_begins_where_the_other_run_ended_and_leaves_what_is_frozen(tiny, finished, tmp_path):
    config = tiny.replace(
        init_from=str(finished.workdir), frozen="stage2", epochs=1, learning_rate=0.01, ema_decay=0.9, seed=1
    )
    result = train_and_evaluate(config, tmp_path / "run")
    # The first epoch of fine-tuning is judged before it is over: better than the first from scratch.
    assert result.history[0]["train/loss"] < finished.history[0]["train/loss"]
    assert result.comparison.agreement.predictions_changed == 0
    for trained in (result.state.variables, result.state.ema):
        for collection, parts in trained.items():
            for name, leaves in parts.items():
                frozen = name.startswith(("stem", "stage1", "stage2"))
                same = jax.tree.map(np.array_equal, leaves, finished.state.variables[collection][name])
                assert all(jax.tree.leaves(same)) == frozen, (collection, name)
    assert normalization_of(result.workdir) == normalization_of(finished.workdir)


@pytest.mark.parametrize("block", ["repvgg", "quantizable"])
def test_a_run_begins_with_a_deploy_form_reopened_if_asked(tiny, finished, begin, block, tmp_path):
    deployed = load_deploy(finished.workdir / "deploy.safetensors")
    weights = str(finished.workdir / "deploy.safetensors")
    config = tiny.replace(init_from=weights, reopen=True, block=block, seed=1)
    state, batch = begin(config, tmp_path / "run")
    normalization = normalization_of(tmp_path / "run")
    assert normalization == normalization_of(finished.workdir)
    images = normalize(batch["image"], *normalization)

    @jax.jit
    def logits(variables, deploy_variables, images):
        model = config.network.create_model(10)
        in_training, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
        expected = deployed.model.apply(deploy_variables, images, train=False)
        return expected, model.apply(variables, images, train=False), in_training

    # In training too, on the batch that the statistics are of: the first.
    expected, *both = map(np.asarray, logits(state.variables, deployed.variables, images))
    for found in both:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.long
def test_a_deploy_form_is_reopened_if_asked_and_trained_on(tiny, finished, tmp_path):
    file = finished.workdir / "deploy.safetensors"
    config = tiny.replace(init_from=str(file), reopen=True, epochs=1, learning_rate=0.01, seed=1)
    result = train_and_evaluate(config, tmp_path / "run")
    assert result.history[0]["train/loss"] < finished.history[0]["train/loss"]
    assert result.comparison.agreement.predictions_changed == 0
    for name, block in result.state.variables["params"].items():
        if name != "head":
            assert all(jnp.abs(norm["scale"]).max() > 0 for norm in norms(block)), name
    assert normalization_of(result.workdir) == normalization_of(finished.workdir)


def norms(block):
    return [branch.get("bn", branch) for name, branch in block.items() if name.startswith("branch")]


def test_what_cannot_be_started_from_is_refused_with_the_reason(tiny, finished, tmp_path):
    def start(init_from, **changes):
        train_and_evaluate(tiny.replace(init_from=str(init_from), **changes), tmp_path / "run")

    with pytest.raises(ValueError, match=r"deploy.safetensors, a deploy form: .*expected the run directory"):
        start(finished.workdir / "deploy.safetensors")
    with pytest.raises(ValueError, match=r"expected a deploy\.safetensors, since reopen is given"):
        start(finished.workdir, reopen=True)
    with pytest.raises(FileNotFoundError, match="expected a run directory of repvgg-train"):
        start(tmp_path)
    with pytest.raises(
        ValueError, match=r"another one \(.*mean is \(16,\), expected \(32,\);.*give variant, block, depths"
    ):
        start(finished.workdir, width_multiplier=(0.25, 0.25, 0.0625, 0.0625))
    assert not (tmp_path / "run").exists()


PLUS = partial(
    create_model, "repvggplus_l2pse", num_classes=4, depths=(1, 1, 2, 1), ops="xla",
    width_multiplier=(0.25, 0.125, 0.0625, 0.0625),
)  # fmt: skip
IMAGES = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)


def trained(model, variables):
    """Gradients and statistics of a step, and the features of every part in it."""

    def loss(params):
        (logits, auxiliary), updates = model.apply(
            {**variables, "params": params}, IMAGES, train=True, mutable=["batch_stats"]
        )
        return sum(jnp.square(x).sum() for x in (logits, *auxiliary.values())), updates["batch_stats"]

    features, _ = model.apply(variables, IMAGES, train=True, features=True, mutable=["batch_stats"])
    return *jax.grad(loss, has_aux=True)(variables["params"]), features


@pytest.fixture(scope="module")
def whole():
    """The variables of a network of which nothing is frozen, `trained` of it, and its features in evaluation."""
    model = PLUS()
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(1), IMAGES)
    evaluated = partial(model.apply, train=False, features=True)
    return variables, *jax.jit(lambda each: (trained(model, each), evaluated(each, IMAGES)))(variables)


@pytest.mark.parametrize("frozen", ["stem", "stage3", "stage4"])
def test_a_frozen_part_gets_no_gradient_keeps_its_statistics_and_uses_them(frozen, whole):
    variables, of_whole, evaluated = whole
    of_part = jax.jit(partial(trained, PLUS(frozen=frozen)))(variables)
    order = ["stem", "stage1", "stage2", "stage3", "stage4"]
    names = tuple(order[: order.index(frozen) + 1])
    for gradients, statistics, _ in (of_whole, of_part):
        for name, gradient in gradients.items():
            still = gradients is of_part[0] and name.startswith(names) and not name.endswith("_aux")
            zero = all(not leaf.any() for leaf in jax.tree.leaves(gradient))
            assert zero == still, name
            if name in statistics and "head" not in name:
                same = jax.tree.map(np.array_equal, statistics[name], variables["batch_stats"][name])
                assert all(jax.tree.leaves(same)) == still, name
    chex.assert_trees_all_close(of_part[2][frozen], evaluated[frozen], rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(of_whole[2][frozen], evaluated[frozen], rtol=1e-3)


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="frozen is 'stage5': expected None or one of stem, stage1"):
        create_model("repvgg_a0", frozen="stage5")
