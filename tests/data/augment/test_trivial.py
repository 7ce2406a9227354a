import importlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from repvgg_jax.data.augment.trivial import OPERATIONS, WARPS, changed, trivial_augment
from tests.data.tiny_data import noise

# By its path: the package has a function of the name.
MODULE = importlib.import_module("repvgg_jax.data.augment.trivial")


def pictures():
    """Colour gradients with some noise, of a limited range: something to equalise and to stretch."""
    rows, columns = np.mgrid[:24, :24]
    smooth = np.stack([40 + 5 * rows, 60 + 4 * columns, 100 + 2 * rows + columns], -1)
    return (smooth + noise(24, 24, 3) // 8).clip(0, 255).astype(np.uint8)


CHANGED = jax.jit(changed)
AUGMENT = jax.jit(trivial_augment)


def applied(name, image, strength=0.5, sign=1.0):
    return np.asarray(CHANGED(OPERATIONS.index(name), np.float32(image), np.float32(strength), np.float32(sign)))


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
    assert abs(result - expected).max() <= (0 if name in ("posterize", "solarize", "equalize") else 2)
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
    augmented = np.asarray(AUGMENT(jax.random.key(0), images))
    assert augmented.dtype == np.uint8
    assert augmented.shape == images.shape
    keys = jax.random.split(jax.random.key(0), 3)
    operations = np.asarray(jax.random.randint(keys[0], (280,), 0, len(OPERATIONS)))
    assert set(operations) == set(range(len(OPERATIONS)))
    unchanged = (augmented == images).all((1, 2, 3))
    assert unchanged[operations == OPERATIONS.index("identity")].all()
    assert unchanged.mean() < 0.2
    assert len({image.tobytes() for image in augmented}) > 150


@pytest.mark.parametrize("channels", [1, 3])
def test_the_result_depends_on_the_key_alone(channels):
    images = noise(280, 24, 24, channels)
    first, again, other = (AUGMENT(jax.random.key(seed), images) for seed in (0, 0, 1))
    assert (first == again).all()
    assert not (first == other).all()


def test_normalised_images_are_refused():
    with pytest.raises(ValueError, match="images are float32: expected uint8"):
        trivial_augment(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))


def drawn_from(told, operations, count, monkeypatch):
    """One pixel each of so many images, as these operations change it."""
    monkeypatch.setattr(MODULE, "OPERATIONS", range(operations))
    monkeypatch.setattr(MODULE, "changed", told)
    # Traced anew: AUGMENT has been with the true operations.
    augment = jax.jit(lambda key, images: trivial_augment(key, images))
    return np.asarray(augment(jax.random.key(0), np.zeros((count, 1, 1, 1), np.uint8))).ravel()


def test_each_image_has_a_strength_of_31_and_a_sign_of_its_own(monkeypatch):
    told = lambda operation, image, strength, sign: image * 0 + 100 + 90 * sign * strength  # noqa: E731
    drawn = drawn_from(told, 1, 3000, monkeypatch)
    levels = np.round((drawn.astype(float) - 100) / 3)
    np.testing.assert_array_equal(drawn, 100 + 3 * levels)
    counts = np.bincount((levels + 30).astype(int), minlength=61)
    assert counts.size == 61
    assert abs(counts[30] - 3000 / 31) < 45, "both signs of no strength"
    assert abs(np.delete(counts, 30) - 3000 / 62).max() < 32, "4.6 standard deviations"


