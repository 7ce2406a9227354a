"""`repvgg-fuse`, or `python fuse.py`: fuse a run or PyTorch weights, verify, save, export."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from repvgg_jax.cli.exit_status import STATUSES, ExitStatus, guard
from repvgg_jax.cli.header import start_jax
from repvgg_jax.cli.output import Output
from repvgg_jax.files import require_writable
from repvgg_jax.interop.exportable import OPSET
from repvgg_jax.interop.fuse_weights import fuse_weights
from repvgg_jax.interop.safetensors import load_deploy
from repvgg_jax.interop.torch.weights_file import SUFFIXES
from repvgg_jax.invocation import command
from repvgg_jax.reparam import EquivalenceError
from repvgg_jax.terminal import printable
from repvgg_jax.training.export.formats import describe, export_deploy
from repvgg_jax.training.export.int8 import Int8Settings, describe_int8, export_int8
from repvgg_jax.training.export.int8_images import folder_images
from repvgg_jax.training.export.int8_proof import AccuracyLostError
from repvgg_jax.training.export.requirements import Format, is_deploy_form, require_export
from repvgg_jax.training.run.directory import DataMissingError, fuse_run

_DESCRIPTION = (
    "Restore a run, fuse it, verify on every test image that the two forms are the same function, and save "
    "deploy.safetensors. PyTorch weights of the official implementation or of timm are fused as well, and verified on "
    "images of noise. With --export, the deploy form is also written as ONNX, in float or in 8 bits, or as StableHLO. "
    "A deploy.safetensors can be exported, too. " + STATUSES
)

_FAILURES: dict[type[Exception], ExitStatus] = {
    EquivalenceError: ExitStatus.FAILED,
    AccuracyLostError: ExitStatus.FAILED,
}

_Source = Literal["run", "weights", "deploy"]


@dataclasses.dataclass(frozen=True)
class _Arguments:
    source: tyro.conf.Positional[Path]
    """What to fuse: a run directory, or a file of PyTorch weights (.safetensors, .pth, .pt, .bin or .tar).
    With --export it may be a deploy.safetensors too."""
    check_only: bool = False
    """Verify the two forms without writing anything."""
    export: tuple[Format, ...] = ()
    """Formats to write the deploy form in besides deploy.safetensors: deploy.onnx, deploy.stablehlo, deploy.int8.onnx.
    Each file is proven in its own runtime: on test images where there are any, and else on images of noise.
    Noise serves for weights, for a deploy.safetensors, and for a run whose data set is not at hand.
    8 bits (onnx-int8) need images: those of the run, or --images."""
    int8: Annotated[Int8Settings, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=Int8Settings)
    images: Path | None = None
    """For --export onnx-int8 of weights or of a deploy.safetensors: a folder of images to calibrate and prove with.
    Where its directories are named as the classes, it is split as for training, and accuracy is measured.
    Otherwise half of all images in it calibrate, and the others must be predicted as before."""
    opset: int = OPSET
    """Version of the operators in the ONNX file, 11 to 21. Older runtimes and converters want a smaller one."""
    with_preprocess: bool = False
    """Let the exported files take uint8 pixels (NHWC) and return probabilities."""
    data_dir: str | None = None
    """For a run only: where its data set lies now, if it has moved: TFDS' data_dir, or the PATH of folder:PATH."""
    variant: str | None = None
    """For weights only, which need it: the published network that they are of, e.g. repvgg_a0."""
    entry: str | None = None
    """For weights only: which to take from a file that holds several, e.g. model or ema. The default is the average."""
    output: Path | None = None
    """For weights only: the file to write. The default is NAME.deploy.safetensors beside NAME.pth."""
    class_names: Path | None = None
    """For weights only: a text file with one class name a line, in the order of the logits."""
    image_size: int = 224
    """For weights only: side length in pixels of the images that the network is for."""
    strides: tuple[int, int, int, int, int] = (2, 2, 2, 2, 2)
    """For weights only: strides of the stem and of stage 1 to 4."""


def fuse_command(arguments: list[str]) -> int:
    """Run the command and return its exit status, an `ExitStatus`."""

    def run(_: Output) -> int:
        parsed = tyro.cli(_Arguments, args=arguments, prog=command("fuse"), description=_DESCRIPTION)
        is_file = parsed.source.is_file() or (parsed.source.suffix in SUFFIXES and not parsed.source.is_dir())
        kind: _Source = "deploy" if is_deploy_form(parsed.source) else "weights" if is_file else "run"
        _require_fitting(parsed, kind)
        start_jax()
        if kind == "weights":
            _fuse_weights(parsed)
        elif kind == "deploy":
            _export(parsed, parsed.source)
        else:
            _fuse_run(parsed)
        return ExitStatus.DONE

    def run_and_show(output: Output) -> int:
        try:
            return run(output)
        except AccuracyLostError as error:
            print(f"\n{error.proof}\n", flush=True)
            raise

    remedy = "see to its folder, permissions and room; of weights, --output names another file"
    return guard(run_and_show, remedy=remedy, failures=_FAILURES)


