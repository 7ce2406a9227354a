"""What XLA computes slowly on some platform, computed well: convolution and batch norm. Imports jax only."""

from repvgg_jax.ops.batch_norm import batch_norm_train
from repvgg_jax.ops.convolution import conv_general_dilated

__all__ = ["batch_norm_train", "conv_general_dilated"]