def test_operations_are_drawn_evenly_and_apart_from_strengths(monkeypatch):
    told = lambda operation, image, strength, sign: image * 0 + 64 * operation + 31 * strength  # noqa: E731
    drawn = drawn_from(told, 4, 2000, monkeypatch)
    weak, strong = (np.bincount(part // 64, minlength=4) for part in (drawn[drawn % 64 < 16], drawn[drawn % 64 >= 16]))
    for counts in (weak, strong):
        assert counts.min() > 180


def test_results_are_rounded_and_clipped(monkeypatch):
    values = jnp.array([-3.0, 0.4, 0.6, 254.7, 255.6, 300.0])
    monkeypatch.setattr(MODULE, "changed", lambda operation, image, *_: image * 0 + values[:, None, None])
    drawn = trivial_augment(jax.random.key(0), jnp.zeros((1, 6, 1, 1), jnp.uint8))
    assert drawn.ravel().tolist() == [0, 0, 1, 255, 255, 255]


@pytest.mark.parametrize("level", [0, 2, 3, 7, 8, 13, 18, 23, 27, 28, 30])
def test_posterize_keeps_eight_bits_less_six_tenths_of_the_strength(level):
    """As torchvision's wide space: 8 - round(level / 5) bits, from 8 to 2."""
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    expected = np.asarray(ImageOps.posterize(Image.fromarray(image[..., 0]), 8 - round(level / 5)))
    np.testing.assert_array_equal(applied("posterize", image, level / 30)[..., 0], expected)


def test_solarize_inverts_from_its_threshold_on():
    image = np.array([0, 127, 128, 204, 255], np.uint8).reshape(1, 5, 1)
    assert applied("solarize", image, 0.0).ravel().tolist() == [0, 127, 128, 204, 0]
    assert applied("solarize", image, 0.5).ravel().tolist() == [0, 127, 127, 51, 0]
    assert applied("solarize", image, 1.0).ravel().tolist() == [255, 128, 127, 51, 0]


@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_what_has_one_level_is_left_alone(name):
    image = np.stack([np.full((5, 5), 77), np.zeros((5, 5)), np.full((5, 5), 255)], -1)
    np.testing.assert_array_equal(applied(name, image), image)


def test_geometry_turns_about_the_centre_of_images_that_are_no_squares():
    image = np.maximum(noise(5, 8, 3), 1)
    np.testing.assert_array_equal(applied("rotate", image, 180 / 135), image[::-1, ::-1])
    quarter = np.zeros_like(image)
    for row in range(5):
        for column in range(8):
            place = (2 + (column - 3.5), 3.5 - (row - 2))
            source = tuple(int(np.round(each)) for each in place)
            if 0 <= source[0] < 5 and 0 <= source[1] < 8:
                quarter[row, column] = image[source]
    assert (quarter > 0).any()
    assert (applied("rotate", image, 90 / 135) == quarter).mean() > 0.8, "half pixels are rounded either way"


@pytest.mark.parametrize("levels", [np.arange(256), np.full(300, 200), noise(20, 15, 1)], ids=["each", "one", "any"])
def test_what_a_tpu_counts_and_looks_up_by_products_is_the_same(levels):
    levels = jnp.asarray(levels, jnp.int32)
    np.testing.assert_array_equal(MODULE._count_by_products(levels), MODULE._count(levels))
    np.testing.assert_array_equal(MODULE._count(levels), np.bincount(np.ravel(levels), minlength=256))
    table = jnp.asarray(noise(256), jnp.int32)
    np.testing.assert_array_equal(MODULE._look_up_by_products(table, levels), np.asarray(table)[np.asarray(levels)])


@pytest.mark.parametrize("name", WARPS)
def test_what_a_tpu_takes_by_products_are_the_same_pixels(name, monkeypatch):
    image = np.float32(noise(9, 14, 3))
    expected = applied(name, image, 0.3, -1.0)
    monkeypatch.setattr(MODULE, "_take", MODULE._take_by_products)
    found = jax.jit(lambda *each: changed(*each))(OPERATIONS.index(name), image, np.float32(0.3), np.float32(-1))
    np.testing.assert_array_equal(found, expected)
    assert (expected != image).mean() > 0.3


@pytest.mark.parametrize(
    ("platform", "side", "gathers"), [("tpu", 32, False), ("tpu", 96, True), ("cpu", 32, True)], ids=str
)
def test_on_a_tpu_pixels_of_small_images_are_not_taken_one_by_one(platform, side, gathers):
    """Lowered for a TPU, which needs none."""
    images = jax.ShapeDtypeStruct((4, side, side, 3), jnp.uint8)
    export = jax.export.export(jax.jit(trivial_augment), platforms=[platform])
    program = export(jax.eval_shape(jax.random.key, 0), images).mlir_module()
    sizes = re.findall(r'"stablehlo.gather".*-> tensor<([\dx]+)x[fi]32>', program)
    assert any(math.prod(map(int, each.split("x"))) >= images.size for each in sizes) == gathers
    scattered = re.findall(r"}\) : \(tensor<[\dx]*256xi32>, tensor<[\dx]+x1xi32>", program)  # the histogram
    assert bool(scattered) == (platform == "cpu")
