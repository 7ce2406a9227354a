"""`repvgg-train`, or `python train.py`: train a RepVGG, fuse it, and prove that its two forms are equal."""

from __future__ import annotations

import dataclasses
import difflib
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from repvgg_jax.cli.devices import require_devices
from repvgg_jax.cli.exit_status import STATUSES, ExitStatus, guard
from repvgg_jax.cli.header import start_jax
from repvgg_jax.cli.output import Output
from repvgg_jax.data import load_dataset
from repvgg_jax.invocation import command
from repvgg_jax.models import summarize
from repvgg_jax.reparam import EquivalenceError
from repvgg_jax.terminal import printable
from repvgg_jax.training.config import PRESETS, TrainConfig
from repvgg_jax.training.distributed import Cluster, is_primary
from repvgg_jax.training.epoch import TrainingDivergedError
from repvgg_jax.training.loop import train_and_evaluate
from repvgg_jax.training.preemption import TerminatedError
from repvgg_jax.training.run.paths import run_directory

_FAILURES = {
    TrainingDivergedError: ExitStatus.FAILED,
    EquivalenceError: ExitStatus.FAILED,
    TerminatedError: ExitStatus.TERMINATED,
}


@dataclasses.dataclass(frozen=True)
class _Arguments:
    config: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]
    cluster: Annotated[Cluster, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=Cluster)
    workdir: Path | None = None
    """Run directory. An unfinished run of the same config in it is resumed. The default is runs/PRESET-TIMESTAMP."""
    summary: bool = False
    """Print the network's blocks in both forms (output shape, parameters, multiply-adds), and stop."""


def train_command(arguments: list[str]) -> int:
    """Run the command.

    Args:
      arguments: The name of a preset, 'digits' where there is none, and then flags.

    Returns:
      The exit status, an `ExitStatus`. A run that Ctrl-C or SIGTERM stopped is saved.
    """
    return guard(partial(_train, arguments), remedy="name another --workdir or --data-dir", failures=_FAILURES)


def _train(arguments: list[str], _: Output) -> int:
    preset = "digits"
    if arguments and not arguments[0].startswith("-"):
        preset, *arguments = arguments
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"unknown preset {preset!r}{hint}: expected one of {', '.join(PRESETS)}")
    parsed = tyro.cli(
        _Arguments,
        args=arguments,
        default=_Arguments(PRESETS[preset]),
        prog=f"{command('train')} {preset}",
        description="Train a RepVGG, fuse it, and prove that the two forms are the same function. The first argument "
        f"may be a preset: {', '.join(PRESETS)}. The defaults below are those of {preset!r}. {STATUSES}",
    )
    if parsed.summary:
        require_devices()
        print(_summary(parsed.config))
        return ExitStatus.DONE
    if parsed.cluster.distributed and parsed.workdir is None:
        raise ValueError("workdir is None: several processes need one --workdir that all of them see")
    workdir = parsed.workdir or Path("runs") / f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_directory(workdir)
    parsed.cluster.join()
    start_jax()
    train_and_evaluate(parsed.config, workdir)
    if is_primary():
        shown = printable(str(workdir))
        print(f"\nreport: {shown}/report.md\nweights: {shown}/deploy.safetensors")
    return ExitStatus.DONE


def _summary(config: TrainConfig) -> str:
    """Return the table of a config's network. The data set tells classes and channels where it is at hand."""
    try:
        dataset = load_dataset(config.data.dataset, data_dir=config.data.data_dir, seed=config.seed)
        classes, channels, note = dataset.num_classes, dataset.channels, ""
    except FileNotFoundError:
        classes, channels = 1000, 3
        name = printable(config.data.dataset)
        note = f"\n\n{name} is not at hand: counted with {classes} classes and {channels} channels"
    size = config.data.image_size
    summary = summarize(config.network.create_model(classes), (size, size, channels))
    return f"{config.network.description} on {size}×{size} images\n\n{summary}{note}"
