"""What is merged, and what is not because it would not be exact or would cost more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from repvgg_jax import create_model
from repvgg_jax.transform import reparameterize
from tests.random_variables import random_images, random_variables
from tests.transform.merging.comparison import compare, primitives
from tests.transform.merging.networks import convolve

pytestmark = pytest.mark.usefixtures("float64")


def test_zeros_around_a_value_and_means_over_windows_are_left_where_nothing_takes_them_in():
    def function(v, x):
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        pooled = jax.lax.reduce_window(jnp.tanh(padded), 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return pooled * v["scale"], jnp.pad(x, ((0, 0), (0, 0), (0, 0), (1, 2)), constant_values=1.0)

    before, after = compare(function, {"scale": jnp.arange(1.0, 4.0)}, (2, 6, 6, 3))
    assert after["pad"] == before["pad"] == 2
    assert (after["reduce_window_sum"], after["conv_general_dilated"]) == (1, 0)


def test_a_convolution_with_a_bias_is_not_merged_into_a_padded_one():
    """The padding would be zero where the bias is not: exact inside the border alone."""

    def function(v, x, padding):
        y = convolve(x, v["first"]) + v["bias"]
        return convolve(y, v["second"], padding)

    rng = np.random.default_rng(0)
    v = {
        "first": jnp.asarray(rng.normal(size=(1, 1, 3, 3))),
        "second": jnp.asarray(rng.normal(size=(3, 3, 3, 2))),
        "bias": jnp.asarray(rng.normal(size=2 + 1)),
    }
    for padding, convolutions in (("SAME", 2), ("VALID", 1)):
        _, after = compare(lambda v, x, padding=padding: function(v, x, padding), v, (2, 6, 6, 3))
        assert after["conv_general_dilated"] == convolutions


@pytest.mark.parametrize("asked", [False, True])
def test_a_merge_that_costs_multiply_adds_is_not_made_unless_asked(asked):
    rng = np.random.default_rng(0)
    v = {"wide": jnp.asarray(rng.normal(size=(1, 3, 4, 4))), "tall": jnp.asarray(rng.normal(size=(3, 1, 4, 4)))}
    # 1×3 and 3×1 are six taps, the 3×3 around them nine.
    _, after = compare(
        lambda v, x: convolve(x, v["wide"]) + convolve(x, v["tall"]), v, (2, 6, 6, 4), fewest_convolutions=asked
    )
    assert after["conv_general_dilated"] == (1 if asked else 2)
    narrow = {"down": jnp.asarray(rng.normal(size=(1, 1, 8, 2))), "up": jnp.asarray(rng.normal(size=(1, 1, 2, 8)))}
    _, after = compare(
        lambda v, x: convolve(convolve(x, v["down"]), v["up"]), narrow, (2, 6, 6, 8), fewest_convolutions=asked
    )
    assert after["conv_general_dilated"] == (1 if asked else 2)
    wide = {"up": jnp.asarray(rng.normal(size=(1, 1, 2, 8))), "down": jnp.asarray(rng.normal(size=(1, 1, 8, 2)))}
    _, after = compare(
        lambda v, x: convolve(convolve(x, v["up"]), v["down"]), wide, (2, 6, 6, 2), fewest_convolutions=asked
    )
    assert after["conv_general_dilated"] == 1

    def averaged(v, x):
        y = convolve(x, v["up"])
        return jax.lax.reduce_window(y, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "VALID") * v["mean"]

    wide["mean"] = jnp.asarray(1 / 9)
    _, after = compare(averaged, wide, (2, 6, 6, 2), fewest_convolutions=asked)
    assert after["conv_general_dilated"] == 1
    assert after["reduce_window_sum"] == (0 if asked else 1)
    apart = {"each": jnp.asarray(rng.normal(size=(3, 3, 1, 6))), "all": jnp.asarray(rng.normal(size=(1, 1, 6, 6)))}
    _, after = compare(
        lambda v, x: convolve(x, v["each"], feature_group_count=6) + convolve(x, v["all"]),
        apart,
        (2, 6, 6, 6),
        fewest_convolutions=asked,
    )
    assert after["conv_general_dilated"] == (1 if asked else 2)


def affordable(*kernels, **settings):
    """Convolutions in a row, and how many they become when no more multiply-adds may be taken."""
    v = {str(index): jnp.zeros(shape) for index, shape in enumerate(kernels)}

    def network(v, x):
        for index, kernel in enumerate(v.values()):
            x = convolve(x, kernel, **(settings if index else {}))
        return x

    fused = reparameterize(network, v, jax.ShapeDtypeStruct((1, 6, 6, kernels[0][2]), jnp.float64), ops="xla")
    assert fused.totals["multiply-adds"].after <= fused.totals["multiply-adds"].before
    return fused.totals["convolutions"].after


def test_a_merge_that_saves_multiply_adds_or_costs_none_is_made():
    # 6 × 4 + 4 × 6 is more than 6 × 6; both convolutions are computed for every pixel.
    assert affordable((1, 1, 6, 4), (1, 1, 4, 6)) == 1
    assert affordable((3, 3, 3, 8), (1, 1, 8, 8)) == 1
    assert affordable((1, 1, 8, 8), (3, 3, 8, 3)) == 1
    # As many as before: 4 × 2 + 2 × 4.
    assert affordable((1, 1, 4, 2), (1, 1, 2, 4)) == 1
    # One more: 5 × 2 + 2 × 4 is less than 5 × 4.
    assert affordable((1, 1, 5, 2), (1, 1, 2, 4)) == 2
    # Of a bottleneck that pads around its waist, the first part may be computed for fewer pixels than the second.
    assert affordable((1, 1, 6, 4), (1, 1, 4, 6), padding=((0, 0), (0, 1))) == 2
    assert affordable((1, 1, 6, 4), (1, 1, 4, 6), padding=((1, 0), (0, 0))) == 2
    assert affordable((1, 1, 6, 4), (2, 2, 4, 1), padding=((1, 1), (0, 0))) == 2
    # Padded by no more than its reach, the second reads at least one pixel of the image.
    assert affordable((1, 1, 8, 8), (3, 3, 8, 8), padding=((2, 0), (0, 2))) == 1
    assert affordable((1, 1, 10, 8), (3, 3, 8, 8), padding=((1, 1), (1, 1))) == 2
    assert affordable((1, 1, 6, 4), (2, 2, 4, 1), padding=((1, 2), (2, 1)), rhs_dilation=(3, 3)) == 1


@pytest.mark.parametrize(
    ("offsets", "taps"),
    [(((0, 0), (0, 1)), (1, 2)), (((0, 0), (1, 0)), (2, 1)), (((0, 0), (0, 0)), (1, 1)), (((1, 1), (1, 0)), (1, 2))],
)
def test_two_taps_side_by_side_cost_as_much_as_one_kernel(offsets, taps):
    rng = np.random.default_rng(0)
    v = {name: jnp.asarray(rng.normal(size=(1, 1, 3, 4))) for name in "ab"}

    def network(v, x):
        tap = lambda kernel, row, column: convolve(x, kernel, ((-row, row), (-column, column)))  # noqa: E731
        return tap(v["a"], *offsets[0]) + tap(v["b"], *offsets[1])

    images = random_images((1, 3, 3, 3))
    fused = reparameterize(network, v, images, ops="xla")
    assert [value.shape for value in fused.params.values()] == [(*taps, 3, 4)]
    np.testing.assert_allclose(fused(fused.params, images), network(v, images), atol=1e-12)


def test_taps_are_placed_by_the_axes_of_the_layout():
    rng = np.random.default_rng(0)
    v = {name: jnp.asarray(rng.normal(size=(2, 3, 1, 1))) for name in "ab"}

    def network(v, x):
        tap = lambda kernel, *pads: lax.conv_general_dilated(x, kernel, (1, 2), pads)  # noqa: E731
        return tap(v["a"], (0, 0), (0, -1)) + tap(v["b"], (-1, 1), (-1, 0))

    images = random_images((2, 3, 4, 10))
    fused = reparameterize(network, v, images, ops="xla", fewest_convolutions=True)
    assert [value.shape for value in fused.params.values()] == [(2, 2, 3, 2)]
    np.testing.assert_allclose(fused(fused.params, images), network(v, images), atol=1e-12)


def test_groups_of_two_and_three_are_merged_in_one():
    rng = np.random.default_rng(0)
    v = {name: jnp.asarray(rng.normal(size=(1, 1, size, 6))) for name, size in (("two", 3), ("three", 2))}

    def network(v, x):
        return convolve(x, v["two"], feature_group_count=2) + convolve(x, v["three"], feature_group_count=3)

    images = random_images((1, 2, 2, 6))
    fused = reparameterize(network, v, images, ops="xla", fewest_convolutions=True)
    assert [value.shape for value in fused.params.values()] == [(1, 1, 6, 6)]
    np.testing.assert_allclose(fused(fused.params, images), network(v, images), atol=1e-12)


def test_what_is_also_an_output_is_computed_once():
    v = {"full": jnp.ones((3, 3, 4, 4)), "point": jnp.ones((1, 1, 4, 4))}
    images = jax.ShapeDtypeStruct((1, 6, 6, 4), jnp.float64)
    fused = reparameterize(lambda v, x: ((y := convolve(x, v["full"])), convolve(y, v["point"])), v, images)
    before, after = fused.totals["multiply-adds"]
    assert before == after

    def padded(v, x):
        y = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return jnp.tanh(y), jnp.exp(y), y * 2.0

    fused = reparameterize(padded, v, images)
    assert primitives(fused, fused.params, images)["pad"] == 1


def test_two_taps_apart_from_one_another_stay_two():
    v = {name: jnp.ones((1, 1, 3, 4)) for name in "ab"}

    def network(v, x):
        return convolve(x, v["a"]) + convolve(x, v["b"], ((0, 0), (-2, 2)))

    fused = reparameterize(network, v, jax.ShapeDtypeStruct((1, 3, 3, 3), jnp.float64))
    assert fused.totals["convolutions"] == (2, 2)


@pytest.mark.parametrize("size", [1, 3])
def test_the_smallest_images_take_no_more_multiply_adds_either(size):
    """Of a bottleneck before a stride of 2 there is little to save where few pixels are left out."""
    rng = np.random.default_rng(0)
    v = {"down": jnp.asarray(rng.normal(size=(1, 1, 8, 2))), "up": jnp.asarray(rng.normal(size=(1, 1, 2, 8)))}

    def network(v, x):
        return convolve(convolve(x, v["down"]), v["up"], stride=2)

    fused = reparameterize(network, v, jnp.ones((1, size, size, 8)))
    assert fused.totals["multiply-adds"].after <= fused.totals["multiply-adds"].before


def test_a_value_outside_of_a_kernel_is_not_taken_into_it():
    v = {"kernel": jnp.ones((1, 1, 1, 3))}
    shifted = ((0, 0), (-1, 1))  # the neighbour to the right
    before, after = compare(lambda v, x: convolve(x, v["kernel"], shifted, feature_group_count=3) + x, v, (2, 6, 6, 3))
    assert (before["add"], after["add"]) == (1, 1)


@pytest.mark.parametrize("asked", [False, True])
def test_a_mean_over_windows_takes_factors_of_any_kind(asked):
    v = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 3, 4))), "scale": jnp.arange(1.0, 5.0)}

    def network(v, x):
        y = jax.lax.reduce_window(convolve(x, v["kernel"]), 0.0, jax.lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "VALID")
        return -(y / 4) * 2.0, (y * 0.5) * v["scale"] * 3.0

    compare(network, v, (2, 6, 6, 3), fewest_convolutions=asked)


def test_an_elementwise_map_stays_elementwise():
    before, after = compare(lambda v, x: jax.nn.gelu(x * v["scale"]), {"scale": jnp.arange(1.0, 4.0)}, (2, 5, 5, 3))
    assert after["conv_general_dilated"] == 0
    assert after["mul"] + after["add"] <= before["mul"] + before["add"]


def test_a_scale_before_a_convolution_goes_into_its_kernel():
    rng = np.random.default_rng(0)
    v = {"kernel": jnp.asarray(rng.normal(size=(3, 3, 2, 6))), "scale": jnp.asarray(rng.normal(size=4)), "shift": 2.0}
    grouped = lambda x, v, padding: convolve(x, v["kernel"], padding, feature_group_count=2)  # noqa: E731
    _, after = compare(lambda v, x: grouped(x * v["scale"], v, "SAME"), v, (2, 6, 6, 4))
    assert after["mul"] == 0
    _, after = compare(lambda v, x: grouped(x * v["scale"] + v["shift"], v, "VALID"), v, (2, 6, 6, 4))
    assert (after["mul"], after["add"]) == (0, 1)
    _, after = compare(lambda v, x: grouped(x * v["scale"] + v["shift"], v, "SAME"), v, (2, 6, 6, 4))
    assert (after["mul"], after["add"]) == (1, 1)


def test_another_rounding_is_kept():
    """In bfloat16 a batch norm rounds between convolution and sum, where a fold would not: nothing is merged."""
    model = create_model(
        "repvgg_a0", depths=(1, 1, 1, 1), width_multiplier=(0.25,) * 4, num_classes=5, dtype=jnp.bfloat16, ops="xla"
    )
    variables = random_variables(model, dtype=np.float32)
    images = random_images((2, 16, 16, 3), np.float32)
    function = lambda v, x: model.apply(v, x, train=False)  # noqa: E731
    fused = reparameterize(function, variables, images)
    before, after = primitives(function, variables, images), primitives(fused, fused.params, images)
    assert before["conv_general_dilated"] == after["conv_general_dilated"]
    np.testing.assert_allclose(jax.jit(fused)(fused.params, images), jax.jit(function)(variables, images), atol=0.05)


def test_an_evenly_spaced_part_of_a_value_is_an_identity_kernel_beside_a_strided_convolution():
    rng = np.random.default_rng(0)
    v = {"kernel": jnp.asarray(rng.normal(size=(3, 3, 3, 3))), "scale": jnp.asarray(rng.uniform(1, 2, 3))}

    def strided(x, kernel, padding=((1, 1), (1, 1))):
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    for first, convolutions in ((0, 1), (1, 1)):
        _, after = compare(
            lambda v, x, first=first: strided(x, v["kernel"]) + x[:, first::2, first::2] * v["scale"], v, (2, 6, 8, 3),
            any_size=True,
        )  # fmt: skip
        assert (after["conv_general_dilated"], after["mul"], after["slice"]) == (convolutions, 0, 0)
    # A part that no tap of the kernel reads, and one on another grid, stay what they are.
    for part in (
        lambda x: jnp.pad(x, ((0, 0), (4, 0), (4, 0), (0, 0)))[:, ::2, ::2][:, :3, :4],
        lambda x: x[:, :3, :4],
    ):
        _, after = compare(lambda v, x, part=part: strided(x, v["kernel"]) + part(x), v, (2, 6, 8, 3))
        assert after["conv_general_dilated"] == 1
        assert after["add"] == 1


def test_a_padded_convolution_of_a_part_does_not_see_the_rest():
    v = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 3, 2)))}
    for padding, slices in (("SAME", 1), ("VALID", 0)):
        _, after = compare(
            lambda v, x, padding=padding: convolve(x[:, 1:-1, 2:], v["kernel"], padding), v, (2, 7, 8, 3), any_size=True
        )
        assert after["slice"] + after["pad"] == slices


def test_a_merge_of_crops_crops_as_much_and_a_crop_after_a_convolution_is_kept():
    rng = np.random.default_rng(0)
    v = {"kernel": jnp.asarray(rng.normal(size=(3, 3, 3, 3))), "point": jnp.asarray(rng.normal(size=(1, 1, 3, 3)))}
    zeros = lambda low, high: ((low, high), (low, high))  # noqa: E731

    def shifted(v, x):
        return convolve(x, v["point"], zeros(1, -3)) + convolve(x, v["point"], zeros(0, -2)) + convolve(
            x, v["kernel"], zeros(1, -1)
        )  # fmt: skip

    _, after = compare(shifted, v, (2, 8, 9, 3), any_size=True)
    assert after["conv_general_dilated"] == 1
    compare(lambda v, x: convolve(convolve(x, v["kernel"]), v["point"], zeros(-1, -2)), v, (2, 8, 9, 3), any_size=True)


def test_axes_of_size_one_that_vmap_adds_and_takes_are_no_end_of_an_affine_value():
    def one(v, image):
        y = lax.conv(image[None], v["kernel"], (1, 1), "SAME")[0]
        return jax.nn.relu((y - v["mean"][:, None, None]) * v["scale"][:, None, None] + image)

    rng = np.random.default_rng(0)
    v = {"kernel": rng.normal(size=(3, 3, 3, 3)), "mean": rng.normal(size=3), "scale": rng.uniform(0.5, 1.5, 3)}
    _, after = compare(lambda v, x: jax.vmap(lambda image: one(v, image))(x), v, (2, 3, 6, 7))
    assert (after["conv_general_dilated"], after["mul"], after["sub"], after["add"]) == (1, 0, 0, 1)
    # An axis of size one that stays elsewhere is no detour.
    moved = lambda v, x: jax.nn.relu(lax.conv(x, v["kernel"], (1, 1), "SAME")[:, None] * v["scale"][0])  # noqa: E731
    compare(moved, v, (2, 3, 6, 7))
