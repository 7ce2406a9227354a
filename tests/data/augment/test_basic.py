import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.data import (
    alternating_flip,
    normalize,
    random_color_jitter,
    random_crop,
    random_cutout,
    random_flip,
)
from tests.data.tiny_data import noise

COMPILED = {
    random_crop: jax.jit(random_crop, static_argnames="padding"),
    random_flip: jax.jit(random_flip),
    random_cutout: jax.jit(random_cutout, static_argnames="size"),
    random_color_jitter: jax.jit(random_color_jitter, static_argnames="strength"),
    alternating_flip: jax.jit(alternating_flip, static_argnames="epoch"),
}


def applied(augment, *arguments, **settings):
    """In NumPy, by one program."""
    return np.asarray(COMPILED[augment](*arguments, **settings))


def windows(image: np.ndarray, padding: int) -> list[np.ndarray]:
    height, width = image.shape[:2]
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    steps = range(2 * padding + 1)
    return [padded[top : top + height, left : left + width] for top in steps for left in steps]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_each_crop_is_a_window_of_the_zero_padded_image(dtype):
    images = noise(64, 6, 5, 3).astype(dtype)
    cropped = applied(random_crop, jax.random.key(0), images, padding=2)
    assert cropped.dtype == dtype
    found = []
    for image, crop in zip(images, cropped, strict=True):
        matches = [i for i, window in enumerate(windows(image, 2)) if np.array_equal(window, crop)]
        assert len(matches) == 1
        found += matches
    assert len(set(found)) > 15, "64 draws among 25 windows should reach most of them"


def test_every_offset_is_equally_likely():
    marker = np.zeros((9000, 3, 3, 1), np.uint8)
    marker[:, 1, 1] = 1
    counts = applied(random_crop, jax.random.key(1), marker, padding=1).sum(0, dtype=int).ravel()
    assert counts.sum() == 9000
    assert abs(counts - 1000).max() < 130, "4.4 standard deviations"


def test_no_padding_changes_nothing():
    images = jnp.asarray(noise(3, 4, 4, 3))
    assert random_crop(jax.random.key(0), images, padding=0) is images


def test_negative_padding_is_refused():
    with pytest.raises(ValueError, match=r"padding \(=-1\)"):
        random_crop(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), padding=-1)


def test_each_image_is_mirrored_or_left_alone():
    images = noise(64, 3, 5, 3)
    flipped = applied(random_flip, jax.random.key(0), images)
    same = (flipped == images).all(axis=(1, 2, 3))
    mirrored = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 16 < same.sum() < 48


def test_half_of_the_images_are_mirrored():
    images = np.tile(np.uint8([[[1], [0]]]), (4000, 1, 1, 1))
    mirrored = int(applied(random_flip, jax.random.key(0), images)[:, 0, 1, 0].sum())
    assert abs(mirrored - 2000) < 140, "4.4 standard deviations"


def mirrored_rows(images, flipped):
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    np.testing.assert_array_equal(flipped, np.where(mirrored[:, None, None, None], images[:, :, ::-1], images))
    return mirrored


def first_sides(seed, indices):
    """Which images of so many indices are mirrored in epoch 0."""
    images = np.broadcast_to(np.uint8([[[1], [0]]]), (len(indices), 1, 2, 1))
    return applied(alternating_flip, jax.random.key(seed), images, indices, epoch=0)[:, 0, 0, 0] == 0


def test_alternating_flip_shows_both_sides_of_every_image_in_two_epochs():
    images, key, indices = noise(64, 3, 5, 3), jax.random.key(0), np.arange(64)
    sides = [mirrored_rows(images, applied(alternating_flip, key, images, indices, epoch=epoch)) for epoch in range(3)]
    assert (sides[0] ^ sides[1]).all()
    assert (sides[0] == sides[2]).all()
    at_random = [mirrored_rows(images, applied(random_flip, jax.random.key(epoch), images)) for epoch in range(2)]
    assert not (at_random[0] ^ at_random[1]).all()


