"""The claim on a run directory: it is of one run, and of one process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from repvgg_jax.training.config import TrainConfig
from repvgg_jax.training.run.data_record import DataRecord
from repvgg_jax.training.run.metrics_log import read_metrics

_FIRST_FILES = ("dataset.json", "config.json", ".lock")


def claim(workdir: Path, config: TrainConfig, record: DataRecord) -> None:
    """Make a run directory, or check that the run in it is whole, of the same config and data.

    Raises:
      ValueError: If the directory is another run's, or no directory, or its log is damaged. What differs is named.
    """
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
        record.save(workdir)
        config.save(path)
        return
    earlier = TrainConfig.load(path).settings
    # Where the data lie is no part of the result.
    moved = {"data_dir"}
    if earlier["dataset"].startswith("folder:") and config.data.dataset.startswith("folder:"):
        moved.add("dataset")
    differing = [
        f"{name} was {earlier[name]}, is {value}"
        for name, value in config.settings.items()
        if name not in moved and earlier[name] != value
    ]
    if differing:
        raise ValueError(f"{workdir} holds a run of another config ({'; '.join(differing)}): name a new directory")
    record.require(workdir)
    # What is damaged is told before the work.
    read_metrics(workdir)


@contextmanager
def only_run_in(workdir: Path) -> Iterator[None]:
    """Hold a run directory for this process. The system lets go of it when the process ends, however it ends.

    Args:
      workdir: The run directory. It exists.

    Raises:
      ValueError: If another process holds it.
    """
    try:
        with FileLock(workdir / ".lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(
            f"another process is training in {workdir}: wait for it, stop it, or name another directory"
        ) from None
