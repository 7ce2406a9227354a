"""ONNX Runtime and OpenVINO on the CPU, running the deploy form: one Conv and one Relu per block."""

import os
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.race import Case
from repvgg_jax import create_model


def graph(case: Case) -> onnx.ModelProto:
    """The deploy form with random weights, NCHW, opset 17."""
    model = create_model(case.network, deploy=True, strides=case.strides)
    groups, depths, widths = model.groups, model.depths, model.widths
    random = np.random.default_rng(0)
    nodes, weights = [], []

    def weight(name: str, *shape: int) -> str:
        values = random.normal(0, (2 / max(1, np.prod(shape[1:]))) ** 0.5, shape).astype(np.float32)
        weights.append(numpy_helper.from_array(values, name))
        return name

    blocks = [(widths[0], case.strides[0])]
    for stage, depth in enumerate(depths, start=1):
        blocks += [(widths[stage], case.strides[stage] if number == 0 else 1) for number in range(depth)]
    last, inside = "images", 3
    for index, (out, stride) in enumerate(blocks):
        count = groups if index and index % 2 == 0 else 1
        inputs = [last, weight(f"kernel{index}", out, inside // count, 3, 3), weight(f"bias{index}", out)]
        nodes += [
            helper.make_node(
                "Conv", inputs, [f"conv{index}"], strides=[stride] * 2, pads=[1] * 4, group=count, kernel_shape=[3, 3]
            ),
            helper.make_node("Relu", [f"conv{index}"], [f"block{index}"]),
        ]
        last, inside = f"block{index}", out
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Gemm", ["flat", weight("head", 1000, inside), weight("shift", 1000)], ["logits"], transB=1),
    ]
    shape = [case.batch, 3, case.size, case.size]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [case.batch, 1000])
    return helper.make_model(
        helper.make_graph(nodes, case.network, [images], [logits], weights),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )


def build(case: Case) -> Callable[[int], None]:
    """A function that runs the case so many times."""
    if case.form != "deploy" or case.network.startswith("resnet"):
        raise ValueError(f"{case.peer} runs the deploy form of RepVGG, not {case.network} in form {case.form!r}")
    images = np.random.default_rng(1).normal(size=(case.batch, 3, case.size, case.size)).astype(np.float32)
    threads = len(os.sched_getaffinity(0))
    model = graph(case).SerializeToString()
    if case.peer == "openvino":
        import openvino

        hint = openvino.Type.bf16 if case.dtype == "bfloat16" else openvino.Type.f32
        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(model, b""), "CPU", {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads}
        )
        request = compiled.create_infer_request()

        def call() -> None:
            request.infer({0: images}, share_inputs=True, share_outputs=True)
    else:
        import onnxruntime

        if case.dtype != "float32":
            raise ValueError("ONNX Runtime computes convolutions in float32 on a CPU")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

        def call() -> None:
            session.run(None, {"images": images})

    def calls(count: int) -> None:
        for _ in range(count):
            call()

    return calls
