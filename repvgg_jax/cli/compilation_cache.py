"""Compiled programs kept on disk, so that the second run of a script starts at once."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax


class Kept(NamedTuple):
    """Where compiled programs are kept.

    Attributes:
      directory: The directory, or None where they are not kept.
      reason: Why they are not kept, where that was not asked for; else None.
    """

    directory: str | None
    reason: str | None = None

    def __str__(self) -> str:
        if self.directory is not None:
            return f"compiled programs are kept in {self.directory}"
        return f"compiled programs are not kept{f': {self.reason}' if self.reason else ''}"


def keep_compiled_programs() -> Kept:
    """Switch on JAX's persistent compilation cache, in a place of this package unless the user has chosen one.

    The place is `repvgg_jax/xla` in `XDG_CACHE_HOME` or `~/.cache`. `JAX_COMPILATION_CACHE_DIR` names another, and
    `JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing. Programs that compile in less than a second are not kept. Where
    the place cannot be written, or its name is not UTF-8, the cache is off.

    Returns:
      The directory, or None where the cache is off, and why.
    """
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return Kept(None)
    chosen: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    try:
        directory = chosen or str(_home() / "repvgg_jax" / "xla")
        if "://" not in directory:
            if any("\ud800" <= character <= "\udfff" for character in directory):
                raise ValueError(f"{directory} is not UTF-8, as JAX expects")
            os.makedirs(directory, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
    except (OSError, RuntimeError, ValueError) as error:
        jax.config.update("jax_enable_compilation_cache", False)
        return Kept(None, f"{error}; JAX_COMPILATION_CACHE_DIR names another place")
    jax.config.update("jax_compilation_cache_dir", directory)
    return Kept(directory)


def _home() -> Path:
    """Return the user's directory for caches. A relative one counts for nothing, as XDG's specification says."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = named if named.is_absolute() else Path.home() / ".cache"
    if not home.is_absolute():
        raise ValueError(f"HOME is {os.environ.get('HOME')!r}: expected an absolute path")
    return home
