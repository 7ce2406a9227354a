"""What a trained network sees in images: `python -m repvgg_jax.predict deploy.safetensors cat.jpg DIRECTORY …`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from repvgg_jax.compilation_cache import keep_compiled_programs
from repvgg_jax.data import fit, normalize, read_image
from repvgg_jax.data.find import EXTENSIONS
from repvgg_jax.devices import require_devices
from repvgg_jax.interop.preprocess import Preprocess
from repvgg_jax.interop.safetensors import Deployed, load_deploy
from repvgg_jax.models import compile_inference
from repvgg_jax.terminal import Output, fail, printable, run_command


class Prediction(NamedTuple):
    """What a network sees in one image.

    Attributes:
      path: of the image.
      classes: `(name, probability)`, the likeliest first.
      error: why there are no classes, or None.
    """

    path: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None


def predict(
    deployed: Deployed, paths: Sequence[str | os.PathLike[str]], *, top: int = 5, batch_size: int = 32
) -> Iterator[Prediction]:
    """Classify image files, as the network's evaluation would: resized, centre-cropped and normalised alike.

    Args:
      deployed: from `load_deploy`.
      paths: of image files.
      top: classes per image, at most as many as there are.
      batch_size: images per call of the network; the next batch is decoded, in threads, while it computes.

    Yields:
      One prediction for each path, in order. A file that is missing or cannot be decoded has an `error`.

    Raises:
      ValueError: `top` or `batch_size` is less than 1.
    """
    for name, value in (("top", top), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}: expected at least 1")
    if not paths:
        return
    preprocess = deployed.preprocess
    size = min(batch_size, len(paths))
    shape = (size, preprocess.image_size, preprocess.image_size, preprocess.channels)
    forward = compile_inference(deployed.model, deployed.variables, jax.ShapeDtypeStruct(shape, jnp.float32))
    prepare = jax.jit(partial(normalize, mean=preprocess.mean, std=preprocess.std))
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
            probabilities = np.asarray(jax.nn.softmax(forward(prepare(images))))
            for path, result, row in zip(chunk, results, probabilities, strict=False):
                if isinstance(result, str):
                    yield Prediction(path, error=result)
                    continue
                best = np.argsort(-row, kind="stable")[:top]
                yield Prediction(path, tuple((preprocess.class_names[i], float(row[i])) for i in best))


def _read(path: str, preprocess: Preprocess) -> np.ndarray | str:
    try:
        image = read_image(path, preprocess.channels)
        return fit(image, preprocess.image_size, preprocess.eval_resize, preprocess.interpolation)
    except (OSError, ValueError) as error:
        return str(error)


def find_images(arguments: Iterable[str], lines: Iterable[str] = ()) -> list[str]:
    """Expand what the command line names into image files.

    Args:
      arguments: files, which are taken as they are; directories, which stand for the images in them and below,
        sorted; '-', which stands for `lines`.
      lines: paths of files, one each, empty ones passed over.

    Raises:
      FileNotFoundError: a directory holds no image.
    """
    found: list[str] = []
    for argument in arguments:
        if argument == "-":
            found += [line for line in (line.strip() for line in lines) if line]
        elif Path(argument).is_dir():
            below = sorted(str(path) for path in Path(argument).rglob("*") if path.suffix.lower() in EXTENSIONS)
            if not below:
                raise FileNotFoundError(f"{argument} holds no image: expected files ending in {', '.join(EXTENSIONS)}")
            found += below
        else:
            found.append(argument)
    return found


@dataclasses.dataclass(frozen=True)
class _Arguments:
    weights: tyro.conf.Positional[Path]
    """A deploy.safetensors."""
    images: tyro.conf.Positional[tuple[str, ...]]
    """Image files; directories, searched for images; - for a list of files on standard input."""
    top: int = 5
    """Classes per image."""
    batch_size: int = 32
    """Images per call of the network."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object a line: {"path", "classes": [{"name", "probability"}, …]} or {"path", "error"}."""


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Returns:
      The exit status: 0, 1 where an image could not be read, 2 for bad input.
    """
    return run_command(partial(_classify, arguments))


def _classify(arguments: Sequence[str], output: Output) -> int:
    parsed = tyro.cli(_Arguments, args=arguments, prog="python -m repvgg_jax.predict", description=__doc__)
    status = 0
    try:
        require_devices()
        keep_compiled_programs()
        paths = find_images(parsed.images, sys.stdin or ())
        if not paths:
            raise ValueError("no image is named: give files, directories, or - and a list on standard input")
        deployed = load_deploy(parsed.weights)
        for prediction in predict(deployed, paths, top=parsed.top, batch_size=parsed.batch_size):
            if output.failure is not None:
                break
            if prediction.error is not None:
                status = 1
            if parsed.as_json:
                print(json.dumps(_as_json(prediction), ensure_ascii=not _encodes_all(sys.stdout)), flush=True)
            elif prediction.error is not None:
                fail(prediction.error, 1)
            else:
                lines = [f"{100 * probability:8.2f} %  {printable(name)}" for name, probability in prediction.classes]
                print("\n".join([printable(prediction.path), *lines]), flush=True)
    except (OSError, ValueError) as error:
        return fail(str(error), 2)
    return status


def _encodes_all(stream: TextIO) -> bool:
    return (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")


def _as_json(prediction: Prediction) -> dict[str, object]:
    if prediction.error is not None:
        return {"path": prediction.path, "error": prediction.error}
    classes = [{"name": name, "probability": probability} for name, probability in prediction.classes]
    return {"path": prediction.path, "classes": classes}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
