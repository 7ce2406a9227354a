"""Export of a `deploy.safetensors`: what is written is proven in its own runtime, on images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.files import replace_whole
from repvgg_jax.interop.exportable import OPSET
from repvgg_jax.interop.safetensors import Deployed, load_deploy
from repvgg_jax.ops import compiler_options
from repvgg_jax.preprocess import Preprocess, normalize
from repvgg_jax.reparam import Agreement, EquivalenceError, agreement
from repvgg_jax.terminal import printable
from repvgg_jax.training.export.requirements import Format, exported_path, require_export
from repvgg_jax.training.steps.mesh import Batch

_Run = Callable[[np.ndarray], np.ndarray]
# Of the largest logit, and of the largest probability. Runtimes order their sums differently.
TOLERANCE = 1e-4
_NOISE_IMAGES = 8


class Proof(NamedTuple):
    """How the logits of a file, read back, compare with those of the deploy form.

    Attributes:
      agreement: How the logits compare, also where the file returns probabilities.
      images: What they were computed of, 'test images' or 'images of noise'.
    """

    agreement: Agreement
    images: str


def export_deploy(
    path: Path,
    formats: Sequence[Format],
    batches: Callable[[], Iterable[Batch]] | None = None,
    *,
    with_preprocess: bool = False,
    opset: int = OPSET,
) -> dict[Path, Proof]:
    """Write `NAME.onnx` and `NAME.stablehlo` beside a `NAME.safetensors`.

    Each file is read back and run on every image. It is removed where it does not compute what the deploy form
    computes.

    Args:
      path: The file of the deploy form.
      formats: Formats to write. "onnx-int8" is left to `export_int8`, which takes images to calibrate with.
      batches: Returns a fresh pass over test images, uint8 `(batch, height, width, channels)`. By default there are
        eight images of noise.
      with_preprocess: Whether the files take uint8 pixels and return probabilities, instead of normalised images and
        logits.
      opset: Version of the operators of the ONNX file.

    Returns:
      How the outputs of each file compare with those of the deploy form, and on which images.

    Raises:
      EquivalenceError: If a file computes something else, or the images prove nothing. It is removed, and those before
        it stay.
      OSError: If a file could not be written. Those before it stay, and are named.
      ImportError: If the extra of a format is not installed.
      ValueError: If there is no such `opset`, or `load_deploy`, `to_onnx` or `to_stablehlo` raises one.
    """
    require_export(path, formats, opset=opset)
    deployed = load_deploy(path)
    images = partial(_noise, deployed) if batches is None else batches
    kind = "images of noise" if batches is None else "test images"
    found: dict[Path, Proof] = {}
    for name in dict.fromkeys(formats):
        if name == "onnx-int8":
            continue
        exported = exported_path(path, name)
        prove = partial(_write_proven, deployed=deployed, images=images, with_preprocess=with_preprocess, opset=opset)
        try:
            found[exported] = Proof(prove(exported, name), kind)
        except EquivalenceError as error:
            raise EquivalenceError(
                f"{exported} was not written: in its runtime it computes something else than {path}, or the {kind} "
                f"prove nothing: {error}"
            ) from None
        except OSError as error:
            whole = " and ".join(str(each) for each in (path, *found))
            raise OSError(
                f"{exported} could not be written: {error.strerror or error}; make room or give permission, and export "
                f"{path} anew. Whole: {whole}"
            ) from error
    return found


def describe(exported: Mapping[Path, Proof]) -> str:
    """Return what `export_deploy` found, with a line for each file."""
    return "\n".join(
        f"{printable(str(path))}: largest difference {found.relative:.1e} of the largest logit, "
        f"{found.predictions_changed} predictions changed on {found.compared:,} {images}"
        for path, (found, images) in exported.items()
    )


def _noise(deployed: Deployed) -> list[Batch]:
    """Return images of random squares with sides of 1, 2, 4, … pixels.

    No two are alike, so that a network tells them apart.
    """
    size, rng = deployed.preprocess.image_size, np.random.default_rng(0)
    images = []
    for index in range(_NOISE_IMAGES):
        side = -(-size // 2**index)
        squares = rng.integers(0, 256, (side, side, deployed.preprocess.channels), np.uint8)
        images.append(squares.repeat(2**index, 0)[:size].repeat(2**index, 1)[:, :size])
    # Two at a time: large ones would fill the memory.
    return [
        {"image": np.stack(images[start : start + 2]), "mask": np.ones(2, bool)} for start in range(0, len(images), 2)
    ]


def _write_proven(
    exported: Path,
    name: Format,
    *,
    deployed: Deployed,
    images: Callable[[], Iterable[Batch]],
    with_preprocess: bool,
    opset: int,
) -> Agreement:
    found: list[Agreement] = []
    write_format = partial(_write_onnx, opset=opset) if name == "onnx" else _write_stablehlo

    def write(unproven: Path) -> None:
        preprocess = deployed.preprocess if with_preprocess else None
        # Probabilities of 0 and 1 hide what a network computes: the same graph is proven without the softmax, too.
        of_logits = write_format(unproven, deployed, preprocess, softmax=False)
        of_file = write_format(unproven, deployed, preprocess, softmax=True) if with_preprocess else None
        found.append(_compare(of_logits, of_file, deployed, images()))

    replace_whole(exported, write)
    return found[0]


# Both write a file and read it back, as a function of normalised images, or of pixels.
def _write_onnx(path: Path, deployed: Deployed, preprocess: Preprocess | None, *, softmax: bool, opset: int) -> _Run:
    from repvgg_jax.interop.onnx import load_onnx, to_onnx
    from repvgg_jax.interop.onnx_file import describe_preprocess

    graph = to_onnx(
        deployed.model,
        deployed.variables,
        image_size=deployed.preprocess.image_size,
        layout="NCHW" if preprocess is None else "NHWC",
        preprocess=preprocess,
        softmax=softmax,
        opset=opset,
    )
    describe_preprocess(graph, deployed.preprocess)
    path.write_bytes(graph.SerializeToString())
    run = load_onnx(path)
    return run if preprocess else lambda images: run(images.transpose(0, 3, 1, 2))


def _write_stablehlo(path: Path, deployed: Deployed, preprocess: Preprocess | None, *, softmax: bool) -> _Run:
    from repvgg_jax.interop.stablehlo import load_stablehlo, to_stablehlo

    data = to_stablehlo(
        deployed.model,
        deployed.variables,
        image_size=deployed.preprocess.image_size,
        preprocess=preprocess,
        softmax=softmax,
    )
    path.write_bytes(data)
    run = load_stablehlo(path)
    return lambda images: np.asarray(run(images))


def _compare(of_logits: _Run, of_file: _Run | None, deployed: Deployed, batches: Iterable[Batch]) -> Agreement:
    """Compare logits with those of the deploy form and, where a file takes pixels, its probabilities with theirs.

    Raises:
      EquivalenceError: If they differ, or prove nothing.
    """
    preprocess = deployed.preprocess

    def reference(variables: Any, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        images = normalize(pixels, preprocess.mean, preprocess.std)
        logits: Any = deployed.model.apply(variables, images, train=False)
        return images, logits

    compiled = jax.jit(reference, compiler_options=compiler_options())
    expected, found, probabilities = [], [], []
    with jax.default_matmul_precision("float32"):
        for batch in batches:
            pixels = np.asarray(batch["image"])[np.asarray(batch["mask"])]
            images, logits = compiled(deployed.variables, jnp.asarray(pixels))
            if not np.isfinite(images).all():
                raise EquivalenceError(
                    f"nothing would be proven: normalised by mean {preprocess.mean} and std {preprocess.std}, images "
                    "are not finite"
                )
            expected.append(np.asarray(logits))
            found.append(of_logits(pixels if of_file else np.array(images)))
            if of_file:
                probabilities.append(of_file(pixels))
    proven = agreement(np.concatenate(expected), np.concatenate(found)).require(TOLERANCE)
    if of_file:
        _require_softmax(np.concatenate(found), np.concatenate(probabilities))
    return proven


def _require_softmax(logits: np.ndarray, probabilities: np.ndarray) -> None:
    """Check that probabilities are the softmax of logits that one runtime computed of the same images."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    difference = np.abs(exponentials / exponentials.sum(-1, keepdims=True) - probabilities).max()
    # Logits that round otherwise in the second graph move their softmax by as much.
    allowed = min(0.1, TOLERANCE * max(1, np.abs(logits).max()))
    if not difference <= allowed:
        raise EquivalenceError(
            f"its probabilities are not the softmax of its logits: they differ by {difference:.3g}, allowed "
            f"{allowed:.3g}"
        )
