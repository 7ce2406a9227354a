"""Weights that timm publishes on the Hugging Face Hub, trained by the authors of RepVGG. Needs the extra `[hub]`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax

from repvgg_jax.interop.preprocess import Interpolation, Preprocess
from repvgg_jax.interop.weights_file import load_weights
from repvgg_jax.models import RepVGG
from repvgg_jax.models.variants import canonical_name

_PUBLISHED = (
    *(f"repvgg_{name}" for name in ("a0", "a1", "a2", "b0", "b1", "b1g4", "b2", "b2g4", "b3", "b3g4")),
    "repvgg_d2se",
)


class Pretrained(NamedTuple):
    """A published network, in its training form.

    Attributes:
      model: of the variant; `fuse_model(model, variables)` gives its deploy form.
      variables: `{'params', 'batch_stats'}`.
      preprocess: of the images, as the weights were evaluated.
      revision: commit of the repository on the hub that the weights are of; pass it to get the same again.
    """

    model: RepVGG
    variables: dict[str, Any]
    preprocess: Preprocess
    revision: str


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

    The repository is `timm/NAME.rvgg_in1k` (MIT licence, https://github.com/DingXiaoH/RepVGG); its `config.json` tells
    the preprocessing.

    Args:
      name: 'repvgg_a0', a1, a2, b0, b1, b1g4, b2, b2g4, b3, b3g4 or d2se.
      revision: a commit of the repository to stay with, or a branch.
      num_classes: of the model; 1000 where not given. Other numbers take `head="reinit"`.
      head: "reinit" initialises the classifier for `num_classes`.
      key: random key for "reinit".
      cache_dir: of huggingface_hub; its own (~/.cache/huggingface/hub) where not given.

    Returns:
      The network, in its training form.

    Raises:
      ValueError: there are no published weights of that name, they do not fit, or their images are resized by an
        interpolation that `Preprocess` does not know.
      ImportError: huggingface_hub is not installed.
      ConnectionError: the hub cannot be reached, and the weights are not in the cache.
    """
    variant = canonical_name(name)
    if variant not in _PUBLISHED:
        raise ValueError(f"there are no published weights of {name!r}: expected one of {', '.join(_PUBLISHED)}")
    repository = f"timm/{variant}.rvgg_in1k"
    config_path = _download(repository, "config.json", revision, cache_dir)
    # The cache keeps each commit in a folder of its name: both files come from the same one.
    commit = config_path.parent.name
    weights = load_weights(
        _download(repository, "model.safetensors", commit, cache_dir),
        variant,
        num_classes=num_classes,
        head=head,
        key=key,
    )
    config = json.loads(config_path.read_text())
    classes = weights.model.num_classes
    named = config.get("label_names", []) if head == "load" else []
    class_names = tuple(named) if len(named) == classes else tuple(f"class {index}" for index in range(classes))
    preprocess = _preprocess(config.get("pretrained_cfg", config), class_names)
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
            "the cache: connect, or download it elsewhere and use repvgg_jax.interop.weights_file.load_weights(PATH, "
            "VARIANT)"
        ) from None


def _preprocess(config: dict[str, Any], class_names: tuple[str, ...]) -> Preprocess:
    """From timm's `pretrained_cfg`."""
    channels, size, _ = config["input_size"]
    interpolation = config.get("interpolation", "bilinear")
    if interpolation not in get_args(Interpolation):
        raise ValueError(
            f"the images of these weights are resized by {interpolation!r} interpolation: expected one of "
            f"{', '.join(get_args(Interpolation))}; use load_weights and prepare the images yourself"
        )
    return Preprocess(
        image_size=size,
        channels=channels,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        eval_resize=round(size / config["crop_pct"]),
        class_names=class_names,
        interpolation=interpolation,
    )
