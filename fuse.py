"""Fuse a trained run or a file of PyTorch weights, verify, save: `python fuse.py RUN_DIR`, `… a0.pth --variant …`."""

import sys

from repvgg_jax.training.command import fuse_command

if __name__ == "__main__":
    sys.exit(fuse_command(sys.argv[1:]))
