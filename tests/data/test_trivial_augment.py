import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from repvgg_jax.data.trivial_augment import OPERATIONS, trivial_augment
from tests.data.tiny_data import noise


def pictures():
    """Colour gradients with some noise, of a limited range: something to equalise and to stretch."""
    rows, columns = np.mgrid[:24, :24]
    smooth = np.stack([40 + 5 * rows, 60 + 4 * columns, 100 + 2 * rows + columns], -1)
    return (smooth + noise(24, 24, 3) // 8).clip(0, 255).astype(np.uint8)


def applied(name, image, strength=0.5, sign=1.0):
    result = OPERATIONS[name](jnp.asarray(image, jnp.float32), jnp.float32(strength), jnp.float32(sign))
    return np.asarray(result)


PILLOW = {
    "identity": lambda image, factor: image,
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "color": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    "posterize": lambda image, factor: ImageOps.posterize(image, 5),
    "solarize": lambda image, factor: ImageOps.solarize(image, 128),
    "autocontrast": lambda image, factor: ImageOps.autocontrast(image),
    "equalize": lambda image, factor: ImageOps.equalize(image),
}


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", list(PILLOW))
def test_colour_operations_do_what_pillows_do(name, sign):
    picture = pictures()
    expected = np.asarray(PILLOW[name](Image.fromarray(picture), 1 + sign * 0.99 * 0.5), np.float32)
    result = applied(name, picture, 0.5, sign)
    assert abs(result - expected).max() <= 2
    if name != "identity":
        assert abs(expected - picture).max() > 4, "the operation does something to this picture"


@pytest.mark.parametrize("sign", [1, -1])
def test_translation_shifts_by_up_to_32_pixels_and_fills_with_black(sign):
    image = np.maximum(noise(12, 12, 3), 1)
    shift = sign * 8
    expected = np.zeros_like(image)
    if sign > 0:
        expected[:, :-shift] = image[:, shift:]
    else:
        expected[:, -shift:] = image[:, :shift]
    np.testing.assert_array_equal(applied("translate_x", image, 0.25, sign), expected)
    vertical = applied("translate_y", image.swapaxes(0, 1), 0.25, sign)
    np.testing.assert_array_equal(vertical, expected.swapaxes(0, 1))
    assert (applied("translate_x", image, 1.0, sign) == 0).all()


@pytest.mark.parametrize(("sign", "turns"), [(1.0, 1), (-1.0, -1)])
@pytest.mark.parametrize("side", [8, 9])
def test_a_rotation_by_ninety_degrees_is_exact(sign, turns, side):
    image = noise(side, side, 3)
    rotated = applied("rotate", image, 90 / 135, sign)
    np.testing.assert_array_equal(rotated, np.rot90(image, turns))
    assert (rotated != np.rot90(image, -turns)).any()


def test_shearing_moves_each_row_or_column_by_its_distance_from_the_centre():
    image = np.maximum(noise(9, 9, 1), 1)
    expected = np.zeros_like(image)
    for row in range(9):
        for column in range(9):
            source = round(column + 0.99 * 0.4 * (row - 4))
            if 0 <= source < 9:
                expected[row, column] = image[row, source]
    np.testing.assert_array_equal(applied("shear_x", image, 0.4), expected)
    np.testing.assert_array_equal(applied("shear_y", image.swapaxes(0, 1), 0.4), expected.swapaxes(0, 1))


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("autocontrast", "equalize")])
def test_without_strength_an_operation_changes_nothing(name):
    image = np.minimum(noise(10, 10, 3), 254)
    np.testing.assert_allclose(applied(name, image, 0.0), image, atol=1e-3)


def test_each_image_gets_one_operation_and_all_of_them_occur():
    images = np.repeat(pictures()[None], 280, axis=0)
    augmented = np.asarray(jax.jit(trivial_augment)(jax.random.key(0), jnp.asarray(images)))
    assert augmented.dtype == np.uint8
    assert augmented.shape == images.shape
    keys = jax.random.split(jax.random.key(0), 3)
    operations = np.asarray(jax.random.randint(keys[0], (280,), 0, len(OPERATIONS)))
    assert set(operations) == set(range(len(OPERATIONS)))
    unchanged = (augmented == images).all((1, 2, 3))
    assert unchanged[operations == list(OPERATIONS).index("identity")].all()
    assert unchanged.mean() < 0.2
    assert len({image.tobytes() for image in augmented}) > 150


@pytest.mark.parametrize("channels", [1, 3])
def test_the_result_depends_on_the_key_alone(channels):
    images = jnp.asarray(noise(32, 8, 8, channels))
    first, again = (jax.jit(trivial_augment)(jax.random.key(0), images) for _ in range(2))
    other = trivial_augment(jax.random.key(1), images)
    assert (first == again).all()
    assert not (first == other).all()


def test_normalised_images_are_refused():
    with pytest.raises(ValueError, match="images are float32: expected uint8"):
        trivial_augment(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
