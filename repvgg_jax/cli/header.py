"""What a command settles and says before its work."""

from __future__ import annotations

from repvgg_jax.cli.compilation_cache import keep_compiled_programs
from repvgg_jax.cli.devices import require_devices
from repvgg_jax.cli.huge_pages import are_on
from repvgg_jax.terminal import printable
from repvgg_jax.training.distributed import is_primary


def start_jax() -> None:
    """Start JAX, keep what it compiles, and print what holds for the process.

    Raises:
      ValueError: If JAX cannot start.
    """
    require_devices()
    kept = keep_compiled_programs()
    if not is_primary():
        return
    if are_on():
        print("large arrays lie in huge pages")
    if kept.directory or kept.reason:
        print(printable(str(kept)))
