"""What `train.py` and `fuse.py` do with their command lines."""

from __future__ import annotations

import dataclasses
import difflib
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from repvgg_jax.compilation_cache import keep_compiled_programs
from repvgg_jax.data import load_dataset
from repvgg_jax.devices import require_devices
from repvgg_jax.files import require_writable
from repvgg_jax.interop.exportable import OPSET
from repvgg_jax.interop.fuse_weights import fuse_weights
from repvgg_jax.interop.torch.weights_file import SUFFIXES
from repvgg_jax.models import summarize
from repvgg_jax.reparam import EquivalenceError
from repvgg_jax.terminal import fail, printable, run_command
from repvgg_jax.training.cluster import Cluster, is_primary
from repvgg_jax.training.config import TrainConfig
from repvgg_jax.training.export import Format, describe, export_deploy, is_deploy_form, require_export
from repvgg_jax.training.interruption import TerminatedError
from repvgg_jax.training.loop import TrainingDivergedError, train_and_evaluate
from repvgg_jax.training.presets import PRESETS
from repvgg_jax.training.run_directory import DataMissingError, fuse_run
from repvgg_jax.training.run_path import run_directory

_FAILED, _USAGE_ERROR = 1, 2
# As the shell reports a process that the signal ended: schedulers take it for preempted and start the job again.
_TERMINATED, _INTERRUPTED = 128 + signal.SIGTERM, 128 + signal.SIGINT
_FUSE_DESCRIPTION = (
    "Restore a run, fuse it, verify on every test image that the two forms are the same function, and save "
    "deploy.safetensors. Or fuse weights of the official PyTorch implementation or timm, and verify on images of "
    "noise. With --export, write ONNX and StableHLO files of the deploy form too, also of a deploy.safetensors alone. "
    "Exits with 1 where the forms differ, with 2 where an argument is wrong or a file cannot be written."
)


_Source = Literal["run", "weights", "deploy"]


@dataclasses.dataclass(frozen=True)
class _TrainArguments:
    config: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes]
    cluster: Annotated[Cluster, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=Cluster)
    workdir: Path | None = None
    """Run directory; an unfinished run of the same config in it is resumed. Default: runs/PRESET-TIMESTAMP."""
    summary: bool = False
    """Print the network's blocks in both forms (output shape, parameters, multiply-adds) and stop."""


@dataclasses.dataclass(frozen=True)
class _FuseArguments:
    source: tyro.conf.Positional[Path]
    """Run directory that train.py wrote; a file of PyTorch weights, .safetensors, .pth, .pt, .bin or .tar; or, with
    --export, a deploy.safetensors."""
    check_only: bool = False
    """Verify without writing anything."""
    export: tuple[Format, ...] = ()
    """Formats to write the deploy form in besides, each proven in its own runtime: deploy.onnx, deploy.stablehlo. On
    test images where there are any, and else on noise: of weights, of a deploy.safetensors, and of the
    deploy.safetensors in a run directory whose data set is not at hand."""
    opset: int = OPSET
    """Of the ONNX file: version of its operators, 11 to 21. Older runtimes and converters want a smaller one."""
    with_preprocess: bool = False
    """The exported files take uint8 pixels (NHWC) and return probabilities."""
    data_dir: str | None = None
    """Of a run: where the data set (TFDS' data_dir, or PATH of folder:PATH) lies now, if it has moved."""
    variant: str | None = None
    """Of weights: the published network they are of, e.g. repvgg_a0."""
    entry: str | None = None
    """Of weights: which to take of a file that holds several, e.g. model or ema; the average where not given."""
    output: Path | None = None
    """Of weights: the file to write; NAME.deploy.safetensors beside NAME.pth where not given."""
    class_names: Path | None = None
    """Of weights: a text file with one class name a line, in the order of the logits."""
    image_size: int = 224
    """Of weights: side length of the images the network is for, in pixels."""
    strides: tuple[int, int, int, int, int] = (2, 2, 2, 2, 2)
    """Of weights: strides of the stem and of stage 1 to 4."""


def train_command(arguments: list[str]) -> int:
    """Run `train.py`.

    Args:
      arguments: an optional preset name (default 'digits'), then flags.

    Returns:
      The exit status: 0, 1 where training or the proof of equality failed, 2 for bad input, 130 and 143 where Ctrl-C
      or SIGTERM stopped a run, which is saved.
    """
    preset = "digits"
    if arguments and not arguments[0].startswith("-"):
        preset, *arguments = arguments
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        message = f"unknown preset {preset!r}{hint} Expected one of {', '.join(PRESETS)}"
        return run_command(lambda _: fail(message, _USAGE_ERROR))

    def run() -> None:
        parsed = tyro.cli(
            _TrainArguments,
            args=arguments,
            default=_TrainArguments(PRESETS[preset]),
            prog=f"train.py {preset}",
            description=f"Train a RepVGG, fuse it, and prove the two forms equal. Presets: {', '.join(PRESETS)}; "
            f"the defaults below are those of {preset!r}.",
        )
        if parsed.summary:
            require_devices()
            print(_summary(parsed.config))
            return
        if parsed.cluster.distributed and parsed.workdir is None:
            raise ValueError("workdir is None: several processes need one --workdir that all of them see")
        workdir = parsed.workdir or Path("runs") / f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
        run_directory(workdir)
        parsed.cluster.join()
        _keep_compiled_programs()
        train_and_evaluate(parsed.config, workdir)
        if is_primary():
            shown = printable(str(workdir))
            print(f"\nreport: {shown}/report.md\nweights: {shown}/deploy.safetensors")

    return _guard(run, "name another --workdir or --data-dir")


