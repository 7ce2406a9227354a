"""All settings of a training run, and the file that holds them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from repvgg_jax.fields import bounded, check_fields, read_object, require, shown, within
from repvgg_jax.files import write_whole
from repvgg_jax.interop.deploy_metadata import DeployMetadata
from repvgg_jax.preprocess import Normalization
from repvgg_jax.quantize.equalization import require_plain_deploy_form
from repvgg_jax.training.config.parts import (
    AugmentationConfig,
    CheckpointConfig,
    DataConfig,
    NetworkConfig,
    OptimizationConfig,
    StartConfig,
)

# Every config that was ever saved holds these; where one is lacking, its default would be another network.
_ALWAYS = {"variant", "strides", "depths", "width_multiplier", "dataset", "image_size", "mean", "std"}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run, by topic.

    A config is a value: `PRESETS["cifar10"].replace(epochs=10, cutout=0)` is another one. The name of a setting is also
    its flag on the command line, `--cutout 0`. No two parts share a name. Batch sizes are those of all devices
    together.

    Raises:
      ValueError: If a setting is of another type, out of range, or does not go with the others. The message names it.
    """

    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    start: StartConfig = dataclasses.field(default_factory=StartConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    augmentation: AugmentationConfig = dataclasses.field(default_factory=AugmentationConfig)
    optimization: OptimizationConfig = dataclasses.field(default_factory=OptimizationConfig)
    checkpoints: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    seed: int = bounded(0, within(0, 2**63 - 1))
    """Seed of initialisation, data order, augmentation and the test images drawn from a folder."""

    def __post_init__(self) -> None:
        check_fields(self)
        size = self.data.image_size
        starts = self.network.frozen is None or self.start.init_from is not None
        unfounded = "init_from as well: without a run to start from, what is frozen would stay random"
        require(self.network, "frozen", starts, unfounded)
        aware = self.optimization.quantize_aware
        trained = not aware or self.start.init_from is not None
        require(self.optimization, "quantize_aware", trained, "init_from as well: training comes before rounding")
        require(self.data, "image_size", size >= 3 or not self.start.whiten_stem, "at least 3 to whiten")
        require(self.augmentation, "cutout", self.augmentation.cutout <= size, f"at most image_size (={size})")
        # What no deploy form can be saved with would otherwise be found when the training is over.
        normalization = self.data.normalization or Normalization((0.0,), (1.0,))
        preprocess = self.data.preprocess(normalization, class_names=("any",))
        model = self.network.create_model(num_classes=1).clone(deploy=True)
        DeployMetadata.of(self.network.variant, model, preprocess)
        if aware:
            require_plain_deploy_form(model)

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting by its name, whatever the part that it is in."""
        return {name: getattr(self if part is None else getattr(self, part), name) for name, part in _PART_OF.items()}

    def replace(self, **settings: Any) -> TrainConfig:
        """Return a config in which some settings have other values. This one stays as it is.

        Args:
          **settings: The settings by name, whatever the part that they are in, e.g. `epochs=10, cutout=8`.

        Returns:
          The new config.

        Raises:
          TypeError: If there is no setting of a name.
          ValueError: If the class refuses a value.
        """
        changes: dict[str | None, dict[str, Any]] = {}
        for name, value in settings.items():
            if name not in _PART_OF:
                raise TypeError(f"{name} is no setting: expected some of {', '.join(_PART_OF)}")
            changes.setdefault(_PART_OF[name], {})[name] = value
        own = changes.pop(None, {})
        parts = {part: dataclasses.replace(getattr(self, part), **of_part) for part, of_part in changes.items() if part}
        return dataclasses.replace(self, **parts, **own)

    def at_epoch(self, epoch: int) -> TrainConfig:
        """Return the settings of one epoch, counted from 1. The last `refine_epochs` have no strong augmentation.

        At most half of all epochs are refined, so that a preset that is cut short still trains as it is meant to.

        Args:
          epoch: Number of the epoch.

        References:
          He et al., *Data Augmentation Revisited*, arXiv:1909.09148.
        """
        epochs = self.optimization.epochs
        if epoch <= epochs - min(self.augmentation.refine_epochs, epochs // 2):
            return self
        return dataclasses.replace(self, augmentation=self.augmentation.refined())

    def save(self, path: Path) -> None:
        """Write the config as JSON, with an object for each part."""
        write_whole(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> TrainConfig:
        """Read a config that `save` wrote.

        Raises:
          ValueError: If the file is no config, lacks what says which network it is, or holds settings or values that
            this version does not know. The message names the file and the setting.
        """
        try:
            settings = _flat(read_object(path))
            if lacking := sorted(_ALWAYS - set(settings)):
                raise ValueError(f"it lacks {', '.join(lacking)}")
            return cls().replace(**settings)
        except ValueError as error:
            raise ValueError(f"{path} is not a config of this version of repvgg_jax: {error}") from None


def _part_of() -> dict[str, str | None]:
    """Return the part that each setting is in, or None for those of `TrainConfig` itself."""
    parts: dict[str, str | None] = {}
    for field in dataclasses.fields(TrainConfig):
        kind: Any = field.default_factory
        if dataclasses.is_dataclass(kind):
            parts |= {each.name: field.name for each in dataclasses.fields(kind)}
        else:
            parts[field.name] = None
    return parts


_PART_OF = _part_of()


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in the objects of a config's JSON, by name.

    Raises:
      ValueError: If there is one that is not known, or an object is something else.
    """
    settings: dict[str, Any] = {}
    found: list[tuple[str | None, str]] = []
    for part, value in values.items():
        if part not in _PART_OF.values():
            settings[part] = value
            found.append((None, part))
        elif isinstance(value, dict):
            settings |= value
            found += [(part, name) for name in value]
        else:
            raise ValueError(f"{part} is {shown(value)}: expected a JSON object")
    unknown = [name for part, name in found if _PART_OF.get(name, "none") != part]
    if unknown:
        raise ValueError(f"it has the unknown {', '.join(sorted(unknown))}")
    return settings
