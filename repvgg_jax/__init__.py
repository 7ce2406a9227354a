"""RepVGG in JAX and Flax: a block trains with three parallel branches and infers as one 3×3 convolution.

`create_model` builds a network and `fuse_model` turns its training form into its deploy form. `fuse` and `fuse_with` do
the same to a tree of variables. `reparameterize` merges the convolutions of any traced function, and `expand` lets them
train as branches. Each name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from repvgg_jax.version import VERSION as __version__  # noqa: N811

if TYPE_CHECKING:
    from repvgg_jax.models import VARIANTS, RepVGG, compile_inference, create_model, fuse_model, reopen_model, summarize
    from repvgg_jax.reparam import branch_rule, fuse, fuse_with
    from repvgg_jax.transform import expand, reparameterize

# Imported when they are asked for: a command decides how its process runs before JAX is loaded.
_HOMES = {
    "models": ("VARIANTS", "RepVGG", "compile_inference", "create_model", "fuse_model", "reopen_model", "summarize"),
    "reparam": ("branch_rule", "fuse", "fuse_with"),
    "transform": ("expand", "reparameterize"),
}

__all__ = [
    "VARIANTS",
    "RepVGG",
    "__version__",
    "branch_rule",
    "compile_inference",
    "create_model",
    "expand",
    "fuse",
    "fuse_model",
    "fuse_with",
    "reopen_model",
    "reparameterize",
    "summarize",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
