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
# On a TPU. The matrix of a warp has as many rows and as many columns as the image has pixels.
_MOST_PLACES = 64 * 64


def trivial_augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Change each image by one of the 14 operations of TrivialAugment, drawn at random with its strength.

    Shapes are static, so every image pays for all operations and keeps one. The five geometric ones are one warp, whose
    matrix is drawn. Where a TPU would gather pixels one by one, it multiplies matrices of zeros and ones instead.

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

    result = jax.vmap(changed)(operations, images.astype(jnp.float32), strengths, signs)
    return jnp.clip(jnp.round(result), 0, 255).astype(jnp.uint8)


def changed(operation: jax.Array, image: jax.Array, strength: jax.Array, sign: jax.Array) -> jax.Array:
    """Return an image after one of `OPERATIONS`.

    Args:
      operation: Number of the operation.
      image: float32 `(height, width, channels)` from 0 to 255.
      strength: From 0 to 1. Operations that have no strength ignore it.
      sign: 1 or -1. Operations that have no direction ignore it.
    """
    colours = len(COLOURS)
    coloured = jax.lax.switch(jnp.minimum(operation, colours - 1), list(COLOURS.values()), image, strength, sign)
    warp = jax.lax.switch(jnp.maximum(operation - colours, 0), list(WARPS.values()), sign * strength)
    return jnp.where(operation < colours, coloured, _warp(image, *warp))


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
        histogram = jax.lax.platform_dependent(levels, tpu=_count_by_products, default=_count)
        step = (values.size - histogram[levels.max()]) // 255
        below = jnp.cumsum(histogram) - histogram
        table = jnp.minimum((below + step // 2) // jnp.maximum(step, 1), 255)
        found = jax.lax.platform_dependent(table, levels, tpu=_look_up_by_products, default=_look_up)
        return jnp.where(step > 0, found.astype(values.dtype), values)

    return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)


def _count(levels: jax.Array) -> jax.Array:
    return jnp.zeros(256, jnp.int32).at[levels].add(1)


def _look_up(table: jax.Array, levels: jax.Array) -> jax.Array:
    return table[levels]


def _digits(levels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the two digits of each level to the base of 16, as rows of fifteen zeros and a one."""
    digits = jnp.divmod(levels.reshape(-1, 1), 16)
    first, second = ((digit == jnp.arange(16)[None]).astype(jnp.bfloat16) for digit in digits)
    return first, second


def _count_by_products(levels: jax.Array) -> jax.Array:
    first, second = _digits(levels)
    counted = jnp.matmul(first.T, second, preferred_element_type=jnp.float32)
    return counted.astype(jnp.int32).reshape(256)


def _look_up_by_products(table: jax.Array, levels: jax.Array) -> jax.Array:
    first, second = _digits(levels)
    # Numbers up to 256 are exact in bfloat16.
    rows = jnp.matmul(first, table.reshape(16, 16).astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    return (rows * second).sum(-1).reshape(levels.shape).astype(jnp.int32)


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
    by_products = _take_by_products if height * width <= _MOST_PLACES else _take
    taken = jax.lax.platform_dependent(image, rows, columns, tpu=by_products, default=_take)
    return jnp.where(inside[..., None], taken, 0)


def _take(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    return image[rows, columns]


def _take_by_products(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    height, width, channels = image.shape
    places = (rows * width + columns).reshape(-1, 1)
    chosen = (places == jnp.arange(height * width)[None]).astype(jnp.bfloat16)
    pixels = image.reshape(-1, channels).astype(jnp.bfloat16)
    return jnp.matmul(chosen, pixels, preferred_element_type=jnp.float32).reshape(image.shape)


def _shear_x(strength: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.eye(2).at[1, 0].set(_MOST_CHANGE * strength), jnp.zeros(2)


def _shear_y(strength: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.eye(2).at[0, 1].set(_MOST_CHANGE * strength), jnp.zeros(2)


def _translate_x(strength: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.eye(2), jnp.zeros(2).at[1].set(_MOST_PIXELS * strength)


def _translate_y(strength: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.eye(2), jnp.zeros(2).at[0].set(_MOST_PIXELS * strength)


def _rotate(strength: jax.Array) -> tuple[jax.Array, jax.Array]:
    angle = jnp.deg2rad(_MOST_DEGREES * strength)
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    return jnp.array([[cosine, sine], [-sine, cosine]]), jnp.zeros(2)


# float32 (H, W, C) in 0..255, a strength in [0, 1] and a sign, to the same in the same range. Those that have no
# strength or no direction ignore it.
COLOURS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "identity": _identity,
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
# A strength in [-1, 1] to what `_warp` takes.
WARPS: dict[str, Callable[[jax.Array], tuple[jax.Array, jax.Array]]] = {
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
}
OPERATIONS = (*COLOURS, *WARPS)
