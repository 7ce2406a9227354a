"""The training loop: train, evaluate, checkpoint, and at the end fuse, verify and report."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from repvgg_jax.data import ImageDataset, train_iterator
from repvgg_jax.models import RepVGG
from repvgg_jax.ops import compiler_options
from repvgg_jax.preprocess import Normalization, normalize
from repvgg_jax.training.config import StartConfig, TrainConfig
from repvgg_jax.training.distributed import is_primary, on_primary, wait_for_all
from repvgg_jax.training.epoch import FiniteCheck, Steps, epoch_record, summarize_epoch, watch
from repvgg_jax.training.evaluation import evaluate
from repvgg_jax.training.preemption import Interruption, interruptions
from repvgg_jax.training.progress import ProgressBar, epoch_line, print_header
from repvgg_jax.training.run.checkpoints import Checkpoints, EpochMetrics
from repvgg_jax.training.run.claim import claim, only_run_in
from repvgg_jax.training.run.comparison import Comparison
from repvgg_jax.training.run.data_record import DataRecord, TrainingData
from repvgg_jax.training.run.directory import evaluation_batches, finish, open_data
from repvgg_jax.training.run.metrics_log import MetricsLog
from repvgg_jax.training.run.paths import run_directory
from repvgg_jax.training.run.plots import Pictures
from repvgg_jax.training.start.warm_start import require_same_network, start_from
from repvgg_jax.training.steps.eval_step import make_eval_step
from repvgg_jax.training.steps.mesh import abstract_batch, create_mesh, require_divisible, shard_batch
from repvgg_jax.training.steps.optimizer import create_optimizer, learning_rate_schedule
from repvgg_jax.training.steps.quantize_aware import first_ranges
from repvgg_jax.training.steps.state import TrainState, abstract_state, create_state
from repvgg_jax.training.steps.train_step import make_train_step


class Result(NamedTuple):
    """What a finished run returns. The same lies in its directory.

    Attributes:
      workdir: The run directory.
      state: The train state after the last step. `state.eval_variables` is what was evaluated and fused.
      comparison: The training form beside the deploy form, on the whole test split.
      history: The metrics of each epoch, as in `metrics.jsonl`.
    """

    workdir: Path
    state: TrainState
    comparison: Comparison
    history: list[dict[str, float]]


class Setting(NamedTuple):
    """What a train state is made of, and where it lies."""

    model: RepVGG
    optimizer: optax.GradientTransformation
    config: TrainConfig
    channels: int
    mesh: Mesh


def train_and_evaluate(config: TrainConfig, workdir: str | os.PathLike[str]) -> Result:
    """Train a RepVGG, fuse it, prove that the two forms are the same function, and write a run directory.

    The run takes all devices of all processes. Several processes join by `jax.distributed.initialize` first, and must
    see one file system; process 0 writes and prints. SIGTERM or Ctrl-C lets the step end and a checkpoint be saved
    before an error is raised. Among several processes, Ctrl-C stops at once.

    Args:
      config: The settings, e.g. `PRESETS["digits"].replace(epochs=1)`.
      workdir: The run directory, which is made if it does not exist. An unfinished run of the same config in it is
        resumed from its newest checkpoint.

    Returns:
      The result.

    Raises:
      ValueError: If the config does not fit the data, the devices or the run in `workdir`.
      EquivalenceError: If the two forms are not the same function, or that is not proven. It is a ValueError.
      FileNotFoundError: If the data, or the run to start from, are not there.
      OSError: If a file cannot be written. What is whole is named.
      TrainingDivergedError: If the loss became infinite or NaN.
      TerminatedError: If SIGTERM came while it trained. The run is saved.
      KeyboardInterrupt: If Ctrl-C came while it trained. The run is saved.
    """
    workdir = run_directory(workdir)
    mesh = create_mesh()
    require_divisible(config, mesh, "batch_size", "eval_batch_size")
    data = open_data(config)
    dataset = data.dataset
    if len(dataset.train) < config.optimization.batch_size:
        raise ValueError(
            f"batch_size is {config.optimization.batch_size}: expected at most {len(dataset.train)}, the images in the "
            f"training split of {config.data.dataset}"
        )
    require_same_network(config, dataset.channels)
    with contextlib.ExitStack() as held:
        on_primary(partial(_take, workdir, config, DataRecord.of(data), held))
        with Checkpoints(workdir, keep=config.checkpoints.keep_checkpoints) as checkpoints:
            model, state, history = train(config, data, mesh, workdir, checkpoints)
        comparison = finish(workdir, config, data, model, state.eval_variables, mesh)
    return Result(workdir, state, comparison, history)


def _take(workdir: Path, config: TrainConfig, record: DataRecord, held: contextlib.ExitStack) -> None:
    claim(workdir, config, record)
    held.enter_context(only_run_in(workdir))


def train(
    config: TrainConfig, data: TrainingData, mesh: Mesh, workdir: Path, checkpoints: Checkpoints
) -> tuple[RepVGG, TrainState, list[dict[str, float]]]:
    """Train from the newest checkpoint, or from the start, to the last epoch.

    Returns:
      The model in its training form, the train state, and a line of metrics for each epoch.
    """
    # Network, optimizer, data.
    dataset, normalization = data
    total_epochs, batch_size = config.optimization.epochs, config.optimization.batch_size
    steps_per_epoch = len(dataset.train) // batch_size
    setting = _setting(config, dataset, mesh, steps_per_epoch)
    iterator = _training_batches(config, dataset)
    batches = (shard_batch(batch, mesh) for batch in iterator)

    # Begin, or go on from the newest checkpoint.
    state, earlier = _begin_or_restore(setting, normalization, iterator, checkpoints)
    done = int(state.step)
    check = FiniteCheck(config.optimization, saved_step=checkpoints.latest_step)
    epochs = range(done // steps_per_epoch + 1, total_epochs + 1)

    # Compile, so that images/s measures training alone.
    start = time.perf_counter()
    train_steps = _compile(setting, normalization, epochs, steps_per_epoch)
    reduced = config.optimization.weight_bits == 7
    eval_step = make_eval_step(setting.model, normalization, mesh, reduce_range=reduced)
    seconds = time.perf_counter() - start
    print_header(config, dataset, workdir, done=done, steps_per_epoch=steps_per_epoch, compiled_in=seconds)

    # Epochs.
    schedule = learning_rate_schedule(config.optimization, steps_per_epoch)
    pictures = Pictures(workdir, dataset.class_names)
    with (
        interruptions() as interruption,
        contextlib.closing(iterator),
        MetricsLog(workdir, resume_epoch=epochs.start - 1, write=is_primary()) as log,
        ProgressBar(total_epochs * steps_per_epoch, done, batch_size) as bar,
    ):
        for epoch in epochs:
            start = time.perf_counter()
            numbers = range((epoch - 1) * steps_per_epoch + len(earlier), epoch * steps_per_epoch)
            steps = Steps(train_steps[config.at_epoch(epoch)], state, batches, numbers, interruption)
            watch(steps, epoch, steps_per_epoch, check, bar)
            state, epoch_metrics = steps.state, earlier + steps.metrics()
            train_seconds = time.perf_counter() - start
            if len(epoch_metrics) < steps_per_epoch:
                _save_unfinished(state, iterator, epoch_metrics, check, checkpoints)
                raise _stopped(interruption, state, total_epochs * steps_per_epoch, workdir)
            images_per_second = len(numbers) * batch_size / train_seconds
            earlier, summary = [], summarize_epoch(epoch_metrics)
            check.require(summary["loss"], f"epoch {epoch}")
            test = evaluate(eval_step, state.eval_variables, evaluation_batches(config.data, dataset), mesh)
            # The last step's update is in no training loss yet, and must not reach a checkpoint broken.
            check.require(test.metrics["loss"], f"the end of epoch {epoch}")
            rate, seconds = float(schedule(int(state.step) - 1)), time.perf_counter() - start
            log.write(epoch_record(epoch, int(state.step), rate, summary, test.metrics, images_per_second, seconds))
            if is_primary():
                bar.write(epoch_line(log.history[-1], total_epochs))
                pictures.draw(log.history, test.labels, test.predictions)
            if epoch % config.checkpoints.checkpoint_every == 0 or epoch == total_epochs:
                checkpoints.save(state, iterator.get_state(), accuracy=test.metrics["accuracy"])
                check.saved_step = int(state.step)
        checkpoints.wait()
    return setting.model, state, log.history


def _setting(config: TrainConfig, dataset: ImageDataset, mesh: Mesh, steps_per_epoch: int) -> Setting:
    model = config.network.create_model(dataset.num_classes)
    optimizer = create_optimizer(config.optimization, steps_per_epoch, frozen=config.network.frozen)
    return Setting(model, optimizer, config, dataset.channels, mesh)


def _training_batches(config: TrainConfig, dataset: ImageDataset) -> Any:
    """Return this process's share of an endless stream of batches."""
    return train_iterator(
        dataset.train,
        batch_size=config.optimization.batch_size // jax.process_count(),
        image_size=config.data.image_size,
        channels=dataset.channels,
        seed=config.seed,
        crop="random_resized" if config.data.random_resized_crop else "resize",
        shard=(jax.process_index(), jax.process_count()),
        num_workers=config.data.num_workers,
    )


