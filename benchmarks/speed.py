"""How fast our networks are, beside their peers: `python -m benchmarks.speed [SUITE …] [options]`.

Suites, by default those for the device at hand:

    forward   deploy form against the peers' and against our own training form, RepVGG-A0, several batch sizes
    step      training step of RepVGG-A0 on 32×32 images (on a GPU: B1 and 224×224 too)
    paper     RepVGG-B1g4 against ResNet-101, both with and without folding: the paper's table 4
    variants  deploy form of all A and B variants (GPU)

Prints one table per suite and, with `--out DIR`, writes `speed.json`, `speed.md` and `speed.png` there. Every figure is
a median over turns that the competitors take in their own processes; a ratio is the median of the ratios within a turn.
Peers that are not installed are named as such. On a CPU PyTorch races in the faster of its two layouts. What is not
prepared, or does not end its turn, within `--limit` seconds is reported as "over N s".
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
from tabulate import tabulate

from benchmarks.command import end_with, positive, whole
from benchmarks.race import PEERS, Case, Race, Time, ratio
from repvgg_jax.files import require_writable

A_AND_B = ("a0", "a1", "a2", "b0", "b1", "b1g2", "b1g4", "b2", "b2g2", "b2g4", "b3", "b3g2", "b3g4")
Contest = list[Case]  # the first is the subject, the others what it is compared with
SMALL = (1, 1, 2, 2, 2)


def against(peers: list[str], case: Case, *others: Case) -> Contest:
    """The case, computed by us, then the same by the peers, then other cases."""
    return [case, *(case._replace(peer=peer) for peer in peers), *others]


def suites(on_gpu: bool, batches: list[int] | None, size: int, variants: list[str]) -> dict[str, list[Contest]]:
    """Every suite's contests on this kind of device."""
    dtype = "bfloat16" if on_gpu else "float32"
    both = ["float32", "bfloat16"] if on_gpu else ["float32"]
    peers = ["pytorch-compile"] if on_gpu else ["pytorch-eager", "pytorch-compile", "onnxruntime", "openvino"]
    forward = [
        against(
            ["flax", *peers],
            case := Case("repvgg_jax", "repvgg_a0", "deploy", batch, size, dtype=kind),
            case._replace(form="training"),
        )
        for kind in both
        for batch in batches or ([32, 256] if on_gpu else [1, 16])
    ]
    tasks = [("repvgg_a0", 32, SMALL, 512), ("repvgg_a0", 224, (2,) * 5, 256), ("repvgg_b1", 224, (2,) * 5, 128)]
    if not on_gpu:
        tasks = [("repvgg_a0", 32, (2,) * 5, 128), ("repvgg_a0", 32, SMALL, 128)]
    step_peers = peers if on_gpu else ["flax", "pytorch-eager"]
    step = [
        against(step_peers, Case("repvgg_jax", name, "step", batch, min(side, size), strides, dtype))
        for name, side, strides, usual in tasks
        for batch in batches or [usual]
    ]
    paper = [
        [
            Case("repvgg_jax", network, form, batch, size, dtype=dtype)
            for network in ("repvgg_b1g4", "resnet101")
            for form in ("deploy", "training")
        ]
        for batch in batches or [128 if on_gpu else 8]
    ]
    return {
        "step": step,
        "paper": paper,
        "forward": forward,
        "variants": [
            against(["pytorch-compile"], Case("repvgg_jax", f"repvgg_{name}", "deploy", batch, size, dtype=dtype))
            for batch in batches or [256, 32, 1]
            for name in variants
        ],
    }


def label(case: Case) -> str:
    """One line for one task."""
    strides = "" if case.strides == (2,) * 5 else f", strides {','.join(map(str, case.strides))}"
    return f"{case.network} {case.form}, batch {case.batch}, {case.size}²{strides}, {case.dtype}"


def row(subject: Time, other: Time) -> list[str]:
    """One line of a table."""
    name = other.case.peer
    if other.case._replace(peer=subject.case.peer) != subject.case:
        name += f", {other.case.network} {other.case.form}"
    if other.layout:
        name += f", {other.layout}"
    if not other.seconds:
        late = other.error.startswith("over ")
        return [label(subject.case), name, "-", "-", other.error if late else f"not run: {other.error}"[:80]]
    milliseconds = 1e3 * float(np.median(other.seconds))
    relative = f"{ratio(subject, other):.2f}×" if subject.seconds else "-"
    return [
        label(subject.case),
        name,
        f"{other.images_per_second:,.1f}",
        f"{milliseconds:.3f}",
        "" if other is subject else relative,
    ]


HEADERS = ("task", "computed by", "images/s", "ms per call", "repvgg_jax is faster by")


