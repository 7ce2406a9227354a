"""What a run measured, epoch by epoch: `metrics.jsonl` and TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path

from tensorboardX import SummaryWriter

from repvgg_jax.training.files import write_whole


class MetricsLog:
    """Appends to `metrics.jsonl` and to TensorBoard's event files of a run directory.

    Args:
      workdir: the run directory.
      resume_epoch: epochs already in the log that stay; later lines, from a run that was cut off after its last
        checkpoint, go.
      write: keep the history only, for processes that do not write.
    """

    def __init__(self, workdir: Path, resume_epoch: int = 0, *, write: bool = True):
        self._path = workdir / "metrics.jsonl"
        self.history = [line for line in read_metrics(workdir) if line["epoch"] <= resume_epoch]
        self._board: SummaryWriter | None = None
        if not write:
            return
        write_whole(self._path, "".join(json.dumps(line) + "\n" for line in self.history))
        purge = int(self.history[-1]["step"]) + 1 if self.history else 0
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=purge)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()

    def write(self, line: dict[str, float]) -> None:
        """Append the metrics of one epoch; `epoch` and `step` are among them."""
        self.history.append(line)
        if self._board is None:
            return
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if name not in ("epoch", "step"):
                self._board.add_scalar(name, value, int(line["step"]))
        self._board.flush()


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """Read the lines of a run's `metrics.jsonl`; none where there is no such file.

    A last line that was cut off when the run was killed is passed over.

    Raises:
      ValueError: another line is damaged.
    """
    path = workdir / "metrics.jsonl"
    texts = path.read_text().splitlines() if path.exists() else []
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            if number < len(texts):
                raise ValueError(f"{path} line {number} is damaged ({error}): remove that line") from None
    return lines
