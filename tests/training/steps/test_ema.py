import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.training.steps.ema import update_ema
from repvgg_jax.training.steps.mesh import create_mesh, shard_batch
from repvgg_jax.training.steps.optimizer import create_optimizer
from repvgg_jax.training.steps.state import create_state
from repvgg_jax.training.steps.train_step import make_train_step
from tests.training.steps.test_steps import CONFIG, batch


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_average_is_its_recursion_with_a_decay_that_warms_up(decay):
    values = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    ema = {"params": jnp.zeros(3)}
    expected = np.zeros(3)
    for step, value in enumerate(values):
        ema = update_ema(ema, {"params": jnp.asarray(value)}, jnp.int32(step), decay)
        now = min(decay, (1 + step) / (10 + step))
        expected = now * expected + (1 - now) * value
    np.testing.assert_allclose(ema["params"], expected, rtol=1e-4, atol=1e-6)
    assert abs(ema["params"] - values[-1]).max() > 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_does_not_change_stays_to_the_last_bit_and_in_its_dtype(dtype):
    values = jnp.asarray(np.random.default_rng(0).normal(size=1000), dtype)
    for step in (0, 3, 1000):
        variables = {"frozen": values, "moving": 2 * values}
        found = update_ema({"frozen": values, "moving": values}, variables, jnp.int32(step), 0.999)
        assert {leaf.dtype for leaf in found.values()} == {jnp.dtype(dtype)}
        np.testing.assert_array_equal(found["frozen"], values)
        assert (found["moving"] != values).any()


@pytest.mark.usefixtures("float32")
def test_a_step_averages_parameters_and_statistics_and_trains_as_without():
    mesh = create_mesh(jax.devices()[:1])
    states = {}
    for decay in (0.0, 0.9):
        config = CONFIG.replace(ema_decay=decay)
        model = config.network.create_model(4)
        optimizer = create_optimizer(config.optimization, steps_per_epoch=2)
        state = create_state(model, optimizer, config, 1, mesh)
        step = make_train_step(model, optimizer, config, config.data.normalization, mesh, steps_per_epoch=2)
        history = [jax.device_get(state)]
        for number in range(2):
            state, _ = step(state, shard_batch(batch(seed=number), mesh))
            history.append(jax.device_get(state))
        states[decay] = history
    start, first, second = states[0.9]
    chex.assert_trees_all_equal(start.ema, start.variables)
    ema = jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, start.variables, first.variables)
    chex.assert_trees_all_close(first.ema, ema, rtol=1e-5, atol=1e-6)
    ema = jax.tree.map(lambda a, b: 2 / 11 * a + 9 / 11 * b, ema, second.variables)
    chex.assert_trees_all_close(second.ema, ema, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(second.variables, states[0.0][-1].variables, rtol=1e-4, atol=1e-5)
    assert states[0.0][-1].ema is None
    assert second.eval_variables is second.ema
