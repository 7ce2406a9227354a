"""Checkpoints of a run, written by Orbax: the train state, and the position in the data and in the epoch."""

from __future__ import annotations

import contextlib
import json
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN, PreservationPolicy

from repvgg_jax.invocation import command
from repvgg_jax.models.shapes import differences, few, shapes_by_name
from repvgg_jax.terminal import one_line
from repvgg_jax.training.distributed import is_primary, wait_for_all
from repvgg_jax.training.run.paths import plain_path
from repvgg_jax.training.steps.state import TrainState

EpochMetrics = list[dict[str, float]]


class Restored(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      state: The train state.
      data_state: State of the data iterator.
      epoch_metrics: Metrics of the steps of the unfinished epoch, in order; empty after a whole one.
      damaged: Steps of newer checkpoints that could not be read.
    """

    state: TrainState
    data_state: dict[str, Any]
    epoch_metrics: EpochMetrics
    damaged: list[int]


class _MostAccurate(PreservationPolicy):
    """Preserves the checkpoint of the best accuracy, the newest of equals.

    Not Orbax's `BestN`: the file of metrics it would keep in each checkpoint is read before damage can be passed over.
    """

    def __init__(self, accuracies: dict[int, float | None]):
        self._accuracies = accuracies

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [each.step for each in checkpoints]
        known = [(self._accuracies[step], step) for step in steps if self._accuracies.get(step) is not None]
        _, best = max(known, default=(None, None))
        return [step == best for step in steps]


class Checkpoints:
    """The checkpoints of one run directory, `checkpoints/STEP/`. Writing goes on in the background.

    Orbax writes into a temporary directory and renames it when it is whole. A process killed meanwhile leaves the
    earlier checkpoints as they were.

    Args:
      workdir: The run directory.
      keep: Number of newest checkpoints to keep, besides the one of the best test accuracy. None keeps all.
    """

    def __init__(self, workdir: Path, keep: int | None = None):
        self.directory = workdir.absolute() / "checkpoints"
        self._accuracies: dict[int, float | None] = {}
        kept = None if keep is None else AnyPreservationPolicy([LatestN(n=keep), _MostAccurate(self._accuracies)])
        with contextlib.ExitStack() as opened:
            self._shown = opened.enter_context(plain_path(self.directory))
            self._manager = ocp.CheckpointManager(
                self._shown, options=ocp.CheckpointManagerOptions(preservation_policy=kept, create=True)
            )
            if keep is not None:
                self._accuracies.update({step: self._accuracy(step) for step in self._manager.all_steps()})
            self._opened = opened.pop_all()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What failed to be written before fails again here, and must not hide why the run ends.
        with self._opened, contextlib.suppress(Exception) if kind else self._writing():
            self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def save(
        self,
        state: TrainState,
        data_state: dict[str, Any],
        *,
        epoch_metrics: EpochMetrics | None = None,
        accuracy: float | None = None,
    ) -> None:
        """Save the state under its step.

        Args:
          state: The train state.
          data_state: State of the data iterator.
          epoch_metrics: Metrics of the steps of the epoch so far, where it is not over.
          accuracy: Accuracy on the test split. The checkpoint where it is highest is kept.

        Raises:
          OSError: If this or the last checkpoint could not be written.
        """
        fields = _fields(state)
        progress = {"epoch_metrics": epoch_metrics or [], "accuracy": accuracy}
        checksum = _checksum(fields, data_state, progress)
        self._accuracies[int(state.step)] = accuracy
        with self._writing():
            self._manager.save(
                int(state.step),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(fields),
                    data=ocp.args.JsonSave(data_state),
                    progress=ocp.args.JsonSave({**progress, "checksum": checksum}),
                ),
            )

    def wait(self) -> None:
        """Return when everything saved is on disk.

        Raises:
          OSError: If it could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise nearly anything
            raise OSError(
                f"a checkpoint could not be written in {self.directory}: {self._said(error)}. Those before it are "
                "whole: make room or give permission, and run the same command again"
            ) from error

    def restore(self, template: TrainState) -> Restored:
        """Restore the newest checkpoint that is whole, and warn of newer ones that are not.

        Args:
          template: The state from `abstract_state`.

        Returns:
          What the checkpoint holds.

        Raises:
          FileNotFoundError: If there is no checkpoint.
          ValueError: If none can be read, or they are of another network or optimizer than the template. The first
            arrays that differ are named.
        """
        failures: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            self._require_same_network(step, template)
            try:
                state, data_state, epoch_metrics = self._read(step, template)
            except Exception as error:  # Orbax and TensorStore raise nearly anything for a damaged file
                failures[step] = error
                continue
            for damaged, failure in failures.items():
                warnings.warn(
                    one_line(
                        f"checkpoint {self.directory / str(damaged)} is damaged and passed over for that of step "
                        f"{step}: {self._said(failure)}"
                    ),
                    stacklevel=2,
                )
            return Restored(state, data_state, epoch_metrics, list(failures))
        if not failures:
            raise FileNotFoundError(f"{self.directory} holds no checkpoint: train first, {command('train')}")
        newest, failure = next(iter(failures.items()))
        raise ValueError(
            f"none of the checkpoints in {self.directory} can be read (step {newest}: {self._said(failure)}): restore "
            "them from a copy, or train anew in another directory"
        ) from failure

    def set_aside(self, steps: list[int]) -> None:
        """Move damaged checkpoints to `damaged_checkpoints/`, where training does not stumble over them."""
        for step in steps if is_primary() else []:
            target = self.directory.parent / "damaged_checkpoints" / str(step)
            target.parent.mkdir(exist_ok=True)
            while target.exists():
                target = target.with_name(f"{target.name}_")
            (self.directory / str(step)).rename(target)
        if steps:
            wait_for_all("damaged checkpoints set aside")
            self._manager.reload()

    def _read(self, step: int, template: TrainState) -> tuple[TrainState, dict[str, Any], EpochMetrics]:
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(_fields(template)),
            data=ocp.args.JsonRestore(),
            progress=ocp.args.JsonRestore(),
        )
        restored = self._manager.restore(step, args=items)
        progress = restored["progress"]
        expected = progress.pop("checksum")
        found = _checksum(restored["state"], restored["data"], progress)
        if found != expected:
            raise ValueError(f"the checksum of what it holds is {found}, expected {expected}")
        return TrainState(**restored["state"]), restored["data"], progress["epoch_metrics"]

    def _accuracy(self, step: int) -> float | None:
        """Return the accuracy that a checkpoint was saved with; None where there was none or it cannot be read."""
        try:
            items = ocp.args.Composite(progress=ocp.args.JsonRestore())
            return float(self._manager.restore(step, args=items)["progress"]["accuracy"])
        except Exception:  # damage is told where it is restored
            return None

    def _require_same_network(self, step: int, template: TrainState) -> None:
        """Raise a ValueError where a checkpoint tells readably that it holds other arrays than the template."""
        try:
            found = shapes_by_name(ocp.PyTreeCheckpointHandler().metadata(self._shown / str(step) / "state").tree)
        except Exception:  # it is damaged, and that is told as for any other
            return
        differing = differences(found, shapes_by_name(_fields(template)))
        if differing:
            raise ValueError(
                f"{self.directory.parent / 'config.json'} and checkpoint {step} beside it do not belong together "
                f"({few(differing)}): put back the config or the checkpoints of this run"
            )

    def _said(self, error: Exception) -> str:
        """Return the first line of an error, with the directory by its own name."""
        text = (str(error).strip() or type(error).__name__).splitlines()[0].partition(" [tensorstore_spec=")[0]
        text = text.replace(str(self._shown), str(self.directory))
        return text if len(text) <= 240 else f"{text[:100]} … {text[-130:]}"


def _fields(state: TrainState) -> dict[str, Any]:
    """Return the state by field, without those that are None: a checkpoint from before such a field restores."""
    return {name: value for name, value in vars(state).items() if value is not None}


def _checksum(fields: dict[str, Any], data_state: dict[str, Any], progress: dict[str, Any]) -> int:
    value = zlib.crc32(json.dumps([data_state, progress], sort_keys=True).encode())
    for leaf in jax.tree.leaves(fields):
        array = np.ascontiguousarray(jax.device_get(leaf)).reshape(-1)
        value = zlib.crc32(array.view(np.uint8).data, value)
    return value
