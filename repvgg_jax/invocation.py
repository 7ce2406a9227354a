"""How the user runs the commands: from a checkout, or as they are installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

_OF_A_CHECKOUT = {
    "train": "python train.py",
    "fuse": "python fuse.py",
    "predict": "python -m repvgg_jax.predict",
}


def command(name: Literal["train", "fuse", "predict"]) -> str:
    """The command as the user types it.

    Returns:
      That of a checkout, e.g. `python train.py`, in a process that was begun so; elsewhere `repvgg-NAME`.
    """
    script = Path(sys.argv[0]).name if sys.argv else ""
    return _OF_A_CHECKOUT[name] if script.removesuffix(".py") in _OF_A_CHECKOUT else f"repvgg-{name}"
