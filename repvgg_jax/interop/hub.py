"""Weights that timm publishes on the Hugging Face Hub, trained by the authors of RepVGG. It needs the extra `[hub]`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax

from repvgg_jax.fields import read_object, require_types, shown
from repvgg_jax.interop.torch.weights_file import load_weights
from repvgg_jax.models import RepVGG
from repvgg_jax.models.variants import canonical_name
from repvgg_jax.preprocess import LARGEST_SIDE, Interpolation, Preprocess

_PUBLISHED = (
    *(f"repvgg_{name}" for name in ("a0", "a1", "a2", "b0", "b1", "b1g4", "b2", "b2g4", "b3", "b3g4")),
    "repvgg_d2se",
)


class Pretrained(NamedTuple):
    """A published network in its training form.

    Attributes:
      model: The network. `fuse_model(model, variables)` gives its deploy form.
      variables: Its variables, `{'params', 'batch_stats'}`.
      preprocess: Preprocessing that the weights were evaluated with. Classes are named 'class 0' and so on where the
        hub has no names for them.
      revision: Commit of the repository on the hub. Pass it to `load_pretrained` to get the same weights again.
    """

    model: RepVGG
    variables: dict[str, Any]
    preprocess: Preprocess
    revision: str


@dataclasses.dataclass(frozen=True)
class _Config:
    """The fields of timm's `config.json` that describe images and classes.

    Raises:
      ValueError: If a field is of another type or out of range. The message names it.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str = "bilinear"
    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_types(self)
        _, height, width = self.input_size
        if not 1 <= height == width <= LARGEST_SIDE:
            raise ValueError(
                f"input_size is {shown(self.input_size)}: expected [channels, side, side], 1 to {LARGEST_SIDE} pixels"
            )
        # Below 1/100, an image is resized to more than a hundred times what is looked at.
        if not 0.01 <= self.crop_pct <= 1:
            raise ValueError(f"crop_pct is {self.crop_pct}: expected a share from 0.01 to 1")
        if self.interpolation not in get_args(Interpolation):
            raise ValueError(
                f"interpolation is {shown(self.interpolation)}: expected one of {', '.join(get_args(Interpolation))}; "
                "use load_weights and prepare the images yourself"
            )
        self.preprocess()

    @classmethod
    def read(cls, path: Path) -> _Config:
        """Parse the file. Older ones have the fields of images at the top, newer ones under `pretrained_cfg`."""
        config = read_object(path)
        of_images = config.get("pretrained_cfg", config)
        if not isinstance(of_images, dict):
            raise ValueError(f"pretrained_cfg is {shown(of_images)}: expected a JSON object")
        found = {**of_images, "label_names": config.get("label_names") or ()}
        fields = dataclasses.fields(cls)
        for field in fields:
            if field.default is dataclasses.MISSING and field.name not in found:
                raise ValueError(f"{field.name} is missing: expected it in pretrained_cfg")
        values: dict[str, Any] = {field.name: found[field.name] for field in fields if field.name in found}
        for name, value in values.items():
            if isinstance(value, list):
                values[name] = tuple(value)
        return cls(**values)

    def preprocess(self) -> Preprocess:
        """Return the preprocessing of an image; the classes have no names yet."""
        channels, size, _ = self.input_size
        return Preprocess(
            image_size=size,
            channels=channels,
            mean=self.mean,
            std=self.std,
            eval_resize=round(size / self.crop_pct),
            class_names=(),
            interpolation=self.interpolation,  # type: ignore[arg-type]
        )


def load_pretrained(
    name: str,
    *,
    revision: str = "main",
    num_classes: int | None = None,
    head: Literal["load", "reinit"] = "load",
    key: jax.Array | None = None,
    cache_dir: str | Path | None = None,
) -> Pretrained:
    """Download weights trained on ImageNet, or take them from the cache of an earlier download.

    The repository is `timm/NAME.rvgg_in1k` (MIT licence, https://github.com/DingXiaoH/RepVGG). Its `config.json` holds
    the preprocessing.

    Args:
      name: 'repvgg_a0', or the same with a1, a2, b0, b1, b1g4, b2, b2g4, b3, b3g4 or d2se.
      revision: A commit of the repository, to stay with it, or a branch.
      num_classes: Number of classes of the model, by default the 1000 of the weights. Another number takes
        `head="reinit"`.
      head: "load" takes the classifier of the weights, "reinit" initialises one for `num_classes`.
      key: Random key for "reinit", by default `jax.random.key(0)`.
      cache_dir: Directory of huggingface_hub's cache, by default its own (~/.cache/huggingface/hub).

    Returns:
      The network in its training form.

    Raises:
      ValueError: If there are no published weights of that name or revision, they do not fit, or a field of
        `config.json` is missing, of another type or out of range. The message names file and field.
      ImportError: If huggingface_hub is not installed.
      ConnectionError: If the hub cannot be reached, and the weights are not in the cache.
    """
    variant = canonical_name(name)
    if variant not in _PUBLISHED:
        raise ValueError(f"there are no published weights of {name!r}: expected one of {', '.join(_PUBLISHED)}")
    repository = f"timm/{variant}.rvgg_in1k"
    config_path = _download(repository, "config.json", revision, cache_dir)
    # The cache keeps each commit in a folder of its name: both files come from the same one.
    commit = config_path.parent.name
    try:
        config = _Config.read(config_path)
    except ValueError as error:
        raise ValueError(f"{config_path} is not what timm writes: {error}; download it again") from None
    weights = load_weights(
        _download(repository, "model.safetensors", commit, cache_dir),
        variant,
        num_classes=num_classes,
        head=head,
        key=key,
    )
    classes = weights.model.num_classes
    names = config.label_names if head == "load" else ()
    if len(names) != classes:
        names = tuple(f"class {index}" for index in range(classes))
    preprocess = dataclasses.replace(config.preprocess(), class_names=names)
    return Pretrained(weights.model, weights.variables, preprocess, commit)


def _download(repository: str, name: str, revision: str, cache_dir: str | Path | None) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError:
        raise ImportError(
            'published weights take huggingface_hub: pip install "huggingface_hub>=0.30", or the extra [hub]'
        ) from None
    try:
        return Path(hf_hub_download(repository, name, revision=revision, cache_dir=cache_dir))
    except RevisionNotFoundError:
        raise ValueError(f"{repository} has no revision {revision!r}: expected a commit or a branch of it") from None
    except RepositoryNotFoundError:
        raise ValueError(f"https://huggingface.co/{repository} does not exist (any more)") from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise ConnectionError(
            f"cannot fetch {name} of https://huggingface.co/{repository} ({type(error).__name__}), and it is not in "
            "the cache: connect, or download it elsewhere and use repvgg_jax.interop.torch.load_weights(PATH, VARIANT)"
        ) from None
