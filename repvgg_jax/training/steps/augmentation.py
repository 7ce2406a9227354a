"""The way from a raw batch to what the network sees in training: augmented, normalised images and soft targets."""

from __future__ import annotations

from collections.abc import Mapping

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
from repvgg_jax.preprocess import Normalization
from repvgg_jax.training.config import AugmentationConfig

# Folded into a seed's key it gives the key that is the same at every step; no step has this number.
_SIDES = 2**32 - 1


def augment(
    key: jax.Array,
    batch: Mapping[str, jax.Array],
    config: AugmentationConfig,
    normalization: Normalization,
    *,
    num_classes: int,
    seed: int,
    epoch: jax.Array | int,
) -> tuple[jax.Array, jax.Array]:
    """Augment and normalise a batch of images, and make its targets.

    The order is: crop, flip, TrivialAugment, colour, normalise, cut out, mix. What the config leaves off costs nothing.

    Args:
      key: Random key. Each ingredient has its own part of it, so that switching one on changes no other's draw.
      batch: 'image', uint8 `(batch, height, width, channels)`, and 'label' and 'index', int32 `(batch,)`.
      config: The settings that say which ingredients there are.
      normalization: The normalisation of the images.
      num_classes: Length of a target.
      seed: Seed of the run.
      epoch: Number of the epoch. With `alternate_flip` it decides, with the index and the seed, which images are
        mirrored.

    Returns:
      float32 images `(batch, height, width, channels)`, and smoothed, mixed targets `(batch, num_classes)`.
    """
    crop_key, flip_key, color_key, cutout_key, mix_key, policy_key = jax.random.split(key, 6)
    images = batch["image"]
    if config.crop_padding:
        images = random_crop(crop_key, images, padding=config.crop_padding)
    if config.alternate_flip:
        sides_key = jax.random.fold_in(jax.random.key(seed), _SIDES)
        images = alternating_flip(sides_key, images, batch["index"], epoch=epoch)
    elif config.flip:
        images = random_flip(flip_key, images)
    if config.trivial_augment:
        images = trivial_augment(policy_key, images)
    if config.color_jitter:
        images = random_color_jitter(color_key, images, strength=config.color_jitter)
    images = normalize(images, *normalization)
    if config.cutout:
        images = random_cutout(cutout_key, images, size=config.cutout)
    targets = optax.smooth_labels(jax.nn.one_hot(batch["label"], num_classes), config.label_smoothing)
    return random_mix(mix_key, images, targets, mixup=config.mixup, cutmix=config.cutmix)
