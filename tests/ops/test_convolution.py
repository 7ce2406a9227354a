"""Every lowering computes the convolution, its input gradient and its kernel gradient, within 2e-5."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax

from repvgg_jax.ops import conv_general_dilated, inference_on
from repvgg_jax.ops.choose import LOWERINGS, choose
from repvgg_jax.ops.lowerings import grouped, pointwise
from repvgg_jax.ops.lowerings.base import Window

SIZES = (1, 2, 3, 4, 5, 7, 8, 13, 16, 32)
FEW_SIZES = (1, 2, 3, 5, 8)  # below one tile of Winograd's, and with and without a remainder
TOLERANCE = 2e-5
ONE = ((1, 1), (1, 1))
NONE = ((0, 0), (0, 0))


def problem(input_shape, kernel_shape, window, seed=0):
    """Float32 x, kernel and dy; mean and scale away from 0 and 1, so that nothing cancels by luck."""
    random = np.random.default_rng(seed)
    x = random.normal(0.5, 2, input_shape)
    kernel = random.normal(0.1, 1, kernel_shape)
    dy = random.normal(-0.5, 1, (input_shape[0], *window.output_size(input_shape, kernel_shape), kernel_shape[-1]))
    return [array.astype(np.float32) for array in (x, kernel, dy)]


def truth(x, kernel, dy, window):
    """y, dx and dkernel in float64, tap by tap, in NumPy: no compiler involved."""
    x, kernel, dy = (array.astype(np.float64) for array in (x, kernel, dy))
    (rows, columns), (down, across) = dy.shape[1:3], window.strides
    (top, bottom), (left, right) = window.padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    y, dpadded, dkernel = np.zeros_like(dy), np.zeros_like(padded), np.zeros_like(kernel)
    inside, out = kernel.shape[2], kernel.shape[3] // window.groups
    for i, j, group in np.ndindex(*kernel.shape[:2], window.groups):
        seen = np.s_[
            :,
            i : i + (rows - 1) * down + 1 : down,
            j : j + (columns - 1) * across + 1 : across,
            group * inside : (group + 1) * inside,
        ]
        made = np.s_[..., group * out : (group + 1) * out]
        y[made] += padded[seen] @ kernel[i, j][made]
        dpadded[seen] += dy[made] @ kernel[i, j][made].T
        dkernel[i, j][made] = np.tensordot(padded[seen], dy[made], ((0, 1, 2), (0, 1, 2)))
    return [y, dpadded[:, top : top + x.shape[1], left : left + x.shape[2]], dkernel]


def by_lowering(lowering, x, kernel, dy, window):
    @jax.jit
    def run(x, kernel, dy):
        return (
            lowering.forward(x, kernel, window),
            lowering.input_gradient(dy, kernel, window, x.shape),
            lowering.kernel_gradient(x, dy, window, kernel.shape),
        )

    return run(x, kernel, dy)


def as_chosen(x, kernel, dy, window, **options):
    @jax.jit
    def run(x, kernel, dy):
        convolve = partial(
            conv_general_dilated,
            window_strides=window.strides,
            padding=window.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=window.groups,
            **options,
        )
        y, transpose = jax.vjp(convolve, x, kernel)
        return y, *transpose(dy)

    return run(x, kernel, dy)


def errors(found, expected):
    """The largest errors of y, dx and dkernel, relative to the largest entries."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == jnp.float32
    return [
        np.abs(np.asarray(ours, np.float64) - theirs).max() / max(np.abs(theirs).max(), 1e-30)
        for ours, theirs in zip(found, expected, strict=True)
    ]


def assert_close(found, expected):
    assert max(errors(found, expected)) < TOLERANCE, errors(found, expected)


