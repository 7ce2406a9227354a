"""Image data sets, batches of them for training and evaluation, and augmentation on the device."""

from repvgg_jax.data.augment.basic import (
    alternating_flip,
    random_color_jitter,
    random_crop,
    random_cutout,
    random_flip,
)
from repvgg_jax.data.augment.mix import random_mix
from repvgg_jax.data.augment.trivial import trivial_augment
from repvgg_jax.data.dataset import ImageDataset, Record, Source
from repvgg_jax.data.images import fit, read_image
from repvgg_jax.data.load import load_dataset
from repvgg_jax.data.normalization import measure_normalization
from repvgg_jax.data.pipeline import eval_batches, train_iterator
from repvgg_jax.preprocess import normalize

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
