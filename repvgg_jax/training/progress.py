"""What a run prints: its header, a bar while it trains, and a line for each epoch."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

import jax
from tqdm.auto import tqdm

from repvgg_jax.data import ImageDataset
from repvgg_jax.terminal import printable
from repvgg_jax.training.config import TrainConfig
from repvgg_jax.training.distributed import is_primary

_SECONDS_BETWEEN_REFRESHES = 0.5


def print_header(
    config: TrainConfig, dataset: ImageDataset, workdir: Path, *, done: int, steps_per_epoch: int, compiled_in: float
) -> None:
    """Say what is trained, on what, and where, on process 0.

    Args:
      config: The settings of the run.
      dataset: The data set of the run.
      workdir: The run directory.
      done: Number of steps that were made before.
      steps_per_epoch: Number of steps in an epoch.
      compiled_in: Seconds that compiling took.
    """
    if not is_primary():
        return
    devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    if jax.process_count() > 1:
        devices += f" in {jax.process_count()} processes"
    epochs, steps = divmod(done, steps_per_epoch)
    resumed = f", resuming after epoch {epochs}" if done else ""
    if steps:
        resumed += f" and {steps} steps"
    settings = config.optimization
    print(
        f"{config.network.description} on {printable(config.data.dataset)}: {len(dataset.train):,} training and "
        f"{len(dataset.test):,} test images, {dataset.num_classes} classes, {settings.epochs} epochs "
        f"of {steps_per_epoch} steps on {devices}{resumed}\n"
        f"peak learning rate {settings.peak_learning_rate:.4g} at batch size {settings.batch_size}\n"
        f"run directory: {printable(str(workdir))} (training step compiled in {compiled_in:.1f} s)",
        flush=True,
    )


class ProgressBar:
    """A bar over all steps of a run, on the process that prints, where there is a terminal."""

    def __init__(self, total: int, done: int, batch_size: int):
        quiet = None if is_primary() else True
        self._bar = tqdm(total=total, initial=done, unit="step", disable=quiet, dynamic_ncols=True)
        self._batch_size = batch_size

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def begin_epoch(self, epoch: int) -> None:
        """Count images per second from now."""
        self._epoch, self._steps = epoch, 0
        self._begun = self._shown = time.perf_counter()

    def show_step(self, metrics: dict[str, jax.Array], *, last: bool) -> None:
        """Move on by a step. Twice a second, and at the last step of the epoch, show its metrics."""
        self._steps += 1
        self._bar.update()
        now = time.perf_counter()
        if now - self._shown > _SECONDS_BETWEEN_REFRESHES or last:
            self._shown = now
            speed = self._steps * self._batch_size / (now - self._begun)
            self._bar.set_postfix_str(
                f"epoch {self._epoch}, loss {float(metrics['loss']):.3f}, accuracy {float(metrics['accuracy']):.3f}, "
                f"{speed:,.0f} images/s",
                refresh=False,
            )

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.write(line)


def epoch_line(line: dict[str, float], epochs: int) -> str:
    """Return the metrics of an epoch, as they are in the log, for a reader."""
    return (
        f"epoch {line['epoch']:>{len(str(epochs))}}/{epochs}  "
        f"train loss {line['train/loss']:.4f} accuracy {100 * line['train/accuracy']:.2f} %  "
        f"test loss {line['test/loss']:.4f} accuracy {100 * line['test/accuracy']:.2f} %  "
        f"{line['images_per_second']:,.0f} images/s"
    )
