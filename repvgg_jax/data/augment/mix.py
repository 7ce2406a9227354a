"""Mixing of images and targets of a batch on the device: mixup and CutMix.

Both blend each image with a partner by a map of weights. That of mixup is one number everywhere; that of CutMix is 0 in
a box and 1 outside. The target is blended by the mean of the map. The partner is the next image of the batch: batches
are shuffled already, and a neighbour mostly lies on the same device.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def mixup_weights(key: jax.Array, size: tuple[int, int], *, alpha: float) -> jax.Array:
    """Return mixup's map of weights: one weight for the whole image, drawn from Beta(alpha, alpha).

    Args:
      key: Random key.
      size: `(height, width)`.
      alpha: Parameter of the distribution, more than 0.

    Returns:
      float32 `(height, width)`.

    References:
      Zhang et al., *mixup: Beyond Empirical Risk Minimization*, arXiv:1710.09412.
    """
    return jnp.full(size, jax.random.beta(key, alpha, alpha), jnp.float32)


def cutmix_weights(key: jax.Array, size: tuple[int, int], *, alpha: float) -> jax.Array:
    """Return CutMix's map of weights: 0 in a box and 1 outside.

    The box has the image's aspect ratio and the share 1 - λ of its area, with λ from Beta(alpha, alpha). Its centre is
    uniform over the pixels, and what lies outside of the image is cut off.

    Args:
      key: Random key.
      size: `(height, width)`.
      alpha: Parameter of the distribution, more than 0.

    Returns:
      float32 `(height, width)`.

    References:
      Yun et al., *CutMix*, arXiv:1905.04899.
    """
    share_key, *centre_keys = jax.random.split(key, 3)
    ratio = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha))
    inside: list[jax.Array] = []
    for extent, centre_key in zip(size, centre_keys, strict=True):
        half = (extent * ratio).astype(jnp.int32) // 2
        distance = jnp.arange(extent) - jax.random.randint(centre_key, (), 0, extent)
        inside.append((distance >= -half) & (distance < half))
    return jnp.where(inside[0][:, None] & inside[1][None], 0.0, 1.0)


def mix(images: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Blend every image, and its target, with the next of the batch.

    Args:
      images: `(batch, height, width, channels)`, floating point.
      targets: `(batch, classes)`, rows that sum to 1.
      weights: `(height, width)` in [0, 1], the weights of the image itself.

    Returns:
      Images and targets of the same shapes and dtypes.
    """
    own, share = weights[None, :, :, None].astype(images.dtype), weights.mean().astype(targets.dtype)
    next_images, next_targets = jnp.roll(images, -1, axis=0), jnp.roll(targets, -1, axis=0)
    return own * images + (1 - own) * next_images, share * targets + (1 - share) * next_targets


def random_mix(
    key: jax.Array, images: jax.Array, targets: jax.Array, *, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    """Apply mixup or CutMix to a batch, with one draw for all of it.

    Each image is blended with the next of the batch. Where both are on, a fair coin decides.

    Args:
      key: Random key.
      images: `(batch, height, width, channels)`, floating point.
      targets: `(batch, classes)`, rows that sum to 1.
      mixup: The alpha of mixup's Beta(alpha, alpha). 0 switches it off.
      cutmix: The alpha of CutMix's Beta(alpha, alpha). 0 switches it off.

    Returns:
      Images and targets of the same shapes and dtypes, as they are where both are off.

    Raises:
      ValueError: If an alpha is negative.

    References:
      Zhang et al., *mixup*, arXiv:1710.09412; Yun et al., *CutMix*, arXiv:1905.04899.
    """
    for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
        if alpha < 0:
            raise ValueError(f"{name} (={alpha}) must not be negative")
    coin_key, mixup_key, cutmix_key = jax.random.split(key, 3)
    size = (images.shape[1], images.shape[2])
    draws: list[jax.Array] = []
    if mixup:
        draws.append(mixup_weights(mixup_key, size, alpha=mixup))
    if cutmix:
        draws.append(cutmix_weights(cutmix_key, size, alpha=cutmix))
    if not draws:
        return images, targets
    weights = draws[0] if len(draws) == 1 else jnp.where(jax.random.bernoulli(coin_key), draws[0], draws[1])
    return mix(images, targets, weights)
