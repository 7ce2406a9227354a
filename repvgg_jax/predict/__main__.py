"""`python -m repvgg_jax.predict deploy.safetensors cat.jpg DIRECTORY …`, which is `repvgg-predict`."""

import sys

from repvgg_jax.cli.start import predict

if __name__ == "__main__":
    sys.exit(predict())