@st.composite
def problems(draw, sides=(1, 3), strides=(1, 2), groups=(1, 1, 1, 2), unpadded=False):
    """(input_shape, kernel_shape, window), non-empty output, groups that divide."""
    side, count = draw(st.sampled_from(sides)), draw(st.sampled_from(groups))
    steps = st.sampled_from(strides)
    amounts = st.tuples(st.integers(0, 2), st.integers(0, 2))
    usual = st.just(ONE if side == 3 else NONE)
    padding = draw(usual if unpadded else st.one_of(usual, st.tuples(amounts, amounts)))
    window = Window((draw(steps), draw(steps)), padding, count)
    inside, out = (draw(st.sampled_from([n for n in (2, 4, 16, 24, 32) if n % count == 0])) for _ in range(2))
    size = draw(st.tuples(st.sampled_from(SIZES), st.sampled_from(SIZES)))
    input_shape = (draw(st.integers(1, 3)), *size, inside)
    kernel_shape = (side, side, inside // count, out)
    assume(min(window.output_size(input_shape, kernel_shape)) > 0)
    return input_shape, kernel_shape, window


@st.composite
def depthwise_problems(draw):
    """(input_shape, kernel_shape, window) of one group per channel, with several outputs a channel now and then."""
    channels, multiplier = draw(st.integers(2, 9)), draw(st.sampled_from((1, 1, 2, 3)))
    taps = draw(st.tuples(*[st.sampled_from((1, 2, 3, 5, 7))] * 2))
    padding = draw(st.tuples(*[st.tuples(st.integers(0, 4), st.integers(0, 4))] * 2))
    window = Window(draw(st.tuples(st.integers(1, 3), st.integers(1, 3))), padding, channels)
    input_shape = (draw(st.integers(1, 3)), *draw(st.tuples(st.integers(1, 9), st.integers(1, 9))), channels)
    kernel_shape = (*taps, 1, channels * multiplier)
    assume(min(window.output_size(input_shape, kernel_shape)) > 0)
    return input_shape, kernel_shape, window


SUPPORTED = {
    "plain": problems(),
    "depthwise": depthwise_problems(),
    "pointwise": problems(sides=(1,), groups=(1,), unpadded=True),
    "im2col": problems(groups=(1, 2, 16)),
    "winograd_f2": problems(sides=(3,), strides=(1,), groups=(1, 2)),
    "winograd_f4": problems(sides=(3,), strides=(1,), groups=(1, 2, 16)),
    "space_to_depth": problems(sides=(3,), strides=(2,), groups=(1,)),
    "block_diagonal": problems(groups=(2,)),
}


@pytest.mark.parametrize(
    ("input_shape", "kernel_shape", "window"),
    [
        ((2, 8, 8, 4), (3, 3, 4, 6), Window((1, 1), ONE)),
        ((2, 7, 8, 4), (3, 3, 2, 6), Window((2, 1), ((1, 2), (0, 1)), 2)),
        ((2, 5, 5, 4), (1, 1, 4, 6), Window((2, 2))),
    ],
)
def test_the_truth_is_that_of_lax_in_float64(input_shape, kernel_shape, window):
    with jax.enable_x64(True):
        arrays = [array.astype(np.float64) for array in problem(input_shape, kernel_shape, window)]
        convolve = partial(
            lax.conv_general_dilated,
            window_strides=window.strides,
            padding=window.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=window.groups,
        )
        y, transpose = jax.vjp(convolve, *arrays[:2])
        for ours, theirs in zip(truth(*arrays, window), (y, *transpose(arrays[2])), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in LOWERINGS if name != "plain"])
@pytest.mark.parametrize("size", [n if n in FEW_SIZES else pytest.param(n, marks=pytest.mark.long) for n in SIZES])
def test_every_lowering_is_the_convolution_on_every_map_size(name, size):
    """Compiled in one program."""
    cases = []
    for side, stride, (channels, groups) in itertools.product((1, 3), (1, 2), ((3, 1), (16, 4), (16, 16))):
        window = Window((stride, stride), ONE if side == 3 else NONE, groups)
        shapes = (2, size, size, channels), (side, side, channels // groups, 16)
        if LOWERINGS[name].supports(*shapes, window):
            cases.append((*problem(*shapes, window), window))
    assert cases

    @jax.jit
    def run(arrays):
        return [by_lowering(LOWERINGS[name], *each, case[3]) for each, case in zip(arrays, cases, strict=True)]

    for case, found in zip(cases, run([case[:3] for case in cases]), strict=True):
        assert_close(found, truth(*case))


@pytest.mark.parametrize("name", LOWERINGS)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.data())
def test_every_lowering_is_the_convolution_wherever_it_says_it_is(name, data):
    case = data.draw(SUPPORTED[name])
    assume(LOWERINGS[name].supports(*case))
    arrays = problem(*case)
    assert_close(by_lowering(LOWERINGS[name], *arrays, case[2]), truth(*arrays, case[2]))


