"""A start of JAX before anything else is done, to see whether it can."""

from __future__ import annotations

import os

import jax


def require_devices() -> list[jax.Device]:
    """Start JAX and return its devices.

    Raises:
      ValueError: If JAX cannot start what `JAX_PLATFORMS` names, or found no device.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError, ValueError) as error:
        # A plugin that is installed and finds no device of its kind raises an AssertionError without a word.
        said = (
            " ".join(str(error).partition("(set JAX_PLATFORMS")[0].split())
            or "no such device, or no plugin of JAX for it"
        )
        asked = os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms  # type: ignore[attr-defined]
        remedy = (
            f"unset JAX_PLATFORMS (={asked}), or set it to cpu, or install the plugin, e.g. "
            'pip install "jax[cuda13]" or "jax[tpu]"'
            if asked
            else "JAX_PLATFORMS=cpu does without an accelerator"
        )
        raise ValueError(f"JAX cannot start ({said.removesuffix('.')}): {remedy}") from None
