"""From a raw batch to what the network sees in training: augmented, normalised images and soft targets."""

from __future__ import annotations

import jax
import optax

from repvgg_jax.data import (
    alternating_flip,
    normalize,
    random_color_jitter,
    random_crop,
    random_cutout,
    random_flip,
    random_mix,
    trivial_augment,
)
from repvgg_jax.training.config import TrainConfig


def augment(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    config: TrainConfig,
    num_classes: int,
    epoch: jax.Array | int,
) -> tuple[jax.Array, jax.Array]:
    """Crop, flip, TrivialAugment and colour, normalise, cut out, mix; what the config leaves off costs nothing.

    Args:
      key: random key; each ingredient has its own part of it, so that switching one on changes no other's draw.
      images: uint8 `(B, H, W, C)`.
      labels: int32 `(B,)`.
      config: with `mean` and `std` filled in.
      num_classes: length of a target.
      epoch: decides, with `alternate_flip`, which images are mirrored.

    Returns:
      float32 images `(B, H, W, C)` and smoothed, mixed targets `(B, num_classes)`.
    """
    crop_key, flip_key, color_key, cutout_key, mix_key, policy_key = jax.random.split(key, 6)
    if config.alternate_flip:
        images = alternating_flip(images, epoch=epoch)
    if config.crop_padding:
        images = random_crop(crop_key, images, padding=config.crop_padding)
    if config.flip and not config.alternate_flip:
        images = random_flip(flip_key, images)
    if config.trivial_augment:
        images = trivial_augment(policy_key, images)
    if config.color_jitter:
        images = random_color_jitter(color_key, images, strength=config.color_jitter)
    images = normalize(images, *config.normalization)
    if config.cutout:
        images = random_cutout(cutout_key, images, size=config.cutout)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, num_classes), config.label_smoothing)
    return random_mix(mix_key, images, targets, mixup=config.mixup, cutmix=config.cutmix)
