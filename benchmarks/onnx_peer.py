"""ONNX Runtime and OpenVINO on the CPU, running the deploy form: one Conv and one Relu per block."""

import os
from collections.abc import Callable

import numpy as np

from benchmarks.jax_peer import network
from benchmarks.race import Case
from repvgg_jax.interop.onnx import to_onnx


def build(case: Case) -> Callable[[int], None]:
    """A function that runs the case so many times."""
    if case.form != "deploy" or case.network.startswith("resnet"):
        raise ValueError(f"{case.peer} runs the deploy form of RepVGG, not {case.network} in form {case.form!r}")
    images = np.random.default_rng(1).normal(size=(case.batch, 3, case.size, case.size)).astype(np.float32)
    threads = len(os.sched_getaffinity(0))
    deployed = network(case._replace(dtype="float32"))
    model = to_onnx(*deployed, batch_size=case.batch, image_size=case.size).SerializeToString()
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