def _begin_or_restore(
    setting: Setting, normalization: Normalization, iterator: Any, checkpoints: Checkpoints
) -> tuple[TrainState, EpochMetrics]:
    """Return the state to train from, and the metrics of the steps that an earlier process made of its epoch."""
    if checkpoints.latest_step is None:
        return _begin(setting, normalization, iterator), []
    state, data_state, epoch_metrics, damaged = checkpoints.restore(abstract_state(*setting))
    wait_for_all("restored")
    checkpoints.set_aside(damaged)
    iterator.set_state(data_state)
    return state, epoch_metrics


def _begin(setting: Setting, normalization: Normalization, iterator: Any) -> TrainState:
    """Return a state to begin with, changed as the config says. The stream of batches stays at its beginning."""
    config, state = setting.config, create_state(*setting)
    if config.start == StartConfig():
        return state
    beginning = iterator.get_state()
    batch = partial(_next_batch, iterator, setting.mesh)
    state = dataclasses.replace(state, **start_from(config, normalization, state.variables, batch))
    if state.ranges is not None:
        ranges = _first_ranges(setting, normalization, state.variables, batch()["image"])
        state = dataclasses.replace(state, ranges=ranges)
    iterator.set_state(beginning)
    # A copy: the training step donates its state, and must not be given one array twice.
    return state if state.ema is None else dataclasses.replace(state, ema=jax.tree.map(jnp.copy, state.variables))


