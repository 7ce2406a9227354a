from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.data.augment.mix import cutmix_weights, mix, mixup_weights, random_mix
from tests.data.tiny_data import noise

IMAGES = noise(6, 8, 10, 3).astype(np.float32)
TARGETS = np.eye(5, dtype=np.float32)[[0, 1, 2, 3, 4, 1]] * 0.9 + 0.02


def test_mixing_blends_images_by_the_weights_and_targets_by_their_mean():
    weights = np.random.default_rng(0).random((8, 10)).astype(np.float32)
    images, targets = mix(jnp.asarray(IMAGES), jnp.asarray(TARGETS), jnp.asarray(weights))
    for i in range(6):
        partner = (i + 1) % 6
        own = weights[:, :, None]
        np.testing.assert_allclose(images[i], own * IMAGES[i] + (1 - own) * IMAGES[partner], rtol=1e-5, atol=1e-4)
        share = weights.mean()
        np.testing.assert_allclose(targets[i], share * TARGETS[i] + (1 - share) * TARGETS[partner], rtol=1e-5)
        assert abs(targets[i] - TARGETS[i]).max() > 0.1


def mix_batches(mixup, cutmix):
    """Images and targets of 200 batches, each mixed by a key of its own."""
    one = lambda key: random_mix(key, IMAGES, TARGETS, mixup=mixup, cutmix=cutmix)  # noqa: E731
    return map(np.asarray, jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 200)))


mix_once = cache(lambda *alphas: tuple(mix_batches(*alphas)))


@pytest.mark.parametrize("alphas", [(0.2, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_mixed_targets_sum_to_one_and_depend_on_the_key_alone(alphas):
    # Traced twice, so that a draw while tracing would show.
    for batches, again in zip(mix_once(*alphas), mix_batches(*alphas), strict=True):
        np.testing.assert_allclose(batches, again, rtol=1e-5, atol=1e-4)
        assert abs(batches[0] - batches[1]).max() > 0.01
    np.testing.assert_allclose(mix_once(*alphas)[1].sum(-1), np.ones((200, 6)), rtol=1e-5)


@partial(jax.jit, static_argnums=(0, 1, 2))
def draw(weights, size, count, alpha):
    keys = jax.random.split(jax.random.key(0), count)
    return jax.vmap(lambda key: weights(key, size, alpha=alpha))(keys)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_draws_one_weight_a_batch_from_beta(alpha):
    weights = np.asarray(draw(mixup_weights, (2, 3), 2000, alpha))
    np.testing.assert_array_equal(weights.min((1, 2)), weights.max((1, 2)))
    assert weights.mean() == pytest.approx(0.5, abs=0.03)
    assert weights[:, 0, 0].var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_cutmix_cuts_a_box_whose_weights_count_its_true_area():
    shares = []
    for weights in np.asarray(draw(cutmix_weights, (16, 24), 4000, 1.0))[:500]:
        assert set(np.unique(weights)) <= {0.0, 1.0}
        inside = weights == 0
        rows, columns = inside.any(1), inside.any(0)
        np.testing.assert_array_equal(inside, rows[:, None] & columns)
        for side in (rows, columns):
            assert (np.diff(side.astype(int)) == 1).sum() <= 1, "one box, not two"
        shares.append(inside.mean())
    # Cutting off at the borders leaves less than the half that Beta(1, 1) means on average.
    assert np.mean(shares) == pytest.approx(0.284, abs=0.03)
    assert max(shares) > 0.8


def cutmix_coverage(size, alpha, count=20_000):
    """How often the algorithm of the paper, in NumPy, pastes each pixel of an image."""
    random = np.random.default_rng(0)
    inside = []
    ratio = np.sqrt(1 - random.beta(alpha, alpha, (count, 1)))
    for extent in size:
        centre, half = random.integers(extent, size=(count, 1)), (extent * ratio).astype(int) // 2
        pixels = np.arange(extent)
        inside.append((pixels >= centre - half) & (pixels < centre + half))
    return (inside[0][:, :, None] & inside[1][:, None]).mean(0)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_cutmix_pastes_each_pixel_as_often_as_the_paper_does(alpha):
    """Area, aspect ratio, uniform and independent centres, and the cut at the borders all show in it."""
    weights = np.asarray(draw(cutmix_weights, (16, 24), 4000, alpha))
    expected = cutmix_coverage((16, 24), alpha)
    np.testing.assert_allclose((weights == 0).mean(0), expected, atol=0.04, err_msg="5 standard deviations")
    # Negative control: the corners, where boxes are cut off, from the middle.
    assert expected[8, 12] - expected[0, 0] > 0.1


def test_each_kind_of_mixing_draws_from_its_own_alpha():
    """Beta(40, 40) stays near a half; Beta(0.05, 0.05) nearly always leaves one image whole."""
    images = np.stack([np.ones((6, 8, 1), np.float32), np.zeros((6, 8, 1), np.float32)])

    def mixed(mixup, cutmix):
        def one(key):
            first, targets = random_mix(key, images, np.eye(2, dtype=np.float32), mixup=mixup, cutmix=cutmix)
            return first[0].mean(), targets[0, 0], ((first > 0) & (first < 1)).any()

        pixels, target, blended = map(np.asarray, jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 200)))
        np.testing.assert_allclose(target, pixels, rtol=1e-5, atol=1e-6)
        return np.abs(target - 0.5), blended

    off_half, blended = mixed(40.0, 0.05)
    assert off_half[blended].max() < 0.25
    assert (off_half[~blended] == 0.5).mean() > 0.3, "boxes of no pixel"
    off_half, blended = mixed(0.05, 40.0)
    assert (off_half[blended] > 0.25).mean() > 0.6
    assert (off_half[~blended] == 0.5).mean() < 0.25, "mixup's weights that round to 0 and 1"


def test_cutmix_takes_each_pixel_from_one_of_the_two_images():
    shares = []
    for images, targets in zip(*mix_once(0.0, 1.0), strict=True):
        own = (images == IMAGES).all(-1)
        other = (images == np.roll(IMAGES, -1, axis=0)).all(-1)
        assert (own ^ other).all()
        share = own[0].mean()
        np.testing.assert_allclose(targets, share * TARGETS + (1 - share) * np.roll(TARGETS, -1, axis=0), rtol=1e-5)
        shares.append(share)
    # A box about a corner is cut off to a quarter.
    assert min(shares) < 0.5
    assert max(shares) > 0.9


def test_where_both_are_on_each_batch_takes_one_by_a_fair_coin():
    images, _ = mix_once(1.0, 1.0)
    cuts = ((images == IMAGES) | (images == np.roll(IMAGES, -1, axis=0))).all((1, 2, 3, 4))
    assert 70 < cuts.sum() < 130, "4.2 standard deviations"


def test_without_mixing_nothing_changes():
    images, targets = jnp.asarray(IMAGES), jnp.asarray(TARGETS)
    same = random_mix(jax.random.key(0), images, targets, mixup=0.0, cutmix=0.0)
    assert same[0] is images
    assert same[1] is targets


def test_a_negative_alpha_is_refused():
    with pytest.raises(ValueError, match=r"cutmix \(=-1\)"):
        random_mix(jax.random.key(0), jnp.asarray(IMAGES), jnp.asarray(TARGETS), mixup=0, cutmix=-1)
