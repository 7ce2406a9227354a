"""The commands as the user runs them: from a checkout, or as they are installed."""

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
    """Return a command as the user types it.

    Returns:
      The command of a checkout, e.g. `python train.py`, in a process that was begun so; elsewhere `repvgg-NAME`.
    """
    begun = Path(sys.argv[0]).parts[-2:] if sys.argv else ()
    of_a_checkout = begun == ("predict", "__main__.py") or begun[-1:] in (("train.py",), ("fuse.py",))
    return _OF_A_CHECKOUT[name] if of_a_checkout else f"repvgg-{name}"
