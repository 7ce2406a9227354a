"""Files of PyTorch weights: `.safetensors` without torch, `.pth` without running what is in it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy

from repvgg_jax.interop.torch import from_state_dict, tensors_by_key
from repvgg_jax.models import RepVGG, create_model

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")


class Weights(NamedTuple):
    """A network and its variables, in the form of the file: `model.apply(variables, images, train=False)`."""

    model: RepVGG
    variables: dict[str, Any]


def load_weights(
    path: str | os.PathLike[str],
    variant: str,
    *,
    num_classes: int | None = None,
    strides: Sequence[int] = (2, 2, 2, 2, 2),
    head: Literal["load", "reinit"] = "load",
    key: jax.Array | None = None,
) -> Weights:
    """Read a file of PyTorch weights into a network of this package.

    Whether they are of the training form or of the deploy form is read off their names.

    Args:
      path: as for `read_state_dict`.
      variant: the published network they are of, e.g. 'repvgg_a0'.
      num_classes: of the model; the file's where not given.
      strides: of the stem and of stage 1 to 4, which weights do not tell.
      head: "load", or "reinit" to initialise the classifiers for `num_classes`.
      key: random key for "reinit".

    Returns:
      `(model, variables)`.

    Raises:
      FileNotFoundError, ValueError, ImportError: as `read_state_dict` and `from_state_dict`.
    """
    tensors = read_state_dict(path)
    if num_classes is None:
        classifiers = [tensors[name].shape[0] for name in ("linear.bias", "head.fc.bias") if name in tensors]
        if not classifiers:
            raise ValueError(
                f"{path} holds no classifier (linear.bias or head.fc.bias) but {', '.join(list(tensors)[:3])}, …: "
                "expected weights of a RepVGG from the official repository or timm (a deploy.safetensors of this "
                "package is fused already: load_deploy reads it; weights without a classifier take num_classes and "
                "head='reinit')"
            )
        num_classes = int(classifiers[0])
    deploy = any("reparam" in name for name in tensors)
    model = create_model(variant, num_classes=num_classes, deploy=deploy, strides=tuple(strides))
    try:
        return Weights(model, from_state_dict(model, tensors, head=head, key=key))
    except ValueError as error:
        raise ValueError(f"{path} is not {variant}: {error}") from None


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the tensors of a file that PyTorch code wrote.

    Args:
      path: of a `.safetensors` file, which needs no torch, or of one that `torch.save` wrote (`.pth`, `.pt`, `.bin`,
        `.tar`), which needs it. The latter is read with `weights_only=True`: code in it is refused, not run.

    Returns:
      Arrays or torch tensors by key, as `from_state_dict` takes them; prefixes and nesting are gone already.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, holds objects other than tensors, or values that are not finite.
      ImportError: torch is needed and not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a file of weights, .safetensors or .pth")
    tensors = tensors_by_key(_read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path))
    broken = [key for key, tensor in tensors.items() if not _is_finite(tensor)]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ValueError(
            f"{path} holds values that are not finite, in {', '.join(broken[:3])}{more}: the training diverged or the "
            "file is damaged; take an earlier checkpoint"
        )
    return tensors


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(safetensors.numpy.load_file(path))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): download or copy it again") from None


def _read_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"reading {path} takes PyTorch: pip install torch, or write the weights as .safetensors where it is"
        ) from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors ({_first_line(error)}), and was not read, since that could run code. "
            "If you trust who wrote it, torch.save(torch.load(PATH, weights_only=False)['state_dict'], …) keeps the "
            "tensors alone"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a whole file of torch.save ({_first_line(error)}): copy it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected a state dict or a checkpoint around one")
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _is_finite(tensor: Any) -> bool:
    if isinstance(tensor, np.ndarray):
        return bool(np.isfinite(tensor).all())
    return bool(tensor.isfinite().all())
