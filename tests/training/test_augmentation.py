import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.data import random_crop, random_flip
from repvgg_jax.training import TrainConfig
from repvgg_jax.training.augmentation import augment
from tests.data.tiny_data import noise

CONFIG = TrainConfig(image_size=12, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), crop_padding=2, label_smoothing=0.1)
IMAGES = jnp.asarray(noise(16, 12, 12, 3))
LABELS = jnp.arange(16, dtype=jnp.int32) % 5
KEY = jax.random.key(7)
INGREDIENTS = dict(trivial_augment=True, color_jitter=0.4, cutout=6, mixup=0.2, cutmix=1.0)


def augmented(epoch=0, **fields):
    return augment(KEY, IMAGES, LABELS, dataclasses.replace(CONFIG, **fields), 5, epoch)


def test_by_default_only_crop_flip_and_normalisation_happen_with_their_two_keys():
    crop_key, flip_key = jax.random.split(KEY)
    expected = random_flip(flip_key, random_crop(crop_key, IMAGES, padding=2))
    images, targets = augmented()
    np.testing.assert_allclose(images, (expected / 255 - np.array(CONFIG.mean)) / np.array(CONFIG.std), atol=1e-5)
    np.testing.assert_allclose(targets, np.eye(5)[LABELS] * 0.9 + 0.02, atol=1e-6)


@pytest.mark.parametrize("name", list(INGREDIENTS))
def test_each_ingredient_changes_the_images_and_only_mixing_the_targets(name):
    images, targets = augmented()
    changed_images, changed_targets = augmented(**{name: INGREDIENTS[name]})
    assert abs(images - changed_images).max() > 0.1
    assert (abs(targets - changed_targets).max() > 1e-3) == (name in ("mixup", "cutmix"))
    np.testing.assert_allclose(changed_targets.sum(-1), np.ones(16), rtol=1e-5)


def test_a_cut_out_square_is_the_channel_mean():
    images, _ = augmented(cutout=6)
    blank = (np.asarray(images) == 0).all(-1)
    assert (blank.sum((1, 2)) >= 9).all()
    np.testing.assert_array_equal(np.asarray(images)[~blank], np.asarray(augmented()[0])[~blank])


def test_alternating_flip_takes_the_place_of_the_random_one_and_goes_by_the_epoch():
    first, second, third = (augmented(epoch, alternate_flip=True, crop_padding=0)[0] for epoch in range(3))
    np.testing.assert_array_equal(first, third)
    np.testing.assert_array_equal(first[:, :, ::-1], second)
    at_random = [augmented(epoch, crop_padding=0)[0] for epoch in range(2)]
    np.testing.assert_array_equal(*at_random)


def test_switching_one_ingredient_on_changes_no_other_draw():
    plain, _ = augmented(color_jitter=0.4)
    cut, _ = augmented(color_jitter=0.4, cutout=6)
    kept = (np.asarray(cut) != 0).any(-1)
    np.testing.assert_array_equal(np.asarray(cut)[kept], np.asarray(plain)[kept])
