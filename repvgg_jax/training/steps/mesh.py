"""The mesh of devices, and batches placed on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from repvgg_jax.training.config import TrainConfig

Batch = Mapping[str, Any]


def create_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """Return a one-dimensional mesh, axis 'data', over the given devices or over all devices of all processes."""
    return Mesh(np.asarray(devices or jax.devices()), ("data",))


def require_divisible(config: TrainConfig, mesh: Mesh, *fields: str) -> None:
    """Raise a ValueError unless the mesh divides the batch sizes of a config, in training times its microbatches."""
    for field in fields:
        size = config.settings[field]
        microbatches = config.optimization.accumulate_steps if field == "batch_size" else 1
        multiple = mesh.size * microbatches
        if size % multiple:
            times = f" times accumulate_steps (={microbatches})" if microbatches > 1 else ""
            raise ValueError(
                f"{field} is {size}: expected a multiple of the {mesh.size} devices{times}, "
                f"e.g. {-(-size // multiple) * multiple}"
            )


def shard_batch(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """Put this process's rows of a batch on its devices, and return the global batch."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}


def abstract_batch(config: TrainConfig, channels: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes, dtypes and shardings of a training batch."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    size = config.data.image_size
    shape = (config.optimization.batch_size, size, size, channels)
    integers = jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=sharding)
    return {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=sharding),
        "label": integers,
        "index": integers,
    }
