"""Which calls are left to lax, and which lowering the others get: decided by shapes, so nothing is compiled."""

import importlib.metadata
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from repvgg_jax.ops import conv_general_dilated, inference_on, xla_options
from repvgg_jax.ops.batch_norm import _fast_statistics
from repvgg_jax.ops.choose import choose
from repvgg_jax.ops.convolution import _beyond_default
from repvgg_jax.ops.lowerings.base import Window
from repvgg_jax.ops.platform import by_platform, known_platform

ONE = ((1, 1), (1, 1))
LAST = ("NHWC", "HWIO", "NHWC")


def program(x, kernel, strides=(1, 1), padding=ONE, dtypes=(jnp.float32, jnp.float32), **options):
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip((x, kernel), dtypes, strict=True)]
    options = {"dimension_numbers": LAST, **options}
    return jax.make_jaxpr(lambda x, kernel: conv_general_dilated(x, kernel, strides, padding, **options))(*arrays)


def is_left_to_lax(*arguments, **options):
    equations = program(*arguments, **options).eqns
    return [equation.primitive.name for equation in equations] == ["conv_general_dilated"]


MAP, THREE = (2, 8, 8, 16), (3, 3, 16, 16)


def test_the_plainest_call_is_lowered_here():
    assert not is_left_to_lax(MAP, THREE)
    assert not is_left_to_lax(MAP, THREE, lhs_dilation=(1, 1), rhs_dilation=(1, 1), preferred_element_type=jnp.float32)
    assert not is_left_to_lax(MAP, (5, 5, 1, 16), feature_group_count=16)


@pytest.mark.parametrize(
    "call",
    [
        dict(padding=((-1, 1), (1, 1))),
        dict(padding=((1, -1), (1, 1))),
        dict(padding=((1, 1), (-1, 1))),
        dict(padding=((1, 1), (1, -1))),
        dict(x=(0, 8, 8, 16)),
        dict(x=(2, 8, 8, 0), kernel=(3, 3, 0, 16)),
        dict(kernel=(3, 3, 16, 0)),
        dict(kernel=(2, 2, 16, 16)),
        dict(kernel=(3, 1, 16, 16)),
        dict(kernel=(5, 5, 16, 16)),
        dict(lhs_dilation=(1, 2)),
        dict(rhs_dilation=(1, 2), padding=((2, 2), (2, 2))),
        dict(batch_group_count=2),
        dict(preferred_element_type=jnp.float32, dtypes=(jnp.bfloat16, jnp.bfloat16)),
        dict(dtypes=(jnp.bfloat16, jnp.bfloat16)),
        dict(dtypes=(jnp.float16, jnp.float16)),
        dict(x=(2, 8, 8, 12), kernel=(3, 3, 3, 12), feature_group_count=4, preferred_element_type=jnp.float32,
             dtypes=(jnp.bfloat16, jnp.bfloat16)),
        dict(x=(2, 16, 8, 8), dimension_numbers=("NCHW", "HWIO", "NHWC")),
        dict(dimension_numbers=("NHWC", "OIHW", "NHWC"), kernel=(16, 16, 3, 3)),
        dict(dimension_numbers=("NHWC", "HWIO", "NCHW")),
        dict(dimension_numbers=("NHWC", "WHIO", "NHWC")),
        dict(x=(2, 8, 16), kernel=(3, 16, 16), strides=(1,), padding=((1, 1),),
             dimension_numbers=("NWC", "WIO", "NWC")),
    ],
    ids=str,
)  # fmt: skip
def test_a_call_that_no_lowering_is_for_is_lax_itself(call):
    assert is_left_to_lax(**{"x": MAP, "kernel": THREE, **call})


@pytest.mark.parametrize(
    ("precision", "exact"),
    [
        (None, False),
        ("default", False),
        (lax.Precision.DEFAULT, False),
        (("default", lax.Precision.DEFAULT), False),
        ("high", True),
        (lax.Precision.HIGHEST, True),
        ((lax.Precision.DEFAULT, lax.Precision.HIGHEST), True),
        ((lax.Precision.HIGHEST, None), True),
    ],
    ids=str,
)
def test_more_than_the_default_precision_is_seen(precision, exact):
    assert _beyond_default(precision) is exact


