"""Look-alikes, side by side: what becomes one convolution, and what must not, because another value would come out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from repvgg_jax.transform import reparameterize
from tests.random_variables import random_images
from tests.transform.merging.combinations import COMBINATIONS, SIZE, variables
from tests.transform.merging.comparison import primitives
from tests.transform.merging.networks import convolve

pytestmark = pytest.mark.usefixtures("float64")

# Of these one convolution is left, and a bias where there is a shift: no arithmetic besides.
WITHOUT_A_SHIFT = [
    "padded before", "a part, unpadded", "scaled before", "scaled before a transposed one", "scaled before groups",
    "scaled by one number before", "scaled by numbers of the program before", "the value twice beside",
    "another accumulator beside", "1×1, then 3×3", "3×3, then 1×1", "padded 1×1, then 3×3",
    "1×1, then 3×3 of stride 2, dilated", "dilated 3×3 of stride 2, then 1×1", "a residual sum, then 1×1",
    "branches, then 1×1", "3×3 + 1×1 that pads less", "1×1 + 3×3 below a 5×5", "2×2 at either end", "dilated alike",
    "two taps, of no dilation that counts", "dilated, and one tap", "dilated, and the value", "strides of 2",
    "strides of 2 that see the last pixel", "groups of two and of four", "groups and the value", "depthwise and full",
    "transposed alike", "a mean beside what it is taken of", "a negated branch", "a branch less another",
    "the gradient of two branches",
]  # fmt: skip
WITH_A_SHIFT = [
    "shifted before", "shifted before a cropping one", "shifted before groups", "a norm after groups of the batch",
    "shifted by one number before", "an affine sum", "one minus it", "two shifts and scales",
    "1×1 and shifts, then 3×3", "3×3 and shifts, then 1×1", "a norm after a transposed one",
]  # fmt: skip


@pytest.mark.parametrize("name", [*WITHOUT_A_SHIFT, *WITH_A_SHIFT])
def test_nothing_is_left_beside_the_convolution(name):
    x = jax.ShapeDtypeStruct((SIZE,) * 4, jnp.float64)
    fused = reparameterize(COMBINATIONS[name].network, variables(), x, ops="xla")
    left = primitives(fused, fused.params, x)
    expected = {"conv_general_dilated": 1} | ({"add": 1} if name in WITH_A_SHIFT else {})
    assert {each: left[each] for each in left.keys() - {"broadcast_in_dim", "reshape"}} == expected
    assert len(fused.params) == len(expected)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_what_is_merged_and_what_is_not(name):
    network, *expected = COMBINATIONS[name]
    x = jax.ShapeDtypeStruct((SIZE,) * 4, jnp.float64)
    found = [
        reparameterize(network, variables(), x, fewest_convolutions=asked, ops="xla").totals["convolutions"].after
        for asked in (False, True)
    ]
    assert found == expected


def differing(expected, found):
    """The names of results that are not equal up to rounding."""

    def differs(a, b):
        return a.shape != b.shape or float(jnp.abs(a - b).max()) > 1e-12 * max(1.0, float(jnp.abs(a).max()))

    return [name for name, value in expected.items() if differs(value, found[name])]


def test_every_combination_keeps_its_function():
    """Compiled in one program."""

    def every(v, x):
        return {name: each.network(v, x) for name, each in COMBINATIONS.items()}

    v, x = variables(), random_images((SIZE,) * 4)
    forms = [reparameterize(every, v, x, fewest_convolutions=asked, ops="xla") for asked in (False, True)]
    expected, cheapest, fewest = jax.jit(lambda x: [every(v, x), *(form(form.params, x) for form in forms)])(x)
    assert differing(expected, cheapest) == []
    assert differing(expected, fewest) == []
    nearly = {name: value * (1 + 1e-9) for name, value in expected.items()}
    assert differing(expected, nearly) == sorted(COMBINATIONS)


def test_a_pad_by_a_variable_is_no_pad_by_zero_whatever_it_holds():
    v = {"edge": jnp.zeros(()), "kernel": jnp.ones((3, 3, 4, 4))}

    def network(v, x):
        return convolve(lax.pad(x, v["edge"], [(0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)]), v["kernel"], "VALID")

    x = jax.ShapeDtypeStruct((SIZE,) * 4, jnp.float64)
    fused = reparameterize(network, v, x, ops="xla")
    assert sorted(value.shape for value in fused.params.values()) == [(), (3, 3, 4, 4)]
    assert primitives(fused, fused.params, jax.ShapeDtypeStruct((1, 5, 4, 4), jnp.float64))["pad"] == 1


def test_a_result_of_another_dtype_than_the_source_is_scaled_in_its_own():
    """In bfloat16 the scaled kernel would be rounded once more."""
    rng = np.random.default_rng(0)
    narrow = jnp.asarray(rng.normal(size=(1, 3, 3, 2)), jnp.bfloat16)
    v = {"kernel": jnp.asarray(rng.normal(size=(1, 1, 2, 2)), jnp.bfloat16), "scale": jnp.asarray([1.1, 2.3])}
    network = lambda v, x: convolve(x, v["kernel"], preferred_element_type=jnp.float64) * v["scale"]  # noqa: E731
    fused = reparameterize(network, v, narrow, ops="xla")
    assert {value.dtype for value in fused.params.values()} == {jnp.dtype("bfloat16"), jnp.dtype("float64")}
    np.testing.assert_allclose(fused(fused.params, narrow), network(v, narrow), rtol=1e-12)
