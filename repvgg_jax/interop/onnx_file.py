"""ONNX files with the preprocessing of their images, read back as a network. It needs the extra `[onnx]`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from repvgg_jax.fields import read_json, shown
from repvgg_jax.interop.onnx import load_session
from repvgg_jax.preprocess import Preprocess, normalize

_KEY = "preprocess"


class OnnxNetwork(NamedTuple):
    """A network in an ONNX file, on the CPU.

    Attributes:
      probabilities: A function from pixels, uint8 `(batch, size, size, channels)`, to probabilities
        `(batch, classes)`, both NumPy arrays.
      preprocess: Preprocessing of its images, and the names of its classes.
    """

    probabilities: Callable[[np.ndarray], np.ndarray]
    preprocess: Preprocess


def describe_preprocess(graph: Any, preprocess: Preprocess) -> None:
    """Write into the metadata of a graph how its images are prepared, and the names of its classes.

    Args:
      graph: The graph of `to_onnx` or `to_onnx_int8`.
      preprocess: The preprocessing.
    """
    entry = graph.metadata_props.add()
    entry.key, entry.value = _KEY, json.dumps(dataclasses.asdict(preprocess))


def load_onnx_network(path: str | os.PathLike[str]) -> OnnxNetwork:
    """Read an ONNX file that `fuse.py --export` wrote, whatever its images and its outputs.

    Args:
      path: The file.

    Returns:
      The network.

    Raises:
      FileNotFoundError: If there is no such file.
      ImportError: If ONNX or ONNX Runtime is not installed.
      ValueError: If ONNX Runtime does not read it, or it says nothing of its preprocessing.
    """
    session = load_session(Path(path))
    strings = session.get_modelmeta().custom_metadata_map
    if _KEY not in strings:
        raise ValueError(f"{path} does not say how its images are prepared: expected a file that fuse --export wrote")
    preprocess = _parse(path, strings[_KEY])
    (images,) = session.get_inputs()
    takes_pixels = images.type == "tensor(uint8)"

    def probabilities(pixels: np.ndarray) -> np.ndarray:
        if takes_pixels:
            return session.run(None, {"images": pixels})[0]
        normalized = np.asarray(normalize(jnp.asarray(pixels), preprocess.mean, preprocess.std))
        logits = session.run(None, {"images": normalized.transpose(0, 3, 1, 2)})[0]
        exponentials = np.exp(logits - logits.max(-1, keepdims=True))
        return exponentials / exponentials.sum(-1, keepdims=True)

    return OnnxNetwork(probabilities, preprocess)


def _parse(path: str | os.PathLike[str], text: str) -> Preprocess:
    try:
        fields: dict[str, Any] = read_json(text)
        return Preprocess(**fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its metadata have {_KEY} {shown(text)}, which cannot be read: {error}") from None
