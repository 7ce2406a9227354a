"""Each branch is a kernel of the size of the caller's: what it computes, a plain convolution with that kernel does."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.transform import Average, Chain, Conv, Identity, Kernel, expand
from tests.random_variables import random_images

pytestmark = pytest.mark.usefixtures("float64")

ALL = (
    Kernel(),
    Conv(),
    Conv(1),
    Conv(2),
    Conv((None, 1)),
    Conv((1, None)),
    Conv(2, dilation=2),
    Identity(),
    Chain(Conv()),
    Chain(Conv(1)),
    Chain(Average()),
)


def convolution(numbers=("NHWC", "HWIO", "NHWC"), **settings):
    settings = {"window_strides": (1, 1), "padding": "SAME", **settings}
    return lambda variables, x: jax.lax.conv_general_dilated(
        x, variables["kernel"], dimension_numbers=numbers, **settings
    )


SETTINGS = {
    "same": {},
    "valid": {"padding": "VALID"},
    "uneven padding": {"padding": ((3, 0), (1, 2))},
    "cropped": {"padding": ((-1, 2), (1, -2))},
    "strided, even": {"window_strides": (2, 2)},
    "strided, odd": {"window_strides": (3, 2), "padding": ((1, 1), (1, 1))},
    "dilated": {"rhs_dilation": (2, 3)},
    "transposed": {"lhs_dilation": (2, 3), "padding": ((2, 1), (1, 2))},
    "strided and transposed": {"lhs_dilation": (2, 2), "window_strides": (3, 1), "padding": ((1, 1), (2, 2))},
    "grouped": {"feature_group_count": 2},
    "depthwise": {"feature_group_count": 4},
}


def expanded(function, kernel, images, branches, seed=0, **options):
    """Branches with parameters and state at random, and the state after a step of evaluation."""
    wide = expand(function, {"kernel": kernel}, images, branches=branches, **options)
    rng = np.random.default_rng(seed)
    params, state = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 2, leaf.shape)), (wide.params, wide.state))
    return wide, params, state


@pytest.mark.parametrize(
    ("setting", "size"),
    [*((setting, (3, 3)) for setting in SETTINGS), ("same", (4, 2)), ("dilated", (5, 3)), ("transposed", (4, 3))],
    ids=str,
)
def test_branches_are_parts_of_the_kernel(setting, size):
    settings = SETTINGS[setting]
    groups = settings.get("feature_group_count", 1)
    kernel, images = random_images((*size, 4 // groups, 4)), random_images((2, 10, 9, 4))
    function = convolution(**settings)
    wide, params, state = expanded(function, kernel, images, ALL)

    @jax.jit
    def both(params, state):
        """With branches and collapsed: results, and gradients of the parameters."""
        apart = lambda params: wide(params, state, images, train=False)[0]  # noqa: E731
        merged = lambda params: function(wide.collapse(params, state), images)  # noqa: E731
        slopes = [jax.grad(lambda params, way=way: (way(params) ** 2).sum())(params) for way in (apart, merged)]
        return apart(params), merged(params), *slopes

    found, expected, slope, other = both(params, state)
    np.testing.assert_allclose(found, expected, atol=1e-12 * float(abs(found).max()))
    for one, two in zip(*map(jax.tree.leaves, (slope, other)), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-11 * float(abs(two).max() + 1))

    merged, names = wide.collapse(params, state)["kernel"], sorted(params["branches"]["kernel"])
    for name in names:  # each has its share
        less = {**params["branches"]["kernel"], name: jax.tree.map(jnp.zeros_like, params["branches"]["kernel"][name])}
        without = wide.collapse({**params, "branches": {"kernel": less}}, state)["kernel"]
        assert float(abs(merged - without).max()) > 1e-3, name
    strides = setting.startswith(("strided", "transposed"))
    assert ("identity" in names) == (not strides)
    assert any("average" in name for name in names) == (setting != "cropped")
    height, width = size
    whole = f"{height}x{width}"
    expected = {"kernel", whole, "1x1", f"{height}x1", f"1x{width}", f"1x1_{whole}/{whole}", "1x1_1x1/1x1", "2x2"}
    assert set(names) >= expected - ({"2x2"} if size == (2, 2) else set())
    assert ("2x2_dilated_2" in names) == (min(size) >= 3)


@pytest.mark.parametrize(
    "numbers", [("NCHW", "OIHW", "NCHW"), ("NCHW", "HWIO", "NHWC"), ("HWNC", "OHWI", "CHNW")], ids=str
)
def test_any_layout_is_read(numbers):
    sizes = dict(zip("NHWC", (2, 8, 7, 4), strict=True))
    images = random_images([sizes[axis] for axis in numbers[0]])
    kernel = random_images([{"H": 3, "W": 5, "I": 4, "O": 4}[axis] for axis in numbers[1]])
    function = convolution(numbers)
    branches = (Kernel(), Conv(1), Conv((None, 1)), Identity(), Chain(Conv()), Chain(Average()))
    wide, params, state = expanded(function, kernel, images, branches)
    found, _ = wide(params, state, images, train=False)
    expected = function(wide.collapse(params, state), images)
    np.testing.assert_allclose(found, expected, atol=1e-12 * float(abs(found).max()))
    # In training each channel is scaled by its own variance.
    _, after = wide(params, state, images, train=True)
    y = function({"kernel": params["variables"]["kernel"]}, images)
    channel = numbers[2].index("C")
    expected = 0.9 * state["kernel"]["kernel"]["var"] + 0.1 * y.var([axis for axis in range(4) if axis != channel])
    np.testing.assert_allclose(after["kernel"]["kernel"]["var"], expected, rtol=1e-12)


@pytest.mark.parametrize("spatial", [1, 3])
def test_lines_and_volumes_have_the_same_branches(spatial):
    images = random_images((2, *(6, 7, 5)[:spatial], 4))
    kernel = random_images((*(3, 3, 3)[:spatial], 4, 4))
    axes = "DHW"[:spatial]
    function = convolution(
        (f"N{axes}C", f"{axes}IO", f"N{axes}C"), window_strides=(1,) * spatial, padding=((1, 1),) * spatial
    )
    branches = (Kernel(), Conv(1), Conv((None, 1, 1)), Identity(), Chain(Conv()), Chain(Average()))
    wide, params, state = expanded(function, kernel, images, branches)
    found, _ = wide(params, state, images, train=False)
    expected = function(wide.collapse(params, state), images)
    np.testing.assert_allclose(found, expected, atol=1e-12 * float(abs(found).max()))
    assert ("3x1x1" in wide.params["branches"]["kernel"]) == (spatial == 3)


def test_several_copies_have_names_and_kernels_of_their_own():
    wide = expand(convolution(), {"kernel": random_images((3, 3, 4, 4))}, random_images((2, 6, 6, 4)), branches=(
        Kernel(), Conv(), Conv(), Conv(1), Chain(Conv()), Chain(Conv()),
    ))  # fmt: skip
    branches = wide.params["branches"]["kernel"]
    assert list(branches) == [
        "kernel", "3x3", "3x3_2", "1x1", "1x1_3x3/1x1", "1x1_3x3/3x3", "1x1_3x3_2/1x1", "1x1_3x3_2/3x3",
    ]  # fmt: skip
    kernels = [branches[name]["kernel"] for name in ("3x3", "3x3_2", "1x1_3x3/3x3", "1x1_3x3_2/3x3")]
    for one, other in itertools.combinations(kernels, 2):
        assert float(abs(one - other).max()) > 0.1
    # As He et al. draw them: a variance of 2 over the fan-in.
    assert math.isclose(np.mean([kernel.var() for kernel in kernels]), 2 / 36, rel_tol=0.15)
    np.testing.assert_array_equal(branches["1x1_3x3/1x1"]["kernel"][0, 0], np.eye(4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Conv(0), "size is 0: expected positive numbers of taps"),
        (lambda: Conv((3, -1)), r"size is \(3, -1\): expected positive"),
        (lambda: Conv(3, dilation=0), "dilation is 0: expected at least 1"),
        (lambda: Chain(Identity()), r"last is Identity\(gain=1.0\): expected a Conv or an Average"),
    ],
)
def test_a_branch_that_cannot_be_is_refused_where_it_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()
