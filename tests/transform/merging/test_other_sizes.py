"""The parameters hold for inputs of other sizes and dtypes, or the call is refused: never a wrong result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from repvgg_jax.transform import reparameterize
from tests.random_variables import random_images
from tests.transform.merging.networks import convolve

pytestmark = pytest.mark.usefixtures("float64")
OUTSIDE = np.arange(4.0)
OTHERS = "folds to other parameters than when it was reparameterized"


def variables(**shapes):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


def layout(x, kernel, order):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", order, "NHWC"))


def assert_equal(network, fused, v, shape):
    x = random_images(shape, seed=3)
    expected = network(v, x)
    found = fused(fused.params, x)
    np.testing.assert_allclose(found, expected, atol=1e-12 * float(jnp.abs(expected).max()), rtol=0)


def test_branches_of_stride_2_under_same_padding_are_merged_for_sizes_of_one_parity():
    def network(v, x):
        return convolve(x, v["kernel"], stride=2) + convolve(x, v["point"], stride=2)

    v = variables(kernel=(3, 3, 3, 4), point=(1, 1, 3, 4))
    fused = reparameterize(network, v, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float64))
    assert fused.totals["convolutions"].after == 1
    for size in (8, 12):
        assert_equal(network, fused, v, (2, size, size, 3))
    # Between odd and even sizes the padding, and with it the place of the 1×1 in the kernel, is another.
    with pytest.raises(ValueError, match=OTHERS):
        fused(fused.params, jnp.ones((1, 7, 7, 3)))


@pytest.mark.parametrize(
    "network",
    [
        lambda v, x: convolve(x, v["kernel"]) / x.shape[1],
        lambda v, x: convolve(x, v["kernel"] * x.shape[1] ** -0.5),
        lambda v, x: convolve(x, v["kernel"]) * (v["scale"] / x.shape[1]),
        lambda v, x: convolve(x, v["kernel"] if x.shape[1] == 8 else v["other"]),
    ],
    ids=["division", "kernel", "scale", "choice"],
)
def test_what_is_folded_with_the_size_of_the_images_is_not_used_for_another(network):
    v = variables(kernel=(3, 3, 3, 4), other=(3, 3, 3, 4), scale=(4,))
    fused = reparameterize(network, v, jnp.ones((1, 8, 8, 3)))
    assert_equal(network, fused, v, (3, 8, 8, 3))
    for _ in range(2):  # the second time as the first
        with pytest.raises(ValueError, match=OTHERS):
            fused(fused.params, jnp.ones((1, 12, 12, 3)))


@pytest.mark.parametrize(
    "network",
    [
        lambda v, x, same: layout(x, v["kernel"], "HWIO" if same else "HWOI"),
        lambda v, x, same: convolve(x, v["kernel"]) * (v["scale"] if same else v["other"]),
        lambda v, x, same: convolve(x * (v["scale"] if same else v["other"]), v["kernel"]),
        lambda v, x, same: x + (lax.broadcast_in_dim(v["scale"], (4, 4), (0 if same else 1,)) + v["map"]),
        lambda v, x, same: x + jnp.transpose(v["cube"], (0, 2, 1) if same else (2, 1, 0)),
        lambda v, x, same: x + (jnp.sin if same else jnp.cos)(v["scale"]),
        lambda v, x, same: x + lax.integer_pow(v["scale"], 2 if same else 3),
        lambda v, x, same: x[..., :3] + (v["scale"][1:] if same else v["scale"][:-1]),
        lambda v, x, same: x + lax.sort((v["scale"], v["other"]), num_keys=1)[0 if same else 1],
        lambda v, x, same: x + lax.cumsum(v["scale"], reverse=same),
        lambda v, x, same: x * v["scale"] + (OUTSIDE if same else OUTSIDE[::-1]),
        lambda v, x, same: convolve(x, v["kernel"]) * (2.0 if same else 3.0),
        lambda v, x, same: x + (v["scale"] if same else -v["scale"]),
        lambda v, x, same: convolve(x, v["kernel"]) / v["scale"] if same else convolve(x, v["kernel"]) - v["scale"],
    ],
    ids=[
        "layout", "scale", "scale before", "axis", "transpose", "name", "power", "slice", "result", "parameter",
        "closed over", "number", "sign", "operation",
    ],
)  # fmt: skip
def test_another_function_of_the_same_variables_and_shapes_is_noticed(network):
    """Parameters are told apart by how they are computed, never by their shapes alone."""
    v = variables(kernel=(3, 3, 4, 4), scale=(4,), other=(4,), map=(4, 4), cube=(4, 4, 4))
    fused = reparameterize(lambda v, x: network(v, x, x.shape[0] == 1), v, jnp.ones((1, 4, 4, 4)))
    assert_equal(lambda v, x: network(v, x, True), fused, v, (1, 4, 4, 4))
    with pytest.raises(ValueError, match=OTHERS):
        fused(fused.params, jnp.ones((2, 4, 4, 4)))


def test_constants_serve_larger_batches_compiled_or_not():
    """A token that is tiled to the batch, a table of positions, and a function with a gradient of its own."""

    def network(v, x):
        token = jnp.broadcast_to(v["token"], (x.shape[0], 4)).reshape(x.shape[0], 1, 1, 4)
        blur = jnp.ones((3, 3, 1, 4)) / 9
        x = jnp.tanh(jnp.tanh(x) * jnp.arange(1.0, 5.0))
        scaled = x * jax.nn.relu(v["scale"]) + jnp.arange(4.0) + token
        return scaled + jnp.tanh(convolve(scaled, blur, feature_group_count=4) * v["scale"])

    v = variables(token=(4,), scale=(4,))
    fused = reparameterize(network, v, jnp.ones((2, 4, 4, 4)))
    assert sum(value.size for value in fused.params.values()) <= sum(np.prod(s) for s in [(4,), (4,), (3, 3, 1, 4)])
    for batch in (3, 6):
        assert_equal(network, fused, v, (batch, 4, 4, 4))
    x = random_images((5, 4, 4, 4))
    np.testing.assert_allclose(jax.jit(fused)(fused.params, x), network(v, x), atol=1e-12)


def test_a_function_that_needs_other_parameters_for_other_inputs_is_told_which():
    def network(v, x):
        y = convolve(x, v["first"])
        return y if x.shape[1] == 8 else convolve(jnp.tanh(y), v["second"])

    v = {"first": jnp.ones((3, 3, 2, 2)), "second": jnp.ones((3, 3, 2, 2))}
    fused = reparameterize(network, v, jnp.ones((1, 8, 8, 2)))
    for _ in range(2):  # the second time as the first
        with pytest.raises(
            ValueError, match=r"folds to other parameters than when it was reparameterized: convolution/kernel.1 \(3, 3"
        ):
            fused(fused.params, jnp.ones((1, 6, 6, 2)))


def test_means_over_the_image_stay_in_the_program_and_serve_all_sizes():
    def network(v, x):
        y = convolve(x, v["kernel"])
        return y * jax.nn.sigmoid(convolve(y.mean((1, 2), keepdims=True), v["gate"]))

    v = variables(kernel=(3, 3, 3, 4), gate=(1, 1, 4, 4))
    fused = reparameterize(network, v, jnp.ones((1, 8, 8, 3)))
    for shape in ((2, 8, 8, 3), (1, 13, 9, 3)):
        assert_equal(network, fused, v, shape)


def test_functions_of_symbolic_sizes_are_computed_when_the_program_runs():
    def network(v, x):
        y = convolve(x, v["kernel"])
        return y.mean((1, 2)) + jnp.arange(x.shape[1]).sum()

    v, images = variables(kernel=(3, 3, 3, 4)), random_images((2, 6, 5, 3))
    fused = reparameterize(network, v, images)
    batch, height, width = jax.export.symbolic_shape("b, h, w")
    exported = jax.export.export(jax.jit(lambda x: fused(fused.params, x)))(
        jax.ShapeDtypeStruct((batch, height, width, 3), images.dtype)
    )
    np.testing.assert_allclose(exported.call(images), network(v, images), atol=1e-12)
    divided = reparameterize(lambda v, x: convolve(x, v["kernel"]) / x.shape[1], v, images)
    with pytest.raises(ValueError, match=OTHERS):
        jax.export.export(jax.jit(lambda x: divided(divided.params, x)))(
            jax.ShapeDtypeStruct((batch, height, width, 3), images.dtype)
        )


@pytest.mark.parametrize(
    "network",
    [
        lambda v, x, number: jnp.tanh(x),
        lambda v, x, number: x / 2 + jnp.arange(4),
        lambda v, x, number: x // 2,
        lambda v, x, number: x * number,
    ],
    ids=["non-linearity", "division", "floor", "number"],
)
def test_inputs_of_one_shape_and_other_dtypes_are_computed_as_the_function_does(network):
    """Weak types, those of Python's numbers, give way to the others: 2.0 leaves bfloat16 what it is, float32(2) not."""
    v, values = {}, np.asarray([3, 4.5, -7, 300.3])
    fused = reparameterize(network, v, jnp.asarray(values, jnp.bfloat16), 2.5)
    dtypes = set()
    for dtype in (jnp.bfloat16, jnp.float32, jnp.int32, jnp.bfloat16):
        for number in (2.5, np.float32(2.5), np.asarray(2.5), 2, 2.5):
            x = jnp.asarray(values, dtype)
            expected, found = network(v, x, number), fused(fused.params, x, number)
            assert (found.dtype, found.weak_type) == (expected.dtype, expected.weak_type)
            np.testing.assert_array_equal(found, expected)
            dtypes.add(expected.dtype)
    assert len(dtypes) > 1


