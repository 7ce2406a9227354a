"""Competitors in processes of their own take turns, so that whatever drifts on the machine hits all of them alike.

A competitor's process reads requests as JSON lines and answers each with one line: `prepare` builds and compiles a
case, `run` times calls of it. On a CPU a process is stopped while it is not asked: thread pools that spin between calls
would take the others' cores. A process that does not answer in time is ended, and its case reported as 'over N s'.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from repvgg_jax.cli.huge_pages import HUGE_PAGES

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
# In which orders a module can keep images on a CPU; each is tried, and the fastest races.
LAYOUTS = {"benchmarks.torch_peer": ("channels last", "contiguous")}

START = 120.0  # seconds in which a process must be up


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
    """Seconds per call of one competitor, turn by turn; empty, with the reason, where it could not run.

    Attributes:
        layout: in which it ran, where it could choose, and what the others would not end in time.
    """

    case: Case
    seconds: tuple[float, ...]
    compile_seconds: float = 0.0
    error: str = ""
    layout: str = ""

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

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def ask(self, limit: float, **request: object) -> dict:
        """Return the answer; after `limit` seconds without one the process is killed, and that is the answer."""
        if self.stopped:
            self.process.send_signal(signal.SIGCONT)
        late = threading.Event()
        timer = threading.Timer(limit, lambda: (late.set(), self.process.kill()))
        timer.start()
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            status = self.process.wait()
            return {"error": f"over {limit:g} s" if late.is_set() else f"the process ended with status {status}"}
        finally:
            timer.cancel()
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
        limit: seconds that preparing a case (building, compiling, three calls) or a turn may take.
    """

    def __init__(self, on_gpu: bool, limit: float = 120.0):
        self.on_gpu, self.limit = on_gpu, limit
        self._workers: dict[str, _Worker] = {}

    def __enter__(self) -> "Race":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.close()

    def run(self, cases: list[Case], turns: int = 5, seconds: float = 0.3) -> list[Time]:
        """Prepares all cases, then lets them take turns of about `seconds` each."""
        modules = list(dict.fromkeys(PEERS[case.peer] for case in cases))
        with ThreadPoolExecutor(len(modules) if self.on_gpu else 1) as pool:
            mine = [[case for case in cases if PEERS[case.peer] == module] for module in modules]
            prepared = {}
            for answers in pool.map(self._prepare, modules, mine):
                prepared.update(answers)
        measured: dict[Case, list[float]] = {case: [] for case in cases}
        for _ in range(turns):
            for case in cases:
                answer, module = prepared[case], PEERS[case.peer]
                if "error" not in answer:
                    turn = self._ask(module, run=answer["request"], seconds=seconds)
                    answer.update(turn)
                    measured[case].append(turn.get("seconds", float("nan")))
                    self._restore(module, [prepared[one] for one in cases if PEERS[one.peer] == module])
        return [
            Time(
                case,
                () if "error" in prepared[case] else tuple(measured[case]),
                prepared[case].get("compile", 0.0),
                prepared[case].get("error", ""),
                prepared[case].get("layout", ""),
            )
            for case in cases
        ]

    def _ask(self, module: str, **request: object) -> dict:
        """Ask the process of a module; one that is not there, or has ended, is started."""
        if module in self._workers and self._workers[module].ended:
            self._workers.pop(module).close()
        if module not in self._workers:
            self._workers[module] = _Worker(module, stopped=not self.on_gpu)
            self._workers[module].ask(START, forget=True)  # imports are not the competitor's
        return self._workers[module].ask(self.limit, **request)

    def _prepare(self, module: str, cases: list[Case]) -> dict[Case, dict]:
        """Prepare the cases of one module, each in the layout that is fastest."""
        self._ask(module, forget=True)
        layouts = LAYOUTS.get(module, ("",))[: 1 if self.on_gpu else None]
        best: dict[Case, dict] = {}
        for case in cases:
            tried = []
            for layout in layouts:
                request = {"case": case._asdict(), "layout": layout}
                tried.append({"request": request, **self._ask(module, prepare=request)})
                self._restore(module, [*best.values(), *tried])
            best[case] = _fastest(tried)
        return best

    def _restore(self, module: str, answers: list[dict]) -> None:
        """Prepare again what went with the process of a module, if that has ended."""
        if self._workers[module].ended:
            for answer in answers:
                if "error" not in answer:
                    answer.update(self._ask(module, prepare=answer["request"]))


def _fastest(tried: list[dict]) -> dict:
    """The answer of the fastest layout, with what became of the others; or one error for all."""
    errors = {answer["request"]["layout"]: answer["error"] for answer in tried if "error" in answer}
    told = [f"{layout} {error}".strip() for layout, error in errors.items()]
    ran = [answer for answer in tried if "error" not in answer]
    if not ran:
        same = len(set(errors.values())) == 1
        return {"error": next(iter(errors.values())) if same else "; ".join(told)}
    fastest = min(ran, key=lambda answer: answer["call"])
    others = f" ({'; '.join(told)})" if told else ""
    return {**fastest, "layout": fastest["request"]["layout"] + others}


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
                calls, answer = _prepare(module, **request["prepare"])
                built[json.dumps(request["prepare"])] = calls
            else:
                answer = {"seconds": _time(built[json.dumps(request["run"])], request["seconds"])}
        except ModuleNotFoundError as error:
            answer = {"error": f'{error}: pip install -e ".[bench]"'}
        except Exception as error:  # a peer that is missing or fails is a line of the table, not the end of it
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


def _prepare(module: str, case: dict, layout: str) -> tuple[Callable[[int], None], dict]:
    """Build and compile a case: what runs it, and the seconds of that and of one call."""
    options = {"layout": layout} if layout else {}
    start = time.perf_counter()
    calls = importlib.import_module(module).build(Case(**{**case, "strides": tuple(case["strides"])}), **options)
    calls(1)
    compiled = time.perf_counter()
    calls(2)
    return calls, {"compile": compiled - start, "call": (time.perf_counter() - compiled) / 2}


def _time(calls: Callable[[int], None], seconds: float) -> float:
    start = time.perf_counter()
    calls(1)
    count = max(1, int(seconds / (time.perf_counter() - start)))
    start = time.perf_counter()
    calls(count)
    return (time.perf_counter() - start) / count


if __name__ == "__main__":
    _serve(sys.argv[1])
