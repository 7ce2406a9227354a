"""Training of RepVGG by a config: steps, loop, checkpoints and reports of a run."""

from repvgg_jax.training.config import PRESETS, TrainConfig
from repvgg_jax.training.epoch import TrainingDivergedError
from repvgg_jax.training.loop import Result, train_and_evaluate
from repvgg_jax.training.preemption import TerminatedError
from repvgg_jax.training.run.directory import fuse_run

__all__ = [
    "PRESETS",
    "Result",
    "TerminatedError",
    "TrainConfig",
    "TrainingDivergedError",
    "fuse_run",
    "train_and_evaluate",
]
