"""What every exported file asks of a deploy form, and which ONNX opsets there are. It needs no extra."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from repvgg_jax.models import RepVGG
from repvgg_jax.models.forms import require_deploy_form
from repvgg_jax.models.shapes import input_channels
from repvgg_jax.preprocess import Preprocess

# The operators of the graph have the same meaning and the same attributes in all of them.
OPSETS = range(11, 22)
"""The ONNX opsets that graphs can be written in."""
OPSET = 17
"""The ONNX opset that graphs are written in by default."""
# One message of protobuf, which an ONNX file is, and one buffer of flatbuffers hold no more. Less what is no weight.
_LARGEST_FILE = 2**31 - 2**20


def require_opset(opset: int) -> None:
    """Raise a ValueError unless graphs can be written in an ONNX opset."""
    if isinstance(opset, bool) or not isinstance(opset, int) or opset not in OPSETS:
        raise ValueError(f"opset is {opset!r}: expected a whole number from {OPSETS[0]} to {OPSETS[-1]}")


def require_exportable(
    model: RepVGG,
    variables: Mapping[str, Any],
    *,
    batch_size: int | None,
    image_size: int | None,
    preprocess: Preprocess | None,
) -> int:
    """Check that a network can be written with its weights inside, before anything is built.

    Args:
      model: The network, which must be in its deploy form.
      variables: Its variables, `{'params'}`.
      batch_size: Number of images in a batch, or None for any.
      image_size: Side length of the images in pixels, or None for any.
      preprocess: Preprocessing to be built in, or None.

    Returns:
      The number of channels of its images.

    Raises:
      ValueError: If the model is in its training form, a size is less than 1, `preprocess` is that of another network,
        or the weights do not fit into one file.
    """
    require_deploy_form(model)
    for name, size in (("batch_size", batch_size), ("image_size", image_size)):
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}: expected at least 1, or None for any")
    size = sum(4 * int(np.prod(np.shape(leaf), dtype=np.int64)) for leaf in jax.tree.leaves(variables["params"]))
    if size > _LARGEST_FILE:
        raise ValueError(
            f"the weights take {size / 2**30:.2f} GiB in float32: expected less than 2, which is all that one ONNX or "
            "StableHLO file holds; safetensors holds more, and a smaller width_multiplier makes a smaller network"
        )
    channels = input_channels(variables)
    if preprocess is None:
        return channels
    if not len(preprocess.mean) == len(preprocess.std) == channels:
        raise ValueError(
            f"mean is {preprocess.mean} and std {preprocess.std}: expected {channels} values each, one for each "
            "channel of the network's images"
        )
    if len(preprocess.class_names) != model.num_classes:
        raise ValueError(
            f"there are {len(preprocess.class_names)} class names: expected {model.num_classes}, one for each logit"
        )
    return channels
