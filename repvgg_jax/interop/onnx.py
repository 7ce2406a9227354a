"""The deploy form as an ONNX graph: a Conv and a Relu a block, pooling and one Gemm. It needs the extra `[onnx]`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from repvgg_jax.interop.exportable import OPSET, OPSETS, require_exportable, require_opset
from repvgg_jax.models import RepVGG
from repvgg_jax.models.repvgg import BlockSetting
from repvgg_jax.preprocess import Preprocess
from repvgg_jax.terminal import printable

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError as missing:
    raise ImportError('ONNX files need the extra [onnx]: pip install -e ".[onnx]"') from missing

__all__ = ["OPSET", "OPSETS", "load_onnx", "require_runtime", "to_onnx"]


def to_onnx(
    model: RepVGG,
    variables: Mapping[str, Any],
    *,
    batch_size: int | None = None,
    image_size: int | None = None,
    layout: Literal["NCHW", "NHWC"] = "NCHW",
    preprocess: Preprocess | None = None,
    softmax: bool = True,
    opset: int = OPSET,
) -> onnx.ModelProto:
    """Build the ONNX graph of a deploy form, in float32.

    Args:
      model: The network in its deploy form.
      variables: Its variables, `{'params'}`.
      batch_size: Number of images in a batch, or None for any number.
      image_size: Side length of the images in pixels, or None for any height and width.
      layout: Layout of the images. "NHWC" costs one Transpose.
      preprocess: Preprocessing to build in. The graph then takes uint8 pixels, resized and cropped already, and returns
        probabilities. Without it, the graph takes normalised float32 images and returns logits.
      softmax: Whether a graph with `preprocess` returns probabilities; otherwise it returns logits.
      opset: Version of the operators, from 11 (2019) to 21 (2024). The file names the oldest IR version that has it, so
        that every runtime of the opset reads it: 17 is for ONNX Runtime 1.13 and everything since.

    Returns:
      The model, which `onnx.save` writes. Its input is `images`. Its output is `logits` or `probabilities`, float32
      `(batch, num_classes)`. With `preprocess`, its metadata hold `class_names`, one a line.

    Raises:
      ValueError: If the model is in its training form, `opset` or `layout` has no such value, a size is less than 1,
        `preprocess` is that of another network, or the weights take 2 GiB, which no ONNX file holds.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from repvgg_jax import create_model
      >>> from repvgg_jax.interop.onnx import to_onnx  # doctest: +SKIP
      >>> model = create_model("repvgg_a0", num_classes=10, depths=(1, 1, 1, 1), deploy=True)
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 32, 32, 3)), train=False)
      >>> [node.op_type for node in to_onnx(model, variables).graph.node][:4]  # doctest: +SKIP
      ['Conv', 'Relu', 'Conv', 'Relu']
    """
    require_opset(opset)
    if layout not in ("NCHW", "NHWC"):
        raise ValueError(f"layout is {layout!r}: expected 'NCHW' or 'NHWC'")
    channels = require_exportable(model, variables, batch_size=batch_size, image_size=image_size, preprocess=preprocess)
    params = variables["params"]
    graph = _Graph()
    last = "images"
    if preprocess is not None:
        last = graph.add("Cast", [last], to=TensorProto.FLOAT)
    if layout == "NHWC":
        last = graph.add("Transpose", [last], perm=[0, 3, 1, 2])
    if preprocess is not None:
        mean, std = (np.asarray(value, np.float64)[:, None, None] for value in (preprocess.mean, preprocess.std))
        last = graph.add("Mul", [last, graph.weight("scale", 1 / (255 * std))])
        last = graph.add("Sub", [last, graph.weight("shift", mean / std)])
    for setting in model.blocks:
        last = _block(graph, last, setting, params[setting.name], model.squeeze_excite)
    last = graph.add("GlobalAveragePool", [last])
    last = graph.add("Flatten", [last])
    head = params["head"]
    weights = [graph.weight("head.kernel", head["kernel"]), graph.weight("head.bias", head["bias"])]
    last = graph.add("Gemm", [last, *weights])
    output = "logits"
    if preprocess is not None and softmax:
        output, last = "probabilities", graph.add("Softmax", [last], axis=1)
    graph.nodes[-1].output[0] = output
    sides: list[Any] = ["height", "width"] if image_size is None else [image_size, image_size]
    batch: Any = "batch" if batch_size is None else batch_size
    shape = [batch, channels, *sides] if layout == "NCHW" else [batch, *sides, channels]
    dtype = TensorProto.FLOAT if preprocess is None else TensorProto.UINT8
    imports = [helper.make_opsetid("", opset)]
    built = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "repvgg",
            [helper.make_tensor_value_info("images", dtype, shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, [batch, model.num_classes])],
            graph.weights,
        ),
        opset_imports=imports,
        ir_version=helper.find_min_ir_version_for(imports),
        producer_name="repvgg_jax",
    )
    if preprocess is not None:
        helper.set_model_props(built, {"class_names": "\n".join(map(printable, preprocess.class_names))})
    onnx.checker.check_model(built)
    return built


def load_onnx(path: str | os.PathLike[str]) -> Callable[[np.ndarray], np.ndarray]:
    """Read a file with the graph of `to_onnx` into ONNX Runtime, on the CPU.

    Args:
      path: The file.

    Returns:
      A function from images to logits, or from pixels to probabilities, in the layout of the graph. It takes and
      returns NumPy arrays.

    Raises:
      FileNotFoundError: If there is no such file.
      ImportError: If onnxruntime is not installed.
      ValueError: If ONNX Runtime does not read it, because it is damaged, no ONNX file, or too new for this version.
    """
    session = load_session(Path(path))

    def run(images: np.ndarray) -> np.ndarray:
        return session.run(None, {"images": images})[0]

    return run


def load_session(path: Path) -> Any:
    """Return ONNX Runtime's session of a file, on the CPU. It raises what `load_onnx` does."""
    require_runtime()
    import onnxruntime

    data = path.read_bytes()
    try:
        return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        raise ValueError(
            f"ONNX Runtime {onnxruntime.__version__} does not read {path} ({error}): write or copy it again; a smaller "
            "opset suits older versions"
        ) from None


