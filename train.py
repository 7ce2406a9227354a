"""Train a RepVGG, fuse it, prove the two forms equal: `python train.py [PRESET] [--flags]`."""

import sys

from repvgg_jax.cli.start import train

if __name__ == "__main__":
    sys.exit(train())
