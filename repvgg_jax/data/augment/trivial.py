"""TrivialAugment on the device: one operation an image, drawn uniformly, of a strength drawn uniformly.

The operations and their ranges are those of the wide space of the paper. They do what Pillow's do, but for rounding.
Geometric operations take the nearest pixel and fill with black.

References:
  Müller & Hutter, *TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation*, arXiv:2103.10158.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from repvgg_jax.data.augment.basic import grey

_LEVELS = 31
_MOST_CHANGE = 0.99
_MOST_PIXELS = 32.0
_MOST_DEGREES = 135.0


def trivial_augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Change each image by one of the 14 operations of TrivialAugment, drawn at random with its strength.

    Shapes are static, so every image pays for all operations and keeps one. 512 images of 32×32 pixels took 70 to 130
    ms on two CPU cores.

    Args:
      key: Random key.
      images: uint8 `(batch, height, width, channels)` with 1 or 3 channels.

    Returns:
      uint8 images of the same shape.

    Raises:
      ValueError: If the images are not uint8.

    References:
      Müller & Hutter, *TrivialAugment*, arXiv:2103.10158; the operations are those of its wide space.
    """
    if images.dtype != jnp.uint8:
        raise ValueError(f"images are {images.dtype}: expected uint8, so augment before normalising")
    operation_key, strength_key, sign_key = jax.random.split(key, 3)
    shape = images.shape[:1]
    operations = jax.random.randint(operation_key, shape, 0, len(OPERATIONS))
    strengths = jax.random.randint(strength_key, shape, 0, _LEVELS) / (_LEVELS - 1)
    signs = jax.random.rademacher(sign_key, shape, jnp.float32)

    def apply(operation: jax.Array, image: jax.Array, strength: jax.Array, sign: jax.Array) -> jax.Array:
        return jax.lax.switch(operation, list(OPERATIONS.values()), image, strength, sign)

    result = jax.vmap(apply)(operations, images.astype(jnp.float32), strengths, signs)
    return jnp.clip(jnp.round(result), 0, 255).astype(jnp.uint8)


def _identity(image: jax.Array, strength: jax.Array, sign: jax.Array) -> jax.Array:
    return image


def _blend(origin: jax.Array, image: jax.Array, strength: jax.Array, sign: jax.Array) -> jax.Array:
    return jnp.clip(origin + (1 + sign * _MOST_CHANGE * strength) * (image - origin), 0, 255)


def _brightness(image: jax.Array, strength: jax.Array, sign: jax.Array) -> jax.Array:
    return _blend(jnp.zeros(()), image, strength, sign)


def _color(image: jax.Array, strength: jax.Array, sign: jax.Array) -> jax.Array:
    return _blend(grey(image), image, strength, sign)


def _contrast(image: jax.Array, strength: jax.Array, sign: jax.Array) -> jax.Array:
    return _blend(jnp.round(grey(image).mean()), image, strength, sign)


def _sharpness(image: jax.Array, strength: jax.Array, sign: jax.Array) -> jax.Array:
    height, width, _ = image.shape
    around = sum(image[y : y + height - 2, x : x + width - 2] for y in range(3) for x in range(3))
    smooth = image.at[1:-1, 1:-1].set((around + 4 * image[1:-1, 1:-1]) / 13)
    return _blend(smooth, image, strength, sign)


def _posterize(image: jax.Array, strength: jax.Array, sign: jax.Array) -> jax.Array:
    step = 2.0 ** jnp.round(6 * strength)
    return jnp.floor(image / step) * step


def _solarize(image: jax.Array, strength: jax.Array, sign: jax.Array) -> jax.Array:
    return jnp.where(image < 255 * (1 - strength), image, 255 - image)


def _autocontrast(image: jax.Array, strength: jax.Array, sign: jax.Array) -> jax.Array:
    low, high = image.min((0, 1), keepdims=True), image.max((0, 1), keepdims=True)
    return jnp.where(high > low, (image - low) * 255 / jnp.maximum(high - low, 1), image)


def _equalize(image: jax.Array, strength: jax.Array, sign: jax.Array) -> jax.Array:
    def channel(values: jax.Array) -> jax.Array:
        levels = values.astype(jnp.int32)
        histogram = jnp.zeros(256, jnp.int32).at[levels].add(1)
        step = (values.size - histogram[levels.max()]) // 255
        below = jnp.cumsum(histogram) - histogram
        table = jnp.minimum((below + step // 2) // jnp.maximum(step, 1), 255)
        return jnp.where(step > 0, table[levels].astype(values.dtype), values)

    return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)


def _warp(image: jax.Array, matrix: jax.Array, shift: jax.Array) -> jax.Array:
    """Take each pixel from matrix · (its place from the centre) + shift, in (row, column) order."""
    height, width, _ = image.shape
    centre = (jnp.array([height, width]) - 1) / 2
    places = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), -1) - centre[None, None]
    # Written out: a product of matrices this small would round to bfloat16 on some accelerators.
    rows, columns = (
        jnp.round(line[0] * places[..., 0] + line[1] * places[..., 1] + shift[axis] + centre[axis]).astype(jnp.int32)
        for axis, line in enumerate(matrix)
    )
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return jnp.where(inside[..., None], image[rows, columns], 0)


def _shear_x(image: jax.Array, strength: jax.Array, sign: jax.Array) -> jax.Array:
    return _warp(image, jnp.eye(2).at[1, 0].set(sign * _MOST_CHANGE * strength), jnp.zeros(2))


def _shear_y(image: jax.Array, strength: jax.Array, sign: jax.Array) -> jax.Array:
    return _warp(image, jnp.eye(2).at[0, 1].set(sign * _MOST_CHANGE * strength), jnp.zeros(2))


def _translate_x(image: jax.Array, strength: jax.Array, sign: jax.Array) -> jax.Array:
    return _warp(image, jnp.eye(2), jnp.zeros(2).at[1].set(sign * _MOST_PIXELS * strength))


def _translate_y(image: jax.Array, strength: jax.Array, sign: jax.Array) -> jax.Array:
    return _warp(image, jnp.eye(2), jnp.zeros(2).at[0].set(sign * _MOST_PIXELS * strength))


def _rotate(image: jax.Array, strength: jax.Array, sign: jax.Array) -> jax.Array:
    angle = jnp.deg2rad(sign * _MOST_DEGREES * strength)
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    return _warp(image, jnp.array([[cosine, sine], [-sine, cosine]]), jnp.zeros(2))


# float32 (H, W, C) in 0..255, a strength in [0, 1] and a sign, to the same in the same range. Those that have no
# strength or no direction ignore it.
OPERATIONS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "identity": _identity,
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
}