def test_the_configured_precision_counts_where_the_call_names_none():
    with jax.default_matmul_precision("float32"):
        assert _beyond_default(None)
        assert not _beyond_default("default")
        assert not _beyond_default(lax.Precision.DEFAULT)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_precision_asked_for_reaches_every_convolution(platform):
    """On accelerators, which multiply in less by default, gradients with another precision would look nearly right."""

    def step(x, kernel, **options):
        def convolve(x, kernel):
            y = conv_general_dilated(x, kernel, (2, 2), ONE, dimension_numbers=LAST, **options)
            return jnp.sin(y).sum()

        return jax.value_and_grad(convolve, (0, 1))(x, kernel)

    def asked(**options):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 32, 32, 16), (3, 3, 16, 16))]
        exported = jax.export.export(jax.jit(lambda *both: step(*both, **options)), platforms=[platform])(*shapes)
        lines = [line for line in str(exported.mlir_module()).splitlines() if "stablehlo.convolution" in line]
        return [line.count("HIGHEST") for line in lines]

    assert asked() == [0] * 3
    assert asked(precision="highest") == asked(precision=(lax.Precision.HIGHEST,) * 2) == [2] * 3


def names(x, kernel, *rest, **options):
    return choose(x, kernel, *rest, **options)["cpu"].names


WIDE = (3, 3, 64, 64)


@pytest.mark.parametrize(
    ("x", "kernel", "window", "options", "expected"),
    [
        ((8, 8, 8, 64), WIDE, Window(padding=ONE), {}, ("plain",) * 3),  # 3.8e7 multiplications and additions
        ((9, 8, 8, 64), WIDE, Window(padding=ONE), {}, ("winograd_f4",) * 3),  # 4.2e7
        ((8, 8, 8, 68), (3, 3, 68, 68), Window(padding=ONE), {}, ("winograd_f4",) * 3),  # 512 pixels
        ((9, 8, 8, 64), WIDE, Window(padding=ONE), {"exact": True}, ("plain", "plain", "im2col")),
        ((7, 8, 8, 512), (3, 3, 512, 512), Window(padding=ONE), {}, ("plain", "plain", "im2col")),  # 448 pixels
        ((1, 2, 2, 64), WIDE, Window(padding=ONE), {}, ("winograd_f4",) * 3),
        ((1, 2, 2, 64), WIDE, Window(padding=ONE), {"exact": True}, ("im2col",) * 3),
        ((1, 2, 3, 64), WIDE, Window(padding=ONE), {}, ("plain",) * 3),
        ((128, 8, 8, 8), (3, 3, 8, 64), Window(padding=ONE), {}, ("plain", "plain", "im2col")),
        ((128, 8, 8, 64), (3, 3, 64, 8), Window(padding=ONE), {}, ("plain", "plain", "im2col")),
        ((512, 8, 8, 16), (3, 3, 16, 16), Window(padding=ONE), {}, ("winograd_f4",) * 3),
        ((512, 8, 8, 15), (3, 3, 15, 16), Window(padding=ONE), {}, ("plain", "plain", "im2col")),
        ((128, 7, 7, 8), (3, 3, 8, 64), Window(padding=ONE), {}, ("im2col",) * 3),
        ((64, 16, 16, 64), WIDE, Window((2, 2), ONE), {}, ("plain", "im2col", "im2col")),
        ((64, 14, 14, 64), WIDE, Window((2, 2), ONE), {}, ("im2col",) * 3),
        ((1, 16, 16, 16), (3, 3, 16, 16), Window(padding=ONE), {}, ("plain",) * 3),
        ((1, 16, 16, 16), (3, 3, 8, 16), Window(padding=ONE, groups=2), {}, ("plain", "plain", "im2col")),
        ((1, 12, 12, 192), (3, 3, 192, 192), Window(padding=ONE), {"kernel_ahead": True}, ("winograd_f2",) * 3),
        ((1, 11, 11, 192), (3, 3, 192, 192), Window(padding=ONE), {"kernel_ahead": True}, ("plain", "plain", "im2col")),
        ((8, 10, 10, 32), (3, 3, 2, 32), Window(padding=ONE, groups=16), {}, ("winograd_f4",) * 3),
        ((8, 9, 9, 32), (3, 3, 2, 32), Window(padding=ONE, groups=16), {}, ("im2col", "im2col", "winograd_f4")),
        ((8, 10, 10, 32), (3, 3, 2, 32), Window(padding=ONE, groups=16), {"exact": True}, ("im2col",) * 3),
        ((8, 10, 10, 80), (3, 3, 5, 80), Window(padding=ONE, groups=16), {}, ("plain", "plain", "winograd_f4")),
        ((8, 2, 2, 80), (3, 3, 5, 80), Window(padding=ONE, groups=16), {}, ("im2col", "im2col", "winograd_f4")),
        ((8, 10, 10, 80), (3, 3, 5, 80), Window((2, 2), ONE, 16), {}, ("plain", "im2col", "im2col")),
        ((64, 14, 14, 64), (2, 5, 64, 64), Window((2, 2), ONE), {}, ("plain",) * 3),  # more than 9 taps
        ((8, 8, 8, 16), (1, 1, 16, 16), Window((2, 2)), {}, ("pointwise",) * 3),
        ((8, 8, 8, 16), (3, 3, 1, 16), Window(padding=ONE, groups=16), {}, ("depthwise",) * 3),
    ],
)  # fmt: skip
def test_in_float32_on_cpu_the_table_gives(x, kernel, window, options, expected):
    """At both sides of every bound of the table; a bound that is measured anew changes its line here."""
    assert names(x, kernel, window, **options) == expected


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("x", "kernel", "window", "expected"),
    [
        ((16, 128, 128, 3), (3, 3, 3, 48), Window((2, 2), ONE), ("space_to_depth", "plain", "space_to_depth")),
        ((15, 128, 128, 3), (3, 3, 3, 48), Window((2, 2), ONE), None),  # just below 2¹⁶ pixels
        ((1, 63, 64, 64), (3, 3, 16, 64), Window(padding=ONE, groups=4), ("block_diagonal", "plain", "plain")),
        ((1, 64, 64, 64), (3, 3, 16, 64), Window(padding=ONE, groups=4), None),
        ((1, 64, 64, 48), (3, 3, 12, 64), Window(padding=ONE, groups=4), ("block_diagonal", "plain", "plain")),
        ((1, 64, 64, 64), (3, 3, 16, 48), Window(padding=ONE, groups=4), ("block_diagonal", "plain", "plain")),
        ((1, 64, 64, 24), (3, 3, 4, 24), Window(padding=ONE, groups=6), None),  # 4 channels a group, though 24 in all
        ((1, 8, 8, 48), (3, 3, 12, 48), Window(padding=ONE), None),
        ((1, 8, 8, 48), (3, 3, 3, 48), Window(padding=ONE, groups=16), None),
    ],
)
def test_in_sixteen_bits_on_cuda_the_table_gives(x, kernel, window, expected, dtype):
    chosen = choose(x, kernel, window, dtype)
    assert {platform: choice.names for platform, choice in chosen.items()} == ({"cuda": expected} if expected else {})


