"""Files of PyTorch weights: `.safetensors` without PyTorch, `.pth` without running code that is in it."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import safetensors

from repvgg_jax.interop.torch.entries import TOP, StateDict, find_state_dict
from repvgg_jax.interop.torch.keys import find_block
from repvgg_jax.interop.torch.state_dict import from_state_dict
from repvgg_jax.interop.torch.tensors import is_finite
from repvgg_jax.models import RepVGG, create_model
from repvgg_jax.models.variants import canonical_name
from repvgg_jax.terminal import printable

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
_CLASSIFIERS = ("linear.bias", "head.fc.bias")
# torch.save does not compress: contents this many times as large as the file are a trap.
_LARGEST_RATIO = 4


@dataclass(frozen=True)
class Weights:
    """A network and its variables, in the form of the file: `model.apply(variables, images, train=False)`.

    It unpacks to `(model, variables)`, as `fuse_model` takes them.

    Attributes:
      model: The network.
      variables: Its variables, `{'params', 'batch_stats'}`, or `{'params'}` of a deploy form.
      source: Words that say which weights of the file they are: "the weights under 'ema', an average; there are others
        under 'model'".
    """

    model: RepVGG
    variables: dict[str, Any]
    source: str

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.variables))


def load_weights(
    path: str | os.PathLike[str],
    variant: str,
    *,
    entry: str | None = None,
    num_classes: int | None = None,
    strides: Sequence[int] = (2, 2, 2, 2, 2),
    head: Literal["load", "reinit"] = "load",
    key: jax.Array | None = None,
) -> Weights:
    """Read a file of PyTorch weights into a network of this package.

    Their names tell whether they are of the training form or of the deploy form, and of which block.

    Args:
      path: The file, as for `read_state_dict`.
      variant: The published network that the weights are of, e.g. 'repvgg_a0'.
      entry: Which weights to take from a file that holds several, e.g. 'model' or 'ema'. By default it is the average,
        if there is one.
      num_classes: Number of classes of the model, by default that of the file.
      strides: Strides of the stem and of stage 1 to 4, which weights do not tell. Wrong ones are refused where a block
        would have, or lack, an identity branch. Quantizable blocks keep nothing of theirs, so that nothing is refused.
      head: "load" takes the classifiers of the file, "reinit" initialises them for `num_classes`.
      key: Random key for "reinit", by default `jax.random.key(0)`.

    Returns:
      The network, its variables, and which weights of the file were taken.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the variant is unknown, the weights do not fit, or `read_state_dict` raises one.
      ImportError: If the file takes PyTorch to read, and it is not installed.
    """
    variant = canonical_name(variant)
    found = _read(Path(path), entry)
    tensors = found.tensors
    if num_classes is None:
        num_classes = _count_classes(path, tensors)
    deploy = any("reparam" in name for name in tensors)
    model = create_model(
        variant, num_classes=num_classes, block=find_block(tensors), deploy=deploy, strides=tuple(strides)
    )
    try:
        variables = from_state_dict(model, tensors, head=head, key=key)
    except ValueError as error:
        taken = "" if found.entry == TOP else f"\n  ({found.describe()})"
        raise ValueError(f"{path} is not {variant}: {error}{taken}") from None
    _require_finite(path, tensors)
    return Weights(model, variables, found.describe())


def _count_classes(path: str | os.PathLike[str], tensors: Mapping[str, Any]) -> int:
    biases = {name: tuple(tensors[name].shape) for name in _CLASSIFIERS if name in tensors}
    if not biases:
        raise ValueError(
            f"{path} holds no classifier (linear.bias or head.fc.bias) but "
            f"{', '.join(map(printable, list(tensors)[:3])) or 'no tensors'}, …: "
            "expected weights of a RepVGG from the official repository or timm (a deploy.safetensors of this "
            "package is fused already: load_deploy reads it; weights without a classifier take num_classes and "
            "head='reinit')"
        )
    name, shape = next(iter(biases.items()))
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"{path}: {name} has shape {shape}, expected (classes,), one value for each class")
    return int(shape[0])


def read_state_dict(path: str | os.PathLike[str], entry: str | None = None) -> dict[str, Any]:
    """Read the tensors of a file that PyTorch code wrote.

    Args:
      path: A `.safetensors` file, which takes no PyTorch, or one that `torch.save` wrote (`.pth`, `.pt`, `.bin`,
        `.tar`), which takes it. The latter is read with `weights_only=True`: code in it is refused, not run.
      entry: Which weights to take; see `repvgg_jax.interop.torch.entries.find_state_dict`.

    Returns:
      Arrays or torch tensors by key, as `from_state_dict` takes them. Prefixes and nesting are gone.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file is damaged, or holds objects other than tensors, tensors that are not dense, or values
        that are not finite. Also if `find_state_dict` raises one.
      ImportError: If the file takes PyTorch to read, and it is not installed.
    """
    tensors = _read(Path(path), entry).tensors
    _require_finite(path, tensors)
    return tensors


def _read(path: Path, entry: str | None) -> StateDict:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: expected a file of weights, .safetensors or .pth")
    if not path.is_file():
        kind = "a directory" if path.is_dir() else "no regular file"
        raise ValueError(f"{path} is {kind}: expected a file of weights, .safetensors or .pth")
    contents = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    try:
        return find_state_dict(contents, entry)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _require_finite(path: str | os.PathLike[str], tensors: Mapping[str, Any]) -> None:
    broken = [printable(key) for key, tensor in tensors.items() if not is_finite(key, tensor)]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ValueError(
            f"{path} holds values that are not finite, in {', '.join(broken[:3])}{more}: the training diverged or the "
            "file is damaged; take an earlier checkpoint"
        )


def _read_safetensors(path: Path) -> dict[str, Any]:
    tensors = {}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118
                try:
                    tensors[key] = file.get_tensor(key)
                except (AttributeError, TypeError, KeyError):  # of a type that NumPy lacks
                    kind = file.get_slice(key).get_dtype()
                    raise ValueError(f"{path}: {key!r} holds {kind} values: expected F32, F64, F16 or BF16") from None
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({_first_line(error)}): download or copy it again"
        ) from None
    return tensors


def _read_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"reading {path} takes PyTorch: pip install torch, or write the weights as .safetensors where it is"
        ) from None
    _require_torch_file(path)
    try:
        with warnings.catch_warnings():
            # Of what torch's own loader deprecates.
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        refused = re.search(r"WeightsUnpickler error:\s*(?:.*GLOBAL (\S+)|(.*))", str(error))
        reason = printable(refused[1] or refused[2]) if refused else _first_line(error)
        if refused and "operand" not in reason:
            raise ValueError(
                f"{path} holds more than tensors ({reason}), and was not read, since that could run code. If you trust "
                "who wrote it, torch.save(torch.load(PATH, weights_only=False)['state_dict'], …) keeps the tensors"
            ) from None
        if "nested" in reason:
            raise ValueError(f"{path} holds nested tensors: expected dense ones, of fixed shapes") from None
        raise ValueError(f"{path} is not a whole file of torch.save ({reason}): copy it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected a state dict or a checkpoint around one")
    return found


def _require_torch_file(path: Path) -> None:
    """Check by its first bytes that torch.save wrote a file, and that it does not unpack to many times its size."""
    with path.open("rb") as file:
        start = file.read(4)
    if start[:1] != b"\x80" and start != b"PK\x03\x04":
        raise ValueError(
            f"{path} is not a whole file of torch.save (it begins with {start!r}, not as a zip or a pickle does): "
            "expected what torch.save wrote, unpacked; weights in safetensors take the suffix .safetensors"
        )
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} is not a whole file of torch.save ({_first_line(error)}): copy it again") from None
    if size > _LARGEST_RATIO * path.stat().st_size:
        raise ValueError(
            f"{path} unpacks to {size:,} bytes from {path.stat().st_size:,}: expected what torch.save wrote, which "
            "does not compress"
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return printable(lines[0][:200]) if lines else type(error).__name__
