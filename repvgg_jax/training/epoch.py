"""The steps of one epoch: made ahead of the device's results, watched, and summed up."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import jax
import numpy as np

from repvgg_jax.training.config import OptimizationConfig
from repvgg_jax.training.preemption import Interruption
from repvgg_jax.training.progress import ProgressBar
from repvgg_jax.training.run.checkpoints import EpochMetrics
from repvgg_jax.training.steps.state import TrainState

StepMetrics = dict[str, jax.Array]

# Enough to keep the device fed; what is shown is still true.
_STEPS_AHEAD = 2
# By steps, not by the clock, so that all processes find a loss that is not finite at the same one.
_STEPS_BETWEEN_CHECKS = 10


class TrainingDivergedError(RuntimeError):
    """The loss of a training is infinite or NaN."""


class Steps:
    """Makes the steps of an epoch while they are iterated over, to its end or until the run is to stop.

    The host runs two steps ahead of the device: the metrics of a step, computed, are yielded when two more steps have
    been made.

    Args:
      train_step: The compiled step of this epoch.
      state: State before the first step. It is donated.
      batches: Batches placed on the devices. One is taken for each step.
      numbers: Numbers of the steps to the end of the epoch, counted from 0 through the whole run.
      interruption: Asked before each step whether to stop.

    Attributes:
      state: State after the last step that was made.
    """

    def __init__(
        self,
        train_step: jax.stages.Compiled,
        state: TrainState,
        batches: Iterator[dict[str, jax.Array]],
        numbers: range,
        interruption: Interruption,
    ):
        self.state = state
        self.numbers = numbers
        self._train_step, self._batches, self._interruption = train_step, batches, interruption
        self._made: list[StepMetrics] = []

    def __iter__(self) -> Iterator[StepMetrics]:
        computing: deque[StepMetrics] = deque()
        for number in self.numbers:
            if self._interruption.at_step(number):
                return
            self.state, metrics = self._train_step(self.state, next(self._batches))
            self._made.append(metrics)
            computing.append(metrics)
            if len(computing) > _STEPS_AHEAD:
                yield jax.block_until_ready(computing.popleft())
        for metrics in computing:
            yield jax.block_until_ready(metrics)

    def metrics(self) -> EpochMetrics:
        """Return the metrics of all steps that were made, in order."""
        return [{name: float(value) for name, value in step.items()} for step in jax.device_get(self._made)]


class FiniteCheck:
    """Sees that the loss stays finite.

    Attributes:
      saved_step: Step of the newest checkpoint, or None; for the message.
    """

    def __init__(self, config: OptimizationConfig, saved_step: int | None = None):
        self.saved_step = saved_step
        self._config = config
        self._unchecked: list[jax.Array] = []

    def note(self, loss: jax.Array, epoch: int, step: int, *, last: bool) -> None:
        """Note the loss of a step, counted from 1. Every tenth time, and at the last, those noted are looked at.

        Raises:
          TrainingDivergedError: If one of them is not finite, unless such steps are left out.
        """
        if self._config.skip_nonfinite:
            return
        self._unchecked.append(loss)
        if step % _STEPS_BETWEEN_CHECKS == 0 or last:
            losses, self._unchecked = jax.device_get(self._unchecked), []
            for number, value in enumerate(losses, start=step + 1 - len(losses)):
                self.require(float(value), f"epoch {epoch}, step {number}")

    def require(self, loss: float, where: str) -> None:
        """Raise a TrainingDivergedError, with what can be done, if a loss is not finite."""
        if not math.isfinite(loss):
            saved = "there is no checkpoint yet" if self.saved_step is None else f"step {self.saved_step} is saved"
            raise TrainingDivergedError(
                f"the loss is {loss} at {where}; {saved}. Lower learning_rate (={self._config.learning_rate}), raise "
                f"warmup_epochs (={self._config.warmup_epochs}), set grad_clip_norm, look for damaged images, or leave "
                "such steps out with skip_nonfinite"
            )


def watch(steps: Steps, epoch: int, steps_per_epoch: int, check: FiniteCheck, bar: ProgressBar) -> None:
    """Make the steps of an epoch, while the check and the bar look at each.

    Raises:
      TrainingDivergedError: If a loss is not finite.
    """
    bar.begin_epoch(epoch)
    first = steps.numbers.start - (epoch - 1) * steps_per_epoch + 1
    for number, metrics in enumerate(steps, start=first):
        last = number == steps_per_epoch
        check.note(metrics["loss"], epoch, number, last=last)
        bar.show_step(metrics, last=last)


def summarize_epoch(metrics: EpochMetrics) -> dict[str, float]:
    """Return the means over the steps of an epoch, without those left out, whose count is `skipped`."""
    kept = [step for step in metrics if not step.get("skipped")]
    names = [name for name in metrics[0] if name != "skipped"]
    # In float32, as the device gave them: the same to the last bit whether or not they were saved in between.
    means = {name: float(np.mean(np.array([step[name] for step in kept], np.float32))) for name in names if kept}
    if "skipped" in metrics[0]:
        means["skipped"] = float(len(metrics) - len(kept))
    return {"loss": math.nan, **means}


def epoch_record(
    epoch: int,
    step: int,
    learning_rate: float,
    train: dict[str, float],
    test: dict[str, float],
    images_per_second: float,
    seconds: float,
) -> dict[str, float]:
    """Return what the log says of an epoch.

    The learning rate is that of its last step, and the seconds include evaluation.
    """
    return {
        "epoch": epoch,
        "step": step,
        "learning_rate": learning_rate,
        **{f"train/{name}": value for name, value in train.items()},
        **{f"test/{name}": value for name, value in test.items()},
        "images_per_second": images_per_second,
        "seconds": seconds,
    }
