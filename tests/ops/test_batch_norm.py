"""The batch norm computes what the float64 formula computes, and so does its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.ops import batch_norm_train

EPSILON = 1e-5
SHAPE = (6, 5, 4, 7)


def formula(x, scale, bias):
    mean = x.mean((0, 1, 2))
    var = ((x - mean) ** 2).mean((0, 1, 2))
    y = (x - mean) / jnp.sqrt(var + EPSILON)
    return (y if scale is None else y * scale) + (0 if bias is None else bias), mean, var


def ours(x, scale, bias):
    return batch_norm_train(x, scale, bias, EPSILON)


def inputs(shape=SHAPE, mean=0.5, std=2.0):
    random = np.random.default_rng(0)
    x = random.normal(mean, std, shape)
    scale, bias = random.normal(1, 0.5, (2, shape[-1]))
    cotangents = random.normal(size=shape), *random.normal(size=(2, shape[-1]))
    return (x, scale, bias), cotangents


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def results(function, arguments, cotangents):
    values, transpose = jax.vjp(function, *arguments)
    return values, transpose(cotangents)


def assert_close(found, expected, tolerance):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


@pytest.mark.parametrize("shape", [SHAPE, (1, 1, 2, 3), (2, 3, 1, 1), (1, 9, 8, 5), (64, 1, 1, 48)])
def test_values_and_all_gradients_are_those_of_the_float64_formula(shape):
    """With cotangents on the statistics too, which running averages do not have but other users may."""
    arguments, cotangents = inputs(shape)
    with jax.enable_x64(True):
        expected, in_float64 = jax.jit(lambda *both: (results(formula, *both), results(ours, *both)))(
            arguments, cotangents
        )
    assert_close(in_float64, expected, 1e-9)
    found = jax.jit(lambda *both: results(ours, *both))(*cast((arguments, cotangents), np.float32))
    assert_close(found, expected, 2e-3 if np.prod(shape[:3]) < 8 else 2e-5)


@pytest.mark.parametrize("absent", [("scale",), ("bias",), ("scale", "bias")], ids=str)
def test_without_scale_or_bias_it_is_the_formula_without_them(absent):
    (x, scale, bias), cotangents = cast(inputs(), np.float32)
    arguments = x, None if "scale" in absent else scale, None if "bias" in absent else bias
    assert_close(results(ours, arguments, cotangents), results(formula, arguments, cotangents), 2e-5)


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4])
def test_the_variance_survives_a_mean_far_above_the_deviation(mean):
    (x, _, _), _ = inputs((32, 8, 8, 4), mean, 1.0)
    x = x.astype(np.float32)
    _, _, found = ours(x, None, None)
    np.testing.assert_allclose(found, x.astype(np.float64).var((0, 1, 2)), rtol=2e-5)
    naive = (x * x).mean((0, 1, 2)) - x.mean((0, 1, 2)) ** 2
    if mean == 1e4:
        assert np.abs(naive / x.astype(np.float64).var((0, 1, 2)) - 1).max() > 0.1


def test_one_bad_channel_does_not_spoil_the_others():
    x = np.random.default_rng(0).normal([0, 1, 1e4], [1, 1, 1], (16, 4, 4, 3)).astype(np.float32)
    y, mean, var = ours(x, None, None)
    expected = formula(x.astype(np.float64), None, None)
    assert_close((y[..., :2], mean, var), (expected[0][..., :2], *expected[1:]), 2e-5)


def test_constant_channels_have_no_variance_and_finite_gradients():
    x = jnp.full(SHAPE, 3.25, jnp.float32)
    y, mean, var = ours(x, None, None)
    np.testing.assert_allclose(y, jnp.zeros(SHAPE), atol=1e-3)
    np.testing.assert_allclose(mean, jnp.full(7, 3.25), rtol=1e-6)
    np.testing.assert_allclose(var, jnp.zeros(7), atol=1e-10)
    assert jnp.isfinite(jax.grad(lambda x: jnp.sin(ours(x, None, None)[0]).sum())(x)).all()


def test_bfloat16_images_have_float32_statistics():
    (x, scale, bias), _ = inputs()
    x = jnp.asarray(x, jnp.bfloat16)
    scale, bias = cast((scale, bias), np.float32)
    y, mean, var = ours(x, scale, bias)
    assert (y.dtype, mean.dtype, var.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    expected = formula(np.asarray(x, np.float64), scale, bias)
    assert_close((mean, var), expected[1:], 1e-5)
    assert_close(y.astype(jnp.float32), expected[0], 1e-2)
    gradients = jax.grad(lambda *leaves: ours(*leaves)[0].sum(), (0, 1, 2))(x, scale, bias)
    assert [leaf.dtype for leaf in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]


def test_the_same_check_fails_on_the_unbiased_variance():
    arguments, _ = cast(inputs(), np.float32)
    y, mean, var = formula(*arguments)
    count = np.prod(SHAPE[:3])
    with pytest.raises(AssertionError):
        assert_close(ours(*arguments), (y, mean, var * count / (count - 1)), 2e-5)
