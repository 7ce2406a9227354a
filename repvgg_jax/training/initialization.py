"""Fine-tuning: begin with the weights of an earlier run."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from repvgg_jax.training.checkpoints import Checkpoints
from repvgg_jax.training.config import TrainConfig
from repvgg_jax.training.optimizer import create_optimizer
from repvgg_jax.training.steps import abstract_state, create_mesh


def load_run_config(run: str | Path) -> TrainConfig:
    """Read the config of a run that is to be started from.

    Raises:
      ValueError: it is a file of the deploy form, which cannot be trained on.
      FileNotFoundError: it is no run directory.
    """
    run = Path(run)
    if run.suffix == ".safetensors":
        raise ValueError(
            f"init_from is {run}, a deploy form: its branches are folded into one kernel each, and what training needs "
            "of them is gone; expected the run directory it was made in, which holds the training form"
        )
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"init_from is {run}: expected a run directory that train.py wrote, with a config.json")
    return TrainConfig.load(run / "config.json")


def require_same_network(config: TrainConfig, channels: int) -> None:
    """See that the run in `config.init_from`, if any, trained the network of `config`, whatever the classes.

    Args:
      config: of the new run.
      channels: of its images.

    Raises:
      ValueError: the networks differ; the first arrays that do are named. Or the run is none to start from.
      FileNotFoundError: it is no run directory.
    """
    if config.init_from is None:
        return
    earlier = load_run_config(config.init_from)
    found = _shapes(earlier, _record(config.init_from)["channels"])
    expected = _shapes(config, channels)
    missing = "not there"
    differing = [
        f"{name} is {found.get(name, missing)}, expected {expected.get(name, missing)}"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    ]
    if differing:
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"the network of {config.init_from} is another one ({'; '.join(differing[:3])}{more}): give variant, "
            "depths and width_multiplier of that run, and images of as many channels"
        )


def start_from(run: str | Path, variables: dict[str, Any]) -> dict[str, Any]:
    """Replace freshly initialised variables by those of an earlier run of the same network.

    Taken is what that run evaluates, the moving average where it has one. Heads of another number of classes stay
    as they were initialised.

    Args:
      run: the run directory.
      variables: {'params', 'batch_stats'} of the training form, replicated over devices.

    Returns:
      Variables of the same shapes, dtypes and shardings.

    Raises:
      FileNotFoundError: it is no run, or holds no checkpoint.
    """
    config, record = load_run_config(run), _record(run)
    model = config.create_model(len(record["class_names"]))
    optimizer = create_optimizer(config, steps_per_epoch=1)
    mesh = create_mesh(jax.local_devices()[:1])
    with Checkpoints(Path(run)) as checkpoints:
        earlier = checkpoints.restore(abstract_state(model, optimizer, config, record["channels"], mesh)).state

    def replace(fresh: jax.Array, found: jax.Array) -> jax.Array:
        if found.shape != fresh.shape:
            return fresh
        return jax.device_put(jax.device_get(found), fresh.sharding)

    return jax.tree.map(replace, variables, earlier.eval_variables)


def _record(run: str | Path) -> dict[str, Any]:
    return json.loads((Path(run) / "dataset.json").read_text())


def _shapes(config: TrainConfig, channels: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's arrays by name, but for its heads."""
    images = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, channels), jnp.float32)
    init = partial(config.create_model(num_classes=1).init, train=False)
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(init, jax.random.key(0), images))
    names = {tuple(entry.key for entry in path): leaf.shape for path, leaf in leaves}
    return {"/".join(name): shape for name, shape in names.items() if "head" not in name}
