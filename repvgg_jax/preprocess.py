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
    """The mean and the standard deviation of each channel, for pixels in [0, 1].

    Attributes:
      mean: One mean for each channel.
      std: One standard deviation for each channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        return len(self.mean)


def require_normalization(normalization: Normalization, channels: int) -> None:
    """Raise a ValueError unless images of so many channels stay finite in float32 when they are normalised."""
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
    """The way from an image to the input of a network, and the names of the network's outputs.

    Attributes:
      image_size: Side length of the square input in pixels.
      channels: 1 for grey images, 3 for RGB.
      mean: Means of the channels, for pixels in [0, 1].
      std: Standard deviations of the channels, for pixels in [0, 1]; positive.
      eval_resize: Length in pixels to which the shorter side is resized before the centre is cropped, at least
        `image_size`. None stands for `image_size`.
      class_names: One name for each logit. A name may be any text, since folders may have any name: print it with
        `repvgg_jax.terminal.printable`.
      interpolation: How images are resized, "bilinear" or "bicubic".

    Raises:
      ValueError: If a field is of another type or out of range. The message names it.
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
    """Return the preprocessing that the published weights were evaluated with.

    Args:
      class_names: One name for each logit.
      image_size: Side length of the input in pixels. The shorter side is resized to 8/7 of it before the crop: 256 for
        224.
      gray: Whether images are grey. Mean and standard deviation are then the averages over ImageNet's three channels,
        since there are no published weights for grey images.

    Returns:
      The preprocessing, with ImageNet's mean and standard deviation.

    Raises:
      ValueError: If `Preprocess` refuses a value.

    References:
      RepVGG, section 4.1, https://arxiv.org/abs/2101.03697; the official implementation,
      https://github.com/DingXiaoH/RepVGG, `utils.py`.
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
    """Compute `(images / 255 - mean) / std` in float32 and cast the result.

    Args:
      images: `(…, channels)`, values in 0..255.
      mean: One mean for each channel, in units of [0, 1].
      std: One standard deviation for each channel, in units of [0, 1].
      dtype: Dtype of the result.

    Returns:
      The normalised images, `(…, channels)`.

    Raises:
      ValueError: If `mean` or `std` do not have one value for each channel.
    """
    channels = images.shape[-1]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(f"{name} has {len(values)} values, but the images have {channels} channels")
    # In the rank of the images, as `jax_numpy_rank_promotion="raise"` asks for.
    centre, spread = (jnp.expand_dims(jnp.asarray(each, jnp.float32), range(images.ndim - 1)) for each in (mean, std))
    return ((images.astype(jnp.float32) / 255 - centre) / spread).astype(dtype)