def test_a_dtype_for_which_a_variable_is_rounded_otherwise_is_refused():
    v = {"scale": jnp.asarray([0.3, 0.7], jnp.float32)}
    fused = reparameterize(lambda v, x: x * v["scale"], v, jnp.ones(2, jnp.float32))
    with pytest.raises(ValueError, match=rf"{OTHERS}: convolution/scale"):
        fused(fused.params, jnp.ones(2, jnp.float64))


def test_scales_that_are_all_ones_are_parameters_as_any_others():
    """A fresh norm scales by ones: what is merged is decided by shapes, or it would be another program after a step."""
    ones = {"first": jnp.ones(4), "second": jnp.ones(4), "single": jnp.ones(())}
    v = {"kernel": variables(kernel=(3, 3, 4, 4))["kernel"]}

    def network(v, x):
        before = convolve(x * v["first"], v["kernel"])  # a scale before, in the kernel
        beside = jnp.tanh(before + x * v["second"])
        return beside * v["single"], jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0))) * v["first"]

    images = random_images((2, 5, 6, 4))
    fused = reparameterize(network, v | ones, images)
    drawn = {name: jnp.asarray(np.random.default_rng(1).uniform(0.5, 1.5, one.shape)) for name, one in ones.items()}
    like = reparameterize(network, v | drawn, images)
    assert {name: value.shape for name, value in fused.params.items()} == {
        name: value.shape for name, value in like.params.items()
    }
    for batch in (images, random_images((1, 7, 6, 4))):
        np.testing.assert_allclose(fused(fused.params, batch)[0], network(v | ones, batch)[0], atol=1e-12)
        # The parameters of the one are parameters of the other.
        for found, expected in zip(fused(like.params, batch), network(v | drawn, batch), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-12)
    doubled = reparameterize(lambda v, x: x * v["first"], ones, images)
    assert [value.shape for value in doubled.params.values()] == [(1, 1, 1, 4)]
    np.testing.assert_array_equal(doubled({name: 2 * one for name, one in doubled.params.items()}, images), 2 * images)


