"""Checkpoints of a run: the train state and the position in the data, written by Orbax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from repvgg_jax.training.steps import TrainState


class Checkpoints:
    """The checkpoints of one run directory, `checkpoints/STEP/`. Writing goes on in the background.

    Args:
      workdir: the run directory.
      keep: newest checkpoints kept; None keeps all.
    """

    def __init__(self, workdir: Path, keep: int | None = None):
        self.directory = workdir.absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.directory, options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data_state: dict[str, Any]) -> None:
        """Save the state under its step, and the data iterator's state beside it."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(state=ocp.args.StandardSave(_fields(state)), data=ocp.args.JsonSave(data_state)),
        )

    def wait(self) -> None:
        """Return when everything saved is on disk."""
        self._manager.wait_until_finished()

    def restore(self, template: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restore the newest checkpoint.

        Args:
          template: from `abstract_state`.

        Returns:
          The state and the data iterator's state.

        Raises:
          FileNotFoundError: there is no checkpoint.
        """
        step = self.latest_step
        if step is None:
            raise FileNotFoundError(f"{self.directory} holds no checkpoint: train first, python train.py")
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(_fields(template)), data=ocp.args.JsonRestore()),
        )
        return TrainState(**restored["state"]), restored["data"]


def _fields(state: TrainState) -> dict[str, Any]:
    """The state by field, without those that are None, so that a checkpoint from before such a field restores."""
    return {name: value for name, value in vars(state).items() if value is not None}
