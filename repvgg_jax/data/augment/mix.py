"""Mixing images and targets of a batch on the device: mixup and CutMix.

Both blend each image with a partner, by a map of weights: mixup's is one number everywhere, CutMix's is 0 in a box
and 1 outside. The target is blended by the map's mean. The partner is the next image of the batch: batches are
shuffled already, and a neighbour mostly lies on the same device.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def mixup_weights(key: jax.Array, size: tuple[int, int], *, alpha: float) -> jax.Array:
    """One weight for the whole image, from Beta(alpha, alpha) (Zhang et al., *mixup*, arXiv:1710.09412).

    Args:
      key: random key.
      size: `(H, W)`.
      alpha: more than 0.

    Returns:
      float32 `(H, W)`.
    """
    return jnp.full(size, jax.random.beta(key, alpha, alpha), jnp.float32)


def cutmix_weights(key: jax.Array, size: tuple[int, int], *, alpha: float) -> jax.Array:
    """0 in a box, 1 outside (Yun et al., *CutMix*, arXiv:1905.04899).

    The box has the image's aspect ratio and the share 1 - λ of its area, λ from Beta(alpha, alpha); its centre is
    uniform over the pixels, and what lies outside the image is cut off.

    Args:
      key: random key.
      size: `(H, W)`.
      alpha: more than 0.

    Returns:
      float32 `(H, W)`.
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
      images: `(B, H, W, C)`, floating point.
      targets: `(B, classes)`, rows that sum to 1.
      weights: `(H, W)` in [0, 1], of the image itself.

    Returns:
      Images and targets of the same shapes and dtypes.
    """
    own, share = weights[None, :, :, None].astype(images.dtype), weights.mean().astype(targets.dtype)
    next_images, next_targets = jnp.roll(images, -1, axis=0), jnp.roll(targets, -1, axis=0)
    return own * images + (1 - own) * next_images, share * targets + (1 - share) * next_targets


def random_mix(
    key: jax.Array, images: jax.Array, targets: jax.Array, *, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    """Mixup or CutMix with one draw for the batch; a fair coin decides where both are on.

    Args:
      key: random key.
      images: `(B, H, W, C)`, floating point.
      targets: `(B, classes)`, rows that sum to 1.
      mixup: alpha of mixup's Beta(alpha, alpha); 0 switches it off.
      cutmix: alpha of CutMix's; 0 switches it off.

    Returns:
      Images and targets of the same shapes and dtypes; as they are where both are off.

    Raises:
      ValueError: negative alpha.
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