def require_runtime() -> None:
    """Raise an ImportError, with the command that installs it, where there is no ONNX Runtime."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError as missing:
        raise ImportError('ONNX Runtime needs the extra [onnx]: pip install -e ".[onnx]"') from missing


class _Graph:
    """Nodes and weights, in the order they were added."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def add(self, operator: str, inputs: list[str], **attributes: Any) -> str:
        output = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def weight(self, name: str, values: Any) -> str:
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name))
        return name


def _block(graph: _Graph, last: str, setting: BlockSetting, params: Any, squeeze_excite: str | None) -> str:
    name = setting.name
    kernel = np.asarray(params["reparam"]["kernel"])
    last = graph.add(
        "Conv",
        [
            last,
            graph.weight(f"{name}.kernel", kernel.transpose(3, 2, 0, 1)),
            graph.weight(f"{name}.bias", params["reparam"]["bias"]),
        ],
        strides=[setting.stride] * 2,
        pads=[setting.dilation] * 4,
        dilations=[setting.dilation] * 2,
        group=setting.groups,
        kernel_shape=[3, 3],
    )
    if squeeze_excite == "before_relu":
        last = _squeeze_excite(graph, last, name, params["se"])
    last = graph.add("Relu", [last])
    if squeeze_excite == "after_relu":
        last = _squeeze_excite(graph, last, name, params["se"])
    return last


def _squeeze_excite(graph: _Graph, last: str, name: str, params: Any) -> str:
    gate = graph.add("GlobalAveragePool", [last])
    for layer, activation in (("down", "Relu"), ("up", "Sigmoid")):
        kernel = np.asarray(params[layer]["kernel"]).T[:, :, None, None]
        weights = [
            graph.weight(f"{name}.{layer}.kernel", kernel),
            graph.weight(f"{name}.{layer}.bias", params[layer]["bias"]),
        ]
        gate = graph.add(activation, [graph.add("Conv", [gate, *weights], kernel_shape=[1, 1])])
    return graph.add("Mul", [last, gate])
