"""The deploy form as StableHLO, through `jax.export`: weights inside, for any platform. Extra `[stablehlo]`."""

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
    """Serialise a deploy form, in float32, weights included.

    `jax.export.deserialize(data).call(images)` runs it, on any of the platforms, with jax alone.

    Args:
      model: in its deploy form.
      variables: of that model, `{'params'}`.
      batch_size: images in a batch; any number where not given.
      image_size: side of the images; any height and width where not given.
      preprocess: bake it in: images are then uint8 pixels, resized and cropped already, and results probabilities.
        Otherwise images are normalised float32, and results logits.
      softmax: with `preprocess`, whether results are probabilities; logits where not.
      platforms: of 'cpu', 'cuda', 'rocm', 'tpu'.

    Returns:
      What `jax.export.Exported.serialize` returns, as bytes. Images are `(batch, height, width, channels)`.

    Raises:
      ValueError: the model is in its training form, a size is less than 1, `preprocess` is that of another network,
        or the weights take 2 GiB, which no such file holds.
      ImportError: flatbuffers is missing.
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
    """Raise an ImportError where there is no flatbuffers, with the command that installs it."""
    try:
        import flatbuffers  # noqa: F401
    except ImportError as missing:
        raise ImportError('StableHLO files need the extra [stablehlo]: pip install -e ".[stablehlo]"') from missing


def load_stablehlo(path: str | os.PathLike[str]) -> Callable[[Any], jax.Array]:
    """Read a file with the bytes of `to_stablehlo`.

    Returns:
      A function from images to logits, or from pixels to probabilities; compiled once for each shape.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: flatbuffers is missing.
      ValueError: it is damaged, or no such file.
    """
    require_serializer()
    data = Path(path).read_bytes()
    try:
        exported = export.deserialize(bytearray(data))
    except Exception as error:  # flatbuffers raises what it stumbles over
        raise ValueError(f"{path} is not a whole file of to_stablehlo ({error!r}): write or copy it again") from None
    return jax.jit(exported.call, compiler_options=compiler_options())
