"""Batch normalisation with statistics in at least float32, whatever the compute dtype."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repvgg_jax.models.conv import Operations
from repvgg_jax.ops import batch_norm_train


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last. The variables are those of `flax.linen.BatchNorm`.

    Unlike in Flax's module, running statistics are float64 where `param_dtype` is, so that proofs in float64 stay in
    float64. Under `jit` on a sharded batch the statistics are those of the global batch.

    Attributes:
      use_running_average: Whether to normalise by the running statistics instead of the batch's.
      momentum: Momentum of the running statistics: new = momentum · old + (1 − momentum) · batch. The batch's variance
        is the biased one.
      epsilon: Added to the variance.
      dtype: Dtype of the output. None takes the common dtype of input and parameters.
      param_dtype: Dtype of scale and bias. Statistics have it too, but are at least float32.
      ops: "auto" normalises images in training with `repvgg_jax.ops.batch_norm_train`. "xla" uses plain arithmetic
        always.

    References:
      Ioffe & Szegedy, *Batch Normalization*, ICML 2015, arXiv:1502.03167.
    """

    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    ops: Operations = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise `(…, channels)`.

        In training, the running statistics move towards those of the batch, except while the module is initialised.
        """
        shape = (x.shape[-1],)
        stats_dtype = jnp.promote_types(self.param_dtype, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, stats_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, stats_dtype)
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        output_dtype = self.dtype or jnp.promote_types(x.dtype, self.param_dtype)

        if self.use_running_average:
            return self._normalize(x, running_mean.value, running_var.value, scale, bias).astype(output_dtype)
        if self.ops == "auto" and x.ndim == 4:
            y, mean, var = batch_norm_train(x.astype(output_dtype), scale, bias, self.epsilon)
        else:
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            axes = tuple(range(x.ndim - 1))
            mean = wide.mean(axes)
            var = jnp.square(wide - _along_channels(mean, x.ndim)).mean(axes)
            y = self._normalize(wide, mean, var, scale, bias).astype(output_dtype)
        if not self.is_initializing():
            for running, batch in ((running_mean, mean), (running_var, var)):
                running.value = (self.momentum * running.value + (1 - self.momentum) * batch).astype(stats_dtype)
        return y

    def _normalize(self, x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        mean, factor, bias = (_along_channels(vector, x.ndim) for vector in (mean, factor, bias))
        return (x - mean) * factor + bias


def _along_channels(vector: jax.Array, rank: int) -> jax.Array:
    """Give a vector the rank of the images, as `jax_numpy_rank_promotion="raise"` asks for."""
    return jnp.expand_dims(vector, range(rank - 1))
