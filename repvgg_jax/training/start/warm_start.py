"""The start of a training: fresh variables made quicker to train, an earlier run, or a deploy form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Sharding

from repvgg_jax.interop.safetensors import load_deploy
from repvgg_jax.invocation import command
from repvgg_jax.models import RepVGG, reopen_model
from repvgg_jax.models.repvgg import BlockKind
from repvgg_jax.models.shapes import abstract_variables, differences, few, shapes_by_name
from repvgg_jax.ops import compiler_options
from repvgg_jax.preprocess import Normalization, normalize
from repvgg_jax.training.config import StartConfig, TrainConfig
from repvgg_jax.training.run.data_record import DataRecord
from repvgg_jax.training.run.paths import run_directory
from repvgg_jax.training.run.restore import restore
from repvgg_jax.training.start.near_identity import residual_start
from repvgg_jax.training.start.whitening import whiten_stem
from repvgg_jax.training.steps.mesh import create_mesh


class Origin(NamedTuple):
    """What a run starts from: a network in its training form, and how the images it was trained on are normalised."""

    model: RepVGG
    normalization: Normalization


def find_origin(config: StartConfig, *, block: BlockKind = "repvgg") -> Origin:
    """Look at what `init_from` names.

    Args:
      config: The settings of the start.
      block: The block that a deploy form, which has none, is reopened with.

    Returns:
      The network, and its normalisation.

    Raises:
      ValueError: If it is a file of the deploy form, which cannot be trained on, and `reopen` is not given, or if the
        file is damaged.
      FileNotFoundError: If it is no run directory, or no file.
    """
    path = run_directory(str(config.init_from))
    if config.reopen:
        model, _, preprocess, _ = load_deploy(path)
        return Origin(model.clone(deploy=False, block=block), Normalization(preprocess.mean, preprocess.std))
    if path.suffix == ".safetensors":
        raise ValueError(
            f"init_from is {path}, a deploy form: its branches are folded into one kernel each, and what training "
            "needs of them is gone; expected the run directory it was made in, which holds the training form. reopen "
            "starts from the file all the same, with branches and batch norms that are new"
        )
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"init_from is {path}: expected a run directory of {command('train')}, with a config.json"
        )
    earlier, record = TrainConfig.load(path / "config.json"), DataRecord.load(path)
    return Origin(earlier.network.create_model(len(record.class_names)), record.normalization)


def require_same_network(config: TrainConfig, channels: int) -> None:
    """Check that what `init_from` names, if anything, is the network of a config, whatever the classes.

    Args:
      config: The settings of the new run.
      channels: Number of channels of its images.

    Raises:
      ValueError: If the networks differ, or there is nothing to start from. The first arrays that differ are named.
      FileNotFoundError: If there is no such run.
    """
    if config.start.init_from is None:
        return
    origin = find_origin(config.start, block=config.network.block)
    differing = differences(
        _shapes(origin.model, origin.normalization.channels),
        _shapes(config.network.create_model(num_classes=1), channels),
    )
    if differing:
        raise ValueError(
            f"the network of {config.start.init_from} is another one ({few(differing)}): give variant, block, "
            "depths and width_multiplier of that run, and images of as many channels"
        )


def start_from(
    config: TrainConfig,
    normalization: Normalization,
    variables: dict[str, Any],
    batch: Callable[[], dict[str, jax.Array]],
) -> dict[str, Any]:
    """Change freshly initialised variables as the config says, or replace them by those that `init_from` names.

    What a run evaluates is taken from it: the moving average where it has one. Heads of another number of classes stay
    as they were initialised.

    Args:
      config: The settings of the new run.
      normalization: The normalisation of its images.
      variables: `{'params', 'batch_stats', …}` of the training form, replicated over devices. Other collections stay.
      batch: Returns a batch of training images, to whiten the stem or to reopen a deploy form with.

    Returns:
      Variables of the same shapes, dtypes and shardings.

    Raises:
      FileNotFoundError: If there is no such run, or it holds no checkpoint.
    """
    start = config.start
    if start.init_from is None:
        return _changed(start, normalization, variables, batch)
    if start.reopen:
        replicated = jax.tree.leaves(variables)[0].sharding
        found = _reopened(config, normalization, batch()["image"], replicated)
    else:
        mesh = create_mesh(jax.local_devices()[:1])
        found = restore(run_directory(str(start.init_from)), mesh)[1].eval_variables

    def replace(fresh: jax.Array, found: jax.Array) -> jax.Array:
        if found.shape != fresh.shape:
            return fresh
        return jax.device_put(jax.device_get(found), fresh.sharding)

    trained = {name: variables[name] for name in ("params", "batch_stats")}
    return variables | jax.tree.map(replace, trained, {name: found[name] for name in trained})


def _changed(
    config: StartConfig,
    normalization: Normalization,
    variables: dict[str, Any],
    batch: Callable[[], dict[str, jax.Array]],
) -> dict[str, Any]:
    @partial(jax.jit, out_shardings=jax.tree.leaves(variables)[0].sharding, compiler_options=compiler_options())
    def change(variables: dict[str, Any], images: jax.Array | None) -> dict[str, Any]:
        if images is not None:
            variables = whiten_stem(variables, normalize(images, *normalization))
        if config.residual_scale is not None:
            variables = residual_start(variables, scale=config.residual_scale)
        return variables

    return change(variables, batch()["image"] if config.whiten_stem else None)


def _reopened(
    config: TrainConfig, normalization: Normalization, images: jax.Array, replicated: Sharding
) -> dict[str, Any]:
    deployed, variables, _, _ = load_deploy(run_directory(str(config.start.init_from)))
    model = deployed.clone(block=config.network.block)

    @partial(jax.jit, out_shardings=replicated, compiler_options=compiler_options())
    def reopen(variables: dict[str, Any], images: jax.Array) -> dict[str, Any]:
        key = jax.random.key(config.seed)
        return reopen_model(model, variables, normalize(images, *normalization), key=key)[1]

    return reopen(jax.device_get(variables), images)


def _shapes(model: RepVGG, channels: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a network's arrays by name, but for its heads."""
    found = shapes_by_name(abstract_variables(model, channels))
    return {name: shape for name, shape in found.items() if "head" not in name.split("/")}
