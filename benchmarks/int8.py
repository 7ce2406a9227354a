"""What does each step towards 8 bits keep? `python -m benchmarks.int8 RUN_DIR [RUN_DIR …]` or `--stress`.

A table for each run, on its whole test split: the float network, scales by tensor and by channel, equal channels,
corrected biases, and 7 of 8 bits. A run of `train.py --quantize-aware` has one row, of its own weights and ranges,
beside the float network that it began with. Files run in ONNX Runtime; float and 8 bits take turns.

`--stress` takes RepVGG-A0 with random weights and statistics instead, where a tenth of all channels is almost dead, so
that the identity's batch norm behind them divides by almost nothing. It needs no data; predictions are those of float.
"""

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from benchmarks.command import end_with
from repvgg_jax import create_model, fuse_model
from repvgg_jax.cli.devices import require_devices
from repvgg_jax.interop.onnx import to_onnx
from repvgg_jax.interop.onnx_int8 import to_onnx_int8
from repvgg_jax.models import RepVGG
from repvgg_jax.preprocess import normalize
from repvgg_jax.quantize import prepare, saturates
from repvgg_jax.training.config import TrainConfig
from repvgg_jax.training.export.int8_images import draw_images
from repvgg_jax.training.export.int8_proof import Int8Proof, prove
from repvgg_jax.training.run.data_record import DataRecord
from repvgg_jax.training.run.directory import evaluation_batches, open_data
from repvgg_jax.training.run.restore import restore
from repvgg_jax.training.start.near_identity import residual_start
from repvgg_jax.training.steps.mesh import Batch, create_mesh

CALIBRATE = 512
# Name, by channel, equal channels, corrected biases, 7 of 8 bits, method.
ROWS = (
    ("one scale a tensor", False, False, False, False, "minmax"),
    ("one scale a tensor, equalized", False, True, False, False, "minmax"),
    ("a scale a channel", True, False, False, False, "minmax"),
    ("a scale a channel, percentile", True, False, False, False, "percentile"),
    ("a scale a channel, biases corrected", True, False, True, False, "minmax"),
    ("a scale a channel, equalized", True, True, False, False, "minmax"),
    ("the default: equalized, biases corrected", True, True, True, False, "minmax"),
    ("the default with 7 of 8 bits", True, True, True, True, "minmax"),
)


class Subject(NamedTuple):
    """A deploy form with images, normalised and NHWC, to calibrate with, and a way to run over test images."""

    model: RepVGG
    variables: Any
    calibration: np.ndarray
    batches: Callable[[], Iterable[Batch]]
    prepare: Callable[[np.ndarray], np.ndarray]
    labelled: bool

    def prove(self, variables: Any, reference: Any = None, floating: Any = None, **options: Any) -> Int8Proof:
        """The proof of some variables in 8 bits beside the float network."""
        images = self.calibration.transpose(0, 3, 1, 2)
        return prove(
            to_onnx(self.model, self.variables if floating is None else floating),
            to_onnx_int8(to_onnx(self.model, variables), images, **options),
            to_onnx(self.model, variables if reference is None else reference),
            self.batches(),
            labelled=self.labelled,
            prepare=self.prepare,
        )


