"""One process at a time trains in a run directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def only_run_in(workdir: Path) -> Iterator[None]:
    """Hold the directory for this process; the system lets go of it when the process ends, however it ends.

    Args:
      workdir: the run directory; it exists.

    Raises:
      ValueError: another process holds it.
    """
    try:
        with FileLock(workdir / ".lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(
            f"another process is training in {workdir}: wait for it, stop it, or name another directory"
        ) from None
