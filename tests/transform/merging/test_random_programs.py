"""Random small programs keep their function: convolutions, affine maps, sums, pads, pools and non-linearities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

from repvgg_jax.transform import reparameterize

CHANNELS = 4
KINDS = [
    "scale", "shift", "sub", "relu", "neg", "pad", "pool", "slice", *["add", "views", "transposed"] * 2, *["conv"] * 3
]  # fmt: skip


def part(axis, start=None, stop=None, step=None):
    return lambda a: a[(slice(None),) * axis + (slice(start, stop, step),)]


def padded(axis, low, high):
    return lambda a: jnp.pad(a, [(low, high) if each == axis else (0, 0) for each in range(4)])


# Along one axis, each two of a family have the same shape.
VIEWS = {
    "neighbours": lambda axis: [part(axis, 1), part(axis, 0, -1)],
    "pads": lambda axis: [padded(axis, 0, 2), padded(axis, 1, 1), padded(axis, 2, 0)],
    "moved": lambda axis: [
        lambda a: a, part(axis, None, None, -1), lambda a: padded(axis, 0, 1)(part(axis, 1)(a)),
        lambda a: part(axis, 0, -1)(padded(axis, 1, 0)(a)),
    ],
    "strides": lambda axis: [
        lambda a: part(axis, 0, a.shape[axis] // 2 * 2, 2)(a), part(axis, 1, None, 2),
        lambda a: part(axis, 0, a.shape[axis] // 2)(a),
    ],
}  # fmt: skip


CONVOLUTION = {
    "size": st.sampled_from([(1, 1), (3, 3), (1, 3), (3, 1), (2, 2), (5, 5)]),
    "groups": st.sampled_from([1, 1, 2, 4]),
    "dilation": st.sampled_from([1, 1, 2]),
    "stride": st.sampled_from([1, 1, 1, 2]),
    "padding": st.sampled_from(["SAME", "SAME", "VALID", "FULL"]),
    "source_dilation": st.just((1, 1)),
}
TRANSPOSED = {
    "size": st.sampled_from([(1, 1), (3, 3), (2, 2)]),
    "stride": st.just(1),
    "padding": st.sampled_from(["VALID", "VALID", "FULL"]),
    "source_dilation": st.sampled_from([(2, 2), (1, 2)]),
}
PAIR = {
    "family": st.sampled_from(list(VIEWS)),
    "axis": st.integers(1, 2),
    "pair": st.lists(st.integers(0, 3), min_size=2, max_size=2, unique=True),
    "minus": st.booleans(),
}
SETTINGS = {
    "conv": st.fixed_dictionaries(CONVOLUTION),
    "transposed": st.fixed_dictionaries(CONVOLUTION | TRANSPOSED),
    "views": st.fixed_dictionaries(PAIR),
}


@st.composite
def instructions(draw):
    """Each takes earlier values by number, and makes one of the same channels."""
    program = []
    for _ in range(draw(st.integers(2, 9))):
        kind, index = draw(st.sampled_from(KINDS)), len(program)
        first, second = (draw(st.integers(max(0, index - 3), index)) for _ in range(2))
        setting = draw(SETTINGS.get(kind, st.just({})))
        if kind == "transposed":  # behind a norm of its own
            for before in ("relu", "scale", "shift"):
                program.append((before, first, first, {}))
                first = len(program)
            kind = "conv"
        program.append((kind, first, second, setting))
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
    between = setting["source_dilation"] if max(x.shape[1:3]) < 16 else (1, 1)
    lengths = [(length - 1) * step + 1 for length, step in zip(x.shape[1:3], between, strict=True)]
    if any(length + low + high <= span for length, span, (low, high) in zip(lengths, reach, pads, strict=True)):
        return x
    return lax.conv_general_dilated(
        x, kernel, (setting["stride"],) * 2, pads, lhs_dilation=between, rhs_dilation=(dilation,) * 2,
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
        elif kind == "views" and min(a.shape[1:3]) > 3:
            views = VIEWS[setting["family"]](setting["axis"])
            one, other = (views[number % len(views)](a) for number in setting["pair"])
            y = one - other if setting["minus"] else one + other
        elif kind == "pool" and min(a.shape[1:3]) > 2:
            y = lax.reduce_window(a, 0.0, lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "SAME") / 4
        else:
            y = -a if kind == "neg" else jnp.maximum(a, 0)
        values.append(y)
    read = {first for _, first, _, _ in program} | {second for kind, _, second, _ in program if kind in ("add", "sub")}
    return [value for number, value in enumerate(values) if number not in read]


def check(program):
    v, x = parameters(program), jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 6, CHANNELS)))
    function = lambda v, x: run(program, v, x)  # noqa: E731
    cheapest, fewest = (reparameterize(function, v, x, fewest_convolutions=asked) for asked in (False, True))
    # Of another batch than it was traced with; compiled at once, not operation by operation.
    expected, *found = jax.jit(lambda x: [function(v, x), *(fused(fused.params, x) for fused in (cheapest, fewest))])(
        x[:1]
    )
    for results in found:
        for wanted, got in zip(expected, results, strict=True):
            assert wanted.shape == got.shape
            scale = max(1.0, float(jnp.abs(wanted).max()))
            np.testing.assert_allclose(got, wanted, atol=1e-12 * scale, rtol=0)
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
