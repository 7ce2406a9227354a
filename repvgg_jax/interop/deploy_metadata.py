"""The metadata of a `deploy.safetensors`: which network its tensors are of, and which images it takes."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

from repvgg_jax.fields import read_json, require_types, shown
from repvgg_jax.models import RepVGG, create_model
from repvgg_jax.models.shapes import abstract_variables
from repvgg_jax.preprocess import Preprocess
from repvgg_jax.version import VERSION

FORMAT = "repvgg_jax deploy 1"
# Ten times what any published network has: more would only keep a reader busy.
_MOST_BLOCKS, _MOST_CHANNELS = 512, 65_536
# Earlier files say nothing of these.
_DEFAULTS = {"dilations": (1, 1, 1, 1, 1), "interpolation": "bilinear"}


@dataclasses.dataclass(frozen=True)
class DeployMetadata:
    """The network of a deploy form and the preprocessing of its images.

    Attributes:
      variant: Published network that the model derives from, e.g. 'repvgg_a0'.
      num_classes: Number of classes, the width of the head.
      strides: Strides of the stem and of stage 1 to 4.
      dilations: Dilations of the stem and of stage 1 to 4.
      depths: Numbers of blocks in stage 1 to 4.
      width_multiplier: Factors on the channels of stage 1 to 4.
      epsilon: The epsilon of the batch norms that were folded.
      preprocess: Preprocessing of the images.

    Raises:
      ValueError: If a field is of another type or out of range. The message names it.
    """

    variant: str
    num_classes: int
    strides: tuple[int, int, int, int, int]
    dilations: tuple[int, int, int, int, int]
    depths: tuple[int, int, int, int]
    width_multiplier: tuple[float, float, float, float]
    epsilon: float
    preprocess: Preprocess

    def __post_init__(self) -> None:
        require_types(self)
        if len(self.variant) > 60:
            raise ValueError(f"variant is {shown(self.variant)}: expected one of repvgg_jax.VARIANTS")
        names = self.preprocess.class_names
        if len(names) != self.num_classes:
            raise ValueError(
                f"class_names are {len(names)}, num_classes is {shown(self.num_classes)}: expected one name for each "
                "class"
            )
        # Strides of 2 reach 32 pixels and turn into no larger dilation.
        if not all(1 <= dilation <= 32 for dilation in self.dilations):
            raise ValueError(f"dilations are {shown(self.dilations)}: expected five, each 1 to 32")
        if sum(self.depths) > _MOST_BLOCKS:
            raise ValueError(f"depths are {shown(self.depths)}: expected at most {_MOST_BLOCKS} blocks together")
        if max(self.width_multiplier) * 512 > _MOST_CHANNELS:
            raise ValueError(
                f"width_multiplier is {shown(self.width_multiplier)}: expected factors that give at most "
                f"{_MOST_CHANNELS} channels"
            )
        self.create_model()

    @classmethod
    def of(cls, variant: str, model: RepVGG, preprocess: Preprocess) -> DeployMetadata:
        """Describe a deploy form.

        Args:
          variant: Published network that the model derives from.
          model: The network in its deploy form.
          preprocess: Preprocessing of its images.

        Raises:
          ValueError: If the model does not derive from the variant, or a field is out of range.
        """
        metadata = cls(
            variant=variant,
            num_classes=model.num_classes,
            strides=tuple(model.strides),  # type: ignore[arg-type]
            dilations=tuple(model.dilations),  # type: ignore[arg-type]
            depths=tuple(model.depths),  # type: ignore[arg-type]
            width_multiplier=tuple(model.width_multiplier),  # type: ignore[arg-type]
            epsilon=model.epsilon,
            preprocess=preprocess,
        )
        described = metadata.create_model()
        for name in ("groups", "squeeze_excite", "squeeze_excite_reduction"):
            found, expected = getattr(model, name), getattr(described, name)
            if found != expected:
                raise ValueError(f"{name} of the model is {found}: expected {expected}, that of {variant}")
        return metadata

    @classmethod
    def from_strings(cls, strings: Mapping[str, str]) -> DeployMetadata:
        """Parse the metadata of a file. Fields that have no meaning here are skipped.

        Raises:
          ValueError: If the format is another, or a field is missing, not JSON, of another type or out of range. The
            message names it.
        """
        if strings.get("format") != FORMAT:
            raise ValueError(f"it has the format {shown(strings.get('format'))}, expected {FORMAT!r}")
        own = [field.name for field in dataclasses.fields(cls) if field.name != "preprocess"]
        values = {name: _read(strings, name) for name in own}
        of_images = {field.name: _read(strings, field.name) for field in dataclasses.fields(Preprocess)}
        return cls(**values, preprocess=Preprocess(**of_images))

    def to_strings(self) -> dict[str, str]:
        """Return the metadata of a file for `from_strings` to parse. All values but `format` and `variant` are JSON."""
        fields = {**vars(self), **vars(self.preprocess)}
        fields["versions"] = {
            "repvgg_jax": VERSION,
            **{name: importlib.metadata.version(name) for name in ("jax", "flax")},
        }
        of_json = {name: json.dumps(value) for name, value in fields.items() if name not in ("variant", "preprocess")}
        return {"format": FORMAT, "variant": self.variant, **of_json}

    def create_model(self) -> RepVGG:
        """Build the network in its deploy form.

        Raises:
          ValueError: If `repvgg_jax.create_model` refuses a field.
        """
        model = create_model(
            self.variant,
            num_classes=self.num_classes,
            deploy=True,
            strides=self.strides,
            depths=self.depths,
            width_multiplier=self.width_multiplier,
            epsilon=self.epsilon,
        )
        return model.clone(dilations=self.dilations)

    def abstract_params(self) -> Any:
        """Return the tree of the network's parameters, as shapes and dtypes."""
        return abstract_variables(self.create_model(), self.preprocess.channels)["params"]


def _read(strings: Mapping[str, str], name: str) -> Any:
    if name not in strings:
        if name in _DEFAULTS:
            return _DEFAULTS[name]
        raise ValueError(f"{name} is missing: expected it in the metadata")
    if name == "variant":
        return strings[name]
    try:
        value = read_json(strings[name])
    except ValueError as error:
        raise ValueError(f"{name} is {shown(strings[name])}: expected JSON ({error})") from None
    return tuple(value) if isinstance(value, list) else value
