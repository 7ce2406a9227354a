"""Compiled programs kept on disk, so that the second run of a script starts at once."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def keep_compiled_programs() -> str | None:
    """Switch on JAX's persistent compilation cache, where the user has not chosen a place for it already.

    The place is `repvgg_jax/xla` in `XDG_CACHE_HOME` or `~/.cache`. `JAX_COMPILATION_CACHE_DIR` names another, and
    `JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing. Programs that compile in less than a second are not kept.

    Returns:
      The directory, or None where the cache is off.
    """
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return None
    chosen: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if chosen is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        chosen = str(Path(home) / "repvgg_jax" / "xla")
        jax.config.update("jax_compilation_cache_dir", chosen)
    return chosen
