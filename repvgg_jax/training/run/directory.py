"""A run on disk: its data, its training form, and how it is fused."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from safetensors import SafetensorError

from repvgg_jax.data import ImageDataset, eval_batches, load_dataset, measure_normalization
from repvgg_jax.files import require_writable
from repvgg_jax.interop.exportable import OPSET
from repvgg_jax.interop.safetensors import save_deploy
from repvgg_jax.invocation import command
from repvgg_jax.models import RepVGG
from repvgg_jax.training.config import DataConfig, TrainConfig
from repvgg_jax.training.distributed import is_primary
from repvgg_jax.training.export.formats import describe, export_deploy
from repvgg_jax.training.export.int8 import DEFAULT_INT8, Int8Settings, describe_int8, export_int8
from repvgg_jax.training.export.int8_images import Int8Images, draw_images
from repvgg_jax.training.export.requirements import Format, require_export
from repvgg_jax.training.run.comparison import Comparison, fuse_and_compare
from repvgg_jax.training.run.data_record import DataRecord, TrainingData
from repvgg_jax.training.run.metrics_log import read_metrics
from repvgg_jax.training.run.paths import run_directory
from repvgg_jax.training.run.report import add_int8, write_report
from repvgg_jax.training.run.restore import restore
from repvgg_jax.training.start.warm_start import find_origin
from repvgg_jax.training.steps.mesh import create_mesh, require_divisible


class DataMissingError(FileNotFoundError):
    """The run is whole, but the images that it was trained on are not at hand."""


def open_data(config: TrainConfig) -> TrainingData:
    """Open a config's data set, and find how its images are normalised.

    The config says so, or else the run to start from. Otherwise mean and standard deviation of the training split are
    measured.

    Raises:
      ValueError: If the data set cannot be used, or `mean` does not fit its channels.
      FileNotFoundError: If the data set is not there.
    """
    dataset = _open_dataset(config)
    normalization = config.data.normalization
    if normalization is None and config.start.init_from is not None:
        normalization = find_origin(config.start).normalization
    if normalization is None:
        size = config.data.image_size
        normalization = measure_normalization(dataset.train, image_size=size, channels=dataset.channels)
    mean, std = normalization
    if not len(mean) == len(std) == dataset.channels:
        raise ValueError(
            f"mean is {mean} and std {std}: expected {dataset.channels} values each, one for each "
            f"channel of {config.data.dataset}"
        )
    return TrainingData(dataset, normalization)


def _open_dataset(config: TrainConfig) -> ImageDataset:
    dataset = load_dataset(config.data.dataset, data_dir=config.data.data_dir, seed=config.seed)
    if dataset.left_out and is_primary():
        print(dataset.left_out, file=sys.stderr, flush=True)
    return dataset


def evaluation_batches(config: DataConfig, dataset: ImageDataset) -> Any:
    """Return a fresh pass over this process's share of the test split."""
    return eval_batches(
        dataset.test,
        batch_size=config.eval_batch_size // jax.process_count(),
        image_size=config.evaluation_size,
        channels=dataset.channels,
        eval_resize=config.eval_resize,
        shard=(jax.process_index(), jax.process_count()),
    )


def finish(
    workdir: Path,
    config: TrainConfig,
    data: TrainingData,
    model: RepVGG,
    variables: dict[str, Any],
    mesh: Mesh,
    *,
    check_only: bool = False,
) -> Comparison:
    """Fuse a trained network, compare its two forms, print the table; write `deploy.safetensors` and the report.

    Args:
      workdir: The run directory.
      config: The settings of the run.
      data: The data of the run.
      model: The network in its training form.
      variables: Its variables.
      mesh: The mesh of the run.
      check_only: Whether to write nothing.

    Returns:
      The comparison.

    Raises:
      EquivalenceError: If the forms are not the same function, or that is not proven. Nothing is written then.
      OSError: If the weights or the report could not be written. What is whole is named.
    """
    dataset, normalization = data
    deploy_model, deploy_variables, comparison = fuse_and_compare(
        model, variables, lambda: evaluation_batches(config.data, dataset), normalization, mesh
    )
    if is_primary():
        print(comparison.table(), flush=True)
    comparison.check()
    if check_only or not is_primary():
        return comparison
    preprocess = config.data.preprocess(normalization, dataset.class_names)
    weights = workdir / "deploy.safetensors"
    remedy = f"make room or give permission, and run: {command('fuse')} {workdir}"
    try:
        save_deploy(weights, config.network.variant, deploy_model, deploy_variables, preprocess)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{weights} could not be written: {error}. The checkpoints are whole: {remedy}") from error
    try:
        write_report(workdir, config, read_metrics(workdir), comparison, normalization, dataset.class_names)
    except OSError as error:
        raise OSError(f"report.md could not be written: {error}. {weights} is whole: {remedy}") from error
    return comparison


