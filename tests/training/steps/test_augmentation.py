import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.data import random_crop, random_flip, train_iterator
from repvgg_jax.preprocess import Normalization
from repvgg_jax.training.config import AugmentationConfig
from repvgg_jax.training.steps.augmentation import augment
from tests.data.tiny_data import noise

CONFIG = AugmentationConfig(crop_padding=2, label_smoothing=0.1)
NORMALIZATION = Normalization((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
IMAGES = jnp.asarray(noise(16, 12, 12, 3))
INDICES = jnp.arange(16, dtype=jnp.int32)
BATCH = {"image": IMAGES, "label": INDICES % 5, "index": INDICES}
KEY = jax.random.key(7)
INGREDIENTS = dict(trivial_augment=True, color_jitter=0.4, cutout=6, mixup=0.2, cutmix=1.0)


def augmented(epoch=0, seed=0, **fields):
    config = dataclasses.replace(CONFIG, **fields)
    return augment(KEY, BATCH, config, NORMALIZATION, num_classes=5, seed=seed, epoch=epoch)


def test_by_default_only_crop_flip_and_normalisation_happen_with_their_two_keys():
    crop_key, flip_key = jax.random.split(KEY)
    expected = random_flip(flip_key, random_crop(crop_key, IMAGES, padding=2))
    images, targets = augmented()
    np.testing.assert_allclose(
        images, (expected / 255 - np.array(NORMALIZATION.mean)) / np.array(NORMALIZATION.std), atol=1e-5
    )
    np.testing.assert_allclose(targets, np.eye(5)[BATCH["label"]] * 0.9 + 0.02, atol=1e-6)


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
    assert not np.array_equal(first, augmented(alternate_flip=True, crop_padding=0, seed=1)[0])


def mirrored(crop, shards=1):
    """By epoch and index, whether an image is shown mirrored: all of them rise to the right."""
    image = np.tile(np.linspace(0, 255, 40, dtype=np.uint8)[:, None], (30, 1, 1))
    records = [{"image": image, "label": 0}] * 96
    config = AugmentationConfig(crop_padding=1, alternate_flip=True)
    settings = dict(config=config, normalization=Normalization((0.0,), (1.0,)), num_classes=2, seed=0)
    change = jax.jit(lambda key, batch, epoch: augment(key, batch, epoch=epoch, **settings)[0])
    options = dict(batch_size=24 // shards, image_size=8, channels=1, seed=0, crop=crop)
    streams = [train_iterator(records, shard=(shard, shards), **options) for shard in range(shards)]
    found = np.full((3, 96), -1)
    for step in range(3 * 4):
        for batch in map(next, streams):
            # As in training, every step has a key of its own.
            images = np.asarray(change(jax.random.key(step), batch, step // 4))
            rising = np.sign(np.diff(images, axis=2)).sum((1, 2, 3))
            assert rising.all()
            found[step // 4, batch["index"]] = rising < 0
    return found


def test_an_image_is_mirrored_every_other_epoch_however_it_is_cropped_and_whichever_process_reads_it():
    found = mirrored("random_resized")
    assert (found[0] + found[1] == 1).all()
    np.testing.assert_array_equal(found[0], found[2])
    assert 30 < found[0].sum() < 66
    np.testing.assert_array_equal(mirrored("resize"), found)
    np.testing.assert_array_equal(mirrored("random_resized", shards=2), found)


def test_switching_one_ingredient_on_changes_no_other_draw():
    plain, _ = augmented(color_jitter=0.4)
    cut, _ = augmented(color_jitter=0.4, cutout=6)
    kept = (np.asarray(cut) != 0).any(-1)
    np.testing.assert_array_equal(np.asarray(cut)[kept], np.asarray(plain)[kept])