def of_run(workdir: Path, data_dir: str | None) -> tuple[Subject, Any, TrainConfig]:
    """The network of a run, the ranges it was trained with or None, and its config."""
    config = TrainConfig.load(workdir / "config.json")
    if data_dir is not None:
        config = config.replace(data_dir=data_dir)
    data = open_data(config)
    normalization = DataRecord.load(workdir).normalization
    model, state = restore(workdir, create_mesh())
    trained = jax.device_get(state.eval_variables)
    deploy_model, variables = fuse_model(model, {name: trained[name] for name in ("params", "batch_stats")})
    preprocess = config.data.preprocess(normalization, data.dataset.class_names)

    def normalized(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(normalize(jnp.asarray(pixels), *normalization))

    subject = Subject(
        deploy_model.clone(dtype=None),
        variables,
        normalized(draw_images(data.dataset.train, preprocess, CALIBRATE)),
        partial(evaluation_batches, config.data, data.dataset),
        lambda pixels: normalized(pixels).transpose(0, 3, 1, 2),
        labelled=True,
    )
    return subject, trained.get("ranges"), config


def stress() -> Subject:
    """A0 of ten classes with skewed statistics, and noise of another colour and contrast in each image."""
    model = create_model("repvgg_a0", num_classes=10, strides=(1, 2, 2, 2, 2), momentum=0.0)
    random = np.random.default_rng(0)
    colour, contrast = random.normal(size=(320, 1, 1, 3)), random.uniform(0.2, 1, (320, 1, 1, 1))
    images = (colour + contrast * random.normal(size=(320, 32, 32, 3))).astype(np.float32)
    # Blocks near the identity: fourteen random ones in a row forget their input, in float too.
    variables = residual_start(dict(model.init(jax.random.key(0), images[:1], train=False)), scale=0.25)

    def skew(block: Any) -> Any:
        """A tenth of the channels at a thousandth of their size, in every branch alike."""
        features = block["branch_3x3"]["bn"]["scale"].shape[0]
        size = np.where(random.uniform(size=features) < 0.1, 1e-3, 1.0).astype(np.float32)

        def norm(each: Any) -> Any:
            return {"scale": each["scale"] * size, "bias": each["bias"] * size}

        return {
            name: norm(branch) if name == "branch_identity" else {**branch, "bn": norm(branch["bn"])}
            for name, branch in block.items()
        }

    params = {name: node if name == "head" else skew(node) for name, node in variables["params"].items()}
    # With momentum 0 the running statistics become those of the batch.
    train = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
    _, updates = train({"params": params, "batch_stats": variables["batch_stats"]}, images[:64])
    deploy_model, deployed = fuse_model(model, {"params": params, **updates})
    test = {"image": images[64:], "label": np.zeros(256, np.int32), "mask": np.ones(256, bool)}
    return Subject(
        deploy_model, deployed, images[:64], lambda: [test], lambda x: x.transpose(0, 3, 1, 2), labelled=False
    )


def table(subject: Subject) -> str:
    """A line for each way to 8 bits."""
    lines: list[tuple[str, ...]] = []
    for name, by_channel, equal, corrected, reduced, method in ROWS:
        equalized, variables = prepare(
            subject.model,
            subject.variables,
            jnp.asarray(subject.calibration),
            equal_channels=equal,
            corrected_biases=corrected,
            reduce_range=reduced,
        )
        proof = subject.prove(variables, equalized, per_channel=by_channel, reduce_range=reduced, method=method)
        lines = lines or [floating_line(proof)]
        lines.append(line(name, proof))
        print(f"{name}: {proof.decibels:.1f} dB", flush=True)
    return formatted(lines)


def floating_line(proof: Int8Proof) -> tuple[str, ...]:
    """The line of the float network."""
    return ("float", f"{100 * proof.floating.accuracy:.2f}", "", "", "", "1.00", "1.00")


def line(name: str, proof: Int8Proof) -> tuple[str, ...]:
    """The line of a network in 8 bits."""
    floating, quantized = proof.floating, proof.quantized
    return (
        name,
        f"{100 * quantized.accuracy:.2f}",
        f"{proof.lost:+.2f}",
        f"{proof.agreement.predictions_changed:,}",
        f"{proof.decibels:.1f}",
        f"{quantized.megabytes / floating.megabytes:.3f}",
        f"{quantized.images_per_second / floating.images_per_second:.2f}",
    )


def formatted(lines: list[tuple[str, ...]]) -> str:
    """The lines as a table."""
    headers = ("", "accuracy %", "points lost", "changed", "dB", "file", "speed")
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * 6))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run directories")
    parser.add_argument("--data-dir", help="where the data sets lie, if they have moved")
    parser.add_argument("--stress", action="store_true", help="take A0 with skewed statistics instead of a run")
    arguments = parser.parse_args()
    if arguments.stress == bool(arguments.runs):
        parser.error("expected run directories, or --stress")
    require_devices()
    print(f"products of 8 bits saturate here: {'yes' if saturates() else 'no'}")
    if arguments.stress:
        print(f"\n{table(stress())}")
    for workdir in arguments.runs:
        subject, ranges, config = of_run(workdir, arguments.data_dir)
        print(f"\n{config.network.description}, {config.data.dataset}, {config.optimization.epochs} epochs")
        if ranges is None:
            print(f"\n{table(subject)}")
            continue
        origin, _, _ = of_run(Path(str(config.start.init_from)), arguments.data_dir)
        proof = subject.prove(
            subject.variables,
            floating=origin.variables,
            ranges=ranges,
            reduce_range=config.optimization.weight_bits == 7,
        )
        print(f"\n{formatted([floating_line(proof), line('trained for 8 bits', proof)])}")


if __name__ == "__main__":
    end_with(main)