def test_a_known_platform_takes_its_branch_or_the_default():
    branches = dict(cpu=lambda x: x + 1, cuda=lambda x: x + 2)
    for platform, expected in (("cpu", 1), ("cuda", 2), ("tpu", 0)):
        with inference_on(platform):
            assert by_platform(0, default=lambda x: x, **branches) == expected
    assert by_platform(7, default=lambda x: x) == 7


def test_a_platform_is_known_inside_alone_even_after_an_error():
    with inference_on("cpu"):
        with pytest.raises(ZeroDivisionError), inference_on("cuda"):
            assert known_platform() == "cuda"
            1 / 0  # noqa: B018
        assert known_platform() == "cpu"
    assert known_platform() is None


def test_for_inference_on_a_known_platform_nothing_hides_the_convolution():
    with inference_on("tpu"):
        assert is_left_to_lax(MAP, THREE)
    with inference_on("cpu"):
        names = {equation.primitive.name for equation in program((2, 8, 8, 16), (1, 1, 16, 16), padding="VALID").eqns}
    assert not names & {"custom_vjp_call", "platform_index", "cond", "reverse_mode_only"}


@pytest.mark.parametrize(("version", "sums"), [("0.10.1", True), ("0.10.2", False), ("0.12.0", True)])
def test_the_jaxlib_that_sums_wrongly_gets_no_sums_of_ynnpack(version, sums, monkeypatch):
    """https://github.com/jax-ml/jax/issues/39103."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    wanted = runpy.run_path(xla_options.__file__)["_WANTED"]["cpu"]
    assert ("REDUCE" in wanted["xla_cpu_experimental_ynn_fusion_type"]) is sums


def test_a_variance_is_never_negative():
    """As E[x²] - E[x]² may come out: rounding alone takes it below zero for constant channels."""
    x = jnp.broadcast_to(jnp.asarray(np.random.default_rng(0).normal(0, 30, 500), jnp.float32), (3, 3, 5, 500))
    _, var = _fast_statistics(x)
    assert float(var.min()) == 0
    mean = x.mean((0, 1, 2))
    assert float(((x * x).mean((0, 1, 2)) - mean * mean).min()) < 0, "negative control"
