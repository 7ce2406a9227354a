"""PyTorch on the device at hand: eager, compiled, and compiled with `max-autotune`.

Channels last on a GPU; on a CPU in whichever layout is faster there.

RepVGG is `benchmarks.torch_repvgg`; ResNets are timm's, where timm is installed.
"""

import os
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.race import Case
from benchmarks.torch_repvgg import RepVGG

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.benchmark = True
torch.set_float32_matmul_precision("high")  # TF32, as JAX's default
torch.backends.cudnn.allow_tf32 = True
if DEVICE == "cpu":
    torch.set_num_threads(len(os.sched_getaffinity(0)))
LAYOUTS = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}
# CUDA graphs for "pytorch-compile"; nothing to capture on a CPU.
MODES = {"pytorch-compile": "reduce-overhead" if DEVICE == "cuda" else "default", "pytorch-autotune": "max-autotune"}


def network(case: Case) -> nn.Module:
    """The module, in the form of the case."""
    if case.network.startswith("resnet"):
        import timm

        if case.form == "deploy":
            raise ValueError("timm's ResNets have no folded form")
        return timm.create_model(case.network)
    return RepVGG(case.network, 1000, case.strides, deploy=case.form == "deploy")


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def build(case: Case, layout: str) -> Callable[[int], None]:
    """A function that runs the case so many times, in a key of `LAYOUTS`, and waits."""
    torch._dynamo.reset()
    half, order = case.dtype == "bfloat16", LAYOUTS[layout]
    module = network(case).to(DEVICE, memory_format=order)
    images = torch.randn(case.batch, 3, case.size, case.size, device=DEVICE).to(memory_format=order)
    if case.form == "step":
        return _steps(case, module, images, half)
    module.eval()
    if half:
        module, images = module.bfloat16(), images.bfloat16()
    forward = torch.compile(module, mode=MODES[case.peer]) if case.peer in MODES else module

    def calls(count: int) -> None:
        with torch.inference_mode():
            for _ in range(count):
                forward(images)
            _wait()

    return calls


def _steps(case: Case, module: nn.Module, images: torch.Tensor, half: bool) -> Callable[[int], None]:
    labels = torch.arange(case.batch, device=DEVICE) % 1000
    fused = DEVICE == "cuda"
    optimizer = torch.optim.SGD(module.parameters(), 0.01, momentum=0.9, nesterov=True, fused=fused)
    forward = torch.compile(module, mode=MODES[case.peer]) if case.peer in MODES else module

    def calls(count: int) -> None:
        for _ in range(count):
            if DEVICE == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
                loss = nn.functional.cross_entropy(forward(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        _wait()

    return calls
