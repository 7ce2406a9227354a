"""The parameters hold for inputs of other sizes, or the call is refused: never a wrong result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.trace import reparameterize
from tests.random_variables import random_images
from tests.trace.networks import convolve

pytestmark = pytest.mark.usefixtures("float64")
OTHERS = "folds to other parameters than when it was reparameterized"


def variables(**shapes):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


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
