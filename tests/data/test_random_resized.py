import numpy as np
import pytest
from PIL import Image

from repvgg_jax.data.random_resized import _draw_box, random_resized_crop
from tests.data.tiny_data import noise


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(5, 90), (90, 5), (33, 47), (1, 1)])
def test_the_crop_has_the_asked_size_and_follows_the_generator(size, channels):
    image = noise(*size, channels)
    first = random_resized_crop(image, 16, np.random.default_rng(0))
    again = random_resized_crop(image, 16, np.random.default_rng(0))
    assert first.shape == (16, 16, channels)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)


def test_other_randomness_crops_elsewhere():
    image = noise(40, 40, 3)
    crops = {random_resized_crop(image, 8, np.random.default_rng(seed)).tobytes() for seed in range(10)}
    assert len(crops) == 10


def test_the_whole_of_a_square_is_a_plain_resize():
    image = noise(30, 30, 3)
    cropped = random_resized_crop(image, 12, np.random.default_rng(0), scale=(1, 1), ratio=(1, 1))
    assert np.array_equal(cropped, np.asarray(Image.fromarray(image).resize((12, 12), Image.Resampling.BILINEAR)))


def test_boxes_lie_inside_and_keep_their_bounds():
    rng = np.random.default_rng(0)
    for _ in range(500):
        left, top, width, height = _draw_box(100, 150, rng, (0.08, 1.0), (3 / 4, 4 / 3))
        assert 0 <= left <= 150 - width
        assert 0 <= top <= 100 - height
        # Rounding to pixels moves area and ratio a little.
        assert 0.075 < width * height / 15000 <= 1
        assert 0.72 < width / height < 1.39


def test_an_elongated_image_falls_back_to_its_centre():
    rng = np.random.default_rng(0)
    assert _draw_box(9, 900, rng, (0.5, 1.0), (3 / 4, 4 / 3)) == (444, 0, 12, 9)
    assert _draw_box(900, 9, rng, (0.5, 1.0), (3 / 4, 4 / 3)) == (0, 444, 9, 12)
