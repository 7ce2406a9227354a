"""The training loop: train, evaluate, checkpoint, and at the end fuse, verify and report."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tqdm.auto import tqdm

from repvgg_jax.data import ImageDataset, train_iterator
from repvgg_jax.terminal import printable
from repvgg_jax.training.config import TrainConfig
from repvgg_jax.training.distributed import is_primary, on_primary, wait_for_all
from repvgg_jax.training.optimizer import create_optimizer, learning_rate_schedule
from repvgg_jax.training.preemption import Interruption, interruptions
from repvgg_jax.training.run.checkpoints import Checkpoints, EpochMetrics
from repvgg_jax.training.run.comparison import Comparison
from repvgg_jax.training.run.data_record import DataRecord
from repvgg_jax.training.run.directory import finish, open_data, test_batches
from repvgg_jax.training.run.lock import only_run_in
from repvgg_jax.training.run.metrics_log import MetricsLog
from repvgg_jax.training.run.paths import run_directory
from repvgg_jax.training.run.plots import draw_confusion, draw_curves
from repvgg_jax.training.start.warm_start import require_same_network, start_from
from repvgg_jax.training.steps import (
    TrainState,
    abstract_batch,
    abstract_state,
    create_mesh,
    create_state,
    make_eval_step,
    make_train_step,
    require_divisible,
    shard_batch,
)

_SECONDS_BETWEEN_PICTURES = 5.0
# By steps, not by the clock, so that all processes find a loss that is not finite at the same one.
_STEPS_BETWEEN_CHECKS = 10
_FIRST_FILES = ("dataset.json", "config.json", ".lock")


class Result(NamedTuple):
    """What a finished run returns; the same lies in its directory."""

    workdir: Path
    state: TrainState
    comparison: Comparison
    history: list[dict[str, float]]


class TrainingDivergedError(RuntimeError):
    """The loss is not finite."""


def train_and_evaluate(config: TrainConfig, workdir: str | os.PathLike[str]) -> Result:
    """Train a RepVGG, fuse it, prove the two forms equal, and write a run directory.

    On all devices of all processes, where several have joined by `jax.distributed.initialize`; they must see one file
    system. Process 0 writes and prints. SIGTERM and Ctrl-C end the step, save a checkpoint, and then raise.

    Args:
      config: e.g. `dataclasses.replace(PRESETS["digits"], epochs=1)`.
      workdir: the run directory; made if it does not exist. An unfinished run of the same config in it is resumed
        from its newest checkpoint.

    Returns:
      The result.

    Raises:
      ValueError: the config does not fit the data, the devices or the run in `workdir`, or the two forms are not
        the same function.
      FileNotFoundError: the data are not there.
      TrainingDivergedError: the loss became infinite or NaN.
      TerminatedError, KeyboardInterrupt: a signal came while it trained; the run is saved.
    """
    workdir = run_directory(workdir)
    mesh = create_mesh()
    require_divisible(config, mesh, "batch_size", "eval_batch_size")
    config, dataset = open_data(config)
    steps_per_epoch = len(dataset.train) // config.batch_size
    if not steps_per_epoch:
        raise ValueError(
            f"batch_size is {config.batch_size}: expected at most {len(dataset.train)}, the images in the training "
            f"split of {config.dataset}"
        )
    require_same_network(config, dataset.channels)
    run = _Run(config, dataset, steps_per_epoch, mesh)
    with contextlib.ExitStack() as held:

        def claim() -> None:
            _claim(workdir, config, dataset)
            held.enter_context(only_run_in(workdir))

        on_primary(claim)
        with Checkpoints(workdir, keep=config.keep_checkpoints) as checkpoints:
            state, history = run.train(workdir, checkpoints)
        comparison = finish(workdir, config, dataset, run.model, state.eval_variables, mesh)
    return Result(workdir, state, comparison, history)


def _claim(workdir: Path, config: TrainConfig, dataset: ImageDataset) -> None:
    """Make the run directory, or see that the run in it has the same config and data."""
    path = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"{workdir} is a file: name a new directory")
    if workdir.is_symlink() and not workdir.exists():
        raise ValueError(f"{workdir} is a link to {os.readlink(workdir)}, which is not there: name a directory")
    if not path.exists():
        # A run that was killed while it made the directory leaves the first of these.
        if workdir.exists() and any(not entry.name.startswith(_FIRST_FILES) for entry in workdir.iterdir()):
            raise ValueError(f"{workdir} is not empty and holds no run: name a new directory")
        workdir.mkdir(parents=True, exist_ok=True)
        DataRecord.of(dataset).save(workdir)
        config.save(path)
        return
    DataRecord.of(dataset).require(workdir)
    earlier = dataclasses.asdict(TrainConfig.load(path))
    # Where the data lie is no part of the result.
    moved = {"data_dir"}
    if earlier["dataset"].startswith("folder:") and config.dataset.startswith("folder:"):
        moved.add("dataset")
    differing = [
        f"{name} was {earlier[name]}, is {value}"
        for name, value in dataclasses.asdict(config).items()
        if name not in moved and earlier[name] != value
    ]
    if differing:
        raise ValueError(f"{workdir} holds a run of another config ({'; '.join(differing)}): name a new directory")


class _Run:
    """The pieces of one run that do not change from step to step."""

    def __init__(self, config: TrainConfig, dataset: ImageDataset, steps_per_epoch: int, mesh: Mesh):
        self.config, self.dataset, self.steps_per_epoch, self.mesh = config, dataset, steps_per_epoch, mesh
        self.model = config.create_model(dataset.num_classes)
        self.optimizer = create_optimizer(config, steps_per_epoch)
        self.schedule = learning_rate_schedule(config, steps_per_epoch)
        self.eval_step = make_eval_step(self.model, config, mesh)
        self.saved_step: int | None = None

    def train(self, workdir: Path, checkpoints: Checkpoints) -> tuple[TrainState, list[dict[str, float]]]:
        """Train from the newest checkpoint, or from the start, to the last epoch."""
        config = self.config
        setting = (self.model, self.optimizer, config, self.dataset.channels, self.mesh)
        iterator = train_iterator(
            self.dataset.train,
            batch_size=config.batch_size // jax.process_count(),
            image_size=config.image_size,
            channels=self.dataset.channels,
            seed=config.seed,
            crop="random_resized" if config.random_resized_crop else "resize",
            shard=(jax.process_index(), jax.process_count()),
            num_workers=config.num_workers,
        )
        epoch_metrics: EpochMetrics = []
        if checkpoints.latest_step is None:
            state = create_state(*setting)
            if config.init_from is not None or config.whiten_stem or config.residual_scale is not None:
                beginning = iterator.get_state()
                variables = start_from(config, state.variables, lambda: shard_batch(next(iterator), self.mesh))
                iterator.set_state(beginning)
                # A copy: the training step donates its state, and must not be given one array twice.
                average = jax.tree.map(jnp.copy, variables) if state.ema is not None else None
                state = TrainState(state.step, **variables, opt_state=state.opt_state, ema=average)
        else:
            state, data_state, epoch_metrics, damaged = checkpoints.restore(abstract_state(*setting))
            wait_for_all("restored")
            checkpoints.set_aside(damaged)
            iterator.set_state(data_state)
            self.saved_step = int(state.step)
        # Compiled ahead, so that images/s measures training alone.
        start = time.perf_counter()
        shapes = (abstract_state(*setting), abstract_batch(config, self.dataset.channels, self.mesh))
        done = int(state.step) // self.steps_per_epoch
        # In the same order in every process: XLA's autotuning on GPUs waits for the others at each program.
        train_steps = {
            each: make_train_step(self.model, self.optimizer, each, self.mesh, steps_per_epoch=self.steps_per_epoch)
            .lower(*shapes)
            .compile()
            for each in dict.fromkeys(config.at_epoch(epoch) for epoch in range(done + 1, config.epochs + 1))
        }
        compile_seconds = time.perf_counter() - start
        total = config.epochs * self.steps_per_epoch
        self._introduce(workdir, int(state.step), compile_seconds)
        with (
            interruptions() as interruption,
            contextlib.closing(iterator),
            MetricsLog(workdir, resume_epoch=done, write=is_primary()) as log,
            tqdm(total=total, initial=int(state.step), unit="step", disable=_quiet(), dynamic_ncols=True) as bar,
        ):
            drawn = -math.inf
            for epoch in range(done + 1, config.epochs + 1):
                start = time.perf_counter()
                steps = self.steps_per_epoch - len(epoch_metrics)
                state, epoch_metrics = self._train_epoch(
                    train_steps[config.at_epoch(epoch)], state, iterator, epoch, bar, epoch_metrics, interruption
                )
                train_seconds = time.perf_counter() - start
                if len(epoch_metrics) < self.steps_per_epoch:
                    self._require_finite(float(optax.tree.norm(state.eval_variables)), f"step {state.step}")
                    checkpoints.save(state, iterator.get_state(), epoch_metrics=epoch_metrics)
                    checkpoints.wait()
                    raise interruption.exception(
                        f"stopped at step {state.step} of {total}, and saved: train with --workdir {workdir} and the "
                        "same settings to go on from there"
                    )
                train_metrics, epoch_metrics = _summarize(epoch_metrics), []
                self._require_finite(train_metrics["loss"], f"epoch {epoch}")
                test_metrics, labels, predictions = self._evaluate(state)
                # The last step's update is in no training loss yet, and must not reach a checkpoint broken.
                self._require_finite(test_metrics["loss"], f"the end of epoch {epoch}")
                line = {
                    "epoch": epoch,
                    "step": int(state.step),
                    "learning_rate": float(self.schedule(int(state.step) - 1)),
                    **{f"train/{name}": value for name, value in train_metrics.items()},
                    **{f"test/{name}": value for name, value in test_metrics.items()},
                    "images_per_second": steps * config.batch_size / train_seconds,
                    "seconds": time.perf_counter() - start,
                }
                log.write(line)
                if is_primary():
                    bar.write(_epoch_line(line, config.epochs))
                    # Not after each of many short epochs: drawing takes half a second.
                    if time.perf_counter() - drawn > _SECONDS_BETWEEN_PICTURES:
                        draw_curves(workdir / "curves.png", log.history)
                        draw_confusion(workdir / "confusion.png", labels, predictions, self.dataset.class_names)
                        drawn = time.perf_counter()
                if epoch % config.checkpoint_every == 0 or epoch == config.epochs:
                    checkpoints.save(state, iterator.get_state(), accuracy=test_metrics["accuracy"])
                    self.saved_step = int(state.step)
            checkpoints.wait()
        return state, log.history

    def _introduce(self, workdir: Path, step: int, compile_seconds: float) -> None:
        if not is_primary():
            return
        devices = f"{self.mesh.size} × {jax.devices()[0].device_kind}"
        if jax.process_count() > 1:
            devices += f" in {jax.process_count()} processes"
        epochs, steps = divmod(step, self.steps_per_epoch)
        resumed = f", resuming after epoch {epochs}" + f" and {steps} steps" * (steps > 0) if step else ""
        print(
            f"{self.config.variant} on {printable(self.config.dataset)}: {len(self.dataset.train):,} training and "
            f"{len(self.dataset.test):,} test images, {self.dataset.num_classes} classes, {self.config.epochs} epochs "
            f"of {self.steps_per_epoch} steps on {devices}{resumed}\n"
            f"peak learning rate {self.config.peak_learning_rate:.4g} at batch size {self.config.batch_size}\n"
            f"run directory: {printable(str(workdir))} (training step compiled in {compile_seconds:.1f} s)",
            flush=True,
        )

    def _train_epoch(
        self,
        train_step: jax.stages.Compiled,
        state: TrainState,
        iterator: Any,
        epoch: int,
        bar: tqdm,
        earlier: EpochMetrics,
        interruption: Interruption,
    ) -> tuple[TrainState, EpochMetrics]:
        """Train to the end of the epoch, or to the step at which the run is asked to stop.

        `earlier` are the metrics of the steps that an earlier process made of this epoch.
        """
        metrics: list[dict[str, jax.Array]] = []
        first = completed = checked = len(earlier)
        start = shown = time.perf_counter()
        for number in range(first + 1, self.steps_per_epoch + 1):
            if interruption.at_step((epoch - 1) * self.steps_per_epoch + number - 1):
                break
            state, step_metrics = train_step(state, shard_batch(next(iterator), self.mesh))
            metrics.append(step_metrics)
            # The host runs two steps ahead of the device: enough to keep it fed, and the bar tells the truth.
            done = number if number == self.steps_per_epoch else number - 2
            if done <= first:
                continue
            jax.block_until_ready(metrics[done - first - 1])
            bar.update(done - completed)
            completed = done
            check = done % _STEPS_BETWEEN_CHECKS == 0 or done == self.steps_per_epoch
            if check and not self.config.skip_nonfinite:
                losses = jax.device_get([step["loss"] for step in metrics[checked - first : done - first]])
                for step, loss in enumerate(losses, start=checked + 1):
                    self._require_finite(float(loss), f"epoch {epoch}, step {step}")
                checked = done
            now = time.perf_counter()
            if now - shown > 0.5 or done == self.steps_per_epoch:
                shown = now
                values = {name: float(value) for name, value in metrics[done - first - 1].items()}
                bar.set_postfix_str(
                    f"epoch {epoch}, loss {values['loss']:.3f}, accuracy {values['accuracy']:.3f}, "
                    f"{(done - first) * self.config.batch_size / (now - start):,.0f} images/s",
                    refresh=False,
                )
        made = [{name: float(value) for name, value in step.items()} for step in jax.device_get(metrics)]
        return state, earlier + made

    def _require_finite(self, loss: float, where: str) -> None:
        if not math.isfinite(loss):
            saved = "there is no checkpoint yet" if self.saved_step is None else f"step {self.saved_step} is saved"
            raise TrainingDivergedError(
                f"the loss is {loss} at {where}; {saved}. Lower learning_rate (={self.config.learning_rate}), raise "
                f"warmup_epochs (={self.config.warmup_epochs}), set grad_clip_norm, look for damaged images, or leave "
                "such steps out with skip_nonfinite"
            )

    def _evaluate(self, state: TrainState) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
        """Mean loss and accuracy on the test split, its labels, and what is predicted for them."""
        results = [
            self.eval_step(state.eval_variables, shard_batch(batch, self.mesh))
            for batch in test_batches(self.config, self.dataset)
        ]
        loss, correct, count = (sum(float(r[name]) for r in results) for name in ("loss", "correct", "count"))
        masks = [np.asarray(r["mask"]) for r in results]
        labels = [np.asarray(r["label"])[mask] for r, mask in zip(results, masks, strict=True)]
        predictions = [np.asarray(r["logits"]).argmax(-1)[mask] for r, mask in zip(results, masks, strict=True)]
        metrics = {"loss": loss / count, "accuracy": correct / count}
        return metrics, np.concatenate(labels), np.concatenate(predictions)


def _summarize(metrics: EpochMetrics) -> dict[str, float]:
    """The means over the steps of an epoch, without those left out, whose count is `skipped`."""
    kept = [step for step in metrics if not step.get("skipped")]
    names = [name for name in metrics[0] if name != "skipped"]
    # In float32, as the device gave them: the same to the last bit whether or not they were saved in between.
    means = {name: float(np.mean(np.array([step[name] for step in kept], np.float32))) for name in names if kept}
    if "skipped" in metrics[0]:
        means["skipped"] = float(len(metrics) - len(kept))
    return {"loss": math.nan, **means}


def _quiet() -> bool | None:
    """For tqdm: never on processes that do not print, otherwise where there is no terminal."""
    return None if is_primary() else True


def _epoch_line(line: dict[str, float], epochs: int) -> str:
    return (
        f"epoch {line['epoch']:>{len(str(epochs))}}/{epochs}  "
        f"train loss {line['train/loss']:.4f} accuracy {100 * line['train/accuracy']:.2f} %  "
        f"test loss {line['test/loss']:.4f} accuracy {100 * line['test/accuracy']:.2f} %  "
        f"{line['images_per_second']:,.0f} images/s"
    )
