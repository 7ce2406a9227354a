"""Classification of image files by a trained network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.data import fit, normalize, read_image
from repvgg_jax.data.sources.image_files import EXTENSIONS
from repvgg_jax.interop.safetensors import Deployed
from repvgg_jax.models import compile_inference
from repvgg_jax.ops import compiler_options
from repvgg_jax.preprocess import Preprocess
from repvgg_jax.terminal import printable

if TYPE_CHECKING:  # it takes the extra [onnx]
    from repvgg_jax.interop.onnx_file import OnnxNetwork

EXPECTED = f"expected files ending in {', '.join(EXTENSIONS)}"


class Prediction(NamedTuple):
    """What a network sees in one image.

    Attributes:
      path: Path of the image.
      classes: Pairs `(name, probability)`, the likeliest first.
      error: Why there are no classes, without the path, or None.
    """

    path: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None


def predict(
    network: Deployed | OnnxNetwork, paths: Sequence[str | os.PathLike[str]], *, top: int = 5, batch_size: int = 32
) -> Iterator[Prediction]:
    """Classify image files. Each is resized, centre-cropped and normalised as in the network's evaluation.

    Args:
      network: The network, from `load_deploy` or `load_onnx_network`.
      paths: Paths of image files.
      top: Number of classes for each image, at most as many as there are.
      batch_size: Number of images in a call of the network. The next batch is decoded, in threads, while it computes.

    Yields:
      A prediction for each path, in order. It has an `error` where the file is missing, no regular file, not to be
      decoded, or larger than memory.

    Raises:
      ValueError: If `top` or `batch_size` is less than 1. It is raised when the first prediction is asked for.
    """
    for name, value in (("top", top), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}: expected at least 1")
    if not paths:
        return
    preprocess = network.preprocess
    size = min(batch_size, len(paths))
    shape = (size, preprocess.image_size, preprocess.image_size, preprocess.channels)
    classify = _compiled(network, shape) if isinstance(network, Deployed) else network.probabilities
    chunks = [[str(path) for path in paths[start : start + size]] for start in range(0, len(paths), size)]
    with ThreadPoolExecutor() as pool:
        read = partial(_read, preprocess=preprocess)
        coming = list(map(partial(pool.submit, read), chunks[0]))
        for chunk, after in zip(chunks, [*chunks[1:], []], strict=True):
            results = [future.result() for future in coming]
            coming = list(map(partial(pool.submit, read), after))
            images = np.zeros(shape, np.uint8)
            for index, result in enumerate(results):
                if isinstance(result, np.ndarray):
                    images[index] = result
            probabilities = classify(images)
            for path, result, row in zip(chunk, results, probabilities, strict=False):
                if isinstance(result, str):
                    yield Prediction(path, error=result)
                    continue
                best = np.argsort(-row, kind="stable")[:top]
                yield Prediction(path, tuple((preprocess.class_names[i], float(row[i])) for i in best))


def _compiled(network: Deployed, shape: tuple[int, int, int, int]) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from pixels to probabilities."""
    mean, std = network.preprocess.mean, network.preprocess.std
    forward = compile_inference(network.model, network.variables, jax.ShapeDtypeStruct(shape, jnp.float32))
    prepare = jax.jit(partial(normalize, mean=mean, std=std), compiler_options=compiler_options())
    return lambda pixels: np.asarray(jax.nn.softmax(forward(prepare(pixels))))


def _read(path: str, preprocess: Preprocess) -> np.ndarray | str:
    """Return the image as the network takes it, or why there is none."""
    try:
        if os.path.isdir(path):
            os.scandir(path).close()  # raises why it cannot be read
            return f"holds no image: {EXPECTED}"
        image = read_image(path, preprocess.channels)
        return fit(image, preprocess.image_size, preprocess.eval_resize, preprocess.interpolation)
    # Whatever it is, a MemoryError too, it is of this image: the others are classified.
    except Exception as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        return reason.removeprefix(f"{printable(path)}: ")
