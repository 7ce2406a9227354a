"""What a lowering says it supports, and how it reads a window in which no two numbers are alike."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.ops.choose import LOWERINGS
from repvgg_jax.ops.lowerings import im2col, space_to_depth, winograd
from repvgg_jax.ops.lowerings.base import Window
from tests.ops.test_convolution import assert_close, by_lowering, problem, truth

ONE = ((1, 1), (1, 1))
NONE = ((0, 0), (0, 0))


def test_output_sizes_and_the_way_back_keep_low_and_high_apart():
    window = Window((1, 1), ((0, 2), (1, 0)), 4)
    assert window.output_size((2, 8, 9, 4), (3, 2, 1, 4)) == (8, 9)
    assert window.backwards((3, 2, 1, 4)) == Window((1, 1), ((2, 0), (0, 1)), 4)
    assert window._replace(strides=(2, 3)).output_size((2, 8, 10, 4), (3, 2, 1, 4)) == (4, 4)
    for strides in ((2, 1), (1, 2)):
        assert window._replace(strides=strides).backwards((3, 2, 1, 4)) is None
    for padding in (((3, 0), (0, 0)), ((0, 3), (0, 0)), ((0, 0), (2, 0)), ((0, 0), (0, 2))):
        assert Window(padding=padding).backwards((3, 2, 1, 4)) is None, "more padding than the taps reach"


# Where all numbers differ, no mistaken order of rows and columns, low and high, or in and out goes unnoticed.
LOPSIDED = {
    "plain": ((2, 6, 9, 4), (3, 2, 2, 6), Window((2, 1), ((0, 2), (1, 0)), 2)),
    "depthwise": ((2, 6, 9, 4), (3, 2, 1, 8), Window((2, 1), ((0, 2), (1, 0)), 4)),
    "depthwise, stride 1": ((2, 6, 9, 4), (3, 2, 1, 4), Window((1, 1), ((0, 2), (1, 0)), 4)),
    "pointwise": ((2, 6, 9, 4), (1, 1, 4, 6), Window((2, 3))),
    "im2col": ((2, 6, 9, 4), (3, 2, 4, 6), Window((2, 1), ((0, 2), (1, 0)))),
    "im2col, stride 1": ((2, 6, 9, 4), (3, 2, 4, 6), Window((1, 1), ((0, 2), (1, 0)))),
    "winograd_f2": ((2, 6, 9, 4), (3, 3, 4, 6), Window((1, 1), ((0, 2), (1, 0)))),
    "winograd_f4": ((2, 6, 9, 4), (3, 3, 4, 6), Window((1, 1), ((0, 2), (1, 0)))),
    "winograd_f4, one tile": ((2, 4, 3, 4), (3, 3, 4, 6), Window((1, 1), ((0, 2), (1, 0)))),
    "space_to_depth": ((2, 6, 9, 3), (3, 3, 3, 6), Window((2, 2), ((0, 2), (1, 0)))),
    "block_diagonal": ((2, 6, 9, 4), (3, 2, 2, 6), Window((2, 1), ((0, 2), (1, 0)), 2)),
}


@pytest.mark.parametrize("case", LOPSIDED)
def test_rows_and_columns_low_and_high_are_not_confused(case):
    lowering = LOWERINGS[case.split(",")[0]]
    assert lowering.supports(*LOPSIDED[case])
    arrays = problem(*LOPSIDED[case])
    assert_close(by_lowering(lowering, *arrays, LOPSIDED[case][2]), truth(*arrays, LOPSIDED[case][2]))


STRIDED = ("plain", "depthwise", "im2col", "space_to_depth", "block_diagonal")


@pytest.mark.parametrize("padding", [(1, 1), (0, 1), (1, 0)], ids=["PyTorch's", "SAME", "mirrored"])
@pytest.mark.parametrize("name", STRIDED)
def test_at_stride_2_on_even_and_odd_sizes_padding_lies_on_its_side(name, padding):
    """One image of 8×7 pixels, of which `padding="SAME"` pads rows at the bottom alone, and columns on both sides."""
    channels = 2
    window = Window((2, 2), (padding, (1, 1)), {"depthwise": 2, "block_diagonal": 2}.get(name, 1))
    shapes = (1, 8, 7, channels), (3, 3, channels // window.groups, 2)
    arrays = problem(*shapes, window)
    found = LOWERINGS[name].forward(arrays[0], arrays[1], window)
    assert_close([found], truth(*arrays, window)[:1])
    if padding != (1, 1):  # Negative control: of the same shape, and another function.
        other = window._replace(padding=(padding[::-1], (1, 1)))
        assert np.abs(found - truth(*arrays, other)[0]).max() > 0.1


MAP, THREE = (1, 8, 8, 4), (3, 3, 4, 8)
SUPPORTS = {
    "plain": [(MAP, THREE, Window(), True)],
    "depthwise": [
        (MAP, (3, 3, 1, 4), Window(groups=4), True),
        (MAP, (3, 3, 1, 8), Window((2, 2), ONE, 4), True),
        (MAP, (7, 7, 1, 4), Window(groups=4), True),
        (MAP, (8, 7, 1, 4), Window(groups=4), False),
        (MAP, (3, 3, 2, 4), Window(groups=2), False),
        ((1, 8, 8, 1), (3, 3, 1, 4), Window(), False),
        ((1, 2, 8, 4), (3, 3, 1, 4), Window(groups=4), False),
        ((1, 8, 2, 4), (3, 3, 1, 4), Window(groups=4), False),
    ],
    "pointwise": [
        (MAP, (1, 1, 4, 8), Window((2, 2)), True),
        (MAP, (1, 1, 2, 8), Window(groups=2), True),
        (MAP, (1, 1, 4, 8), Window(padding=((0, 0), (0, 1))), False),
        (MAP, (1, 2, 4, 8), Window(), False),
        (MAP, (2, 1, 4, 8), Window(), False),
    ],
    "im2col": [
        (MAP, THREE, Window((2, 2), ONE), True),
        (MAP, (3, 3, 2, 8), Window(groups=2), True),
        (MAP, (5, 2, 4, 8), Window(), True),
        ((1, 2, 8, 4), THREE, Window(), False),
        ((1, 8, 2, 4), THREE, Window(), False),
        ((1, 1, 8, 4), (1, 1, 4, 8), Window((2, 1), ((1, 0), (0, 0))), False),  # it reads the padding alone
    ],
    "space_to_depth": [
        (MAP, THREE, Window((2, 2), ONE), True),
        ((1, 8, 8, 5), (3, 3, 5, 8), Window((2, 2), ONE), False),
        (MAP, THREE, Window((2, 1), ONE), False),
        (MAP, THREE, Window((1, 2), ONE), False),
        (MAP, (3, 3, 2, 8), Window((2, 2), ONE, 2), False),
        (MAP, (3, 2, 4, 8), Window((2, 2), ONE), False),
        ((1, 2, 8, 4), THREE, Window((2, 2)), False),
    ],
    "block_diagonal": [
        (MAP, (3, 3, 2, 8), Window(groups=2), True),
        (MAP, THREE, Window(), False),
    ],
}  # fmt: skip
WINOGRAD = [
    (MAP, THREE, Window(padding=ONE), True),
    (MAP, THREE, Window(padding=((2, 2), (2, 2))), True),
    (MAP, (3, 3, 2, 8), Window(padding=ONE, groups=2), True),
    *[(MAP, THREE, Window(padding=padding), False) for padding in (((3, 0), (0, 0)), ((0, 3), (0, 0)))],
    *[(MAP, THREE, Window(padding=padding), False) for padding in (((0, 0), (3, 0)), ((0, 0), (0, 3)))],
    *[(MAP, THREE, Window(strides, ONE), False) for strides in ((2, 1), (1, 2), (2, 2))],
    *[(MAP, (*side, 4, 8), Window(padding=ONE), False) for side in ((1, 1), (3, 1), (1, 3), (5, 5))],
    ((1, 2, 8, 4), THREE, Window(), False),
    ((1, 8, 2, 4), THREE, Window(), False),
]


@pytest.mark.parametrize("name", LOWERINGS)
def test_a_lowering_supports_what_it_says_and_no_more(name):
    for *case, expected in WINOGRAD if "winograd" in name else SUPPORTS[name]:
        assert LOWERINGS[name].supports(*case) is expected, case


@pytest.mark.parametrize("name", LOWERINGS)
def test_a_lowering_promotes_no_ranks(name):
    lowering = LOWERINGS[name]
    for image, kernel, window, expected in WINOGRAD if "winograd" in name else SUPPORTS[name]:
        if not expected:
            continue
        x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (image, kernel))
        with jax.numpy_rank_promotion("raise"):
            dy = jax.eval_shape(partial(lowering.forward, window=window), x, w)
            jax.eval_shape(partial(lowering.input_gradient, window=window, input_shape=image), dy, w)
            jax.eval_shape(partial(lowering.kernel_gradient, window=window, kernel_shape=kernel), x, dy)


@pytest.mark.parametrize("lowering", [winograd.f2, im2col.lowering, space_to_depth.lowering])
def test_a_lowering_of_one_group_supports_one_group(lowering):
    assert not lowering.supports(MAP, (3, 3, 2, 8), Window((2, 2), ONE, 2))
    assert not lowering.supports(MAP, (3, 3, 2, 8), Window((1, 1), ONE, 2))


@pytest.mark.parametrize(
    ("axis", "live"),
    [
        ((1, 1, 3, 1, (1, 1)), range(1, 2)),
        ((2, 2, 3, 1, (1, 1)), range(0, 3)),
        ((2, 1, 3, 2, (1, 1)), range(1, 3)),
        ((1, 1, 3, 1, (2, 0)), range(2, 3)),
        ((1, 1, 3, 1, (0, 2)), range(0, 1)),
        ((3, 1, 5, 1, (0, 2)), range(0, 3)),
        ((1, 1, 1, 1, (1, 0)), range(0)),
    ],
)
def test_taps_that_meet_nothing_but_padding_are_left_out(axis, live):
    """Of (pixels, outputs, taps, stride, padding)."""
    assert im2col._live_taps(*axis) == live


def test_winograd_of_four_by_four_has_six_points_along_an_axis_and_of_two_by_two_four():
    x, kernel = jax.ShapeDtypeStruct((1, 16, 16, 5), jnp.float32), jax.ShapeDtypeStruct((3, 3, 5, 7), jnp.float32)
    for lowering, points in ((winograd.f2, 4), (winograd.f4, 6)):
        program = jax.make_jaxpr(partial(lowering.forward, window=Window(padding=ONE)))(x, kernel)
        assert f"f32[{points},{points},5,7]" in str(program)
    matrices = winograd._axis(16, (1, 1), 4)
    assert (matrices.into.shape, matrices.kernel.shape, matrices.out.shape) == ((6, 6), (6, 3), (4, 6))
    for size, points in ((1, 1), (2, 3)):  # maps so small have products of their own
        assert winograd._axis(size, (1, 1), 4).into.shape == (points, size)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_cells_have_channels_in_multiples_of_eight(channels):
    x = jax.ShapeDtypeStruct((1, 9, 8, channels), jnp.bfloat16)
    cells = jax.eval_shape(lambda x: space_to_depth._image_cells(x, Window((2, 2), ONE), (5, 4)), x)
    assert cells.shape == (1, 6, 5, 8 if channels <= 2 else 16)
