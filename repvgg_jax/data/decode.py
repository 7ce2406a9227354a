"""From an encoded image to a uint8 array of the wanted size: one decoder for every source."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image


def read_image(path_or_bytes: str | os.PathLike[str] | bytes, channels: int) -> np.ndarray:
    """Decodes an image.

    Palettes, alpha, CMYK and 16-bit grey are converted: alpha is dropped and 16 bits keep their upper 8.
    EXIF orientation is ignored, as torchvision and TensorFlow do.

    Args:
      path_or_bytes: an image file, or its encoded content.
      channels: 1 for grey, 3 for RGB.

    Returns:
      uint8 `(H, W, channels)`.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: not an image that Pillow can decode; the message names the file.
    """
    if isinstance(path_or_bytes, bytes):
        encoded, name = path_or_bytes, f"{len(path_or_bytes)} bytes"
    else:
        encoded, name = Path(path_or_bytes).read_bytes(), str(path_or_bytes)
    mode = _mode(channels)
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            array = np.asarray(_convert(opened, mode))
    # Broken files raise OSError, SyntaxError, ValueError, struct.error and more, depending on the format.
    except Exception as error:
        raise ValueError(
            f"{name}: cannot be decoded as an image ({type(error).__name__}: {error}); "
            "replace or remove it (JPEG, PNG, WebP and BMP are supported)"
        ) from error
    return array.reshape(*array.shape[:2], channels)


def convert_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Converts uint8 `(H, W, C)` between grey (1) and RGB (3), by luma or by repetition."""
    mode = _mode(channels)
    if image.shape[-1] == channels:
        return image
    return np.asarray(_to_pil(image).convert(mode)).reshape(*image.shape[:2], channels)


def fit(image: np.ndarray, image_size: int, resize: int | None = None, interpolation: str = "bilinear") -> np.ndarray:
    """Resizes the shorter side to `resize` (antialiased), then crops the centre square.

    Args:
      image: uint8 `(H, W, C)`.
      image_size: side of the result.
      resize: length of the shorter side before the crop, at least `image_size`; `image_size` when None.
      interpolation: of the resizing, by Pillow's name in small letters, e.g. 'bicubic'.

    Returns:
      uint8 `(image_size, image_size, C)`; the very same array where nothing is to be done.

    Raises:
      ValueError: `resize` is smaller than `image_size`.
    """
    shorter = image_size if resize is None else resize
    if shorter < image_size:
        raise ValueError(f"resize (={shorter}) must be at least image_size (={image_size})")
    height, width = image.shape[:2]
    if min(height, width) != shorter:
        # The longer side is rounded down, and the offset to the nearest even, as in torchvision.
        height, width = (
            (shorter, shorter * width // height) if height <= width else (shorter * height // width, shorter)
        )
        image = resize_image(image, (height, width), interpolation=interpolation)
    if (height, width) == (image_size, image_size):
        return image
    top, left = round((height - image_size) / 2), round((width - image_size) / 2)
    return image[top : top + image_size, left : left + image_size]


def resize_image(
    image: np.ndarray,
    size: tuple[int, int],
    box: tuple[int, int, int, int] | None = None,
    interpolation: str = "bilinear",
) -> np.ndarray:
    """Resizes uint8 `(H, W, C)`, or its `box` (left, top, right, bottom), to `size` (height, width)."""
    resized = _to_pil(image).resize(size[::-1], Image.Resampling[interpolation.upper()], box=box)
    return np.asarray(resized).reshape(*size, image.shape[-1])


def _mode(channels: int) -> str:
    if channels not in (1, 3):
        raise ValueError(f"channels (={channels}) must be 1 (grey) or 3 (RGB)")
    return "L" if channels == 1 else "RGB"


def _to_pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey at 255 instead of scaling it.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        # Pillow warns unless transparent palettes go through RGBA.
        image = image.convert("RGBA")
    return image.convert(mode)
