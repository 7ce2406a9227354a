"""The settings of a training run: by topic, in one config, and as presets."""

from repvgg_jax.training.config.parts import (
    AugmentationConfig,
    CheckpointConfig,
    DataConfig,
    NetworkConfig,
    OptimizationConfig,
    StartConfig,
)
from repvgg_jax.training.config.presets import PRESETS
from repvgg_jax.training.config.train_config import TrainConfig

__all__ = [
    "PRESETS",
    "AugmentationConfig",
    "CheckpointConfig",
    "DataConfig",
    "NetworkConfig",
    "OptimizationConfig",
    "StartConfig",
    "TrainConfig",
]
