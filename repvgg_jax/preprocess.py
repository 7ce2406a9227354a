"""What has to be done to an image before a network sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from repvgg_jax.fields import check_fields, shown

Interpolation = Literal["bilinear", "bicubic"]
# Side of an image in pixels: one image takes gigabytes in a network then.
LARGEST_SIDE = 8192


class Normalization(NamedTuple):
    """Mean and standard deviation of pixels in units of [0, 1], one value of each a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return len(self.mean)


def require_normalization(normalization: Normalization, channels: int) -> None:
    """Raise a ValueError unless images of so many channels are finite in float32 when they are normalised."""
    if channels not in (1, 3):
        raise ValueError(f"channels is {shown(channels)}: expected 1 (gray) or 3 (RGB)")
    for name, values in normalization._asdict().items():
        if len(values) != channels:
            raise ValueError(f"{name} is {shown(values)}: expected as many values as channels (={channels})")
    mean, std = normalization
    if any(each < 1e-30 for each in std):
        raise ValueError(f"std is {shown(std)}: expected positive numbers")
    if any((1 + abs(centre)) / spread > 1e30 for centre, spread in zip(mean, std, strict=True)):
        raise ValueError(f"mean is {shown(mean)}: expected numbers of the size of pixels, in [0, 1] units")


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How an image becomes the network's input, and what its outputs are called.

    Attributes:
      image_size: side length in pixels of the square input.
      channels: 1 (gray) or 3 (RGB).
      mean: channel means in [0, 1] units.
      std: channel standard deviations in [0, 1] units, positive.
      eval_resize: the shorter side is resized to this before the centre crop, at least `image_size`; None resizes to
        `image_size`.
      class_names: one name for each logit. Any text, as folders are called: print it with
        `repvgg_jax.terminal.printable`.
      interpolation: of the resizing.

    Raises:
      ValueError: a field is of another type or out of range; the message names it.
    """

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_resize: int | None
    class_names: tuple[str, ...]
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        check_fields(self)
        if not 1 <= self.image_size <= LARGEST_SIDE:
            raise ValueError(f"image_size is {shown(self.image_size)}: expected 1 to {LARGEST_SIDE} pixels")
        require_normalization(Normalization(self.mean, self.std), self.channels)
        if self.eval_resize is not None and not self.image_size <= self.eval_resize <= LARGEST_SIDE:
            raise ValueError(
                f"eval_resize is {shown(self.eval_resize)}: expected None, or at least image_size "
                f"(={self.image_size}) and at most {LARGEST_SIDE} pixels"
            )


def imagenet_preprocess(class_names: Sequence[str], *, image_size: int = 224, gray: bool = False) -> Preprocess:
    """The preprocessing that the published weights were evaluated with (RepVGG, section 4.1; official `utils.py`).

    Args:
      class_names: one name for each logit.
      image_size: side length in pixels; the shorter side is resized to 8/7 of it first, 256 for 224.
      gray: of gray images, which no weights were published for: mean and standard deviation are then the averages of
        the three channels'.

    Returns:
      The preprocessing of RGB or gray images, with ImageNet's mean and standard deviation.

    Raises:
      ValueError: as `Preprocess`.
    """
    return Preprocess(
        image_size=image_size,
        channels=1 if gray else 3,
        mean=(0.449,) if gray else (0.485, 0.456, 0.406),
        std=(0.226,) if gray else (0.229, 0.224, 0.225),
        eval_resize=(16 * image_size + 7) // 14,  # 8/7, rounded
        class_names=tuple(class_names),
    )


def normalize(
    images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
    """Compute `(images / 255 - mean) / std` in float32, and cast the result.

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
    # In the rank of the images, as `jax_numpy_rank_promotion="raise"` asks for.
    centre, spread = (jnp.expand_dims(jnp.asarray(each, jnp.float32), range(images.ndim - 1)) for each in (mean, std))
    return ((images.astype(jnp.float32) / 255 - centre) / spread).astype(dtype)
