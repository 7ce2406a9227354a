import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import create_model
from repvgg_jax.models.blocks import RepVGGBlock
from repvgg_jax.training import train_and_evaluate
from repvgg_jax.training.start.near_identity import residual_start


def after_blocks(count, scale):
    """A rectified normal, and the same after so many blocks; None: blocks as published."""
    block = RepVGGBlock(features=32)
    start = x = jax.nn.relu(jax.random.normal(jax.random.key(0), (16, 8, 8, 32)))
    for number in range(count):
        variables = block.init(jax.random.key(1 + number), x, train=False)
        if scale is not None:
            params = residual_start({"params": {"block": variables["params"]}}, scale=scale)["params"]["block"]
            variables = {**variables, "params": params}
        x, _ = block.apply(variables, x, train=True, mutable=["batch_stats"])
    return np.asarray(start), np.asarray(x)


def correlation(pair):
    return np.corrcoef(pair[0].ravel(), pair[1].ravel())[0, 1]


def test_an_identity_branch_alone_only_rescales_a_rectified_input():
    start, end = after_blocks(1, scale=0.0)
    centred = (start - start.mean((0, 1, 2))) / np.sqrt(start.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(end, np.maximum(centred + 1 / np.sqrt(np.pi - 1), 0), atol=1e-4)
    assert np.abs(end - np.maximum(centred, 0)).max() > 0.5  # as published
    assert correlation(after_blocks(14, scale=0.0)) > 0.99


def test_fourteen_blocks_near_the_identity_remember_their_input_and_published_ones_do_not():
    assert correlation(after_blocks(14, scale=0.25)) > 0.4
    assert abs(correlation(after_blocks(14, scale=None))) < 0.1


def test_only_scales_beside_an_identity_and_its_bias_change():
    model = create_model("repvgg_a0", num_classes=10, depths=(1, 2, 1, 1), width_multiplier=(0.25,) * 4)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    changed = residual_start(variables, scale=0.5)
    assert jax.tree.map(jnp.shape, changed) == jax.tree.map(jnp.shape, variables)
    different = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.unique(new).tolist()
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(variables), jax.tree.leaves(changed), strict=True
        )
        if not np.array_equal(old, new)
    }
    assert different == {
        "params/stage2_block2/branch_1x1/bn/scale": [0.5],
        "params/stage2_block2/branch_3x3/bn/scale": [0.5],
        "params/stage2_block2/branch_identity/bias": [pytest.approx(0.683, abs=1e-3)],
    }


def test_a_run_begins_near_the_identity_with_or_without_a_whitened_stem(tiny, begin, tmp_path):
    config = tiny.replace(residual_scale=0.5, ema_decay=0.9)
    for whiten in (False, True):
        state, _ = begin(config.replace(whiten_stem=whiten), tmp_path / f"whiten-{whiten}")
        assert_begun_near_the_identity(state, whiten)


def assert_begun_near_the_identity(state, whiten):
    for params in (state.params, state.ema["params"]):
        np.testing.assert_allclose(params["stage2_block2"]["branch_3x3"]["bn"]["scale"], 0.5, atol=1e-6)
        np.testing.assert_allclose(params["stage2_block2"]["branch_identity"]["bias"], 0.683, atol=1e-3)
        np.testing.assert_allclose(params["stem"]["branch_1x1"]["bn"]["scale"], 0 if whiten else 1, atol=1e-6)


@pytest.mark.long
def test_a_run_that_began_near_the_identity_with_a_whitened_stem_is_fused(tiny, tmp_path):
    config = tiny.replace(residual_scale=0.5, whiten_stem=True, epochs=1, learning_rate=1e-12, ema_decay=0.9)
    result = train_and_evaluate(config, tmp_path / "run")
    # Nothing was learned, so the scales are as they began.
    assert_begun_near_the_identity(result.state, whiten=True)
    assert result.comparison.agreement.predictions_changed == 0


def test_branches_that_come_with_weights_keep_their_scales(tiny):
    with pytest.raises(ValueError, match=r"residual_scale is 0\.5: expected None \(--residual-scale None"):
        tiny.replace(residual_scale=0.5, init_from="somewhere")


def test_a_quantizable_block_passes_its_input_by_the_norm_of_the_sum():
    model = create_model(
        "repvgg_a0", num_classes=10, depths=(1, 2, 1, 1), width_multiplier=(0.25,) * 4, block="quantizable"
    )
    images = jnp.zeros((1, 32, 32, 3))
    variables = model.init(jax.random.key(0), images, train=False)
    before, changed = variables["params"], residual_start(variables, scale=0.5)["params"]
    assert jax.tree.map(jnp.shape, changed) == jax.tree.map(jnp.shape, before)
    with_identity = {"stage2_block2"}
    for name, block in before.items():
        if name not in with_identity:
            jax.tree.map(np.testing.assert_array_equal, changed[name], block)
    (name,) = with_identity
    np.testing.assert_array_equal(changed[name]["branch_3x3"]["bn"]["scale"], 0.5)
    np.testing.assert_array_equal(changed[name]["branch_1x1"]["kernel"], 0.5 * before[name]["branch_1x1"]["kernel"])
    np.testing.assert_allclose(changed[name]["bn_with_identity"]["bias"], 0.683, atol=1e-3)
    np.testing.assert_array_equal(changed[name]["bn_with_identity"]["scale"], 1)
