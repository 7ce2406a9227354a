"""`deploy.safetensors`: the deploy form's weights and everything needed to use them, in one file."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from repvgg_jax.interop.preprocess import Preprocess
from repvgg_jax.models import RepVGG, create_model
from repvgg_jax.version import VERSION

_FORMAT = "repvgg_jax deploy 1"


class Deployed(NamedTuple):
    """A network ready to use: `model.apply(variables, images, train=False)`."""

    model: RepVGG
    variables: dict[str, Any]
    preprocess: Preprocess
    metadata: dict[str, str]


def save_deploy(
    path: str | os.PathLike[str],
    variant: str,
    model: RepVGG,
    variables: Mapping[str, Any],
    preprocess: Preprocess,
) -> None:
    """Write a deploy form to one safetensors file, whole or not at all.

    Tensors are named by their path, `stage1_block1.reparam.kernel`, in this package's layouts (HWIO). The metadata
    are strings: `variant`, `num_classes`, `class_names`, `strides`, `dilations`, `depths`, `width_multiplier`,
    `image_size`, `channels`, `mean`, `std`, `eval_resize`, `interpolation`, `epsilon` (of the norms that were folded),
    and `versions`; all but `format` and `variant` are JSON.

    Args:
      path: of the file.
      variant: the published network the model derives from, e.g. 'repvgg_a0'.
      model: in its deploy form.
      variables: `{'params': …}` as `fuse` returned them.
      preprocess: of the images.

    Raises:
      ValueError: the model is in its training form.
    """
    if not model.deploy:
        raise ValueError("the model is in its training form: fuse first, fuse_model(model, variables)")
    path = Path(path)
    tensors = {
        ".".join(entry.key for entry in key_path): np.ascontiguousarray(leaf)
        for key_path, leaf in jax.tree_util.tree_flatten_with_path(variables["params"])[0]
    }
    fields = {
        **dataclasses.asdict(preprocess),
        "num_classes": model.num_classes,
        "strides": model.strides,
        "dilations": model.dilations,
        "depths": model.depths,
        "width_multiplier": model.width_multiplier,
        "epsilon": model.epsilon,
        "versions": {
            "repvgg_jax": VERSION,
            **{name: importlib.metadata.version(name) for name in ("jax", "flax")},
        },
    }
    metadata = {key: json.dumps(value) for key, value in fields.items()}
    partial = path.with_name(path.name + ".partial")
    try:
        safetensors.numpy.save_file(tensors, partial, {"format": _FORMAT, "variant": variant, **metadata})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_deploy(path: str | os.PathLike[str]) -> Deployed:
    """Read a file that `save_deploy` wrote.

    Args:
      path: of the file.

    Returns:
      `(model, variables, preprocess, metadata)`, the model in its deploy form.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, is not a `deploy.safetensors` of this package, or its tensors do not fit
        its variant; the message names them.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a deploy.safetensors that fuse.py wrote")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): write or copy it again") from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{path} has the format {metadata.get('format')!r}, expected {_FORMAT!r}: it was not written by "
            "`python fuse.py RUN_DIR`"
        )
    fields = {key: json.loads(value) for key, value in metadata.items() if key not in ("format", "variant")}
    model = create_model(
        metadata["variant"],
        num_classes=fields["num_classes"],
        deploy=True,
        strides=fields["strides"],
        depths=fields["depths"],
        width_multiplier=fields["width_multiplier"],
        epsilon=fields["epsilon"],
    )
    # Earlier files say nothing of dilations and of interpolation: they have the defaults.
    model = model.clone(dilations=tuple(fields.get("dilations", model.dilations)))
    fields.setdefault("interpolation", "bilinear")
    values: dict[str, Any] = {field.name: fields[field.name] for field in dataclasses.fields(Preprocess)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    preprocess = Preprocess(**values)
    images = jnp.zeros((1, preprocess.image_size, preprocess.image_size, preprocess.channels))
    template = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))["params"]
    paths, structure = jax.tree_util.tree_flatten_with_path(template)
    expected = {".".join(entry.key for entry in key_path): leaf.shape for key_path, leaf in paths}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if expected != found:
        differing = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        raise ValueError(
            f"{path} does not fit {metadata['variant']}: "
            + "; ".join(f"{name} is {found.get(name)}, expected {expected.get(name)}" for name in differing)
        )
    params = jax.tree_util.tree_unflatten(structure, [jnp.asarray(tensors[name]) for name in expected])
    return Deployed(model, {"params": params}, preprocess, metadata)
