import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from repvgg_jax.data import fit, read_image
from repvgg_jax.data.images import MAX_BYTES, MAX_PIXELS, convert_channels
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


@pytest.mark.parametrize("file_format", ["ICO", "TGA", "PCX"])
def test_a_format_that_is_not_read_names_those_that_are(file_format):
    with pytest.raises(
        ValueError, match=r"no known image format\); replace or remove it \(JPEG, PNG, WEBP, .* are read"
    ):
        read_image(encode(noise(16, 16, 3), file_format), 3)


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


@pytest.mark.parametrize("long", [45, 200, 999])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_an_elongated_image_is_fitted_as_if_resized_whole(long, interpolation):
    # Without black and white: Pillow takes rows or columns first by the size, and clips in between.
    for image in (noise(10, long, 3) // 2 + 64, noise(long, 10, 3) // 2 + 64):
        height, width = image.shape[:2]
        size = (18, 18 * width // height) if height < width else (18 * height // width, 18)
        whole = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling[interpolation.upper()]))
        top, left = round((size[0] - 16) / 2), round((size[1] - 16) / 2)
        fitted = fit(image, 16, 18, interpolation).astype(int)
        assert np.abs(fitted - whole[top : top + 16, left : left + 16]).max() <= 1
        shifted = whole[top + (height > width) :, left + (height < width) :][:16, :16]
        assert np.abs(fitted - shifted).max() > 20


@pytest.mark.parametrize("shape", [(1, 60000, 3), (60000, 1, 3), (3, 60000, 1)])
def test_no_more_of_an_elongated_image_is_resized_than_is_shown(shape, monkeypatch):
    sizes, resize = [], Image.Image.resize

    def spy(self, size, *arguments, **keywords):
        sizes.append(size)
        assert size[0] * size[1] < 10**6  # or this test would take the memory
        return resize(self, size, *arguments, **keywords)

    monkeypatch.setattr(Image.Image, "resize", spy)
    assert fit(noise(*shape), 224, 256).shape == (224, 224, shape[2])
    assert sizes == [(224, 224)]


