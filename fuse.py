"""Fuse a trained run, verify it on the test split, save it: `python fuse.py RUN_DIR [--check-only]`."""

import sys

from repvgg_jax.training.command import fuse_command

if __name__ == "__main__":
    sys.exit(fuse_command(sys.argv[1:]))
