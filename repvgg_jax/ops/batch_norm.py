"""Batch normalisation in training mode, with its gradient written out."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from repvgg_jax.ops.manual_axes import varying_alike
from repvgg_jax.ops.materialize import materialize
from repvgg_jax.ops.platform import by_platform
from repvgg_jax.ops.reverse_mode import reverse_mode_only

_AXES = (0, 1, 2)


def batch_norm_train(
    x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalise every channel by the statistics of the batch.

    `y = (x - mean) / sqrt(var + epsilon) * scale + bias`, with statistics over batch, height and width. Under a sharded
    batch they are those of the whole batch. All three results can be differentiated in reverse mode. Forward mode
    raises a TypeError.

    On CPU the variance is `E[x²] - E[x]²` while no channel cancels more than six bits in it. Otherwise it is
    `E[(x - E[x])²]`, which takes one more pass over `x`. Other platforms compute `E[x²] - E[x]²` as Flax does. It is
    clipped at zero.

    Args:
      x: `(batch, height, width, channels)`, any floating-point dtype.
      scale: `(channels,)`, or None for ones.
      bias: `(channels,)`, or None for zeros.
      epsilon: Added to the variance, in the dtype of the statistics.

    Returns:
      The arrays `(y, mean, var)`. `y` has the shape and dtype of `x`; `mean` and `var` are `(channels,)` in at least
      float32. The variance is the biased one, divided by batch · height · width.

    References:
      Ioffe & Szegedy, *Batch Normalization*, ICML 2015, arXiv:1502.03167.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    channels = (x.shape[-1],)
    scale = jnp.ones(channels, wide) if scale is None else scale.astype(wide)
    bias = jnp.zeros(channels, wide) if bias is None else bias.astype(wide)
    return _batch_norm(*map(reverse_mode_only, varying_alike(x, scale, bias)), epsilon)


def _across(vector: jax.Array) -> jax.Array:
    """Give a vector of the channels the rank of the images, as `jax_numpy_rank_promotion="raise"` asks for."""
    return vector[None, None, None]


def _fast_statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    mean = x.mean(_AXES)
    return mean, jnp.maximum(0, (x * x).mean(_AXES) - mean * mean)


def _robust_statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return mean and variance of each channel, with one more pass over `x` where the fast variance would cancel.

    XLA:CPU sums `x` and `x * x` in one threaded pass each, but writes `x - mean` to memory first.
    """

    def once_more(x: jax.Array, mean: jax.Array) -> tuple[jax.Array, jax.Array]:
        rest, var = _fast_statistics(x - _across(mean))
        return mean + rest, var

    mean, var = _fast_statistics(x)
    safe = jnp.all(mean * mean <= 64 * var)
    return lax.cond(safe, lambda x, mean: (mean, var), once_more, x, mean)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
@partial(jax.jit, static_argnums=(3,))
def _batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    wide = materialize(x).astype(scale.dtype)
    mean, var = by_platform(wide, cpu=_robust_statistics, default=_fast_statistics)
    y = (wide - _across(mean)) * _across(lax.rsqrt(var + epsilon) * scale) + _across(bias)
    return y.astype(x.dtype), mean, var


def _batch_norm_forward(x, scale, bias, epsilon):
    y, mean, var = _batch_norm(x, scale, bias, epsilon)
    return (y, mean, var), (x, scale, mean, var)


def _batch_norm_backward(epsilon, residuals, cotangents):
    x, scale, mean, var = residuals
    dy, dmean, dvar = cotangents
    dtype = x.dtype
    count = x.size // x.shape[-1]
    inverse = lax.rsqrt(var + epsilon)
    x, dy = materialize(x).astype(scale.dtype), materialize(dy).astype(scale.dtype)
    dbias = dy.sum(_AXES)
    dscale = ((dy * x).sum(_AXES) - mean * dbias) * inverse
    # dx = slope * dy + tilt * (x - mean) + offset: one pass, whatever the cotangents of the statistics are.
    slope = scale * inverse
    tilt = (2 * dvar - slope * inverse * dscale) / count
    offset = (dmean - slope * dbias) / count
    dx = _across(slope) * dy + _across(tilt) * (x - _across(mean)) + _across(offset)
    return dx.astype(dtype), dscale, dbias


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)
