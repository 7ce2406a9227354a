import numpy as np
import pytest

from repvgg_jax.data import measure_normalization
from tests.data.tiny_data import noise


def test_the_statistics_are_those_of_all_pixels(numbered):
    records = numbered(300, channels=3)
    pixels = np.stack([record["image"] for record in records]).reshape(-1, 3) / 255
    mean, std = measure_normalization(records, image_size=4, channels=3)
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-12)
    assert all(type(value) is float for value in mean + std)
    assert abs(np.array(mean) - measure_normalization(records[:30], image_size=4, channels=3)[0]).max() > 1e-4


def test_a_constant_channel_gets_a_deviation_of_one():
    image = noise(4, 4, 3)
    image[..., 1] = 51
    mean, std = measure_normalization([{"image": image, "label": 0}] * 3, image_size=4, channels=3)
    assert (mean[1], std[1]) == (pytest.approx(0.2), 1.0)
    assert std[0] < 0.5


def test_a_limit_reads_evenly_spaced_records():
    records = [{"image": np.full((2, 2, 1), i, np.uint8), "label": 0} for i in range(100)]
    mean, _ = measure_normalization(records, image_size=2, channels=1, limit=4)
    assert mean[0] * 255 == pytest.approx((0 + 25 + 50 + 75) / 4)


def test_the_digits_are_darker_than_they_are_varied(digits):
    mean, std = measure_normalization(digits.train, image_size=8, channels=1)
    assert mean[0] == pytest.approx(0.305, abs=0.005)
    assert std[0] == pytest.approx(0.376, abs=0.005)


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match=r"number of records \(=0\)"):
        measure_normalization([], image_size=4, channels=3)