def _next_batch(iterator: Any, mesh: Mesh) -> dict[str, jax.Array]:
    return shard_batch(next(iterator), mesh)


def _first_ranges(setting: Setting, normalization: Normalization, variables: Any, images: jax.Array) -> Any:
    replicated = jax.tree.leaves(variables)[0].sharding

    @partial(jax.jit, out_shardings=replicated, compiler_options=compiler_options())
    def measure(variables: Any, images: jax.Array) -> Any:
        return first_ranges(setting.model, variables, normalize(images, *normalization))

    return measure(variables, images)


def _compile(
    setting: Setting, normalization: Normalization, epochs: Iterable[int], steps_per_epoch: int
) -> dict[TrainConfig, jax.stages.Compiled]:
    """Compile the training step for each of the settings that these epochs have."""
    model, optimizer, config, channels, mesh = setting
    shapes = (abstract_state(*setting), abstract_batch(config, channels, mesh))
    # In the same order in every process: XLA's autotuning on GPUs waits for the others at each program.
    return {
        each: make_train_step(model, optimizer, each, normalization, mesh, steps_per_epoch=steps_per_epoch)
        .lower(*shapes)
        .compile()
        for each in dict.fromkeys(map(config.at_epoch, epochs))
    }


def _save_unfinished(
    state: TrainState, iterator: Any, epoch_metrics: EpochMetrics, check: FiniteCheck, checkpoints: Checkpoints
) -> None:
    """Save a run within an epoch, unless the last update broke its network."""
    check.require(float(optax.tree.norm(state.eval_variables)), f"step {state.step}")
    checkpoints.save(state, iterator.get_state(), epoch_metrics=epoch_metrics)
    checkpoints.wait()


def _stopped(interruption: Interruption, state: TrainState, total: int, workdir: Path) -> BaseException:
    return interruption.exception(
        f"stopped at step {state.step} of {total}, and saved: train with --workdir {workdir} and the same settings to "
        "go on from there"
    )
