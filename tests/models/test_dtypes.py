"""Parameters, statistics and computation each have the dtype that they are told, in both forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import create_model
from repvgg_jax.models.norm import BatchNorm

BFLOAT16 = jnp.dtype(jnp.bfloat16)
SMALL = dict(depths=(1, 1, 2, 1), width_multiplier=(0.25,) * 4, num_classes=5)


def small(**fields):
    return create_model("repvggplus_l2pse", **SMALL, **fields)


def abstract(model):
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images), images


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("deploy", [False, True], ids=["training", "deploy"])
def test_parameters_have_the_dtype_asked_for_and_statistics_at_least_float32(param_dtype, deploy):
    variables, _ = abstract(small(param_dtype=param_dtype, deploy=deploy))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype(param_dtype)}
    if not deploy:
        expected = jnp.promote_types(param_dtype, jnp.float32)
        assert {leaf.dtype for leaf in jax.tree.leaves(variables["batch_stats"])} == {expected}


@pytest.mark.parametrize(("deploy", "train"), [(False, True), (False, False), (True, False)])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_every_convolution_computes_in_the_dtype_asked_for(dtype, deploy, train):
    """And every endpoint has it; what is computed in float32 and rounded after is twice as slow, and looks the same."""
    model = small(dtype=dtype, deploy=deploy, ops="xla")
    variables, images = abstract(model)
    expected = jnp.dtype(dtype or jnp.float32)

    def apply(variables, x):
        return model.apply(variables, x, train=train, features=True, mutable=["batch_stats"])[0]

    program, ends = jax.make_jaxpr(apply, return_shape=True)(variables, images)
    convolutions = [each for each in program.jaxpr.eqns if each.primitive.name == "conv_general_dilated"]
    assert len(convolutions) == (6 if deploy else 2 * 6 + 3)
    assert {var.aval.dtype for each in convolutions for var in (*each.invars, *each.outvars)} == {expected}
    dtypes = {name: end.dtype for name, end in ends.items()}
    classifiers = {name for name in ends if name.endswith("_aux") or name in ("pooled", "logits")}
    assert {dtypes[name] for name in classifiers} == {jnp.dtype(jnp.float32)}
    assert {dtypes[name] for name in set(ends) - classifiers} == {expected}


@pytest.mark.parametrize("shape", [(4, 3, 5, 2), (60, 2)], ids=["images", "rows"])
@pytest.mark.parametrize("ops", ["auto", "xla"])
def test_statistics_of_bfloat16_images_are_computed_in_float32(ops, shape):
    x = jnp.asarray(np.random.default_rng(0).normal([3, -5], [1, 0.5], shape), jnp.bfloat16)
    norm = BatchNorm(use_running_average=False, dtype=jnp.bfloat16, ops=ops)
    variables = {
        "params": {"scale": jnp.array([2.0, 0.5]), "bias": jnp.array([1.0, -1.0])},
        "batch_stats": {"mean": jnp.array([1.0, 2.0]), "var": jnp.array([3.0, 4.0])},
    }
    y, updates = norm.apply(variables, x, mutable=["batch_stats"])
    exact = np.asarray(x, np.float64).reshape(-1, 2)
    mean, var = exact.mean(0), exact.var(0)
    new = updates["batch_stats"]
    assert (y.dtype, new["mean"].dtype, new["var"].dtype) == (BFLOAT16, np.float32, np.float32)
    np.testing.assert_allclose(new["mean"], 0.9 * np.array([1, 2]) + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 * np.array([3, 4]) + 0.1 * var, rtol=1e-5)
    # Negative control: the same sums, rounded to bfloat16, are off by more.
    assert np.abs(np.asarray(jnp.asarray(var, jnp.bfloat16), np.float64) / var - 1).max() > 1e-4
    expected = (exact - mean) / np.sqrt(var + 1e-5) * np.array([2, 0.5]) + np.array([1, -1])
    np.testing.assert_allclose(np.asarray(y, np.float64).reshape(-1, 2), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("average", [False, True], ids=["batch", "running"])
@pytest.mark.parametrize("ops", ["auto", "xla"])
@pytest.mark.parametrize(
    ("images", "dtype", "output"),
    [
        (jnp.bfloat16, None, jnp.float32),
        (jnp.float32, None, jnp.float32),
        (jnp.float32, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32, jnp.float32),
    ],
)
def test_a_norm_gives_the_dtype_asked_for_or_that_of_images_and_parameters_together(
    images, dtype, output, ops, average
):
    norm = BatchNorm(use_running_average=average, dtype=dtype, ops=ops)
    x = jax.ShapeDtypeStruct((2, 3, 3, 4), images)
    y, variables = jax.eval_shape(lambda x: norm.init_with_output(jax.random.key(0), x), x)
    assert y.dtype == output
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