@settings(max_examples=16, deadline=None, derandomize=True)
@given(problems())
def test_the_public_function_is_the_convolution(case):
    arrays = problem(*case)
    assert_close(as_chosen(*arrays, case[2]), truth(*arrays, case[2]))


@pytest.mark.parametrize("name", [name for name in LOWERINGS if name != "pointwise"])
def test_the_same_check_fails_on_a_padding_that_is_off_by_one(name):
    """`((0, 2), (0, 2))` keeps every shape, and is the bug of `padding="SAME"` at stride 2."""
    stride, channels = (2, 4) if name == "space_to_depth" else (1, 16)
    window = Window((stride, stride), ONE, {"block_diagonal": 2, "depthwise": 16}.get(name, 1))
    shapes = (2, 8, 8, channels), (3, 3, channels // window.groups, 16)
    arrays = problem(*shapes, window)
    shifted = window._replace(padding=((0, 2), (0, 2)))
    assert LOWERINGS[name].supports(*shapes, shifted)
    found = by_lowering(LOWERINGS[name], *arrays, shifted)
    assert min(errors(found, truth(*arrays, window))) > 0.1
    assert_close(found, truth(*arrays, shifted))


@pytest.mark.parametrize("groups", [2, 8, 9, 32, 1024])
@pytest.mark.parametrize("within", [1, 2])
def test_the_program_does_not_grow_with_the_groups(groups, within):
    """By its size, which compilation takes its time from; depthwise, and with two channels a group."""
    window, channels = Window(padding=ONE, groups=groups), groups * within
    arrays = problem((1, 2, 2, channels), (3, 3, within, channels), window)
    convolve = partial(
        conv_general_dilated,
        window_strides=(1, 1),
        padding=ONE,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )

    def run(x, kernel, dy):
        y, transpose = jax.vjp(convolve, x, kernel)
        return y, *transpose(dy)

    lowered = jax.jit(run).lower(*arrays)
    assert len(lowered.as_text().splitlines()) < 2000
    assert_close(lowered.compile()(*arrays), truth(*arrays, window))


def test_the_same_measure_sees_groups_that_are_unrolled(monkeypatch):
    monkeypatch.setattr(grouped, "FEW_GROUPS", 1024)
    with pytest.raises(AssertionError):
        test_the_program_does_not_grow_with_the_groups(64, 2)


@pytest.mark.parametrize("groups", [2, 4, 9, 32, 64])
@pytest.mark.parametrize("within", [1, 4, 16])
@pytest.mark.parametrize("size", [1, 2, 7, 14])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("batch", [1, 64])
def test_no_kernel_gradient_of_a_grouped_convolution_is_xlas_own(groups, within, size, stride, batch):
    """Which takes a hundred times as long on CPU."""
    channels = groups * within
    window = Window((stride, stride), ONE, groups)
    chosen = choose((batch, size, size, channels), (3, 3, within, channels), window)["cpu"]
    assert chosen.kernel_gradient.name != "plain"
    assert (chosen.forward.name == "depthwise") == (within == 1)


@pytest.mark.parametrize("shape", [(9, 9, 1, 4), (31, 31, 1, 4), (5, 5, 2, 4)])
def test_large_kernels_are_plain(shape):
    """Im2col would copy the image once a tap."""
    groups = 4 // shape[2]
    window = Window(padding=((shape[0] // 2,) * 2,) * 2, groups=groups)
    assert set(choose((1, 32, 32, 4), shape, window)["cpu"].names) == {"plain"}


@pytest.mark.parametrize("walled", [True, False])
def test_a_mean_over_windows_is_never_computed_in_one_with_the_product_before_it(walled, monkeypatch):
    """Where the windows leave a row out, jaxlib 0.10.1 writes outside of its memory then: seen, so only compiled."""
    if not walled:
        monkeypatch.setattr(pointwise, "materialize", lambda x: x)

    def pooled(x, kernel):
        y = LOWERINGS["pointwise"].forward(x, kernel, Window())
        return lax.reduce_window(y, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 19, 19, 256), (1, 1, 256, 128))]
    computations = jax.jit(pooled).lower(*shapes).compile().as_text().split("\n\n")
    means = [text for text in computations if "reduce-window(" in text]
    assert means
    # Without the wall it depends on the version; with it, never.
    assert not (walled and any(" dot(" in text and "ENTRY" not in text for text in means))
    if not walled and jax.__version_info__[:2] == (0, 10):
        assert any(" dot(" in text for text in means)


def test_winograd_at_realistic_width_stays_within_2e_5():
    window = Window(padding=ONE)
    for name in ("winograd_f2", "winograd_f4"):
        arrays = problem((8, 8, 8, 192), (3, 3, 192, 192), window)
        assert_close(by_lowering(LOWERINGS[name], *arrays, window), truth(*arrays, window))


@pytest.mark.parametrize("exact", [{"precision": "highest"}, {"precision": (lax.Precision.HIGHEST,) * 2}])
def test_highest_precision_never_takes_winograd(exact):
    window = Window(padding=ONE)
    shapes = (8, 8, 8, 80), (3, 3, 80, 80)
    assert any("winograd" in name for name in choose(*shapes, window)["cpu"].names)
    arrays = problem(*shapes, window)
    expected = truth(*arrays, window)
    assert max(errors(as_chosen(*arrays, window, **exact), expected)) < 1e-6
    with jax.default_matmul_precision("float32"):
        assert max(errors(as_chosen(*arrays, window), expected)) < 1e-6
    assert max(errors(as_chosen(*arrays, window), expected)) > 1e-6


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_other_dtypes_are_plain_convolutions(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        x, kernel = jnp.ones((2, 8, 8, 16), dtype), jnp.ones((3, 3, 16, 16), dtype)
        found = conv_general_dilated(x, kernel, (1, 1), ONE, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        expected = lax.conv_general_dilated(x, kernel, (1, 1), ONE, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)


def test_kernels_transformed_ahead_of_time_make_winograd_worth_its_while_on_fewer_pixels():
    shapes, window = ((1, 14, 14, 192), (3, 3, 192, 192)), Window(padding=ONE)
    assert choose(*shapes, window)["cpu"].forward.name == "plain"
    assert choose(*shapes, window, kernel_ahead=True)["cpu"].forward.name == "winograd_f2"
    assert choose(*shapes, window, exact=True, kernel_ahead=True)["cpu"].forward.name == "plain"


def test_in_sixteen_bits_a_large_stem_takes_space_to_depth_on_cuda_alone():
    shapes, window = ((32, 224, 224, 3), (3, 3, 3, 48)), Window((2, 2), ONE)
    chosen = choose(*shapes, window, jnp.bfloat16)
    assert chosen.keys() == {"cuda"}
    assert chosen["cuda"].names == ("space_to_depth", "plain", "space_to_depth")
    assert choose((1, *shapes[0][1:]), shapes[1], window, jnp.bfloat16) == {}
    assert choose(*shapes, window, jnp.int16) == {}
    assert "cuda" not in choose(*shapes, window, jnp.float32)


@pytest.mark.parametrize(
    ("batch", "channels", "groups", "faster"),
    [(1, 128, 4, True), (256, 128, 4, False), (256, 160, 4, True), (256, 160, 1, False)],
)
def test_in_sixteen_bits_groups_that_tensor_cores_dislike_become_block_diagonal(batch, channels, groups, faster):
    window = Window(padding=ONE, groups=groups)
    chosen = choose((batch, 28, 28, channels), (3, 3, channels // groups, channels), window, jnp.bfloat16)
    names = {platform: choice.names for platform, choice in chosen.items()}
    assert names == ({"cuda": ("block_diagonal", "plain", "plain")} if faster else {})


@pytest.mark.parametrize(
    ("input_shape", "kernel_shape", "groups", "strides"),
    [((8, 224, 224, 3), (3, 3, 3, 8), 1, (2, 2)), ((2, 14, 14, 24), (3, 3, 6, 24), 4, (1, 1))],
)
def test_what_is_lowered_for_cuda_in_bfloat16_is_the_convolution(input_shape, kernel_shape, groups, strides):
    random = np.random.default_rng(0)
    x, kernel = (jnp.asarray(random.normal(size=shape), jnp.bfloat16) for shape in (input_shape, kernel_shape))

    def convolve(x, kernel):
        return conv_general_dilated(
            x, kernel, strides, ONE, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    expected = np.asarray(convolve(x, kernel), np.float32)  # on this CPU: the plain convolution
    with inference_on("cuda"):
        found = np.asarray(jax.jit(lambda x, kernel: convolve(x, kernel))(x, kernel), np.float32)
        program = str(jax.make_jaxpr(convolve)(x, kernel))
    np.testing.assert_allclose(found, expected, atol=0.01 * np.abs(expected).max())
    assert f"feature_group_count={groups}" not in program or groups == 1
    exported = jax.export.export(jax.jit(convolve), platforms=["cuda"])(x, kernel).mlir_module()
    kernels = [line for line in exported.splitlines() if "stablehlo.convolution" in line]
    assert len(kernels) == 1
    assert f"feature_group_count = {1}" in kernels[0]


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "SAME"},
        {"padding": "VALID", "window_strides": (2, 2)},
        {"padding": "SAME", "window_strides": (2, 1)},
        {"padding": ((2, 2), (2, 2)), "rhs_dilation": (2, 2)},
        {"padding": ((1, 1), (1, 1)), "lhs_dilation": (2, 2)},
        {"padding": ((1, 1), (1, 1)), "dimension_numbers": ("NCHW", "OIHW", "NCHW")},
        {"padding": ((1, 1), (1, 1)), "dimension_numbers": None},
        {"padding": ((1, 1), (1, 1)), "batch_group_count": 2},
        {"padding": ((1, 1), (1, 1)), "preferred_element_type": jnp.float32},
    ],
    ids=str,
)
def test_every_other_call_gives_what_lax_gives(options):
    options = {"window_strides": (1, 1), "dimension_numbers": ("NHWC", "HWIO", "NHWC"), **options}
    channels_last = options["dimension_numbers"] == ("NHWC", "HWIO", "NHWC")
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 9, 9, 4) if channels_last else (2, 4, 9, 9)).astype(np.float32)
    kernel = random.normal(size=(3, 3, 4, 6) if channels_last else (6, 4, 3, 3)).astype(np.float32)
    found = conv_general_dilated(x, kernel, **options)
    expected = lax.conv_general_dilated(x, kernel, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_negative_padding_goes_to_lax():
    """By its equation: XLA:CPU itself reads outside the image there, now and then."""
    x, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
    jaxpr = jax.make_jaxpr(
        lambda x, kernel: conv_general_dilated(
            x, kernel, (1, 1), ((-1, 1), (0, 0)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    )(x, kernel)
    assert [equation.primitive.name for equation in jaxpr.eqns] == ["conv_general_dilated"]


@pytest.mark.parametrize(
    ("x", "kernel", "groups"),
    [((2, 8, 8, 16), (3, 3, 8, 16), 1), ((2, 8, 8, 16), (3, 3, 5, 15), 3), ((2, 8, 16), (3, 3, 16, 16), 1)],
)
def test_wrong_shapes_raise_what_lax_raises(x, kernel, groups):
    def call(convolve):
        return convolve(
            jnp.ones(x),
            jnp.ones(kernel),
            (1, 1),
            ONE,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    with pytest.raises((ValueError, TypeError)) as expected:
        call(lax.conv_general_dilated)
    with pytest.raises(type(expected.value)) as found:
        call(conv_general_dilated)
    assert str(found.value) == str(expected.value)
