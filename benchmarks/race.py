"""Competitors in processes of their own take turns, so that whatever drifts on the machine hits all of them alike.

A competitor's process reads requests as JSON lines and answers each with one line: `prepare` builds and compiles a
case, `run` times calls of it. On a CPU a process is stopped while it is not asked: thread pools that spin between calls
would take the others' cores.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from repvgg_jax.training.huge_pages import HUGE_PAGES

# Which module builds which peer; those of one module share a process.
PEERS = {
    "repvgg_jax": "benchmarks.jax_peer",
    "flax": "benchmarks.jax_peer",
    "pytorch-eager": "benchmarks.torch_peer",
    "pytorch-compile": "benchmarks.torch_peer",
    "pytorch-autotune": "benchmarks.torch_peer",
    "onnxruntime": "benchmarks.onnx_peer",
    "openvino": "benchmarks.onnx_peer",
}


class Case(NamedTuple):
    """One competitor at one task.

    Attributes:
        peer: a key of `PEERS`. 'flax' is our network with XLA's own convolutions and plain arithmetic.
        network: a RepVGG variant, or resnet18, resnet50, resnet101.
        form: 'deploy' (batch norms folded), 'training' (the same network unfolded, in evaluation) or 'step' (forward,
            backward and Nesterov SGD).
        batch: images in a call.
        size: side of the images, in pixels.
        strides: of the stem and stage 1 to 4 (RepVGG only).
        dtype: 'float32' (TF32 products where the GPU has them) or 'bfloat16'.
    """

    peer: str
    network: str
    form: str
    batch: int
    size: int = 224
    strides: tuple[int, ...] = (2, 2, 2, 2, 2)
    dtype: str = "float32"


class Time(NamedTuple):
    """Seconds per call of one competitor, turn by turn; empty, with the reason, where it could not run."""

    case: Case
    seconds: tuple[float, ...]
    compile_seconds: float = 0.0
    error: str = ""

    @property
    def images_per_second(self) -> float:
        """Of the median turn."""
        return self.case.batch / float(np.median(self.seconds))


def ratio(subject: Time, other: Time) -> float:
    """How many times faster the subject is: the median over the turns of the ratio within a turn."""
    per_image = [np.divide(side.seconds, side.case.batch) for side in (subject, other)]
    return float(np.median(per_image[1] / per_image[0]))


class _Worker:
    """The process of one module."""

    def __init__(self, module: str, stopped: bool):
        quiet = None if "BENCHMARK_VERBOSE" in os.environ else subprocess.DEVNULL
        self.stopped = stopped
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.race", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=quiet,
            text=True,
            env={"GLIBC_TUNABLES": HUGE_PAGES, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ},
        )

    def ask(self, **request: object) -> dict:
        if self.stopped:
            self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            return {"error": f"the process ended with status {self.process.wait()}"}
        finally:
            if self.stopped:
                self.process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


class Race:
    """Competitors' processes; a context manager.

    Args:
        on_gpu: prepare those of different processes side by side, and stop none while another runs.
    """

    def __init__(self, on_gpu: bool):
        self.on_gpu = on_gpu
        self._workers: dict[str, _Worker] = {}

    def __enter__(self) -> "Race":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.close()

    def run(self, cases: list[Case], turns: int = 5, seconds: float = 0.3) -> list[Time]:
        """Prepares all cases, then lets them take turns of about `seconds` each."""
        modules = list(dict.fromkeys(PEERS[case.peer] for case in cases))
        for module in modules:
            if module in self._workers and self._workers[module].process.poll() is not None:
                self._workers.pop(module).close()
            if module not in self._workers:
                self._workers[module] = _Worker(module, stopped=not self.on_gpu)

        def prepare(module: str) -> list[dict]:
            worker = self._workers[module]
            worker.ask(forget=True)
            return [worker.ask(prepare=case._asdict()) for case in cases if PEERS[case.peer] == module]

        with ThreadPoolExecutor(len(modules) if self.on_gpu else 1) as pool:
            answers = {module: iter(found) for module, found in zip(modules, pool.map(prepare, modules), strict=True)}
        prepared = [next(answers[PEERS[case.peer]]) for case in cases]
        measured: list[list[float]] = [[] for _ in cases]
        for _ in range(turns):
            for case, answer, times in zip(cases, prepared, measured, strict=True):
                if "error" not in answer:
                    turn = self._workers[PEERS[case.peer]].ask(run=case._asdict(), seconds=seconds)
                    answer.update(turn)
                    times.append(turn.get("seconds", float("nan")))
        return [
            Time(case, () if "error" in answer else tuple(times), answer.get("compile", 0.0), answer.get("error", ""))
            for case, answer, times in zip(cases, prepared, measured, strict=True)
        ]


def _serve(module: str) -> None:
    """The loop of a competitor's process."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    built = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "forget" in request:
                built.clear()
                answer = {}
            elif "prepare" in request:
                case = Case(**{**request["prepare"], "strides": tuple(request["prepare"]["strides"])})
                start = time.perf_counter()
                calls = importlib.import_module(module).build(case)
                calls(1)
                answer = {"compile": time.perf_counter() - start}
                calls(2)
                built[json.dumps(request["prepare"])] = calls
            else:
                answer = {"seconds": _time(built[json.dumps(request["run"])], request["seconds"])}
        except ModuleNotFoundError as error:
            answer = {"error": f'{error}: pip install -e ".[bench]"'}
        except Exception as error:  # a peer that is missing or fails is a line of the table, not the end of it
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


def _time(calls: Callable[[int], None], seconds: float) -> float:
    start = time.perf_counter()
    calls(1)
    count = max(1, int(seconds / (time.perf_counter() - start)))
    start = time.perf_counter()
    calls(count)
    return (time.perf_counter() - start) / count


if __name__ == "__main__":
    _serve(sys.argv[1])