def test_alternating_flip_knows_an_image_wherever_it_lies_in_a_batch():
    images, key, indices = noise(64, 3, 5, 3), jax.random.key(0), np.arange(64) + 1000
    order = np.random.default_rng(0).permutation(64)
    flipped = applied(alternating_flip, key, images, indices, epoch=7)
    np.testing.assert_array_equal(
        applied(alternating_flip, key, images[order], indices[order], epoch=7), flipped[order]
    )
    assert flipped.dtype == np.uint8


@pytest.mark.parametrize("seed", [0, 1, 2**40])
@pytest.mark.parametrize("step", [1, 2, 10, 4096], ids="every {}".format)
def test_half_of_the_images_begin_mirrored_whichever_are_taken(seed, step):
    assert abs(first_sides(seed, step * np.arange(4000)).mean() - 0.5) < 0.035, "4.4 standard deviations"


def test_which_images_begin_mirrored_is_drawn_by_the_key():
    sides = [first_sides(seed, np.arange(4000)) for seed in range(4)]
    for one, other in itertools.combinations(sides, 2):
        assert abs((one == other).mean() - 0.5) < 0.035, "4.4 standard deviations"


def test_the_sides_do_not_depend_on_the_batch_by_another_generator_either():
    images, key, indices = noise(64, 3, 5, 3), jax.random.key(0, impl="rbg"), np.arange(64)
    flipped = applied(alternating_flip, key, images, indices, epoch=0)
    rows = slice(5, 64, 3)
    np.testing.assert_array_equal(applied(alternating_flip, key, images[rows], indices[rows], epoch=0), flipped[rows])
    assert 16 < mirrored_rows(images, flipped).sum() < 48


def test_flipping_twice_with_one_key_restores_the_images():
    images, key = noise(16, 4, 4, 3), jax.random.key(3)
    once = applied(random_flip, key, images)
    assert (applied(random_flip, key, once) == images).all()
    assert not (once == images).all()


@pytest.mark.parametrize(
    "augment",
    [
        lambda k, x: random_crop(k, x, padding=4),
        random_flip,
        lambda k, x: random_cutout(k, x, size=4),
        lambda k, x: random_color_jitter(k, x, strength=0.4),
    ],
    ids=["crop", "flip", "cutout", "color_jitter"],
)
def test_augmentation_depends_on_the_key_alone(augment):
    images = noise(32, 8, 8, 3)
    # Traced twice, so that a draw while tracing would show.
    compiled, another = (jax.jit(lambda key: augment(key, images)) for _ in range(2))
    first, again = (np.asarray(each(jax.random.key(0)), np.float32) for each in (compiled, another))
    np.testing.assert_allclose(first, again, atol=1e-3)
    assert not (first == compiled(jax.random.key(1))).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_normalize_computes_its_formula(dtype):
    images, mean, std = noise(2, 4, 4, 3), (0.1, 0.5, 0.9), (0.2, 0.25, 1.0)
    result = normalize(jnp.asarray(images), mean, std, dtype)
    expected = ((images / 255 - np.array(mean)) / np.array(std)).astype(np.float32)
    assert result.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 0.03
    np.testing.assert_allclose(np.asarray(result, np.float32), expected, atol=tolerance)
    assert abs(expected - normalize(jnp.asarray(images), mean, mean)).max() > 0.1
    # Rounded once, at the end.
    np.testing.assert_array_equal(result, normalize(jnp.asarray(images), mean, std).astype(dtype))


def test_normalize_refuses_statistics_of_other_channels():
    with pytest.raises(ValueError, match="std has 1 values, but the images have 3 channels"):
        normalize(jnp.zeros((1, 2, 2, 3)), (0.5, 0.5, 0.5), (0.5,))
    with pytest.raises(ValueError, match="mean has 1 values, but the images have 3 channels"):
        normalize(jnp.zeros((1, 2, 2, 3)), (0.5,), (0.5, 0.5, 0.5))


