"""The state of a training: what changes from step to step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from repvgg_jax.models import RepVGG
from repvgg_jax.ops import compiler_options
from repvgg_jax.training.config import TrainConfig
from repvgg_jax.training.steps.quantize_aware import no_ranges


@flax.struct.dataclass
class TrainState:
    """Everything that changes from step to step, replicated over the mesh.

    Attributes:
      step: Number of steps that were made.
      params: The parameters.
      batch_stats: The running statistics.
      opt_state: The state of the optimizer.
      ema: The moving average of `variables`, or None where the config's `ema_decay` is 0.
      ranges: The ranges of the activations, by name, where the config has `quantize_aware`.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any = None
    ranges: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """The variables that are trained, `{'params', 'batch_stats'}`, with 'ranges' where there are any."""
        variables = {"params": self.params, "batch_stats": self.batch_stats}
        return variables if self.ranges is None else variables | {"ranges": self.ranges}

    @property
    def eval_variables(self) -> dict[str, Any]:
        """The variables that are evaluated, fused and saved. They are the moving average where there is one."""
        return self.variables if self.ema is None else self.ema


def create_state(
    model: RepVGG, optimizer: optax.GradientTransformation, config: TrainConfig, channels: int, mesh: Mesh
) -> TrainState:
    """Initialise parameters, statistics and optimizer from the config's seed, replicated over the mesh."""
    platform = mesh.devices.flat[0].platform
    options = compiler_options(platform)
    if platform == "cpu":  # XLA:CPU would spend seconds on optimising code that runs once
        options["xla_backend_optimization_level"] = 0
    init = _initializer(model, optimizer, config, channels)
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(init, out_shardings=replicated, compiler_options=options)(jax.random.key(config.seed))


def abstract_state(
    model: RepVGG, optimizer: optax.GradientTransformation, config: TrainConfig, channels: int, mesh: Mesh
) -> TrainState:
    """Return the shapes, dtypes and shardings of what `create_state` returns, computing nothing."""
    shapes = jax.eval_shape(_initializer(model, optimizer, config, channels), jax.random.key(config.seed))
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), shapes)


def _initializer(
    model: RepVGG, optimizer: optax.GradientTransformation, config: TrainConfig, channels: int
) -> Callable[[jax.Array], TrainState]:
    def init(key: jax.Array) -> TrainState:
        images = jnp.zeros((1, config.data.image_size, config.data.image_size, channels))
        variables = model.init(key, images, train=False)
        params, batch_stats = variables["params"], variables["batch_stats"]
        ranges = no_ranges(model) if config.optimization.quantize_aware else None
        state = TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params), ranges=ranges)
        return dataclasses.replace(state, ema=state.variables) if config.optimization.ema_decay else state

    return init