def stored(image, orientation):
    """What a camera held that way would store."""
    turned = {
        1: image,
        2: image[:, ::-1],
        3: image[::-1, ::-1],
        4: image[::-1],
        5: image.swapaxes(0, 1),
        6: np.rot90(image),
        7: image[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(image, -1),
    }[orientation]
    return Image.fromarray(np.ascontiguousarray(turned))


def with_exif(image, file_format, exif):
    buffer = io.BytesIO()
    image.save(buffer, file_format, exif=exif, **({"lossless": True} if file_format == "WEBP" else {}))
    return buffer.getvalue()


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(orientation, file_format):
    image, exif = noise(5, 7, 3), Image.Exif()
    exif[0x0112] = orientation
    encoded = with_exif(stored(image, orientation), file_format, exif)
    assert np.array_equal(read_image(encoded, 3), image)
    assert read_image(encoded, 1).shape == (5, 7, 1)


def test_a_jpeg_from_a_camera_is_turned_upright():
    image, exif = np.zeros((16, 32, 3), np.uint8), Image.Exif()
    image[:8] = 255
    exif[0x0112] = 6
    decoded = read_image(with_exif(stored(image, 6), "JPEG", exif), 3)
    assert decoded.shape == (16, 32, 3)
    assert np.abs(decoded.astype(int) - image).max() < 30


@pytest.mark.filterwarnings("ignore::UserWarning")  # as after a plain import
@pytest.mark.parametrize(
    "damage",
    [b"", b"\xff" * 40, b"MM\0*\0\0\0\x08\xff\xff", b"II*\0\xff\xff\xff\x7f", b"MM\0*\0\0\0\x08\0\x01\x01\x12"],
)
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_damaged_metadata_leave_the_picture_as_it_is(damage, file_format):
    image = Image.fromarray(noise(5, 7, 3))
    encoded = with_exif(image, file_format, b"Exif\0\0" + damage)
    assert np.array_equal(read_image(encoded, 3), np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = noise(5, 7, 3)
    assert np.array_equal(read_image(with_exif(Image.fromarray(image), "PNG", exif), 3), image)


def tiff(values, bits, sample_format, white_is_zero=False):
    """A grey TIFF written by hand: Pillow writes fewer kinds than it reads."""
    data = values.tobytes()
    tags = [(256, 4, values.shape[1]), (257, 4, values.shape[0]), (258, 3, bits), (259, 3, 1)]
    tags += [(262, 3, 0 if white_is_zero else 1), (273, 4, 8), (277, 3, 1), (278, 4, values.shape[0])]
    tags += [(279, 4, len(data)), (339, 3, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    header = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    return header + data + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"


@pytest.mark.parametrize(
    ("kind", "bits", "sample_format", "white_is_zero"),
    [
        (np.float32, 32, 3, False),
        (np.float32, 32, 3, True),
        (np.int32, 32, 2, False),
        (np.uint32, 32, 1, False),
        (np.int16, 16, 2, False),
        (np.uint16, 16, 1, True),
        (np.uint16, 12, 1, False),
        (np.float64, 64, 3, False),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_values_without_a_known_black_and_white_are_refused(
    tmp_path, kind, bits, sample_format, white_is_zero, channels
):
    (tmp_path / "odd.tif").write_bytes(tiff(np.ones((4, 4), kind), bits, sample_format, white_is_zero))
    with pytest.raises(ValueError, match=r"odd\.tif: (its values are of another kind|cannot be decoded)"):
        read_image(tmp_path / "odd.tif", channels)


def test_a_tiff_of_sixteen_bits_keeps_the_upper_eight():
    values = np.array([[0, 255, 256, 65535]], np.uint16)
    assert read_image(tiff(values, 16, 1), 1).ravel().tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_what_pillow_writes_of_such_values_is_refused(mode):
    image = Image.new(mode, (4, 4))
    with pytest.raises(ValueError, match="convert it to 8 bits"):
        read_image(encode(image, "TIFF"), 3)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_picture_is_taken(file_format):
    buffer = io.BytesIO()
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    first.save(buffer, file_format, save_all=True, append_images=[second])
    red, _, blue = read_image(buffer.getvalue(), 3).mean((0, 1))
    assert red > 240
    assert blue < 15


def png_header(width, height):
    """The beginning of a PNG: all that tells its size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_a_picture_of_too_many_pixels_is_refused(tmp_path):
    (tmp_path / "vast.png").write_bytes(png_header(60000, 60000))
    with pytest.raises(ValueError, match=rf"vast\.png: it has more than {MAX_PIXELS:,} pixels"):
        read_image(tmp_path / "vast.png", 3)


@pytest.mark.parametrize("size", [(60000, 1), (1, 60000), (20020, 20)])
def test_a_picture_of_an_extreme_shape_is_refused(size):
    with pytest.raises(ValueError, match=rf"it has {size[0]} × {size[1]} pixels; one side may be at most 1000 times"):
        read_image(encode(Image.new("L", size), "JPEG"), 3)


def test_a_large_picture_is_no_warning_on_the_terminal(tmp_path):
    (tmp_path / "large.png").write_bytes(png_header(10000, 10000))
    script = "import sys; from repvgg_jax.data import read_image; read_image(sys.argv[1], 3)"
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "large.png")], capture_output=True, text=True, check=False
    )
    assert "large.png: cannot be decoded as an image (OSError: image file is truncated" in result.stderr
    assert "Warning" not in result.stderr


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/null", "directory", "pipe", "pipe-by-link"])
def test_what_is_no_regular_file_is_not_read(tmp_path, place):
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "pipe-by-link").symlink_to("pipe")
    with pytest.raises(OSError, match=r"is (a directory|no regular file .*); expected an image file"):
        read_image(tmp_path / place, 3)


def test_a_file_beyond_the_limit_is_not_read(tmp_path):
    with open(tmp_path / "long.png", "wb") as file:
        file.truncate(MAX_BYTES + 1)  # of holes: it takes no space
    with pytest.raises(ValueError, match=r"long\.png: it has 536,870,913 bytes; at most 536,870,912 are read"):
        read_image(tmp_path / "long.png", 3)


def test_too_little_memory_is_not_taken_for_damage(monkeypatch):
    def refuse(*_, **__):
        raise MemoryError

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(MemoryError, match="136 bytes: there is not enough memory to decode it"):
        read_image(bytes(136), 3)


def test_names_cannot_command_the_terminal(tmp_path):
    path = tmp_path / "cat\x1b[2J\n\udcff.png"
    path.write_bytes(b"")
    with pytest.raises(ValueError) as error:
        read_image(path, 3)
    assert r"cat\x1b[2J\n\xff.png: cannot be decoded as an image (no known image format)" in str(error.value)
    assert str(error.value).isprintable()
