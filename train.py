"""Train a RepVGG, fuse it, prove the two forms equal: `python train.py [PRESET] [--flags]`."""

import sys

from repvgg_jax.training.command import train_command

if __name__ == "__main__":
    sys.exit(train_command(sys.argv[1:]))
