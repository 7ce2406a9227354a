import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from repvgg_jax.data import fit, read_image
from repvgg_jax.data.decode import convert_channels
from tests.data.tiny_data import encode, noise


@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_images_come_back_exactly_from_bytes_and_from_files(tmp_path, channels):
    image = noise(5, 7, channels)
    (tmp_path / "image.png").write_bytes(encode(image))
    for source in (encode(image), tmp_path / "image.png", str(tmp_path / "image.png")):
        decoded = read_image(source, channels)
        assert decoded.dtype == np.uint8
        assert np.array_equal(decoded, image)


def test_grey_becomes_rgb_by_repetition_and_rgb_becomes_grey_by_luma():
    grey, red = noise(4, 4, 1), np.full((4, 4, 3), (255, 0, 0), np.uint8)
    assert np.array_equal(read_image(encode(grey), 3), np.repeat(grey, 3, axis=-1))
    assert np.array_equal(read_image(encode(red), 1), np.full((4, 4, 1), 76))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_decodes_to_the_wanted_channels(mode):
    image = Image.fromarray(noise(6, 4, 3)).convert(mode)
    encoded = encode(image, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG")
    assert read_image(encoded, 3).shape == (6, 4, 3)
    assert read_image(encoded, 1).shape == (6, 4, 1)


def test_alpha_is_dropped():
    rgba = noise(4, 4, 4)
    assert np.array_equal(read_image(encode(Image.fromarray(rgba, "RGBA")), 3), rgba[..., :3])


def test_sixteen_bits_keep_the_upper_eight():
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    decoded = read_image(encode(Image.fromarray(values)), 1)
    assert decoded.ravel().tolist() == [0, 0, 1, 128, 255]


def test_transparent_palettes_decode_without_a_warning():
    image = Image.fromarray(noise(4, 4, 3)).convert("P")
    image.info["transparency"] = bytes(range(256))
    assert read_image(encode(image), 3).shape == (4, 4, 3)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b"not an image", lambda b: b[: len(b) // 2]])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_a_broken_file_is_named(tmp_path, damage, file_format):
    path = tmp_path / "broken.img"
    path.write_bytes(damage(encode(noise(32, 32, 3), file_format)))
    with pytest.raises(ValueError, match=r"broken\.img: cannot be decoded as an image"):
        read_image(path, 3)


def test_a_missing_file_is_reported_as_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_image(tmp_path / "nowhere.png", 3)


def test_other_channel_counts_are_refused():
    with pytest.raises(ValueError, match=r"channels \(=4\) must be 1 \(grey\) or 3 \(RGB\)"):
        read_image(encode(noise(2, 2, 3)), 4)
    with pytest.raises(ValueError, match=r"channels \(=2\)"):
        convert_channels(noise(2, 2, 3), 2)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_images_are_resized_by_the_interpolation_asked_for(interpolation):
    image = noise(12, 18, 3)
    expected = Image.fromarray(image).resize((15, 10), Image.Resampling[interpolation.upper()])
    other = {"bilinear": "bicubic", "bicubic": "bilinear"}[interpolation]
    assert np.array_equal(fit(image, 10, 10, interpolation), np.asarray(expected)[:, 2:12])
    assert not np.array_equal(fit(image, 10, 10, other), np.asarray(expected)[:, 2:12])


def test_an_image_of_the_right_size_is_passed_through():
    image = noise(8, 8, 3)
    assert fit(image, 8) is image


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24), st.integers(0, 16), st.sampled_from([1, 3]))
def test_fit_always_gives_the_asked_size(height, width, size, margin, channels):
    fitted = fit(noise(height, width, channels), size, size + margin)
    assert fitted.shape == (size, size, channels)
    assert fitted.dtype == np.uint8


@pytest.mark.parametrize(("height", "width"), [(20, 30), (30, 20), (20, 20)])
def test_fit_resizes_the_shorter_side_and_crops_the_centre(height, width):
    image = noise(height, width, 3)
    scaled = Image.fromarray(image).resize((width * 16 // 20, height * 16 // 20), Image.Resampling.BILINEAR)
    left, top = round((scaled.width - 10) / 2), round((scaled.height - 10) / 2)
    expected = np.asarray(scaled)[top : top + 10, left : left + 10]
    assert np.array_equal(fit(image, 10, 16), expected)
    assert not np.array_equal(fit(image, 10), expected)


def test_fit_keeps_the_centre_of_an_image_that_is_only_cropped():
    image = noise(6, 10, 1)
    assert np.array_equal(fit(image, 6), image[:, 2:8])


def test_a_resize_below_the_crop_is_refused():
    with pytest.raises(ValueError, match=r"resize \(=4\) must be at least image_size \(=8\)"):
        fit(noise(9, 9, 3), 8, 4)
