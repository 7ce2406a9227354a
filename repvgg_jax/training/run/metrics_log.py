"""The metrics of a run, epoch by epoch: `metrics.jsonl` and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from repvgg_jax.fields import read_json, shown
from repvgg_jax.files import write_whole
from repvgg_jax.terminal import printable


class MetricsLog:
    """Appends to `metrics.jsonl` and to TensorBoard's event files of a run directory.

    Args:
      workdir: The run directory.
      resume_epoch: Number of epochs already in the log that stay. Later lines, from a run that was cut off after its
        last checkpoint, go.
      write: Whether to write. Processes that do not write keep the history alone.
    """

    def __init__(self, workdir: Path, resume_epoch: int = 0, *, write: bool = True):
        self._path = workdir / "metrics.jsonl"
        self.history = [line for line in read_metrics(workdir) if line["epoch"] <= resume_epoch]
        self._board: SummaryWriter | None = None
        self._writes = write
        if not write:
            return
        write_whole(self._path, self._text())
        self._torn = False
        purge = int(self.history[-1]["step"]) + 1 if self.history else 0
        with self._spared("tensorboard"):
            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=purge)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            with self._spared("tensorboard"):
                self._board.close()

    def write(self, line: dict[str, float]) -> None:
        """Add the metrics of one epoch. `epoch` and `step` are among them.

        Where the file cannot be written, e.g. because the disk is full, a warning says so, and the next epoch tries
        again. TensorBoard's files are given up then.
        """
        self.history.append(line)
        if not self._writes:
            return
        torn, self._torn = self._torn, True
        with self._spared(self._path.name):
            if torn:
                write_whole(self._path, self._text())
            else:
                with self._path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            self._torn = False
        if self._board is None:
            return
        board, self._board = self._board, None
        with self._spared("tensorboard"):
            for name, value in line.items():
                if name not in ("epoch", "step"):
                    board.add_scalar(name, value, int(line["step"]))
            board.flush()
            self._board = board  # one that failed once would wait for its thread, which is gone

    @contextlib.contextmanager
    def _spared(self, name: str) -> Iterator[None]:
        """Warn where a part of the log cannot be written: no reason to end a run."""
        try:
            yield
        except OSError as error:
            path = printable(str(self._path.with_name(name)))
            warnings.warn(f"{path} could not be written: {error}", stacklevel=4)

    def _text(self) -> str:
        return "".join(json.dumps(line) + "\n" for line in self.history)


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """Read the lines of a run's `metrics.jsonl`; none where there is no such file.

    A last line that was cut off when the run was killed is skipped.

    Raises:
      ValueError: If another line is damaged, or is not an object of numbers with an `epoch` and a `step`. The file and
        the line are named.
    """
    path = workdir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    texts = text.splitlines()
    lines = []
    for number, each in enumerate(texts, start=1):
        try:
            line = read_json(each)
        except ValueError as error:
            if number < len(texts):
                raise ValueError(f"{path} line {number} is damaged ({error}): remove that line") from None
            break
        if (fault := _fault(line)) is not None:
            raise ValueError(f"{path} line {number} is damaged ({fault}): remove that line")
        lines.append(line)
    return lines


def _fault(line: Any) -> str | None:
    """Return what is wrong with a line, or None."""
    if not isinstance(line, dict):
        return f"{shown(line)} is no object"
    for name, value in line.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > sys.float_info.max:
            return f"{shown(name)} is {shown(value)}: expected a number"
    for name in ("epoch", "step"):
        if not isinstance(line.get(name), int) or not 1 <= line[name] < 2**31:
            return f"{name} is {shown(line.get(name))}: expected a whole number from 1 to 2**31"
    return None