def table(results: list[list[Time]], style: str) -> str:
    """The results of one suite."""
    rows = [row(contest[0], other) for contest in results for other in contest]
    for number in range(len(rows) - 1, 0, -1):
        if rows[number][0] == rows[number - 1][0]:
            rows[number][0] = ""
    return tabulate(rows, HEADERS, tablefmt=style, disable_numparse=True, colalign=("left", "left", *["right"] * 3))


def draw(results: dict[str, list[list[Time]]], path: Path) -> None:
    """Bars: by how much the subject is faster, contest by contest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bars = [
        (f"{label(contest[0].case)}\nvs {row(contest[0], other)[1]}", ratio(contest[0], other))
        for suite in results.values()
        for contest in suite
        for other in contest[1:]
        if contest[0].seconds and other.seconds
    ]
    if not bars:
        return
    figure, axes = plt.subplots(figsize=(9, 1 + 0.42 * len(bars)), layout="constrained")
    names, values = zip(*reversed(bars), strict=True)
    axes.barh(range(len(bars)), values, color=["#2a7f9e" if value >= 1 else "#c0504d" for value in values])
    axes.set_yticks(range(len(bars)), names, fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    for position, value in enumerate(values):
        axes.text(value, position, f" {value:.2f}×", va="center", fontsize=7)
    axes.set_xlabel("times faster than the other (images per second, ratio within a turn, median)")
    axes.margins(x=0.1, y=0.01)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def machine() -> dict[str, str]:
    """What the figures depend on.

    Raises:
        ValueError: JAX cannot start.
    """
    # In a process of its own, for the competitors are to have the device.
    script = (
        "from repvgg_jax.cli.devices import require_devices as d; print(d()[0].platform, d()[0].device_kind, sep='|')"
    )
    asked = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if asked.returncode:
        raise ValueError((asked.stderr.strip() or "JAX cannot start").splitlines()[-1].removeprefix("ValueError: "))
    kind, name = asked.stdout.strip().splitlines()[-1].split("|")
    if kind == "cpu":
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor()}, {len(models)} threads"
    found = {"date": time.strftime("%Y-%m-%d"), "platform": kind, "device": name, "python": platform.python_version()}
    for package in ("jax", "jaxlib", "flax", "torch", "timm", "onnxruntime", "openvino"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", nargs="*", metavar="SUITE", help="forward, step, paper, variants")
    parser.add_argument("--batches", type=whole, nargs="+", help="batch sizes, in place of the suites' own")
    parser.add_argument("--size", type=whole, default=224, help="largest side of the images")
    parser.add_argument("--variants", nargs="+", default=list(A_AND_B), help="of the suite 'variants': a0 … b3g4")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), help="only these peers (and ourselves)")
    parser.add_argument("--turns", type=whole, default=7)
    parser.add_argument("--seconds", type=positive, default=0.3, help="length of a turn")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no contest after so long")
    parser.add_argument("--limit", type=positive, default=120, help="seconds to prepare a competitor, or for its turn")
    parser.add_argument("--out", type=Path, help="directory for speed.json, speed.md and speed.png")
    options = parser.parse_args()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        require_writable(options.out / "speed.json")
    begin = time.monotonic()
    setting = machine()
    print(", ".join(f"{name} {value}" for name, value in setting.items()), flush=True)
    on_gpu = setting["platform"] != "cpu"
    known = suites(on_gpu, options.batches, options.size, options.variants)
    unknown = [name for name in options.suite if name not in known]
    if unknown:
        parser.error(f"unknown suite {unknown[0]!r}: expected {', '.join(known)}")
    names = options.suite or [name for name in known if on_gpu or name != "variants"]
    results: dict[str, list[list[Time]]] = {}
    with Race(on_gpu, options.limit) as race:
        for name in names:
            for contest in known[name]:
                if options.peers is not None:
                    contest = [case for case in contest if case.peer in ("repvgg_jax", *options.peers)]
                if time.monotonic() - begin > 60 * options.minutes:
                    print(f"out of time before {label(contest[0])}", flush=True)
                    continue
                times = race.run(contest, options.turns, options.seconds)
                results.setdefault(name, []).append(times)
                for other in times:
                    print("  ".join(row(times[0], other)), flush=True)
    text = "\n\n".join(f"## {name}\n\n{table(found, 'github')}" for name, found in results.items())
    for name, found in results.items():
        print(f"\n{name}\n{table(found, 'simple')}")
    if options.out:
        command = "python -m benchmarks.speed " + " ".join(sys.argv[1:])
        raw = {
            name: [[one._asdict() | {"case": one.case._asdict()} for one in contest] for contest in found]
            for name, found in results.items()
        }
        (options.out / "speed.json").write_text(json.dumps({"command": command, **setting, "results": raw}, indent=1))
        versions = ", ".join(f"{name} {value}" for name, value in setting.items())
        (options.out / "speed.md").write_text(f"`{command}`\n\n{versions}\n\n{text}\n")
        draw(results, options.out / "speed.png")


if __name__ == "__main__":
    end_with(main)
