"""`repvgg-predict`, or `python -m repvgg_jax.predict`: classify image files by a trained network."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TextIO

import tyro

from repvgg_jax.cli.compilation_cache import keep_compiled_programs
from repvgg_jax.cli.devices import require_devices
from repvgg_jax.cli.exit_status import STATUSES, ExitStatus, guard
from repvgg_jax.cli.output import Output, fail
from repvgg_jax.data.sources.image_files import describe_left_out
from repvgg_jax.data.sources.image_files import find_images as find_below
from repvgg_jax.interop.safetensors import load_deploy
from repvgg_jax.invocation import command
from repvgg_jax.predict.classify import EXPECTED, Prediction, predict
from repvgg_jax.terminal import printable

_DESCRIPTION = (
    "Classify image files by the network in a deploy.safetensors or an ONNX file, and print the likeliest classes."
)
_LONGEST_LIST = 2**28


def list_images(
    arguments: Iterable[str], lines: Iterable[str] = (), *, say: Callable[[str], object] = lambda line: None
) -> list[str]:
    """Expand what the command line names into image files.

    Args:
      arguments: Files, which are taken as they are; directories, which stand for the images that training would find in
        them and below, sorted; and '-', which stands for `lines`.
      lines: Paths of files and directories, exact to the last space. Empty ones are skipped.
      say: Is told, in one line for each directory, what is left out there.

    Returns:
      Paths of files, and of directories that cannot be read, or that are one of `lines` and hold no image. `predict`
      has an error for each such directory.

    Raises:
      FileNotFoundError: If a directory among the arguments holds no image.
    """
    found: list[str] = []
    for argument in arguments:
        if argument == "-":
            for line in filter(None, lines):
                found += (_below(line, say) or [line]) if os.path.isdir(line) else [line]
        elif os.path.isdir(argument):
            below = _below(argument, say)
            if not below:
                raise FileNotFoundError(f"{printable(argument)} holds no image: {EXPECTED}")
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
    """Read the paths in a list.

    There is one a line. Where the last byte of the list is NUL, there is one before each NUL, as `find -print0` writes
    them.

    Args:
      stream: A stream of text, or of text with the bytes beneath it. None, as a closed standard input is, stands for an
        empty list.

    Returns:
      Paths as `os.fsdecode` gives them, so that bytes which are not UTF-8 name the same file.

    Raises:
      ValueError: If the list is longer than 256 MiB.
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
    """The deploy.safetensors of a network, or an ONNX file that repvgg-fuse wrote."""
    images: tyro.conf.Positional[tuple[str, ...]]
    """Image files, directories to search for images, or - for a list on standard input.
    The list has one path a line, or each path ends with NUL as find -print0 writes it."""
    top: int = 5
    """Number of classes to print for each image, the likeliest first."""
    batch_size: int = 32
    """Number of images in a call of the network."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object a line: {"path", "classes": [{"name", "probability"}, …]} or {"path", "error"}.
    All of it is ASCII. Paths are exact: a byte XX that is not UTF-8 is \\udcXX, which os.fsencode turns back."""


def predict_command(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status, an `ExitStatus`."""
    return guard(partial(_classify, arguments))


def _classify(arguments: Sequence[str], output: Output) -> int:
    parsed = tyro.cli(_Arguments, args=arguments, prog=command("predict"), description=f"{_DESCRIPTION} {STATUSES}")
    status = ExitStatus.DONE
    require_devices()
    keep_compiled_programs()
    lines = read_list(sys.stdin) if "-" in parsed.images and sys.stdin else []
    paths = list_images(parsed.images, lines, say=partial(print, file=sys.stderr))
    if not paths:
        raise ValueError("no image is named: give files, directories, or - and a list on standard input")
    network: Any
    if parsed.weights.suffix == ".onnx":
        from repvgg_jax.interop.onnx_file import load_onnx_network

        network = load_onnx_network(parsed.weights)
    else:
        network = load_deploy(parsed.weights)
    for prediction in predict(network, paths, top=parsed.top, batch_size=parsed.batch_size):
        if output.failure is not None:
            break
        if prediction.error is not None:
            status = ExitStatus.FAILED
        if parsed.as_json:
            print(json.dumps(_as_json(prediction)), flush=True)
        elif prediction.error is not None:
            fail(f"{printable(prediction.path)}: {prediction.error}", status)
        else:
            shown = [f"{100 * probability:8.2f} %  {printable(name)}" for name, probability in prediction.classes]
            print("\n".join([printable(prediction.path), *shown]), flush=True)
    return status


def _as_json(prediction: Prediction) -> dict[str, object]:
    if prediction.error is not None:
        return {"path": prediction.path, "error": prediction.error}
    classes = [{"name": name, "probability": probability} for name, probability in prediction.classes]
    return {"path": prediction.path, "classes": classes}
