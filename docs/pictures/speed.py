"""Draws speed.png, the picture at the top of docs/performance.md: `python docs/pictures/speed.py`.

All figures are read from files in docs/results, which `python -m benchmarks.speed` wrote.
"""

import json
import re
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

INK, SOFT, GRID = "#1f2733", "#7a869a", "#e8ebf0"
DARK, LIGHT, WARM, PALE = "#1f5fbf", "#8fb4e8", "#d9822b", "#efc894"
RESULTS = Path(__file__).parents[1] / "results"
GROUPED = re.compile(r"g\d$")

Points = dict[str, float]


def from_json(name: str, **wanted: object) -> Points:
    """How many times as fast repvgg_jax is, by network and peer, in the contests of this case."""
    found = {}
    for suite in json.loads((RESULTS / name).read_text())["results"].values():
        for subject, *others in suite:
            for other in others:
                case = subject["case"]
                if all(case[field] == value for field, value in wanted.items()):
                    ratio = np.divide(other["seconds"], other["case"]["batch"]) * case["batch"] / subject["seconds"]
                    form = "" if other["case"]["form"] == case["form"] else " training"
                    found[f"{case['network']} {other['case']['peer']}{form}"] = float(np.median(ratio))
    return found


def from_text(name: str, batch: int) -> Points:
    """The same, of a table as it was printed."""
    text = (RESULTS / name).read_text()
    row = rf"(repvgg_\w+) deploy, batch {batch}, .*\n +(pytorch-compile) .* ([\d.]+)×"
    return {f"{network} {peer}": float(ratio) for network, peer, ratio in re.findall(row, text)}


def prepare(axes: Axes, names: list[str], title: str, below: str, ticks: list[float]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=INK, labelsize=10)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(title, fontsize=11, weight="bold", color=INK, loc="left", pad=14)
    axes.set_xlabel(below, fontsize=10, color=SOFT)


def draw(axes: Axes, rows: list[str], series: dict[str, tuple[Points, str, str]]) -> None:
    for label, (points, colour, marker) in series.items():
        # Steps stand a little below the forward passes, which they would cover.
        below = 0.24 if marker == "s" else 0
        places = [(points[key], row + below) for row, key in enumerate(rows) if key in points]
        axes.plot(*zip(*places, strict=True), marker, color=colour, markersize=8, label=label, linestyle="")
    place = dict(loc="upper center", bbox_to_anchor=(0.45, -0.16))
    axes.legend(fontsize=10, frameon=False, labelcolor=INK, ncols=2, **place)


def draw_gpu(axes: Axes) -> None:
    def of_batch(batch: int) -> Points:
        before = from_text("h100/variants-before.txt", batch)
        plain = {key: ratio for key, ratio in before.items() if not GROUPED.search(key.split()[0])}
        return plain | from_json("h100/grouped.json", batch=batch)

    large, single = of_batch(256), of_batch(1)
    networks = sorted({key.split()[0] for key in large})
    rows = [f"{network} pytorch-compile" for network in networks]
    labels = [network.removeprefix("repvgg_").upper().replace("G", "g") for network in networks]
    prepare(
        axes,
        labels,
        "RepVGG on one H100, bfloat16",
        "speed of repvgg_jax ÷ speed of compiled PyTorch (log scale, right of 1 is faster)",
        [0.8, 0.9, 1, 1.2, 1.4, 1.6],
    )
    axes.set_xlim(0.8, 1.75)
    draw(axes, rows, {"deploy form, batch 256": (large, DARK, "o"), "deploy form, batch 1": (single, WARM, "D")})


def draw_cpu(axes: Axes) -> None:
    peers = {
        "flax": "stock Flax",
        "pytorch-eager": "PyTorch, eager",
        "pytorch-compile": "PyTorch, compiled",
        "onnxruntime": "ONNX Runtime",
        "openvino": "OpenVINO",
        "repvgg_jax training": "our training form",
    }
    rows = [f"repvgg_a0 {peer}" for peer in peers]
    forward, step = "two-cores/forward.json", "two-cores/step.json"
    prepare(
        axes,
        list(peers.values()),
        "RepVGG-A0 on two cores of an AMD EPYC, float32",
        "speed of repvgg_jax ÷ speed of the peer (log scale, right of 1 is faster)",
        [1, 1.5, 2, 3, 5, 7],
    )
    axes.set_xlim(0.8, 9)
    series = {
        "deploy form, batch 16, 224×224": (from_json(forward, batch=16), DARK, "o"),
        "deploy form, batch 1, 224×224": (from_json(forward, batch=1), WARM, "D"),
        "training step, 32×32, strides 2,2,2,2,2": (from_json(step, strides=[2, 2, 2, 2, 2]), LIGHT, "s"),
        "training step, 32×32, strides 1,1,2,2,2": (from_json(step, strides=[1, 1, 2, 2, 2]), PALE, "s"),
    }
    draw(axes, rows, series)


if __name__ == "__main__":
    figure = Figure(figsize=(8, 9), layout="constrained", facecolor="white")
    gpu, cpu = figure.subplots(2, 1, height_ratios=(5, 4))
    draw_gpu(gpu)
    draw_cpu(cpu)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)
