"""Random small programs keep their function: convolutions, affine maps, sums, pads, pools and non-linearities."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

from repvgg_jax.trace import reparameterize

CHANNELS = 4
KINDS = ["scale", "shift", "sub", "relu", "neg", "pad", "pool", "slice", *["add"] * 2, *["conv"] * 3]


@st.composite
def instructions(draw):
    """Each takes earlier values by number, and makes one of the same channels."""
    count = draw(st.integers(2, 9))
    program = []
    for index in range(count):
        kind = draw(st.sampled_from(KINDS))
        operand = st.integers(max(0, index - 3), index)
        setting = {
            "conv": st.fixed_dictionaries(
                {
                    "size": st.sampled_from([(1, 1), (3, 3), (1, 3), (3, 1), (2, 2), (5, 5)]),
                    "groups": st.sampled_from([1, 1, 2, 4]),
                    "dilation": st.sampled_from([1, 1, 2]),
                    "stride": st.sampled_from([1, 1, 1, 2]),
                    "padding": st.sampled_from(["SAME", "SAME", "VALID", "FULL"]),
                }
            )
        }.get(kind, st.just({}))
        program.append((kind, draw(operand), draw(operand), draw(setting)))
    return program


def parameters(program):
    rng = np.random.default_rng(len(program))
    found = {}
    for index, (kind, _, _, setting) in enumerate(program):
        if kind == "conv":
            shape = (*setting["size"], CHANNELS // setting["groups"], CHANNELS)
            found[str(index)] = jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])))
        elif kind in ("scale", "shift"):
            found[str(index)] = jnp.asarray(rng.uniform(0.5, 1.5, CHANNELS))
    return found


def convolution(x, kernel, setting):
    dilation = setting["dilation"]
    reach = [(size - 1) * dilation for size in setting["size"]]
    pads = {
        "SAME": [(span // 2, span - span // 2) for span in reach],
        "VALID": [(0, 0), (0, 0)],
        "FULL": [(span, span) for span in reach],
    }[setting["padding"]]
    if any(length + low + high <= span for length, span, (low, high) in zip(x.shape[1:3], reach, pads, strict=True)):
        return x
    return lax.conv_general_dilated(
        x, kernel, (setting["stride"],) * 2, pads, rhs_dilation=(dilation,) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=setting["groups"],
    )  # fmt: skip


def run(program, v, x):
    values = [x]
    for index, (kind, first, second, setting) in enumerate(program):
        a, b = values[first], values[second]
        if kind == "conv":
            y = convolution(a, v[str(index)], setting)
        elif kind == "scale":
            y = a * v[str(index)]
        elif kind == "shift":
            y = a + v[str(index)]
        elif kind in ("add", "sub"):
            y = a if a.shape != b.shape else a + b if kind == "add" else a - b
        elif kind == "pad":
            y = jnp.pad(a, ((0, 0), (1, 2), (0, 1), (0, 0)))
        elif kind == "slice" and min(a.shape[1:3]) > 3:
            y = (a[:, 1:, ::2], a[:, ::2, ::2], a[:, :-1, 1:-1])[index % 3]
        elif kind == "pool" and min(a.shape[1:3]) > 2:
            y = lax.reduce_window(a, 0.0, lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "SAME") / 4
        else:
            y = -a if kind == "neg" else jnp.maximum(a, 0)
        values.append(y)
    return values[-1], values[len(values) // 2]


def check(program):
    v, x = parameters(program), jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 6, CHANNELS)))
    function = lambda v, x: run(program, v, x)  # noqa: E731
    cheapest, fewest = (reparameterize(function, v, x, fewest_convolutions=asked) for asked in (False, True))
    for batch in (x, x[:1]):
        for fused in (cheapest, fewest):
            for expected, found in zip(function(v, batch), fused(fused.params, batch), strict=True):
                assert expected.shape == found.shape
                scale = max(1.0, float(jnp.abs(expected).max()))
                np.testing.assert_allclose(found, expected, atol=1e-12 * scale, rtol=0)
    before, after = cheapest.totals["multiply-adds"]
    assert after <= before
    assert fewest.totals["convolutions"].after <= cheapest.totals["convolutions"].after


QUIET = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.usefixtures("float64")
@settings(max_examples=50, **QUIET)
@given(instructions())
def test_random_programs_keep_their_function_and_take_no_more_multiply_adds(program):
    check(program)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@settings(max_examples=500, **QUIET)
@given(instructions())
def test_many_random_programs_keep_their_function(program):
    check(program)
