"""Export a `deploy.safetensors`, and prove what was written in its own runtime, on images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.data import normalize
from repvgg_jax.interop.safetensors import Deployed, load_deploy
from repvgg_jax.reparam import Agreement, EquivalenceError, agreement
from repvgg_jax.training.steps import Batch

Format = Literal["onnx", "stablehlo"]
# Of the largest logit, or of probability 1. Runtimes order their sums differently.
TOLERANCE = 1e-4


def export_deploy(
    path: Path,
    formats: Sequence[Format],
    batches: Callable[[], Iterable[Batch]] | None = None,
    *,
    with_preprocess: bool = False,
) -> dict[Path, Agreement]:
    """Write `NAME.onnx` and `NAME.stablehlo` beside a `NAME.safetensors`.

    Each file is read back and run on every image, and removed where it does not compute what the deploy form computes.

    Args:
      path: of the deploy form.
      formats: of the files.
      batches: makes a fresh pass over real images, uint8 `(batch, height, width, channels)`; eight images of noise
        where not given.
      with_preprocess: the files take uint8 pixels and return probabilities, instead of normalised images and logits.

    Returns:
      How the outputs of each file compare with those of the deploy form.

    Raises:
      EquivalenceError: a file computes something else; it is removed.
      ImportError: the extra of a format is not installed.
    """
    deployed = load_deploy(path)
    images = partial(_noise, deployed) if batches is None else batches
    found: dict[Path, Agreement] = {}
    for name in formats:
        exported = path.with_suffix(f".{name}")
        unproven = exported.with_name(exported.name + ".partial")
        try:
            run = _WRITERS[name](unproven, deployed, with_preprocess)
            found[exported] = _compare(run, deployed, images(), with_preprocess)
            if not found[exported].relative <= TOLERANCE:
                raise EquivalenceError(
                    f"{exported} was not written: in its runtime it computes something else, largest difference "
                    f"{found[exported].relative:.3g} of the largest output (allowed {TOLERANCE:.0e}), "
                    f"{found[exported].predictions_changed} of {found[exported].compared} predictions changed; another "
                    "version of the runtime may do better"
                )
            unproven.replace(exported)
        finally:
            unproven.unlink(missing_ok=True)
    return found


def require_writing(formats: Sequence[Format], check_only: bool) -> None:
    """Raise a ValueError where something is to be exported and nothing to be written."""
    if formats and check_only:
        raise ValueError("export and check_only are both given: expected one of them, since check_only writes nothing")


def describe(exported: Mapping[Path, Agreement]) -> str:
    """What `export_deploy` found, a line for each file."""
    return "\n".join(
        f"{path}: largest difference {found.relative:.1e} of the largest output, {found.predictions_changed} of "
        f"{found.compared:,} predictions changed"
        for path, found in exported.items()
    )


def _noise(deployed: Deployed) -> list[Batch]:
    preprocess = deployed.preprocess
    shape = (8, preprocess.image_size, preprocess.image_size, preprocess.channels)
    return [{"image": np.random.default_rng(0).integers(0, 256, shape, np.uint8), "mask": np.ones(8, bool)}]


def _write_onnx(path: Path, deployed: Deployed, with_preprocess: bool) -> Callable[[np.ndarray], np.ndarray]:
    from repvgg_jax.interop.onnx import load_onnx, to_onnx

    preprocess = deployed.preprocess
    graph = to_onnx(
        deployed.model,
        deployed.variables,
        image_size=preprocess.image_size,
        layout="NHWC" if with_preprocess else "NCHW",
        preprocess=preprocess if with_preprocess else None,
    )
    path.write_bytes(graph.SerializeToString())
    run = load_onnx(path)
    return run if with_preprocess else lambda images: run(images.transpose(0, 3, 1, 2))


def _write_stablehlo(path: Path, deployed: Deployed, with_preprocess: bool) -> Callable[[np.ndarray], np.ndarray]:
    from repvgg_jax.interop.stablehlo import load_stablehlo, to_stablehlo

    preprocess = deployed.preprocess
    path.write_bytes(
        to_stablehlo(
            deployed.model,
            deployed.variables,
            image_size=preprocess.image_size,
            preprocess=preprocess if with_preprocess else None,
        )
    )
    run = load_stablehlo(path)
    return lambda images: np.asarray(run(images))


_WRITERS: dict[str, Callable[[Path, Deployed, bool], Callable[[np.ndarray], np.ndarray]]] = {
    "onnx": _write_onnx,
    "stablehlo": _write_stablehlo,
}


def _compare(
    run: Callable[[np.ndarray], np.ndarray], deployed: Deployed, batches: Iterable[Batch], with_preprocess: bool
) -> Agreement:
    preprocess = deployed.preprocess

    @jax.jit
    def reference(variables: Any, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        images = normalize(pixels, preprocess.mean, preprocess.std)
        logits: Any = deployed.model.apply(variables, images, train=False)
        return images, jax.nn.softmax(logits) if with_preprocess else logits

    expected, found = [], []
    with jax.default_matmul_precision("float32"):
        for batch in batches:
            pixels = np.asarray(batch["image"])[np.asarray(batch["mask"])]
            images, outputs = reference(deployed.variables, jnp.asarray(pixels))
            expected.append(np.asarray(outputs))
            found.append(run(pixels if with_preprocess else np.array(images)))
    return agreement(np.concatenate(expected), np.concatenate(found))