def fuse_command(arguments: list[str]) -> int:
    """Run `fuse.py`; arguments and exit status as for `train_command`."""

    def run() -> None:
        parsed = tyro.cli(_FuseArguments, args=arguments, prog="fuse.py", description=_FUSE_DESCRIPTION)
        is_file = parsed.source.is_file() or (parsed.source.suffix in SUFFIXES and not parsed.source.is_dir())
        kind: _Source = "deploy" if is_deploy_form(parsed.source) else "weights" if is_file else "run"
        _require_fitting(parsed, kind)
        _keep_compiled_programs()
        if kind == "weights":
            _fuse_weights(parsed)
        elif kind == "deploy":
            _export(parsed, parsed.source)
        else:
            _fuse_run(parsed)

    return _guard(run, "see to its folder, permissions and room; of weights, --output names another file")


def _require_fitting(parsed: _FuseArguments, kind: _Source) -> None:
    """See that the arguments go together, and that none is given which says nothing about such a source."""
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
    if parsed.image_size < 1:
        raise ValueError(f"image_size is {parsed.image_size}: expected at least 1")
    if kind == "weights" and parsed.variant is None:
        raise ValueError(f"variant is None: expected that of {source}, e.g. --variant repvgg_a0")
    defaults = _FuseArguments(source)
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


def _fuse_run(parsed: _FuseArguments) -> None:
    weights = parsed.source / "deploy.safetensors"
    try:
        fuse_run(
            parsed.source,
            data_dir=parsed.data_dir,
            check_only=parsed.check_only,
            export=parsed.export,
            with_preprocess=parsed.with_preprocess,
            opset=parsed.opset,
        )
    except DataMissingError as error:
        if not parsed.export or not is_deploy_form(weights):
            raise
        if parsed.data_dir is not None:
            raise FileNotFoundError(
                f"{error}; without --data-dir, {weights} is exported as it is, proven on noise"
            ) from None
        print(f"{printable(str(error))}\nso {printable(str(weights))} is exported as it is, proven on images of noise")
        _export(parsed, weights)
        return
    if not parsed.check_only:
        print(f"\nweights: {printable(str(weights))}")


def _export(parsed: _FuseArguments, path: Path) -> None:
    print(describe(export_deploy(path, parsed.export, with_preprocess=parsed.with_preprocess, opset=parsed.opset)))


def _output(parsed: _FuseArguments) -> Path:
    return parsed.output or parsed.source.with_suffix(".deploy.safetensors")


def _fuse_weights(parsed: _FuseArguments) -> None:
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


def _guard(run: Callable[[], None], remedy: str) -> int:
    """The exit status of what runs, after one line for what stopped it, with the remedy for an error of the system.

    Nobody has to read what it prints.
    """

    def guarded(_: object) -> int:
        try:
            run()
        except (TrainingDivergedError, EquivalenceError) as error:
            return fail(str(error), _FAILED)
        except TerminatedError as error:
            return fail(str(error), _TERMINATED)
        except KeyboardInterrupt as error:
            return fail(str(error) or "interrupted", _INTERRUPTED)
        except (ValueError, OSError, ImportError) as error:
            system = isinstance(error, OSError) and error.errno is not None
            return fail(f"{error}{f'; {remedy}' if system else ''}", _USAGE_ERROR)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            return fail(f"{said}: where memory is short, lower --batch-size and --eval-batch-size", _FAILED)
        return 0

    return run_command(guarded)


def _keep_compiled_programs() -> None:
    require_devices()
    kept = keep_compiled_programs()
    if (kept.directory or kept.reason) and is_primary():
        print(printable(str(kept)))


def _summary(config: TrainConfig) -> str:
    """The table of a config's network; the data set tells classes and channels where it is at hand."""
    try:
        dataset = load_dataset(config.dataset, data_dir=config.data_dir, seed=config.seed)
        classes, channels, note = dataset.num_classes, dataset.channels, ""
    except FileNotFoundError:
        classes, channels = 1000, 3
        note = f"\n\n{printable(config.dataset)} is not at hand: counted with {classes} classes and {channels} channels"
    summary = summarize(config.create_model(classes), (config.image_size, config.image_size, channels))
    return f"{config.variant} on {config.image_size}×{config.image_size} images\n\n{summary}{note}"
