"""Several processes that train one network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes that run this command together, each with its own devices."""

    distributed: bool = False
    """Join the other processes of the cluster. Slurm, Open MPI, Kubernetes and TPU pods are recognised."""
    coordinator: str | None = None
    """HOST:PORT of process 0. Give it where the cluster is not recognised."""
    num_processes: int | None = None
    """Number of processes. Give it where the cluster is not recognised."""
    process_id: int | None = None
    """Number of this process, from 0. Give it where the cluster is not recognised."""

    def join(self) -> None:
        """Wait for the other processes and connect to them. Call it before anything is computed.

        Raises:
          ValueError: If no cluster is recognised, or the description of one is incomplete.
        """
        described = (self.coordinator, self.num_processes, self.process_id)
        if not self.distributed:
            if any(value is not None for value in described):
                raise ValueError("coordinator, num_processes and process_id describe a cluster: give --distributed too")
            return
        if any(value is None for value in described) and any(value is not None for value in described):
            raise ValueError(
                f"coordinator is {self.coordinator}, num_processes {self.num_processes}, process_id {self.process_id}: "
                "expected all three, or none where the cluster is recognised"
            )
        try:
            jax.distributed.initialize(self.coordinator, self.num_processes, self.process_id)
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"cannot join a cluster ({error}): give --coordinator HOST:PORT, --num-processes and --process-id"
            ) from None


def is_primary() -> bool:
    """Return whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def on_primary(action: Callable[[], None]) -> None:
    """Let process 0 do something while the others wait. Where it fails, none goes on.

    Raises:
      ValueError: If `action` raised one. On the other processes, if it raised a ValueError or an OSError.
      OSError: If `action` raised one, on process 0.
    """
    failure: Exception | None = None
    if is_primary():
        try:
            action()
        except (ValueError, OSError) as error:
            failure = error
    failed = failure is not None
    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.int32(failed)))
    if failure is not None:
        raise failure
    if failed:
        raise ValueError("process 0 cannot begin, and has said why: mend that and start all processes again")


def wait_for_all(place: str) -> None:
    """Return when every process has come to this place, which has the same name on all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)
