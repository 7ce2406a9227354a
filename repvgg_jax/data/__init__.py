"""Image data sets, batches and on-device augmentation."""

from repvgg_jax.data.augment import (
    alternating_flip,
    normalize,
    random_color_jitter,
    random_crop,
    random_cutout,
    random_flip,
)
from repvgg_jax.data.dataset import ImageDataset, Record, Source
from repvgg_jax.data.decode import fit, read_image
from repvgg_jax.data.load import load_dataset
from repvgg_jax.data.mix import random_mix
from repvgg_jax.data.normalization import measure_normalization
from repvgg_jax.data.pipeline import eval_batches, train_iterator
from repvgg_jax.data.trivial_augment import trivial_augment

__all__ = [
    "ImageDataset",
    "Record",
    "Source",
    "alternating_flip",
    "eval_batches",
    "fit",
    "load_dataset",
    "measure_normalization",
    "normalize",
    "random_color_jitter",
    "random_crop",
    "random_cutout",
    "random_flip",
    "random_mix",
    "read_image",
    "train_iterator",
    "trivial_augment",
]
