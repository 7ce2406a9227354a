"""Convolution and batch norm in place of those that XLA computes slowly on some platforms. Imports JAX and NumPy."""

from repvgg_jax.ops.batch_norm import batch_norm_train
from repvgg_jax.ops.convolution import conv_general_dilated
from repvgg_jax.ops.platform import inference_on
from repvgg_jax.ops.xla_options import compiler_options

__all__ = ["batch_norm_train", "compiler_options", "conv_general_dilated", "inference_on"]