def _require_fitting(parsed: _Arguments, kind: _Source) -> None:
    """Check that the arguments go together, and that none is given which says nothing about such a source."""
    source = parsed.source
    if kind == "weights" and not source.exists():
        raise FileNotFoundError(f"{source} does not exist: expected PyTorch weights, a deploy.safetensors or a run")
    if kind == "deploy" and not parsed.export:
        raise ValueError(f"there is nothing to do: {source} is fused already; --export onnx stablehlo exports it")
    if kind != "run":  # fuse_run sees to its own
        require_export(
            _output(parsed) if kind == "weights" else source,
            parsed.export,
            check_only=parsed.check_only,
            with_preprocess=parsed.with_preprocess,
            opset=parsed.opset,
        )
    if kind != "run" and "onnx-int8" in parsed.export and parsed.images is None:
        raise ValueError("images is None: expected a folder, --images FOLDER, to calibrate and prove 8 bits with")
    if kind == "run" and parsed.images is not None:
        raise ValueError(
            f"images is {parsed.images}: expected none, since a run has its own; to take others, export "
            f"{source / 'deploy.safetensors'} with --images"
        )
    if "onnx-int8" not in parsed.export and (parsed.images is not None or parsed.int8 != Int8Settings()):
        raise ValueError("settings of 8 bits are given without --export onnx-int8, which they are about")
    if parsed.image_size < 1:
        raise ValueError(f"image_size is {parsed.image_size}: expected at least 1")
    if kind == "weights" and parsed.variant is None:
        raise ValueError(f"variant is None: expected that of {source}, e.g. --variant repvgg_a0")
    defaults = _Arguments(source)
    of_run, of_weights = ("data_dir",), ("variant", "entry", "output", "class_names", "image_size", "strides")
    others = {"run": of_weights, "weights": of_run, "deploy": of_run + of_weights}[kind]
    given = [name for name in others if getattr(parsed, name) != getattr(defaults, name)]
    if given:
        found, other = {
            "run": ("no file of weights", "one"),
            "weights": ("a file", "a run directory"),
            "deploy": ("fused already, and says itself what it is", "a run directory or PyTorch weights"),
        }[kind]
        raise ValueError(f"{source} is {found}: expected {', '.join(given)} with {other} alone")


def _fuse_run(parsed: _Arguments) -> None:
    weights = parsed.source / "deploy.safetensors"
    try:
        fuse_run(
            parsed.source,
            data_dir=parsed.data_dir,
            check_only=parsed.check_only,
            export=parsed.export,
            with_preprocess=parsed.with_preprocess,
            opset=parsed.opset,
            int8=parsed.int8,
        )
    except DataMissingError as error:
        if not parsed.export or not is_deploy_form(weights):
            raise
        if "onnx-int8" in parsed.export:
            raise FileNotFoundError(
                f"{error}; 8 bits need images: say with --data-dir where they are, or export {weights} with --images"
            ) from None
        if parsed.data_dir is not None:
            raise FileNotFoundError(
                f"{error}; without --data-dir, {weights} is exported as it is, proven on noise"
            ) from None
        print(f"{printable(str(error))}\nso {printable(str(weights))} is exported as it is, proven on images of noise")
        _export(parsed, weights)
        return
    if not parsed.check_only:
        print(f"\nweights: {printable(str(weights))}")


def _export(parsed: _Arguments, path: Path) -> None:
    written = export_deploy(path, parsed.export, with_preprocess=parsed.with_preprocess, opset=parsed.opset)
    if written:
        print(describe(written))
    if parsed.images is not None:
        images = folder_images(parsed.images, load_deploy(path).preprocess, parsed.int8.calibrate)
        proof = export_int8(path, images, parsed.int8, with_preprocess=parsed.with_preprocess, opset=parsed.opset)
        print(f"\n{describe_int8(path, proof)}")


def _output(parsed: _Arguments) -> Path:
    return parsed.output or parsed.source.with_suffix(".deploy.safetensors")


def _fuse_weights(parsed: _Arguments) -> None:
    output = _output(parsed)
    names = _read_names(parsed.class_names) if parsed.class_names else None
    if not parsed.check_only:
        require_writable(output)
    found, source = fuse_weights(
        parsed.source,
        str(parsed.variant),
        None if parsed.check_only else output,
        entry=parsed.entry,
        class_names=names,
        image_size=parsed.image_size,
        strides=parsed.strides,
    )
    print(f"{printable(str(parsed.source))}: took {source}")
    if found is None:
        print(printable(f"{parsed.source} is of a deploy form: there is nothing to fuse"))
    else:
        print(
            f"the two forms agree on {found.compared} images of noise: in float64, and in float32 to "
            f"{found.relative:.1e} of the largest logit, {found.predictions_changed} predictions changed"
        )
    if parsed.check_only:
        return
    if parsed.export:
        _export(parsed, output)
    print(f"\nweights: {printable(str(output))}")


def _read_names(path: Path) -> list[str]:
    if not path.is_file():
        fault = "is no file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {fault}: expected a text file, one class name a line")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}): expected one class name a line") from None
    # Not `splitlines`, which takes other characters than line ends for line ends.
    return text.removesuffix("\n").split("\n")
