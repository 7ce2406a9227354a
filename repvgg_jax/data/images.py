"""Decoding and cropping of images, from an encoded image to a uint8 array of the wanted size, for every source."""

from __future__ import annotations

import io
import math
import os
import stat
import warnings

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from repvgg_jax.terminal import printable

# The largest file, picture and elongation that are read.
MAX_BYTES = 512 * 2**20
MAX_PIXELS = 178_956_970  # Pillow's own limit
MAX_RATIO = 1000

# Up to here an image is resized whole, to the last bit as by torchvision; beyond, as much of it as is shown.
_ORDINARY_RATIO = 4
# Some of Pillow's other formats run programs. It knows the later ones of these where its build or version does.
Image.init()
_FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN
)
# What turns a picture upright, by its EXIF orientation; the others stand upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Large pictures and damaged metadata: what matters of it is an error here, and the rest would be printed for every
# image. A filter for good, since one for the time of a call is not safe beside other threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_image(path_or_bytes: str | os.PathLike[str] | bytes, channels: int) -> np.ndarray:
    """Decode an image and turn it upright, as its EXIF orientation says.

    Palettes, alpha, CMYK and 16 bits per channel are converted: alpha is dropped, and 16 bits keep their upper 8. Where
    a file holds several pictures (animations, pages), the first is taken. A file may have at most 512 MiB, a picture at
    most 178,956,970 pixels, and no side may be longer than 1000 times the other.

    Args:
      path_or_bytes: An image file, or its encoded content.
      channels: 1 for grey, 3 for RGB.

    Returns:
      uint8 `(height, width, channels)`.

    Raises:
      OSError: If the file does not exist, may not be read, or is no regular file (a directory, a pipe, a device).
      ValueError: If Pillow cannot decode it, it is beyond the limits, or its values have no known black and white
        (floating point, 32-bit integers). The message names the file.
      MemoryError: If there is not enough memory for it. The message names the file.
    """
    mode = _mode(channels)
    if isinstance(path_or_bytes, bytes):
        encoded, name = path_or_bytes, f"{len(path_or_bytes)} bytes"
    else:
        name = printable(os.fspath(path_or_bytes))
        encoded = _read_file(path_or_bytes, name)
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as opened:
            refusal = _refusal(opened)
            if refusal is None:
                array = np.asarray(_upright(opened, mode))
    except MemoryError as error:
        raise MemoryError(f"{name}: there is not enough memory to decode it") from error
    except Image.DecompressionBombError:
        refusal = f"it has more than {MAX_PIXELS:,} pixels, the most that are read; make it smaller"
    # Broken files raise OSError, SyntaxError, ValueError, struct.error and more, depending on the format.
    except Exception as error:
        raise ValueError(
            f"{name}: cannot be decoded as an image ({_explain(error)}); "
            f"replace or remove it ({', '.join(_FORMATS)} are read)"
        ) from error
    if refusal is not None:
        raise ValueError(f"{name}: {refusal}")
    return array.reshape(*array.shape[:2], channels)


