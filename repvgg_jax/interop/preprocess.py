"""What has to be done to an image before a network sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

Interpolation = Literal["bilinear", "bicubic"]


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How an image becomes the network's input, and what its outputs are called.

    Attributes:
      image_size: side length in pixels of the square input.
      channels: 1 (gray) or 3 (RGB).
      mean: channel means in [0, 1] units.
      std: channel standard deviations in [0, 1] units.
      eval_resize: the shorter side is resized to this before the centre crop; None resizes to `image_size`.
      class_names: one name for each logit.
      interpolation: of the resizing.
    """

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_resize: int | None
    class_names: tuple[str, ...]
    interpolation: Interpolation = "bilinear"


def imagenet_preprocess(class_names: Sequence[str], *, image_size: int = 224) -> Preprocess:
    """The preprocessing that the published weights were evaluated with (RepVGG, section 4.1; official `utils.py`).

    Args:
      class_names: one name for each logit.
      image_size: side length in pixels; the shorter side is resized to 8/7 of it first, 256 for 224.

    Returns:
      The preprocessing of RGB images, with ImageNet's mean and standard deviation.
    """
    return Preprocess(
        image_size=image_size,
        channels=3,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        eval_resize=round(image_size * 8 / 7),
        class_names=tuple(class_names),
    )
