"""Which convolutions are expanded, which are left, and what is said of them."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.ops import conv_general_dilated
from repvgg_jax.transform import expand
from tests.random_variables import random_images
from tests.transform.expanding.networks import convolve
from tests.transform.merging.comparison import primitives

pytestmark = pytest.mark.usefixtures("float64")

HELD = np.random.default_rng(5).normal(size=(3, 3, 4, 4))


def twice(v, x):
    return convolve(convolve(x, v["a"]), v["a"])


def decayed(v, x):
    return convolve(x, v["a"]), (v["a"] ** 2).sum()


def returned(v, x):
    return convolve(x, v["a"]), v["a"]


def standardised(v, x):
    return convolve(x, (v["a"] - v["a"].mean((0, 1, 2))) / v["a"].std((0, 1, 2)))


def looped(v, x):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(convolve(x, kernel)), None), x, v["stack"])[0]


def looped_over_one(v, x):
    return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(convolve(x, v["a"])), x)


def chosen(v, x):
    return jax.lax.cond(x.sum() > 0, lambda x: convolve(x, v["a"]), lambda x: x, x)


LEFT = {
    "used twice": (twice, "left as it is, a: its kernel is used 2 times"),
    "and in a penalty": (decayed, "left as it is, a: its kernel is used 2 times"),
    "and returned": (returned, "left as it is, a: its kernel is used 2 times"),
    "weight standardisation": (standardised, r"left as it is, a: its kernel is computed before use \(`div`\)"),
    "sum of two": (
        lambda v, x: convolve(x, v["a"] + v["b"]), r"a convolution: its kernel is computed before use \(`add`\)"
    ),
    "scan": (looped, r"left as it is, stack: it stands in a loop \(`scan`\), which is left as it is"),
    "fori_loop": (looped_over_one, r"left as it is, a: it stands in a loop \(`scan`\)"),
    "cond": (chosen, r"left as it is, a: it stands in other code \(`cond`\)"),
    "held": (lambda v, x: convolve(x, HELD) * v["a"].sum(), "its kernel is held by the function and is no variable"),
    "an input": (lambda v, x: convolve(x, x[:1, :3, :3].transpose(1, 2, 3, 0) * v["a"].sum()), "depends on the inputs"),
    "groups of the batch": (
        lambda v, x: convolve(jnp.concatenate([x, x]), v["a"], batch_group_count=2), "it has groups of the batch"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_expanded_is_left_and_named(name):
    function, message = LEFT[name]
    variables = {each: random_images((3, 3, 4, 4), seed=index) for index, each in enumerate("abc")}
    variables["stack"] = random_images((2, 3, 3, 4, 4))
    images = random_images((2, 6, 6, 4))
    with pytest.raises(ValueError, match=r"no convolution of the function can be expanded\. 0 of"):
        expand(function, variables, images)

    def beside(v, x):  # one more, which can be
        return function(v, x), convolve(x, v["c"])

    wide = expand(beside, variables, images)
    assert list(wide.state) == ["c"]
    assert re.search(message, wide.report()), wide.report()
    found, _ = wide(wide.params, wide.state, images, train=True)
    for one, other in zip(*map(jax.tree.leaves, (found, beside(variables, images))), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


@pytest.mark.parametrize(
    "of",
    [
        lambda v: v["kernel"].astype(jnp.float32),
        lambda v: jnp.flip(v["kernel"], (0, 1)),
        lambda v: v["kernel"].transpose(1, 0, 3, 2),
        lambda v: v["kernel"].reshape(1, 3, 3, 4, 4)[0],
        lambda v: v["kernel"].reshape(-1, 4).T.reshape(4, 3, 3, 4).transpose(1, 2, 3, 0),
        jax.jit(lambda v: jnp.squeeze(v["kernel"][None], 0)),
    ],
    ids=["cast", "flipped", "transposed", "reshaped", "reshaped twice", "jitted"],
)
def test_a_kernel_that_is_only_moved_goes_back_to_where_it_was(of):
    function = lambda v, x: jnp.tanh(convolve(x.astype(of(v).dtype), of(v)))  # noqa: E731
    variables = {"kernel": random_images((3, 3, 4, 4))}
    images = random_images((2, 6, 6, 4))
    wide = expand(function, variables, images)
    params = jax.tree.map(lambda leaf: leaf + 0.1, wide.params)
    collapsed = wide.collapse(params, wide.state)
    assert collapsed["kernel"].dtype == jnp.float64
    found, _ = wide(params, wide.state, images, train=False)
    rounding = 1e-12 if found.dtype == jnp.float64 else 1e-5
    np.testing.assert_allclose(found, function(collapsed, images), atol=rounding)
    np.testing.assert_allclose(wide.collapse(wide.params, wide.state)["kernel"], variables["kernel"], atol=1e-14)


def test_a_network_that_computes_in_bfloat16_keeps_its_kernels_in_float32():
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            half = partial(nn.Conv, use_bias=False, dtype=jnp.bfloat16)
            x = nn.relu(nn.BatchNorm(use_running_average=False, dtype=jnp.bfloat16)(half(8, (3, 3))(x)))
            return half(4, (3, 3))(x)

    with jax.enable_x64(False):
        images = random_images((4, 8, 8, 4), np.float32)
        variables = Half().init(jax.random.key(0), images)
        function = lambda v, x: Half().apply(v, x, mutable=["batch_stats"])[0]  # noqa: E731
        wide = expand(function, variables, images, branches="dbb")
        assert {leaf.dtype for leaf in jax.tree.leaves((wide.params, wide.state))} == {jnp.dtype("float32")}
        params = {**wide.params, "branches": jax.tree.map(lambda leaf: leaf + 0.2, wide.params["branches"])}
        found, _ = wide(params, wide.state, images, train=False)
        collapsed = wide.collapse(params, wide.state)
        expected = function(collapsed, images)
        assert found.dtype == expected.dtype == jnp.bfloat16
        assert float(jnp.abs(found - expected).max()) < 0.05 * float(jnp.abs(expected).max())
        assert {leaf.dtype for leaf in jax.tree.leaves(collapsed)} == {jnp.dtype("float32")}


def shifted(behind):
    """A convolution with something behind it."""
    return lambda v, x: jax.nn.relu(behind(convolve(x, v["kernel"]), v))


SHIFTS = {
    "nothing": [
        lambda y, v: y,
        lambda y, v: y * v["vector"],
        lambda y, v: y + y**2,
        lambda y, v: y - y.mean((1, 2, 3), keepdims=True),
        lambda y, v: y + jnp.arange(6.0)[:, None],
    ],
    "bias": [
        lambda y, v: y + v["vector"],
        lambda y, v: v["vector"] + y.astype(jnp.float64).transpose(0, 2, 1, 3),
        lambda y, v: y * v["vector"] + v["vector"],
        lambda y, v: (y - v["vector"]) * v["vector"],  # a batch norm in evaluation
    ],
    "batch norm": [
        lambda y, v: (y - y.mean((0, 1, 2))) / y.std((0, 1, 2)),
        lambda y, v: y * (1 / y.std((0, 1, 2))) - y.mean((0, 1, 2)) / y.std((0, 1, 2)),
    ],
}


@pytest.mark.parametrize(("shift", "behind"), [(shift, each) for shift, all_of in SHIFTS.items() for each in all_of])
def test_it_is_said_what_takes_the_place_of_the_means_and_biases(shift, behind):
    variables = {"kernel": random_images((3, 3, 4, 4)), "vector": random_images((4,))}
    report = expand(shifted(behind), variables, random_images((2, 6, 6, 4))).report()
    (row,) = [line for line in report.splitlines() if line.startswith("kernel ")]
    assert row.endswith(f"  {shift}")
    assert ("directly behind kernel nothing shifts the channels" in report) == (shift == "nothing")


def test_the_fast_lowerings_of_this_package_are_read_through():
    """They have gradients of their own, and a gate before the kernel."""

    def function(v, x):
        y = conv_general_dilated(x, v["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return (y - y.mean((0, 1, 2))) / y.std((0, 1, 2))

    variables = {"kernel": random_images((3, 3, 4, 4), np.float32)}
    images = random_images((2, 16, 16, 4), np.float32)  # they are for float32
    assert primitives(function, variables, images)["custom_vjp_call"] == 1
    wide = expand(function, variables, images)
    assert "kernel + 1x1 + identity  batch norm" in wide.report()
    params = jax.tree.map(lambda leaf: leaf + 0.1, wide.params)
    found, _ = wide(params, wide.state, images, train=False)
    np.testing.assert_allclose(found, function(wide.collapse(params, wide.state), images), atol=1e-5)


def test_where_chooses_by_path_and_shape():
    function = lambda v, x: convolve(convolve(x, v["a"]["w"]), v["b"]["w"])  # noqa: E731
    variables = {"a": {"w": random_images((3, 3, 4, 4))}, "b": {"w": random_images((1, 1, 4, 4))}}
    images, seen = random_images((2, 6, 6, 4)), {}

    def where(path, shape):
        seen[path] = shape
        return path.startswith("a/")

    wide = expand(function, variables, images, where=where)
    assert seen == {"a/w": (3, 3, 4, 4), "b/w": (1, 1, 4, 4)}
    assert list(wide.state) == ["a/w"]
    assert "left as it is, b/w: `where` leaves it out" in wide.report()
    everything = expand(function, variables, images, branches="acnet")
    assert list(everything.state) == ["a/w"]
    assert "left as it is, b/w: no branch fits: " in everything.report()