def test_a_strong_type_for_a_weak_one_needs_no_other_parameters():
    v = {"scale": jnp.asarray(1.5)}  # of a Python number: weak
    weak, strong = jnp.full(3, 2.0), jnp.ones(3)
    assert weak.weak_type
    assert not strong.weak_type
    network = lambda v, x: jnp.tanh(x) * v["scale"]  # noqa: E731
    fused = reparameterize(network, v, weak)
    np.testing.assert_allclose(fused(fused.params, strong), network(v, strong), atol=1e-15)


def precisions(function, *arguments):
    equations = jax.make_jaxpr(function)(*arguments).eqns
    return [
        each.params["precision"] for each in equations if each.primitive.name in ("dot_general", "conv_general_dilated")
    ]


def test_another_precision_of_products_is_that_of_the_function():
    """Two forms are compared under "float32": an accelerator that rounded one of them would tell them apart."""
    v = variables(kernel=(3, 3, 4, 4), other=(3, 3, 4, 4), weights=(4, 5), mix=(4, 4))

    def network(v, x):
        # A product of variables is folded, and the same in every precision.
        y = convolve(x, v["kernel"] @ v["mix"]) + convolve(x, v["other"])
        return jnp.tanh(y) @ v["weights"]

    x = jnp.ones((1, 4, 4, 4))
    fused = reparameterize(network, v, x, ops="xla")
    default = precisions(fused, fused.params, x)
    with jax.default_matmul_precision("float32"):
        exact = precisions(fused, fused.params, x)
        assert exact == precisions(network, v, x)[-2:]
        assert_equal(network, fused, v, (1, 4, 4, 4))
    assert exact != default == precisions(fused, fused.params, x)


def test_another_width_of_numbers_is_that_of_the_function():
    v = {"scale": jnp.asarray([1.5, 2.5], jnp.float32)}
    network = lambda v, x: (jnp.arange(2) + x) * v["scale"]  # noqa: E731
    x = jnp.asarray([1, 2], jnp.int8)
    fused = reparameterize(network, v, x)
    for enabled in (True, False):
        with jax.enable_x64(enabled):
            found, expected = fused(fused.params, x), network(v, x)
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)
