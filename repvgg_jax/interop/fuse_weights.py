"""PyTorch weights, fused into a `deploy.safetensors` and proven."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.files import require_writable
from repvgg_jax.interop.safetensors import save_deploy
from repvgg_jax.interop.torch.weights_file import Weights, load_weights
from repvgg_jax.models import RepVGG, fuse_model
from repvgg_jax.models.shapes import input_channels
from repvgg_jax.models.variants import canonical_name
from repvgg_jax.ops import compiler_options
from repvgg_jax.preprocess import imagenet_preprocess
from repvgg_jax.reparam import Agreement, assert_equivalent

_IMAGES, _LARGEST_SIDE = 8, 512
# The fold is proven in float64, where nothing but a mistake is this large; float32 only rounds.
_FLOAT64_TOLERANCE, _FLOAT32_TOLERANCE = 1e-9, 1e-4


class FusedWeights(NamedTuple):
    """The result of fusing a file of weights.

    Attributes:
      agreement: How the logits of both forms compare in float32, or None where the weights were of a deploy form
        already.
      source: Words that say which weights of the file were taken.
    """

    agreement: Agreement | None
    source: str


def fuse_weights(
    path: str | os.PathLike[str],
    variant: str,
    output: str | os.PathLike[str] | None,
    *,
    entry: str | None = None,
    class_names: Sequence[str] | None = None,
    image_size: int = 224,
    strides: Sequence[int] = (2, 2, 2, 2, 2),
) -> FusedWeights:
    """Fuse a file of PyTorch weights and save the deploy form.

    There are no test images to verify on, so both forms see images of noise. In float64 they must agree to 1e-9 of the
    largest logit, and in float32 to 1e-4.

    Args:
      path: The file of weights, in either form; see `load_weights`. Weights of a deploy form are saved as they are.
      variant: The published network that the weights are of.
      output: The file to write. None verifies without writing.
      entry: Which weights to take from a file that holds several; see `load_weights`.
      class_names: One name for each class. By default they are 'class 0', 'class 1' and so on.
      image_size: Side length in pixels of the images that the network is for. They are normalised as for ImageNet, grey
        ones by the averages over ImageNet's three channels.
      strides: Strides of the stem and of stage 1 to 4.

    Returns:
      How the two forms compare, and which weights of the file were taken.

    Raises:
      EquivalenceError: If the two forms are not the same function. Nothing is written then.
      FileNotFoundError: If there is no such file.
      ValueError: If `load_weights` raises one, there are not as many names as classes, `output` is the file of the
        weights, or a file is to be written for images that are neither grey nor RGB.
      ImportError: If the file takes PyTorch to read, and it is not installed.
      OSError: If the output cannot be written.
    """
    variant = canonical_name(variant)
    if output is not None:
        require_writable(Path(output))
        if Path(output).exists() and Path(output).samefile(path):
            raise ValueError(
                f"output is {output}, the weights themselves: expected another file, since these are needed"
            )
    loaded = load_weights(path, variant, entry=entry, strides=strides)
    names = [f"class {index}" for index in range(loaded.model.num_classes)] if class_names is None else class_names
    if len(names) != loaded.model.num_classes:
        raise ValueError(f"there are {len(names)} class names: expected {loaded.model.num_classes}, one for each logit")
    channels = input_channels(loaded.variables)
    if output is not None and channels not in (1, 3):
        raise ValueError(
            f"{path} has a stem of {channels} channels: expected 1 (gray) or 3 (RGB), which images are read as. "
            "--check-only verifies without a file to write; in Python, fuse_model(*load_weights(PATH, VARIANT)) fuses"
        )
    preprocess = imagenet_preprocess(names, image_size=image_size, gray=channels == 1)
    model, variables = loaded
    found = None
    if not model.deploy:
        model, variables = fuse_model(*loaded)
        found = _prove(loaded, (model, variables), image_size)
    if output is not None:
        save_deploy(Path(output), variant, model, variables, preprocess)
    return FusedWeights(found, loaded.source)


def _prove(loaded: Weights, fused: tuple[RepVGG, Any], image_size: int) -> Agreement:
    # Sides of 512 pixels at most: what is wrong with a kernel is wrong everywhere, and larger ones fill the memory.
    side = min(image_size, _LARGEST_SIDE)
    noise = np.random.default_rng(0).normal(size=(_IMAGES, side, side, input_channels(loaded.variables)))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), loaded.variables)
        forms = (loaded.model.clone(param_dtype=jnp.float64), wide)
        # Two small images, since float64 is slow.
        small = jnp.asarray(noise[:2, :64, :64])
        assert_equivalent(_logits(*forms, small), _logits(*fuse_model(*forms), small), rtol=_FLOAT64_TOLERANCE)
    images = jnp.asarray(noise, jnp.float32)
    with jax.default_matmul_precision("float32"):
        return assert_equivalent(
            _logits(loaded.model, loaded.variables, images), _logits(*fused, images), rtol=_FLOAT32_TOLERANCE
        )


def _logits(model: RepVGG, variables: Any, images: jax.Array) -> np.ndarray:
    forward = jax.jit(partial(model.apply, train=False), compiler_options=compiler_options())
    return np.asarray(forward(variables, images))
