import numpy as np
import pytest
from PIL import Image

from repvgg_jax.data import images
from repvgg_jax.data.images import _draw_box, random_resized_crop
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


def test_the_crop_shows_the_box_that_was_drawn():
    """By an image whose first channel tells the column, and whose second the row."""
    rows, columns = np.mgrid[:60, :200]
    image = np.stack([columns, rows, 0 * rows], -1).astype(np.uint8)
    for seed in range(5):
        left, top, width, height = _draw_box(60, 200, np.random.default_rng(seed), (0.08, 0.2), (3 / 4, 4 / 3))
        crop = random_resized_crop(image, 16, np.random.default_rng(seed), scale=(0.08, 0.2)).astype(float)
        assert crop[..., 0].mean() == pytest.approx(left + (width - 1) / 2, abs=0.6)
        assert crop[..., 1].mean() == pytest.approx(top + (height - 1) / 2, abs=0.6)
        assert crop[:, -1, 0].mean() - crop[:, 0, 0].mean() == pytest.approx(width * 15 / 16, abs=1)
        assert crop[-1, :, 1].mean() - crop[0, :, 1].mean() == pytest.approx(height * 15 / 16, abs=1)


def is_uniform(drawn, low, high):
    """Kolmogorov's distance, by which one in 10⁶ would differ by chance."""
    share = (np.sort(drawn) - low) / (high - low)
    return np.abs(share - (np.arange(len(share)) + 0.5) / len(share)).max() < 2.7 / np.sqrt(len(share))


def test_area_log_ratio_and_place_are_uniform():
    """In an image so large that every box fits, and of a range of ratios that tells width from height."""
    rng = np.random.default_rng(0)
    boxes = np.array([_draw_box(2000, 1000, rng, (0.05, 0.2), (0.5, 1.0)) for _ in range(2000)])
    left, top, width, height = boxes.T
    assert is_uniform(width * height / 2e6, 0.05, 0.2)
    assert is_uniform(np.log(width / height), np.log(0.5), 0)
    assert is_uniform(left / (1000 - width), 0, 1)
    assert is_uniform(top / (2000 - height), 0, 1)
    assert not is_uniform(width / height, 0.5, 1)


def test_every_place_in_which_a_box_fits_is_drawn():
    boxes = [_draw_box(4, 5, np.random.default_rng(seed), (9 / 20, 9 / 20), (1, 1)) for seed in range(100)]
    assert set(boxes) == {(left, top, 3, 3) for left in range(3) for top in range(2)}
    assert _draw_box(3, 3, np.random.default_rng(0), (1, 1), (1, 1)) == (0, 0, 3, 3)


def test_the_ranges_are_those_of_the_paper_where_none_is_given(monkeypatch):
    asked = []
    monkeypatch.setattr(images, "_draw_box", lambda *args: asked.append(args) or (0, 0, 1, 1))
    random_resized_crop(noise(5, 6, 3), 4, np.random.default_rng(0))
    (((height, width, _, scale, ratio)),) = asked
    assert (height, width, scale, ratio) == (5, 6, (0.08, 1.0), (3 / 4, 4 / 3))


class Scripted:
    """A generator that draws the given areas, all at the ratio 1."""

    def __init__(self, areas):
        self.areas = iter(areas)

    def uniform(self, low, high):
        return 0.0 if low < 0 else next(self.areas)

    def integers(self, count):
        return 0


def test_ten_boxes_are_tried_before_the_central_one():
    """Of a 10×30 image: half of it is a square that does not fit, a twelfth one of 5×5 that does."""
    ratio = (3 / 4, 4 / 3)
    assert _draw_box(10, 30, Scripted([0.5] * 9 + [1 / 12]), (0, 1), ratio) == (0, 0, 5, 5)
    assert _draw_box(10, 30, Scripted([0.5] * 10 + [1 / 12]), (0, 1), ratio) == (8, 0, 13, 10)
    assert _draw_box(10, 30, Scripted([1 / 3]), (0, 1), ratio) == (0, 0, 10, 10), "as high as the image"
