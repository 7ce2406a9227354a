"""Classification of image files by a trained network."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repvgg_jax.predict.classify import Prediction, predict

__all__ = ["Prediction", "predict"]


# Imported when they are asked for: `python -m repvgg_jax.predict` sets up its process before JAX is loaded.
def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.classify"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
