"""What a network loses in 8 bits: accuracy, predictions, and where the noise comes from."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from repvgg_jax.invocation import command
from repvgg_jax.reparam import Agreement, agreement
from repvgg_jax.training.steps.mesh import Batch

# One form must tell images apart for its accuracy to say anything.
_SMALLEST_SPREAD = 1e-4
# Enough pixels for a ratio of two sums; all activations of all layers are in memory at once.
_LAYER_IMAGES, _TIMED_IMAGES, _REPEATS = 32, 64, 15
_WORST = 3


class AccuracyLostError(ValueError):
    """A network in 8 bits loses more accuracy than is allowed, or nothing is proven.

    Args:
      message: What is lost, and what can be done.
      proof: The comparison, which has the figures of every layer.
    """

    def __init__(self, message: str, proof: Int8Proof):
        super().__init__(message)
        self.proof = proof


class Side(NamedTuple):
    """One of the two networks that are compared.

    Attributes:
      accuracy: Share of the images whose label is predicted.
      megabytes: Size of the file.
      images_per_second: Images per second in ONNX Runtime on this machine.
    """

    accuracy: float
    megabytes: float
    images_per_second: float


class Int8Proof(NamedTuple):
    """A network in 8 bits beside the float network it was made of, on every test image.

    Attributes:
      floating: The float network.
      quantized: The network in 8 bits.
      agreement: How the logits compare.
      decibels: Signal to noise of the logits: their energy about the mean of each class over that of the differences.
      layers: Signal to noise in decibels behind each layer, by its name, in the order of computation.
      labelled: Whether the labels are those of the images. Otherwise they are what the float network predicts.
      spread: How much the images change the logits of the float network, as in `Agreement`.
    """

    floating: Side
    quantized: Side
    agreement: Agreement
    decibels: float
    layers: Mapping[str, float]
    labelled: bool
    spread: float

    @property
    def lost(self) -> float:
        """Points of accuracy that 8 bits lose, in percent of the images."""
        return 100 * (self.floating.accuracy - self.quantized.accuracy)

    def table(self, style: str = "simple") -> str:
        """Return the comparison as a table, in a format of tabulate."""
        sides = (self.floating, self.quantized)
        rows = [
            (
                "test accuracy" if self.labelled else "predicted as by float",
                *(f"{100 * side.accuracy:.2f} %" for side in sides),
            ),
            ("file", *(f"{side.megabytes:.2f} MB" for side in sides)),
            ("images per second, ONNX Runtime", *(f"{side.images_per_second:,.0f}" for side in sides)),
            ("signal to noise of the logits", "", f"{self.decibels:.1f} dB"),
            ("predictions changed", "", f"{self.agreement.predictions_changed:,} of {self.agreement.compared:,}"),
        ]
        headers = ("", "float", "8 bits")
        return tabulate(rows, headers, tablefmt=style, disable_numparse=True, colalign=("left", "right", "right"))

    def layer_table(self, style: str = "simple") -> str:
        """Return the signal to noise of the layers as a table, in a format of tabulate."""
        rows = [(name, f"{decibels:.1f} dB") for name, decibels in self.layers.items()]
        return tabulate(rows, ("layer", "signal to noise"), tablefmt=style, colalign=("left", "right"))

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self.layer_table()}"

    def check(self, allowed: float, *, trained: bool = False) -> None:
        """Raise an error where more is lost than allowed, or nothing is proven.

        Args:
          allowed: Points of accuracy that may be lost.
          trained: Whether the network was trained for 8 bits already.

        Raises:
          AccuracyLostError: If more are. The message names the layers that add most noise, and the remedies.
        """
        if not self.spread > _SMALLEST_SPREAD:
            raise AccuracyLostError(
                f"nothing is proven: the float network answers every image the same, or with NaN (its logits differ by "
                f"{self.spread:.3g} of the largest); take other images",
                self,
            )
        if self.lost <= allowed:
            return
        worst = " ".join(self.worst_layers())
        what = "points of accuracy" if self.labelled else "% of the predictions"
        longer = "longer " if trained else ""
        raise AccuracyLostError(
            f"8 bits lose {self.lost:.2f} {what} ({100 * self.floating.accuracy:.2f} % to "
            f"{100 * self.quantized.accuracy:.2f} %), allowed {allowed:g}. Most noise arises in {worst}: keep these in "
            f"float (--keep-float {worst}), allow more (--allowed-loss), or train {longer}for 8 bits "
            f"({command('train')} … --quantize-aware)",
            self,
        )

    def worst_layers(self) -> list[str]:
        """Return the names of the layers that add most noise, the worst first."""
        noise = {name: 10 ** (-decibels / 10) for name, decibels in self.layers.items()}
        before = dict(zip(noise, [0.0, *noise.values()], strict=False))
        return sorted(noise, key=lambda name: before[name] - noise[name])[:_WORST]


def prove(
    floating: Any,
    quantized: Any,
    reference: Any,
    batches: Iterable[Batch],
    *,
    labelled: bool,
    prepare: Callable[[np.ndarray], np.ndarray],
) -> Int8Proof:
    """Run two ONNX graphs on every image, and compare them.

    Args:
      floating: The float graph, which returns logits.
      quantized: The graph in 8 bits, which returns logits.
      reference: The float graph whose layers those of `quantized` are compared with: the same function, with channels
        scaled as in `quantized`.
      batches: The images, as for `Int8Images`.
      labelled: Whether the batches have labels.
      prepare: Turns pixels, uint8 `(batch, height, width, channels)`, into what the graphs take.

    Returns:
      The comparison.
    """
    from repvgg_jax.interop.onnx import require_runtime

    require_runtime()
    sessions = [_session(graph) for graph in (floating, quantized)]
    logits: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    labels, first = [], np.zeros(0)
    for batch in batches:
        mask = np.asarray(batch["mask"])
        images = prepare(np.asarray(batch["image"])[mask])
        first = first if len(first) else images
        labels.append(np.asarray(batch["label"])[mask])
        for session, side in zip(sessions, logits, strict=True):
            side.append(session.run(None, {"images": images})[0])
    expected, found = (np.concatenate(side).astype(np.float64) for side in logits)
    truth = np.concatenate(labels) if labelled else expected.argmax(-1)
    rates = _images_per_second(sessions, first[:_TIMED_IMAGES])
    sides = [
        Side(float(np.mean(side.argmax(-1) == truth)), graph.ByteSize() / 1e6, rate)
        for side, graph, rate in zip((expected, found), (floating, quantized), rates, strict=True)
    ]
    signal = expected - expected.mean(0)
    return Int8Proof(
        floating=sides[0],
        quantized=sides[1],
        agreement=agreement(expected, found),
        decibels=_decibels(signal, found - expected),
        layers=_layers(reference, quantized, first[:_LAYER_IMAGES]),
        labelled=labelled,
        spread=agreement(expected, expected).spread,
    )


def _session(graph: Any) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # The threads of a session that waits for its turn would take the cores from the other.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _images_per_second(sessions: list[Any], images: np.ndarray) -> list[float]:
    """The median of calls that take turns."""
    times: list[list[float]] = [[] for _ in sessions]
    for repeat in range(_REPEATS + 1):
        for session, seconds in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session.run(None, {"images": images})
            if repeat:  # the first call warms up
                seconds.append(time.perf_counter() - start)
    return [len(images) / statistics.median(seconds) for seconds in times]


def _layers(reference: Any, quantized: Any, images: np.ndarray) -> dict[str, float]:
    from repvgg_jax.interop.onnx_int8 import layer_nodes

    expected, found = (_activations(graph, images) for graph in (reference, quantized))
    decibels = {}
    for name, nodes in layer_nodes(reference).items():
        (tensor,) = next(node for node in reference.graph.node if node.name == nodes[-1]).output
        # In 8 bits the value that the next layer reads; a layer in float has none.
        rounded = found.get(f"{tensor}_DequantizeLinear_Output", found.get(tensor))
        decibels[name] = _decibels(expected[tensor], rounded - expected[tensor])
    return decibels


def _activations(graph: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    import onnx
    from onnxruntime.quantization import qdq_loss_debug

    with tempfile.TemporaryDirectory() as directory:
        path, augmented = Path(directory) / "graph.onnx", Path(directory) / "augmented.onnx"
        onnx.save(graph, path)
        qdq_loss_debug.modify_model_output_intermediate_tensors(path, augmented)
        collected = qdq_loss_debug.collect_activations(str(augmented), iter([{"images": images}]))
    return {name: np.concatenate([each.ravel() for each in values]) for name, values in collected.items()}


def _decibels(signal: np.ndarray, noise: np.ndarray) -> float:
    energies = [float(np.square(each, dtype=np.float64).sum()) for each in (signal, noise)]
    if not all(energies):
        return math.inf if energies[0] else 0.0
    return 10 * math.log10(energies[0] / energies[1])
