"""The network of a run, restored from its newest checkpoint."""

from __future__ import annotations

from pathlib import Path

from jax.sharding import Mesh

from repvgg_jax.models import RepVGG
from repvgg_jax.training.config import TrainConfig
from repvgg_jax.training.run.checkpoints import Checkpoints
from repvgg_jax.training.run.data_record import DataRecord
from repvgg_jax.training.steps.optimizer import create_optimizer
from repvgg_jax.training.steps.state import TrainState, abstract_state


def restore(workdir: Path, mesh: Mesh) -> tuple[RepVGG, TrainState]:
    """Restore a run.

    Args:
      workdir: The run directory.
      mesh: Mesh of the devices that the state is to lie on, replicated.

    Returns:
      The model in its training form, and the train state. `state.eval_variables` is what the run evaluates.

    Raises:
      FileNotFoundError: If the directory holds no run, or no checkpoint.
      ValueError: If the run cannot be read.
    """
    config, record = TrainConfig.load(workdir / "config.json"), DataRecord.load(workdir)
    model = config.network.create_model(len(record.class_names))
    optimizer = create_optimizer(config.optimization, steps_per_epoch=1, frozen=config.network.frozen)
    with Checkpoints(workdir) as checkpoints:
        return model, checkpoints.restore(abstract_state(model, optimizer, config, record.channels, mesh)).state
