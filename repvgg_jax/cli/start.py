"""The entry points of the commands: what must be settled before JAX is loaded, and then the command itself."""

from __future__ import annotations

import os
import sys

from repvgg_jax.cli.huge_pages import restart_with_huge_pages
from repvgg_jax.cli.orbax_noise import quieten_orbax


def train() -> int:
    """Run `repvgg-train`, or `python train.py`, in a process with huge pages, and return the exit status."""
    restart_with_huge_pages()
    _quieten_xla()
    from repvgg_jax.cli.train import train_command

    quieten_orbax()
    return train_command(sys.argv[1:])


def fuse() -> int:
    """Run `repvgg-fuse`, or `python fuse.py`, and return the exit status."""
    _quieten_xla()
    from repvgg_jax.cli.fuse import fuse_command

    quieten_orbax()
    return fuse_command(sys.argv[1:])


def predict() -> int:
    """Run `repvgg-predict`, or `python -m repvgg_jax.predict`, and return the exit status."""
    _quieten_xla()
    from repvgg_jax.cli.predict import predict_command

    return predict_command(sys.argv[1:])


def _quieten_xla() -> None:
    """Keep quiet what XLA logs besides the errors that it raises.

    jaxlib 0.10 logs two lines of 3,000 characters for each program that was kept on disk, on some processors.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
