"""Tensors of PyTorch code as arrays: what can be one, without making it. It needs no PyTorch."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

# A view may repeat few values to any size; more elements than these (1 GB in float32) must lie in the file.
_MOST_REPEATED = 2**28


def require_dense(key: str, tensor: Any) -> None:
    """Check that a tensor is a plain array of values, of a size that can be made.

    Args:
      key: Key of the tensor, for the message.
      tensor: An array or a torch tensor.

    Raises:
      ValueError: If it is sparse, nested, quantized or without values, or a view that repeats few values to many.
    """
    if getattr(tensor, "is_nested", False):
        raise ValueError(f"{key!r} is a nested tensor: expected a dense one of a fixed shape")
    if str(getattr(tensor, "layout", "torch.strided")) != "torch.strided":
        raise ValueError(f"{key!r} is a sparse tensor ({tensor.layout}): expected a dense one, tensor.to_dense()")
    if getattr(tensor, "is_quantized", False):
        raise ValueError(f"{key!r} is quantized ({tensor.dtype}): expected floating point, tensor.dequantize()")
    if getattr(tensor, "is_meta", False):
        raise ValueError(f"{key!r} is on the meta device, without values: expected the weights themselves")
    size, shape = math.prod(tensor.shape), tuple(tensor.shape)
    if size > _MOST_REPEATED and size > _stored(tensor):
        raise ValueError(f"{key!r} repeats {_stored(tensor):,} stored values to {shape}: expected as many as it shows")


def require_floating(key: str, tensor: Any) -> None:
    """Check that weights are real floating-point numbers of at least 16 bits.

    Raises:
      ValueError: If they are integers, booleans, complex, or of 8 bits, which mean nothing without their scales.
    """
    name = str(tensor.dtype).removeprefix("torch.")
    if not re.fullmatch(r"b?float\d\d", name):
        raise ValueError(f"{key!r} holds {name} values: expected float32, float64, float16 or bfloat16")


def to_numpy(key: str, tensor: Any) -> np.ndarray:
    """Return the values of a dense tensor on the host. bfloat16 of torch becomes float32.

    Raises:
      ValueError: If it is of a subclass that does not give its values up.
    """
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    tensor = tensor.detach()
    if str(tensor.dtype) == "torch.bfloat16":
        tensor = tensor.float()
    try:
        return np.asarray(tensor.numpy(force=True))
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"{key!r} is a {type(tensor).__name__} without an array ({error}): expected a tensor"
        ) from None


def is_finite(key: str, tensor: Any) -> bool:
    """Whether all values of a dense tensor are finite. Integers are."""
    if hasattr(tensor, "detach"):
        try:
            return bool(tensor.detach().isfinite().all())
        except (TypeError, RuntimeError, NotImplementedError):
            return bool(np.isfinite(to_numpy(key, tensor.float())).all())
    return bool(np.isfinite(np.asarray(tensor)).all())


def _stored(tensor: Any) -> int:
    """Return how many values lie in memory, at most."""
    if hasattr(tensor, "untyped_storage"):
        return int(tensor.untyped_storage().nbytes()) // int(tensor.element_size())
    strides = getattr(tensor, "strides", None) or (1,) * len(tensor.shape)
    return math.prod(size for size, stride in zip(tensor.shape, strides, strict=True) if stride)
