"""The Inception-style training crop."""

from __future__ import annotations

import math

import numpy as np

from repvgg_jax.data.decode import resize_image


def random_resized_crop(
    image: np.ndarray,
    image_size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Crops a random box and resizes it (bilinear, antialiased) to a square.

    Args:
      image: uint8 `(H, W, C)`.
      image_size: side of the result.
      rng: source of randomness.
      scale: bounds of the box's area, as a fraction of the image's.
      ratio: bounds of the box's width over height, drawn log-uniformly.

    Returns:
      uint8 `(image_size, image_size, C)`.

    References:
      Szegedy et al., Going deeper with convolutions, 2015; the algorithm is torchvision's RandomResizedCrop.
    """
    left, top, width, height = _draw_box(image.shape[0], image.shape[1], rng, scale, ratio)
    return resize_image(image, (image_size, image_size), (left, top, left + width, top + height))


def _draw_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    # No box fits a very elongated image: take the largest central one of an allowed ratio.
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return (width - w) // 2, (height - h) // 2, w, h
