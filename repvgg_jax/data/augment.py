"""Augmentation on the device: pure, deterministic by key, static shapes."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def random_crop(key: jax.Array, images: jax.Array, *, padding: int) -> jax.Array:
    """Pads with zeros on every side, then crops each image back to its size at its own random offset.

    Args:
      key: random key.
      images: `(B, H, W, C)`, any dtype.
      padding: pixels added on each side; must be static under jit. 0 returns the images as they are.

    Returns:
      `(B, H, W, C)` of the same dtype.

    Raises:
      ValueError: negative padding.
    """
    if padding < 0:
        raise ValueError(f"padding (={padding}) must not be negative")
    if padding == 0:
        return images
    batch, *shape = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    offsets = jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)

    # Faster on a CPU than gathering by index arrays, and far faster than selecting among the shifts.
    def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), shape)

    return jax.vmap(crop)(padded, offsets)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability one half.

    Args:
      key: random key.
      images: `(B, H, W, C)`, any dtype.

    Returns:
      `(B, H, W, C)` of the same dtype.
    """
    flip = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def normalize(
    images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
    """Computes `(images / 255 - mean) / std` in float32 and casts the result.

    Args:
      images: `(…, C)`, values in 0..255.
      mean: C floats in units of [0, 1].
      std: C floats in units of [0, 1].
      dtype: of the result.

    Returns:
      `(…, C)`.

    Raises:
      ValueError: `mean` or `std` do not have one value per channel.
    """
    channels = images.shape[-1]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(f"{name} has {len(values)} values, but the images have {channels} channels")
    scaled = images.astype(jnp.float32) / 255
    normalized = (scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
    return normalized.astype(dtype)
