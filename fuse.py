"""Fuse a trained run or a file of PyTorch weights, verify, save: `python fuse.py RUN_DIR`, `… a0.pth --variant …`."""

import sys

from repvgg_jax.training.command import fuse_command
from repvgg_jax.training.orbax_noise import quieten_orbax

if __name__ == "__main__":
    quieten_orbax()
    sys.exit(fuse_command(sys.argv[1:]))
