"""Train a RepVGG, fuse it, prove the two forms equal: `python train.py [PRESET] [--flags]`."""

import sys

from repvgg_jax.training.command import train_command
from repvgg_jax.training.huge_pages import restart_with_huge_pages
from repvgg_jax.training.orbax_noise import quieten_orbax

if __name__ == "__main__":
    restart_with_huge_pages()
    quieten_orbax()
    sys.exit(train_command(sys.argv[1:]))
