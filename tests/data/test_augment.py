import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.data import normalize, random_crop, random_flip
from tests.data.tiny_data import noise


def windows(image: np.ndarray, padding: int) -> list[np.ndarray]:
    height, width = image.shape[:2]
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    steps = range(2 * padding + 1)
    return [padded[top : top + height, left : left + width] for top in steps for left in steps]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_each_crop_is_a_window_of_the_zero_padded_image(dtype):
    images = noise(64, 6, 5, 3).astype(dtype)
    cropped = random_crop(jax.random.key(0), jnp.asarray(images), padding=2)
    assert cropped.dtype == dtype
    found = []
    for image, crop in zip(images, np.asarray(cropped), strict=True):
        matches = [i for i, window in enumerate(windows(image, 2)) if np.array_equal(window, crop)]
        assert len(matches) == 1
        found += matches
    assert len(set(found)) > 15, "64 draws among 25 windows should reach most of them"


def test_every_offset_is_equally_likely():
    marker = jnp.zeros((9000, 3, 3, 1), jnp.uint8).at[:, 1, 1].set(1)
    counts = random_crop(jax.random.key(1), marker, padding=1).sum(0).ravel()
    assert counts.sum() == 9000
    assert abs(np.asarray(counts, int) - 1000).max() < 130, "4.4 standard deviations"


def test_no_padding_changes_nothing():
    images = jnp.asarray(noise(3, 4, 4, 3))
    assert random_crop(jax.random.key(0), images, padding=0) is images


def test_negative_padding_is_refused():
    with pytest.raises(ValueError, match=r"padding \(=-1\)"):
        random_crop(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), padding=-1)


def test_each_image_is_mirrored_or_left_alone():
    images = noise(64, 3, 5, 3)
    flipped = np.asarray(random_flip(jax.random.key(0), jnp.asarray(images)))
    same = (flipped == images).all(axis=(1, 2, 3))
    mirrored = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 16 < same.sum() < 48


def test_flipping_twice_with_one_key_restores_the_images():
    images, key = jnp.asarray(noise(16, 4, 4, 3)), jax.random.key(3)
    once = random_flip(key, images)
    assert (random_flip(key, once) == images).all()
    assert not (once == images).all()


@pytest.mark.parametrize("augment", [lambda k, x: random_crop(k, x, padding=4), random_flip])
def test_augmentation_depends_on_the_key_alone(augment):
    images = jnp.asarray(noise(32, 8, 8, 3))
    first, again = augment(jax.random.key(0), images), jax.jit(augment)(jax.random.key(0), images)
    assert (first == again).all()
    assert not (first == augment(jax.random.key(1), images)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_normalize_computes_its_formula(dtype):
    images, mean, std = noise(2, 4, 4, 3), (0.1, 0.5, 0.9), (0.2, 0.25, 1.0)
    result = normalize(jnp.asarray(images), mean, std, dtype)
    expected = ((images / 255 - np.array(mean)) / np.array(std)).astype(np.float32)
    assert result.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 0.03
    np.testing.assert_allclose(np.asarray(result, np.float32), expected, atol=tolerance)
    assert abs(expected - normalize(jnp.asarray(images), mean, mean)).max() > 0.1


def test_normalize_refuses_statistics_of_other_channels():
    with pytest.raises(ValueError, match="std has 1 values, but the images have 3 channels"):
        normalize(jnp.zeros((1, 2, 2, 3)), (0.5, 0.5, 0.5), (0.5,))