def fuse_run(
    workdir: Path,
    *,
    data_dir: str | None = None,
    check_only: bool = False,
    export: Sequence[Format] = (),
    with_preprocess: bool = False,
    opset: int = OPSET,
    int8: Int8Settings = DEFAULT_INT8,
) -> Comparison:
    """Fuse the newest checkpoint of a run, verify it on the test split, and write `deploy.safetensors` and the report.

    The table that compares the two forms is printed. The deploy form is also exported, where that is asked for.

    Args:
      workdir: The run directory.
      data_dir: Where the data set lies now, if it has moved. For a run on `folder:PATH`, it is the new PATH.
      check_only: Whether to verify without writing.
      export: Formats to write the deploy form in besides `deploy.safetensors`: "onnx", "stablehlo", "onnx-int8". Each
        file is proven on the test split.
      with_preprocess: Whether the exported files take uint8 pixels and return probabilities, instead of normalised
        images and logits.
      opset: Version of the operators of the ONNX files.
      int8: How the network becomes one of 8 bits. Images of the training split calibrate it.

    Returns:
      The comparison of the two forms.

    Raises:
      DataMissingError: If the data set is not at hand.
      FileNotFoundError: If the directory is not a run, or holds no checkpoint.
      EquivalenceError: If the two forms are not the same function, or an exported file computes something else.
      AccuracyLostError: If 8 bits lose more accuracy than is allowed.
      ValueError: If the run cannot be read, the data are not those of the run, or arguments do not go together.
      ImportError: If the extra of a format is not installed.
      OSError: If a file cannot be written. What is whole is named.
    """
    workdir = run_directory(workdir)
    if not (workdir / "config.json").is_file():
        raise FileNotFoundError(f"{workdir} holds no config.json: expected a run directory of {command('train')}")
    config = TrainConfig.load(workdir / "config.json")
    if data_dir is not None and config.data.dataset.startswith("folder:"):
        config = config.replace(dataset=f"folder:{data_dir}")
    elif data_dir is not None:
        config = config.replace(data_dir=data_dir)
    if not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(f"{workdir / 'checkpoints'} does not exist: train first, {command('train')}")
    weights = workdir / "deploy.safetensors"
    if not check_only:
        # What would stop the end is told before the work.
        require_writable(weights)
        read_metrics(workdir)
    require_export(weights, export, check_only=check_only, with_preprocess=with_preprocess, opset=opset)
    mesh = create_mesh()
    require_divisible(config, mesh, "eval_batch_size")
    try:
        dataset = _open_dataset(config)
    except OSError as error:
        raise DataMissingError(f"the data set of {workdir} is not at hand: {error}") from error
    data = TrainingData(dataset, DataRecord.load(workdir).normalization)
    DataRecord.of(data).require(workdir)
    model, state = restore(workdir, mesh)
    comparison = finish(workdir, config, data, model, state.eval_variables, mesh, check_only=check_only)
    if not export:
        return comparison
    batches = partial(evaluation_batches, config.data, dataset)
    written = export_deploy(weights, export, batches, with_preprocess=with_preprocess, opset=opset)
    if written:
        print(describe(written))
    if "onnx-int8" in export:
        preprocess = config.data.preprocess(data.normalization, dataset.class_names)
        calibration = draw_images(dataset.train, preprocess, int8.calibrate)
        images = Int8Images(calibration, batches, labelled=True)
        ranges = state.eval_variables.get("ranges")
        if ranges is not None and int8.weight_bits == "auto":
            int8 = dataclasses.replace(int8, weight_bits="7" if config.optimization.weight_bits == 7 else "8")
        proof = export_int8(weights, images, int8, with_preprocess=with_preprocess, opset=opset, ranges=ranges)
        print(f"\n{describe_int8(weights, proof)}")
        add_int8(workdir, proof)
    return comparison
