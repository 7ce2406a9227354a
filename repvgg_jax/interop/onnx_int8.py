"""An ONNX graph of the deploy form with integers of 8 bits in place of its float weights and activations.

Calibration and the surgery of the graph are ONNX Runtime's (`onnxruntime.quantization`). Extra `[onnx]`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from repvgg_jax.interop.onnx import require_runtime
from repvgg_jax.quantize import saturates

try:
    import onnx
    from onnx import helper
except ImportError as missing:
    raise ImportError('ONNX files need the extra [onnx]: pip install -e ".[onnx]"') from missing

Method = Literal["minmax", "percentile"]
# Fixed, so that ranges depend on the images alone.
_CALIBRATION_BATCH = 64
# Cast and normalisation of pixels stay as they are.
_OPERATORS = ["Conv", "Relu", "GlobalAveragePool", "Gemm"]
# ONNX Runtime's entropy is left out. By its defaults it has as many bins as levels, so that one range is left to choose
# from, which is that of the extremes. With more bins it lost 5 to 17 dB of the logits where it was tried.
_OPTIONS: dict[str, dict[str, Any]] = {"minmax": {}, "percentile": {"num_bins": 2048, "percentile": 99.999}}


def to_onnx_int8(
    model: onnx.ModelProto,
    images: np.ndarray,
    *,
    method: Method = "minmax",
    per_channel: bool = True,
    reduce_range: bool | None = None,
    keep_float: Sequence[str] = (),
    ranges: Mapping[str, Sequence[Any]] | None = None,
) -> onnx.ModelProto:
    """Quantize an ONNX graph to weights and activations of 8 bits, with int32 biases.

    Weights are int8 and symmetric, activations uint8. The graph is in the QDQ form: pairs of QuantizeLinear and
    DequantizeLinear stand around each convolution, and a runtime puts an integer convolution in their place.

    Args:
      model: The graph of `to_onnx`.
      images: What the graph takes, `(images, …)`; their activations set the ranges. Take some hundred images of the
        training split.
      method: How the range of an activation is found: by its extremes ("minmax"), or by all but the outermost 0.001 %
        of its values ("percentile").
      per_channel: Give each output channel of a kernel a scale of its own, in place of one for the whole kernel.
      reduce_range: Use 7 of the 8 bits of the weights. Processors without VNNI instructions add two products of 8 bits
        in 16 bits, and saturate where both are large. The default is what the processor at hand needs.
      keep_float: Names of blocks, e.g. 'stage1_block1', or 'head', that stay in float.
      ranges: Ranges of the activations, in place of those that `images` have. They are pairs of the lower and the upper
        end, by the names of `repvgg_jax.quantize.tensor_ranges`. Training in 8 bits finds them.

    Returns:
      The quantized graph. Its metadata have `quantization`, a line that says how it was made.

    Raises:
      ImportError: If ONNX Runtime is missing.
      ValueError: If there are no images, `method` is another, or a name in `keep_float` is no layer of the graph.

    References:
      Jacob et al., *Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference*,
      arXiv:1712.05877.
    """
    require_runtime()
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    if method not in get_args(Method):
        raise ValueError(f"method is {method!r}: expected {', '.join(get_args(Method))}")
    if not len(images) and ranges is None:
        raise ValueError("images are none: expected at least one to calibrate with")
    layers = layer_nodes(model)
    unknown = [name for name in keep_float if name not in layers]
    if unknown:
        raise ValueError(f"keep_float has {', '.join(unknown)}: expected some of {', '.join(layers)}")
    reduce_range = saturates() if reduce_range is None else reduce_range
    model = onnx.shape_inference.infer_shapes(model)
    with _quiet():
        quantizer = QDQQuantizer(
            model,
            per_channel,
            reduce_range,
            QuantType.QInt8,
            QuantType.QUInt8,
            _ranges(model, images, method) if ranges is None else _given(model, ranges),
            None,
            [node for name in keep_float for node in layers[name]],
            _OPERATORS,
            {},
        )
        quantizer.quantize_model()
    _hide_relu(quantizer.model.model, [node for name in keep_float for node in layers[name]])
    quantizer.model.topological_sort()
    quantized = quantizer.model.model
    properties = {each.key: each.value for each in model.metadata_props}
    scales = "per channel" if per_channel else "per tensor"
    kept = f", {' '.join(keep_float)} in float" if keep_float else ""
    bits = "7 of 8 bits" if reduce_range else "8 bits"
    found = "by training" if ranges is not None else f"by {method}"
    properties["quantization"] = f"int8 weights {scales} of {bits}, uint8 activations {found}{kept}"
    helper.set_model_props(quantized, properties)
    return quantized


def _hide_relu(model: onnx.ModelProto, kept: Sequence[str]) -> None:
    """Put `Max(x, 0)` in the place of each ReLU that is kept in float.

    ONNX Runtime 1.32 quantizes the weights of a float convolution too, with one scale for the kernel, where it finds
    integers before it and behind its ReLU.
    """
    names = set(kept)
    for node in model.graph.node:
        if node.op_type == "Relu" and node.name in names:
            zero = f"{node.name}_zero"
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((), np.float32), zero))
            node.op_type = "Max"
            node.input.append(zero)


def layer_nodes(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Name the nodes of each block and of the head, with the mean before it, in the graph of `to_onnx`.

    Returns:
      The names of the nodes, by the name of the layer, in the order of computation.
    """
    layers: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            name = node.input[1].removesuffix(".kernel").split(".")[0]
            layers.setdefault(name, []).append(node.name)
        elif node.op_type == "Relu" and layers:
            layers[list(layers)[-1]].append(node.name)
    pools = [node.name for node in model.graph.node if node.op_type == "GlobalAveragePool"]
    return {**layers, "head": [pools[-1], *layers["head"]]}


