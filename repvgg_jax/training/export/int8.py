"""Export of a `deploy.safetensors` to integers of 8 bits: calibrated, written and proven on images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from repvgg_jax.fields import at_least, bounded, check_fields, within
from repvgg_jax.files import replace_whole
from repvgg_jax.interop.exportable import OPSET
from repvgg_jax.interop.safetensors import load_deploy
from repvgg_jax.preprocess import Preprocess, normalize
from repvgg_jax.quantize import Range, prepare, saturates
from repvgg_jax.quantize.equalization import require_plain_deploy_form
from repvgg_jax.terminal import printable
from repvgg_jax.training.export.int8_images import Int8Images
from repvgg_jax.training.export.int8_proof import AccuracyLostError, Int8Proof, prove
from repvgg_jax.training.export.requirements import exported_path, require_int8


@dataclasses.dataclass(frozen=True)
class Int8Settings:
    """How a network becomes one of 8 bits, and what it may lose."""

    calibrate: int = bounded(512, at_least(1))
    """Number of training images that set the ranges of the activations."""
    equalize: bool = True
    """Scale the channels first so that they are alike, which changes nothing in float."""
    correct_biases: bool = True
    """Take back by the biases what rounding adds to the mean of each channel."""
    weight_bits: Literal["auto", "7", "8"] = "auto"
    """Bits of a weight. An x86 processor without VNNI needs 7, others take 8; auto is for this machine.
    After training for 8 bits, auto is what the training had."""
    keep_float: tuple[str, ...] = ()
    """Names of blocks, e.g. stage1_block1, or head, that stay in float."""
    allowed_loss: float = bounded(0.5, within(0, 100))
    """Points of accuracy that may be lost. Where more are, nothing is written."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def reduce_range(self) -> bool | None:
        """Whether weights have 7 bits, or None for what this machine needs."""
        return None if self.weight_bits == "auto" else self.weight_bits == "7"


DEFAULT_INT8 = Int8Settings()


def export_int8(
    path: Path,
    images: Int8Images,
    settings: Int8Settings = DEFAULT_INT8,
    *,
    with_preprocess: bool = False,
    opset: int = OPSET,
    ranges: Mapping[str, Range] | None = None,
) -> Int8Proof:
    """Write `NAME.int8.onnx` beside a `NAME.safetensors`, once it is proven to keep the accuracy.

    Args:
      path: The file of the deploy form.
      images: Images to calibrate and to prove with.
      settings: How it is quantized.
      with_preprocess: Whether the file takes uint8 pixels and returns probabilities, instead of normalised images and
        logits.
      opset: Version of the operators, at least 13.
      ranges: Ranges that training in 8 bits found. The weights are then taken as they are: neither equalized nor
        corrected.

    Returns:
      The comparison with the float network.

    Raises:
      AccuracyLostError: If more accuracy is lost than the settings allow. Nothing is written.
      OSError: If the file could not be written.
      ImportError: If ONNX or ONNX Runtime is not installed.
      ValueError: If the network has squeeze-and-excitation units, or `load_deploy` or `to_onnx_int8` raises one.
    """
    require_int8(opset)
    from repvgg_jax.interop.onnx import to_onnx
    from repvgg_jax.interop.onnx_file import describe_preprocess
    from repvgg_jax.interop.onnx_int8 import to_onnx_int8

    deployed = load_deploy(path)
    model, variables, preprocess, _ = deployed
    require_plain_deploy_form(model)
    normalized = _normalized(images.calibration, preprocess)
    reduce_range = saturates() if settings.reduce_range is None else settings.reduce_range
    equal, corrected = prepare(
        model,
        variables,
        jnp.asarray(normalized),
        equal_channels=settings.equalize and ranges is None,
        corrected_biases=settings.correct_biases and ranges is None,
        reduce_range=reduce_range,
        keep_float=settings.keep_float,
    )
    graph = partial(
        to_onnx,
        model,
        image_size=preprocess.image_size,
        layout="NHWC" if with_preprocess else "NCHW",
        preprocess=preprocess if with_preprocess else None,
        opset=opset,
    )
    quantize = partial(
        to_onnx_int8,
        images=images.calibration if with_preprocess else normalized.transpose(0, 3, 1, 2),
        reduce_range=reduce_range,
        keep_float=settings.keep_float,
        ranges=ranges,
    )

    def take(pixels: np.ndarray) -> np.ndarray:
        return pixels if with_preprocess else _normalized(pixels, preprocess).transpose(0, 3, 1, 2)

    # Without the softmax, which hides what a network computes.
    quantized = quantize(graph(corrected, softmax=False))
    floating, reference = graph(variables, softmax=False), graph(equal, softmax=False)
    proof = prove(floating, quantized, reference, images.batches(), labelled=images.labelled, prepare=take)
    exported = exported_path(path, "onnx-int8")
    try:
        proof.check(settings.allowed_loss, trained=ranges is not None)
    except AccuracyLostError as error:
        older = ". The file of this name there is an older one" if exported.exists() else ""
        raise AccuracyLostError(f"{exported} was not written: {error}{older}", proof) from None
    written = quantize(graph(corrected)) if with_preprocess else quantized
    describe_preprocess(written, preprocess)
    replace_whole(exported, lambda partial_: partial_.write_bytes(written.SerializeToString()))
    return proof


def describe_int8(path: Path, proof: Int8Proof) -> str:
    """Return what `export_int8` found, and what it wrote beside a deploy form, in words for a terminal."""
    return f"{proof}\n\n8 bits: {printable(str(exported_path(path, 'onnx-int8')))}"


def _normalized(pixels: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    return np.asarray(normalize(jnp.asarray(pixels), preprocess.mean, preprocess.std))
