import dataclasses
from typing import Any

import chex
import flax.struct
import jax
import optax
import orbax.checkpoint as ocp
import pytest

from repvgg_jax.training.checkpoints import Checkpoints
from repvgg_jax.training.steps import abstract_state, create_mesh, create_state
from tests.training.test_steps import CONFIG


@flax.struct.dataclass
class StateWithoutAverage:
    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any


def setting(config):
    return config.create_model(4), optax.sgd(0.1, momentum=0.9), config, 1, create_mesh(jax.devices()[:1])


def test_a_checkpoint_from_before_the_moving_average_restores(tmp_path):
    state = create_state(*setting(CONFIG))
    old = StateWithoutAverage(state.step, state.params, state.batch_stats, state.opt_state)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(0, args=ocp.args.Composite(state=ocp.args.StandardSave(old), data=ocp.args.JsonSave({"next": 1})))
    with Checkpoints(tmp_path) as checkpoints:
        restored, data_state = checkpoints.restore(abstract_state(*setting(CONFIG)))
    chex.assert_trees_all_equal(restored, state)
    assert data_state == {"next": 1}


def test_a_moving_average_is_in_the_checkpoint_and_only_where_there_is_one(tmp_path):
    averaging = dataclasses.replace(CONFIG, ema_decay=0.9)
    state = create_state(*setting(averaging))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        checkpoints.wait()
        restored, _ = checkpoints.restore(abstract_state(*setting(averaging)))
        chex.assert_trees_all_equal(restored, state)
        with pytest.raises(ValueError, match="ema"):
            checkpoints.restore(abstract_state(*setting(CONFIG)))
