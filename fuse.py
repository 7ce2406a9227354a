"""Fuse a trained run or a file of PyTorch weights, verify, save: `python fuse.py RUN_DIR`, `… a0.pth --variant …`."""

import sys

from repvgg_jax.cli.start import fuse

if __name__ == "__main__":
    sys.exit(fuse())
