"""What an export needs, checked before any work: libraries, arguments that go together, and files to write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import safetensors

from repvgg_jax.files import require_writable
from repvgg_jax.interop.exportable import OPSET, require_opset

Format = Literal["onnx", "stablehlo", "onnx-int8"]
# Scales by channel are attributes of QuantizeLinear from this version on.
_OLDEST_INT8_OPSET = 13


def exported_path(path: Path, name: Format) -> Path:
    """Return `NAME.onnx` for `NAME.safetensors`, and `NAME.int8.onnx` for the format onnx-int8.

    Another name is kept whole, so that no two files share one.
    """
    stem = path.name[: -len(".safetensors")] if path.name.lower().endswith(".safetensors") else path.name
    return path.with_name(f"{stem}.{'int8.onnx' if name == 'onnx-int8' else name}")


def require_export(
    path: Path,
    formats: Sequence[Format],
    *,
    check_only: bool = False,
    with_preprocess: bool = False,
    opset: int = OPSET,
) -> None:
    """Check, before any work, that a deploy form can be exported as is asked.

    Args:
      path: The file of the deploy form, which need not be there yet.
      formats: Formats to export it in. There may be none.
      check_only: Whether nothing is to be written.
      with_preprocess: Whether the exported files take pixels.
      opset: Version of the operators of the ONNX file.

    Raises:
      ValueError: If the arguments do not go together.
      ImportError: If the extra of a format is not installed.
      OSError: If a file cannot be written beside `path`.
    """
    if formats and check_only:
        raise ValueError("export and check_only are both given: expected one of them, since check_only writes nothing")
    if with_preprocess and not formats:
        raise ValueError("with_preprocess is given without export: expected both, it is about the exported files")
    require_opset(opset)
    if opset != OPSET and not {"onnx", "onnx-int8"} & set(formats):
        raise ValueError(f"opset is {opset} without an ONNX file to write: expected it with --export onnx alone")
    for name in formats:
        if name == "onnx-int8":
            require_int8(opset)
        else:
            _require_runtime(name)
        require_writable(exported_path(path, name))


def require_int8(opset: int) -> None:
    """Raise an error, before any work, unless 8 bits can be written.

    Raises:
      ValueError: If `opset` is older than scales by channel.
      ImportError: If ONNX or ONNX Runtime is not installed.
    """
    if opset < _OLDEST_INT8_OPSET:
        raise ValueError(
            f"opset is {opset}: expected at least {_OLDEST_INT8_OPSET} for onnx-int8, for scales by channel"
        )
    from repvgg_jax.interop.onnx import require_runtime

    require_runtime()


def is_deploy_form(path: Path) -> bool:
    """Return whether a file is a `deploy.safetensors` of this package, of any version.

    Its metadata tell so, whatever its name.
    """
    if not path.is_file():
        return False
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return str((file.metadata() or {}).get("format")).startswith("repvgg_jax deploy")
    except (safetensors.SafetensorError, OSError):
        return False


def _require_runtime(name: Format) -> None:
    if name == "onnx":
        from repvgg_jax.interop.onnx import require_runtime

        require_runtime()
    else:
        from repvgg_jax.interop.stablehlo import require_serializer

        require_serializer()