def _ranges(model: onnx.ModelProto, images: np.ndarray, method: Method) -> Any:
    """The range of each activation, as ONNX Runtime finds it."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    class Once(CalibrationDataReader):
        def __init__(self, batch: np.ndarray) -> None:
            self._batch: np.ndarray | None = batch

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch, self._batch = self._batch, None
            return None if batch is None else {"images": batch}

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "float.onnx"
        onnx.save(model, path)
        calibrator = create_calibrator(
            path,
            _OPERATORS,
            augmented_model_path=str(Path(directory) / "augmented.onnx"),
            calibrate_method=CalibrationMethod.MinMax if method == "minmax" else CalibrationMethod.Percentile,
            extra_options=_OPTIONS[method],
        )
        # One call a batch: the values of one batch are in memory at a time, and the last may be smaller.
        for start in range(0, len(images), _CALIBRATION_BATCH):
            calibrator.collect_data(Once(images[start : start + _CALIBRATION_BATCH]))
        return calibrator.compute_data()


def _given(model: onnx.ModelProto, ranges: Mapping[str, Sequence[Any]]) -> Any:
    """Ranges by the names of layers, in ONNX Runtime's form and by the names of the graph."""
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import TensorsData

    def pair(name: str) -> tuple[np.ndarray, np.ndarray]:
        low, high = ranges[name]
        return np.asarray(low, np.float32), np.asarray(high, np.float32)

    nodes = model.graph.node
    data = {next(node.input[0] for node in nodes if node.op_type == "Conv"): pair("images")}
    names = iter(layer_nodes(model))
    name = ""
    for node in nodes:
        if node.op_type in ("Conv", "Relu"):
            name = next(names) if node.op_type == "Conv" else name
            data[node.output[0]] = pair(name)
        elif node.op_type in ("GlobalAveragePool", "Flatten"):
            data[node.output[0]] = pair("pooled")
        elif node.op_type == "Gemm":
            data[node.output[0]] = pair("logits")
    return TensorsData(CalibrationMethod.MinMax, data)


@contextlib.contextmanager
def _quiet() -> Any:
    """Without what ONNX Runtime's quantization prints and logs on its way."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
