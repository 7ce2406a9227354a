"""What a deploy form needs before its numbers become integers of 8 bits."""

from repvgg_jax.quantize.equalize import equalize
from repvgg_jax.quantize.ranges import activation_ranges

__all__ = ["activation_ranges", "equalize"]