def squares(height: int, width: int, size: int) -> set[bytes]:
    """Every mask that a square centred on a pixel, cut off at the borders, can leave."""
    masks = set()
    for row in range(height):
        for column in range(width):
            top, left = row - size // 2, column - size // 2
            mask = np.ones((height, width), bool)
            mask[max(top, 0) : top + size, max(left, 0) : left + size] = False
            masks.add(mask.tobytes())
    return masks


@pytest.mark.parametrize(("size", "dtype"), [(3, np.float32), (4, np.uint8)])
def test_each_cutout_is_a_square_about_a_pixel_cut_off_at_the_borders(size, dtype):
    images = np.maximum(noise(300, 6, 5, 3), 1).astype(dtype)
    cut = applied(random_cutout, jax.random.key(0), images, size=size)
    kept = (cut == images).all(-1)
    assert cut.dtype == dtype
    assert (kept | (cut == 0).all(-1)).all()
    found = {mask.tobytes() for mask in kept}
    assert found == squares(6, 5, size), "300 draws among 30 centres reach every square"
    assert found != squares(6, 5, size + 1)


def test_cutout_covers_the_share_that_uniform_centres_give():
    kept = applied(random_cutout, jax.random.key(1), np.ones((4000, 16, 16, 1), np.float32), size=8)
    # Along one axis 8 of 16 pixels, less what centres near the border cut off: 4 + 3 + 2 + 1 and 3 + 2 + 1 of 16 × 8.
    along = (8 - 16 / 16) / 16
    assert float(1 - kept.mean()) == pytest.approx(along**2, rel=0.03)
    assert float(1 - kept.mean()) != pytest.approx(0.25, rel=0.03)


def test_a_cutout_of_no_size_changes_nothing_and_a_negative_one_is_refused():
    images = jnp.asarray(noise(3, 4, 4, 3))
    np.testing.assert_array_equal(applied(random_cutout, jax.random.key(0), images, size=0), images)
    with pytest.raises(ValueError, match=r"size \(=-1\)"):
        random_cutout(jax.random.key(0), images, size=-1)


@pytest.mark.parametrize("channels", [1, 3])
def test_color_jitter_is_its_formula_in_numpy(channels):
    key, images = jax.random.key(2), noise(8, 5, 4, channels)
    factors = np.asarray(jax.random.uniform(key, (3, 8, 1, 1, 1), minval=0.5, maxval=1.5), np.float64)

    def grey(x):
        return x if channels == 1 else (x * [0.299, 0.587, 0.114]).sum(-1, keepdims=True)

    expected = np.clip(images * factors[0], 0, 255)
    mean = grey(expected).mean((1, 2, 3), keepdims=True)
    expected = np.clip(mean + factors[1] * (expected - mean), 0, 255)
    before_saturation = expected
    expected = np.clip(grey(expected) + factors[2] * (expected - grey(expected)), 0, 255)
    result = applied(random_color_jitter, key, images, strength=0.5)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, atol=1e-3)
    assert (abs(result - before_saturation).max() > 1) == (channels == 3)
    assert result.min() >= 0
    assert result.max() <= 255


def test_color_jitter_of_no_strength_changes_nothing():
    images = noise(4, 5, 5, 3)
    result = applied(random_color_jitter, jax.random.key(0), images, strength=0)
    np.testing.assert_allclose(result, images, atol=1e-4)


def test_color_jitter_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"strength \(=1.5\)"):
        random_color_jitter(jax.random.key(0), jnp.zeros((1, 2, 2, 3)), strength=1.5)
    with pytest.raises(ValueError, match=r"strength \(=-0.1\)"):
        random_color_jitter(jax.random.key(0), jnp.zeros((1, 2, 2, 3)), strength=-0.1)
    zeros = np.zeros((1, 2, 2, 3), np.float32)
    assert applied(random_color_jitter, jax.random.key(0), zeros, strength=1).shape == (1, 2, 2, 3)
    with pytest.raises(ValueError, match="images have 4 channels"):
        random_color_jitter(jax.random.key(0), jnp.zeros((1, 2, 2, 4)), strength=0.5)
