"""The deploy form as StableHLO, through `jax.export`: weights inside, for any platform. It needs `[stablehlo]`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from repvgg_jax.interop.exportable import require_exportable
from repvgg_jax.models import RepVGG
from repvgg_jax.ops import compiler_options
from repvgg_jax.preprocess import Preprocess, normalize

PLATFORMS = ("cpu", "cuda", "tpu")
"""The platforms that a file is for by default."""


def to_stablehlo(
    model: RepVGG,
    variables: Mapping[str, Any],
    *,
    batch_size: int | None = None,
    image_size: int | None = None,
    preprocess: Preprocess | None = None,
    softmax: bool = True,
    platforms: Sequence[str] = PLATFORMS,
) -> bytes:
    """Serialise a deploy form in float32, weights included.

    `jax.export.deserialize(data).call(images)` runs it on any of the platforms. That takes JAX and flatbuffers alone.

    Args:
      model: The network in its deploy form.
      variables: Its variables, `{'params'}`.
      batch_size: Number of images in a batch, or None for any number.
      image_size: Side length of the images in pixels, or None for any height and width.
      preprocess: Preprocessing to build in. The program then takes uint8 pixels, resized and cropped already, and
        returns probabilities. Without it, the program takes normalised float32 images and returns logits.
      softmax: Whether a program with `preprocess` returns probabilities; otherwise it returns logits.
      platforms: Platforms that the program is for, of 'cpu', 'cuda', 'rocm' and 'tpu'.

    Returns:
      The bytes that `jax.export.Exported.serialize` returns. Images are `(batch, height, width, channels)`.

    Raises:
      ValueError: If the model is in its training form, a size is less than 1, `preprocess` is that of another network,
        or the weights take 2 GiB, which no such file holds.
      ImportError: If flatbuffers is not installed.
    """
    require_serializer()
    channels = require_exportable(model, variables, batch_size=batch_size, image_size=image_size, preprocess=preprocess)
    # The lowerings of `ops` suit one platform each; the plain convolution is what all of them know.
    plain = model.clone(ops="xla", dtype=None)
    constants = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), dict(variables))

    def forward(images: jax.Array) -> jax.Array:
        if preprocess is None:
            return plain.apply(constants, images, train=False)  # type: ignore[return-value]
        pixels = normalize(images, preprocess.mean, preprocess.std)
        logits: Any = plain.apply(constants, pixels, train=False)
        return jax.nn.softmax(logits) if softmax else logits

    batch = "batch" if batch_size is None else str(batch_size)
    sides = ("height, width") if image_size is None else f"{image_size}, {image_size}"
    shape = export.symbolic_shape(f"{batch}, {sides}, {channels}")
    dtype = jnp.float32 if preprocess is None else jnp.uint8
    exported = export.export(jax.jit(forward), platforms=platforms)(jax.ShapeDtypeStruct(shape, dtype))
    return bytes(exported.serialize())


def require_serializer() -> None:
    """Raise an ImportError, with the command that installs it, where there is no flatbuffers."""
    try:
        import flatbuffers  # noqa: F401
    except ImportError as missing:
        raise ImportError('StableHLO files need the extra [stablehlo]: pip install -e ".[stablehlo]"') from missing


def load_stablehlo(path: str | os.PathLike[str]) -> Callable[[Any], jax.Array]:
    """Read a file with the bytes of `to_stablehlo`.

    Args:
      path: The file.

    Returns:
      A function from images to logits, or from pixels to probabilities. It is compiled once for each shape of images.

    Raises:
      FileNotFoundError: If there is no such file.
      ImportError: If flatbuffers is not installed.
      ValueError: If the file is damaged, or holds something else.
    """
    require_serializer()
    data = Path(path).read_bytes()
    try:
        exported = export.deserialize(bytearray(data))
    except Exception as error:  # flatbuffers raises what it stumbles over
        raise ValueError(f"{path} is not a whole file of to_stablehlo ({error!r}): write or copy it again") from None
    return jax.jit(exported.call, compiler_options=compiler_options())
