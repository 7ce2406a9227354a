"""`deploy.safetensors`: the weights of a deploy form and everything that is needed to use them, in one file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from repvgg_jax.fields import shown
from repvgg_jax.files import write_whole
from repvgg_jax.interop.deploy_metadata import DeployMetadata
from repvgg_jax.invocation import command
from repvgg_jax.models import RepVGG
from repvgg_jax.models.forms import require_deploy_form
from repvgg_jax.models.shapes import differences, few
from repvgg_jax.preprocess import Preprocess

# In the names of safetensors and of NumPy.
_FLOATS = ("F16", "BF16", "F32", "F64", "float16", "bfloat16", "float32", "float64")


class Deployed(NamedTuple):
    """A network ready to use: `model.apply(variables, images, train=False)`.

    Attributes:
      model: The network in its deploy form.
      variables: Its variables, `{'params'}`, in float32.
      preprocess: Preprocessing of its images, and the names of its classes.
      metadata: All metadata of the file, as strings.
    """

    model: RepVGG
    variables: dict[str, Any]
    preprocess: Preprocess
    metadata: dict[str, str]


class _Tensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: str


def save_deploy(
    path: str | os.PathLike[str],
    variant: str,
    model: RepVGG,
    variables: Mapping[str, Any],
    preprocess: Preprocess,
) -> None:
    """Write a deploy form to one safetensors file, whole or not at all.

    Tensors are named by their path, `stage1_block1.reparam.kernel`, and are in this package's layouts (HWIO). The
    metadata are strings: `format`, `variant`, `num_classes`, `class_names`, `strides`, `dilations`, `depths`,
    `width_multiplier`, `image_size`, `channels`, `mean`, `std`, `eval_resize`, `interpolation`, `epsilon` (of the batch
    norms that were folded) and `versions`. All but `format` and `variant` are JSON.

    Args:
      path: The file to write.
      variant: Published network that the model derives from, e.g. 'repvgg_a0'.
      model: The network in its deploy form.
      variables: Its variables, `{'params': …}`, as `fuse` returned them.
      preprocess: Preprocessing of its images, and the names of its classes.

    Raises:
      ValueError: If the model is in its training form, or `load_deploy` would refuse the file.
      OSError: If the file cannot be written.
    """
    require_deploy_form(model)
    metadata = DeployMetadata.of(variant, model, preprocess)
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    tensors = {_name(key_path): np.ascontiguousarray(leaf) for key_path, leaf in leaves}
    _require_fitting(metadata, {name: _Tensor(each.shape, each.dtype.name) for name, each in tensors.items()})
    _require_finite(tensors)
    write_whole(Path(path), safetensors.numpy.save(tensors, metadata.to_strings()))


def load_deploy(path: str | os.PathLike[str]) -> Deployed:
    """Read a file that `save_deploy` wrote.

    Args:
      path: The file. Tensors of float16, bfloat16 or float64 are taken too, and become float32.

    Returns:
      `(model, variables, preprocess, metadata)`, with the model in its deploy form and the variables in float32.

    Raises:
      FileNotFoundError: If there is no such file.
      OSError: If the file cannot be read.
      ValueError: If the file is damaged or no `deploy.safetensors` of this package, or if its tensors do not fit its
        metadata or hold values that are not finite. The message names the file, and the field or the tensors.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: expected the deploy.safetensors of a run, or one that {command('fuse')} wrote"
        )
    if not path.is_file():
        raise ValueError(f"{path} is {'a directory' if path.is_dir() else 'no file'}: expected a deploy.safetensors")
    with path.open("rb"):  # safetensors takes a file that may not be read for one that is missing
        pass
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return _read(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): write or copy it again") from None
    except ValueError as error:
        raise ValueError(
            f"{path} is no deploy form that can be used: {error}; expected a file that {command('fuse')} wrote"
        ) from None


def _read(file: Any) -> Deployed:
    strings = file.metadata() or {}
    metadata = DeployMetadata.from_strings(strings)
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    template = _require_fitting(
        metadata, {name: _Tensor(tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}
    )
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
        tensors = {name: file.get_tensor(name).astype(np.float32, copy=False) for name in slices}
    _require_finite(tensors)
    params = jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(tensors[_name(path)]), template)
    return Deployed(metadata.create_model(), {"params": params}, metadata.preprocess, strings)


def _require_fitting(metadata: DeployMetadata, tensors: Mapping[str, _Tensor]) -> Any:
    """Check that tensors are those of a network, and return its tree of shapes. No values are read."""
    if sum(metadata.depths) > len(tensors):
        raise ValueError(
            f"depths are {metadata.depths}, with {len(tensors)} tensors: expected at least two tensors for each block"
        )
    template = metadata.abstract_params()
    expected = {_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(template)}
    differing = differences({shown(name): tensor.shape for name, tensor in tensors.items()}, expected)
    if differing:
        raise ValueError(
            f"the tensors do not fit {metadata.variant}, depths {metadata.depths}, width_multiplier "
            f"{metadata.width_multiplier}, {metadata.preprocess.channels} channels: {few(differing)}"
        )
    others = [f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in _FLOATS]
    if others:
        raise ValueError(f"{few(others, ', ')}: expected float32 (float16, bfloat16 and float64 become it)")
    return template


def _require_finite(tensors: Mapping[str, np.ndarray]) -> None:
    broken = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
    if broken:
        raise ValueError(
            f"values that are not finite in float32 are in {few(broken, ', ')}: the training diverged or the file is "
            "damaged"
        )


def _name(path: Iterable[Any]) -> str:
    return ".".join(entry.key for entry in path)