def convert_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Convert uint8 `(height, width, channels)` between grey (1) and RGB (3), by luma or by repetition."""
    mode = _mode(channels)
    if image.shape[-1] == channels:
        return image
    return np.asarray(_to_pil(image).convert(mode)).reshape(*image.shape[:2], channels)


def fit(image: np.ndarray, image_size: int, resize: int | None = None, interpolation: str = "bilinear") -> np.ndarray:
    """Resize the shorter side of an image, with antialiasing, then crop the square at its centre.

    Args:
      image: uint8 `(height, width, channels)`.
      image_size: Side length of the result in pixels.
      resize: Length of the shorter side before the crop in pixels, at least `image_size`. None stands for `image_size`.
      interpolation: How to resize, by Pillow's name in small letters, e.g. 'bicubic'.

    Returns:
      uint8 `(image_size, image_size, channels)`. Where nothing is to be done, it is the same array.

    Raises:
      ValueError: If `resize` is smaller than `image_size`.
    """
    shorter = image_size if resize is None else resize
    if shorter < image_size:
        raise ValueError(f"resize (={shorter}) must be at least image_size (={image_size})")
    height, width = image.shape[:2]
    # The longer side is rounded down, and the offset to the nearest even, as in torchvision.
    new_height, new_width = (
        (shorter, shorter * width // height) if height <= width else (shorter * height // width, shorter)
    )
    top, left = round((new_height - image_size) / 2), round((new_width - image_size) / 2)
    if min(height, width) == shorter:
        if (height, width) == (image_size, image_size):
            return image
        return image[top : top + image_size, left : left + image_size]
    if max(new_height, new_width) <= _ORDINARY_RATIO * shorter:
        resized = resize_image(image, (new_height, new_width), interpolation=interpolation)
        return resized[top : top + image_size, left : left + image_size]
    # Only what the crop shows: all of an elongated image could be large without bound.
    (x0, x1), (y0, y1) = (
        (start * old / new, (start + image_size) * old / new)
        for start, old, new in ((left, width, new_width), (top, height, new_height))
    )
    return resize_image(image, (image_size, image_size), (x0, y0, x1, y1), interpolation)


def resize_image(
    image: np.ndarray,
    size: tuple[int, int],
    box: tuple[float, float, float, float] | None = None,
    interpolation: str = "bilinear",
) -> np.ndarray:
    """Resize uint8 `(height, width, channels)`, or its `box` (left, top, right, bottom), to `size` (height, width)."""
    resized = _to_pil(image).resize(size[::-1], Image.Resampling[interpolation.upper()], box=box)
    return np.asarray(resized).reshape(*size, image.shape[-1])


def random_resized_crop(
    image: np.ndarray,
    image_size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Crop a random box and resize it (bilinear, antialiased) to a square.

    Args:
      image: uint8 `(height, width, channels)`.
      image_size: Side length of the result in pixels.
      rng: Source of randomness.
      scale: Bounds of the box's area, as a fraction of the image's.
      ratio: Bounds of the box's width over its height, which is drawn log-uniformly.

    Returns:
      uint8 `(image_size, image_size, channels)`.

    References:
      Szegedy et al., *Going Deeper with Convolutions*, CVPR 2015; the algorithm is torchvision's RandomResizedCrop.
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


def _mode(channels: int) -> str:
    if channels not in (1, 3):
        raise ValueError(f"channels (={channels}) must be 1 (grey) or 3 (RGB)")
    return "L" if channels == 1 else "RGB"


def _to_pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _read_file(path: str | os.PathLike[str], name: str) -> bytes:
    try:
        status = os.stat(path)
    except ValueError as error:  # a path that no system could have, e.g. with a zero byte
        raise ValueError(f"{name}: is no path ({error})") from error
    # Pipes and devices may never end, and waiting for one would stop everything.
    if not stat.S_ISREG(status.st_mode):
        found = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file (a pipe, a socket or a device)"
        raise OSError(f"{name}: is {found}; expected an image file")
    if status.st_size > MAX_BYTES:
        raise ValueError(f"{name}: it has {status.st_size:,} bytes; at most {MAX_BYTES:,} are read")
    with open(path, "rb") as file:
        # No more than its size: what the system makes up while it is read has none, and may not end.
        return file.read(status.st_size)


def _refusal(image: Image.Image) -> str | None:
    """Return why an image that Pillow has opened is not decoded, or None."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        return f"it has {width} × {height} pixels; at most {MAX_PIXELS:,} are read; make it smaller"
    if max(width, height) > MAX_RATIO * min(width, height):
        return f"it has {width} × {height} pixels; one side may be at most {MAX_RATIO} times the other; crop it"
    if _has_known_range(image):
        return None
    return (
        f"its values are of another kind than 8 or 16 bits from black to white (Pillow's mode {image.mode}); "
        "convert it to 8 bits per channel"
    )


def _has_known_range(image: Image.Image) -> bool:
    if image.mode == "F":
        return False
    if image.format == "TIFF" and image.mode.startswith("I"):
        # Pillow gives 12 bits, signed values and those that begin at white as they are, as if of 16 bits.
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits, white_is_zero = (
            tags.get(ExifTags.Base.BitsPerSample),
            not tags.get(ExifTags.Base.PhotometricInterpretation),
        )
        return image.mode != "I" and bits == (16,) and not white_is_zero
    return True


def _upright(image: Image.Image, mode: str) -> Image.Image:
    # TIFF is turned by Pillow while it loads, and then has no orientation any more.
    image.load()
    try:
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    # Damaged metadata raise whatever they like, and leave the picture as it is.
    except Exception:
        turn = None
    converted = _convert(image, mode)
    return converted if turn is None else converted.transpose(turn)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey at 255 instead of scaling it.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode in ("PA", "La", "RGBa") or (image.mode == "P" and "transparency" in image.info):
        # Pillow warns unless transparent palettes go through RGBA, and knows no other way from the rest.
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return image.convert(mode)


def _explain(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"  # Pillow's message shows an object's address
    return printable(f"{type(error).__name__}: {error}")
