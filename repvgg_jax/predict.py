"""What a trained network sees in images: `python -m repvgg_jax.predict deploy.safetensors cat.jpg DIRECTORY …`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from repvgg_jax.data.sources.image_files import EXTENSIONS, describe_left_out
from repvgg_jax.data.sources.image_files import find_images as find_below
from repvgg_jax.devices import require_devices
from repvgg_jax.interop.safetensors import Deployed, load_deploy
from repvgg_jax.models import compile_inference
from repvgg_jax.ops import compiler_options
from repvgg_jax.preprocess import Preprocess
from repvgg_jax.terminal import Output, fail, printable, run_command

_EXPECTED = f"expected files ending in {', '.join(EXTENSIONS)}"
_LONGEST_LIST = 2**28


class Prediction(NamedTuple):
    """What a network sees in one image.

    Attributes:
      path: of the image.
      classes: `(name, probability)`, the likeliest first.
      error: why there are no classes, without the path; or None.
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
      One prediction for each path, in order. A file that is missing or cannot be decoded has an `error`, and so has one
      that is no regular file, or takes more memory than there is.

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
    normalized = partial(normalize, mean=preprocess.mean, std=preprocess.std)
    prepare = jax.jit(normalized, compiler_options=compiler_options())
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
    """The image as the network takes it, or why there is none."""
    try:
        if os.path.isdir(path):
            os.scandir(path).close()  # raises why it cannot be read
            return f"holds no image: {_EXPECTED}"
        image = read_image(path, preprocess.channels)
        return fit(image, preprocess.image_size, preprocess.eval_resize, preprocess.interpolation)
    # Whatever it is, a MemoryError too, it is of this image: the others are classified.
    except Exception as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        return reason.removeprefix(f"{printable(path)}: ")


def find_images(
    arguments: Iterable[str], lines: Iterable[str] = (), *, say: Callable[[str], object] = lambda line: None
) -> list[str]:
    """Expand what the command line names into image files.

    Args:
      arguments: files, which are taken as they are; directories, which stand for the images that training would find
        in them and below, sorted; '-', which stands for `lines`.
      lines: paths of files and directories, exact to the last space; empty ones are passed over.
      say: is told, in one line for each directory, what is left out there.

    Returns:
      Paths of files, and of the directories that cannot be read, or are one of `lines` and hold no image: `predict` has
      an error for each.

    Raises:
      FileNotFoundError: a directory among the arguments holds no image.
    """
    found: list[str] = []
    for argument in arguments:
        if argument == "-":
            for line in filter(None, lines):
                found += (_below(line, say) or [line]) if os.path.isdir(line) else [line]
        elif os.path.isdir(argument):
            below = _below(argument, say)
            if not below:
                raise FileNotFoundError(f"{printable(argument)} holds no image: {_EXPECTED}")
            found += below
        else:
            found.append(argument)
    return found


def _below(directory: str, say: Callable[[str], object]) -> list[str]:
    found = find_below(directory)
    if found.left_out:
        say(describe_left_out(found.left_out, directory))
    return found.images + list(found.unreadable)


def read_list(stream: TextIO | None) -> list[str]:
    """The paths in a list: one a line, or, where its last byte is NUL, one before each NUL, as `find -print0` writes.

    Args:
      stream: of text or with the bytes beneath it; None, as a closed standard input is, stands for an empty list.

    Returns:
      Paths as `os.fsdecode` gives them, so that bytes which are not UTF-8 name the same file.

    Raises:
      ValueError: the list is longer than 256 MiB.
    """
    if stream is None:
        return []
    content = os.fsencode(getattr(stream, "buffer", stream).read(_LONGEST_LIST + 1))
    if len(content) > _LONGEST_LIST:
        raise ValueError(f"the list on standard input is longer than {_LONGEST_LIST} bytes: give it in parts")
    if content.endswith(b"\0"):
        return [os.fsdecode(entry) for entry in content.split(b"\0")]
    return [os.fsdecode(entry.removesuffix(b"\r")) for entry in content.split(b"\n")]


@dataclasses.dataclass(frozen=True)
class _Arguments:
    weights: tyro.conf.Positional[Path]
    """A deploy.safetensors."""
    images: tyro.conf.Positional[tuple[str, ...]]
    """Image files; directories, searched for images; - for a list on standard input, one path a line, or each ended by
    NUL as find -print0 writes them."""
    top: int = 5
    """Classes per image."""
    batch_size: int = 32
    """Images per call of the network."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object a line: {"path", "classes": [{"name", "probability"}, …]} or {"path", "error"}. All of
    it is ASCII, and paths are exact: a byte XX that is not UTF-8 is \\udcXX, which Python's os.fsencode turns back."""


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
        lines = read_list(sys.stdin) if "-" in parsed.images and sys.stdin else []
        paths = find_images(parsed.images, lines, say=partial(print, file=sys.stderr))
        if not paths:
            raise ValueError("no image is named: give files, directories, or - and a list on standard input")
        deployed = load_deploy(parsed.weights)
        for prediction in predict(deployed, paths, top=parsed.top, batch_size=parsed.batch_size):
            if output.failure is not None:
                break
            if prediction.error is not None:
                status = 1
            if parsed.as_json:
                print(json.dumps(_as_json(prediction)), flush=True)
            elif prediction.error is not None:
                fail(f"{printable(prediction.path)}: {prediction.error}", 1)
            else:
                shown = [f"{100 * probability:8.2f} %  {printable(name)}" for name, probability in prediction.classes]
                print("\n".join([printable(prediction.path), *shown]), flush=True)
    except (OSError, ValueError) as error:
        return fail(str(error), 2)
    return status


def _as_json(prediction: Prediction) -> dict[str, object]:
    if prediction.error is not None:
        return {"path": prediction.path, "error": prediction.error}
    classes = [{"name": name, "probability": probability} for name, probability in prediction.classes]
    return {"path": prediction.path, "classes": classes}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
