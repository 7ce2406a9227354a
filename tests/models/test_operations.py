import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import create_model, fuse_model
from repvgg_jax.reparam import assert_equivalent
from tests.random_variables import random_images, random_variables


def small(ops):
    return create_model(
        "repvgg_a0", depths=(1, 1, 1, 1), width_multiplier=(0.5,) * 4, num_classes=5, strides=(1, 1, 2, 2, 2), ops=ops
    )


def training_gradients(model, variables, images):
    def loss(params):
        logits, updates = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        return jnp.sum(logits**2), (logits, updates)

    return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])


@pytest.mark.usefixtures("float32")
def test_fast_lowerings_change_neither_variables_nor_logits_nor_gradients_beyond_rounding():
    images = random_images((18, 16, 16, 3), np.float32)
    variables = random_variables(small("auto"), dtype=np.float32)
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, random_variables(small("xla"), dtype=np.float32))
    fast, (fast_logits, fast_stats) = training_gradients(small("auto"), variables, images)
    # In float64: in float32, without LLVM's optimisations, XLA's own gradients are off by 5 % in jaxlib 0.10.1.
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), (variables, images))
        exact = training_gradients(small("xla").clone(param_dtype=jnp.float64), *wide)
    plain, (plain_logits, plain_stats) = jax.tree.map(np.float32, exact)
    np.testing.assert_allclose(fast_logits, plain_logits, atol=1e-4 * float(jnp.abs(plain_logits).max()))
    chex.assert_trees_all_close(fast_stats, plain_stats, rtol=1e-4, atol=1e-4)
    for path, leaf in jax.tree_util.tree_flatten_with_path(plain)[0]:
        found = fast
        for entry in path:
            found = found[entry.key]
        scale = float(jnp.abs(leaf).max())
        np.testing.assert_allclose(found, leaf, atol=5e-3 * scale + 1e-3, err_msg=jax.tree_util.keystr(path))


def test_with_xla_a_tracer_sees_plain_convolutions():
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    variables = random_variables(small("xla"), dtype=np.float32)

    def primitives(ops):
        jaxpr = jax.make_jaxpr(lambda x: small(ops).apply(variables, x, train=False))(images)
        return [equation.primitive.name for equation in jaxpr.eqns]

    # four blocks: a 3×3 and a 1×1 convolution each, besides the stem's two
    assert primitives("xla").count("conv_general_dilated") == 2 * 5
    assert "custom_vjp_call" not in primitives("xla")
    assert primitives("auto").count("conv_general_dilated") < 2 * 5


@pytest.mark.usefixtures("float32")
def test_fuse_preserves_logits_and_predictions_with_the_fast_lowerings_too():
    images = random_images((32, 16, 16, 3), np.float32)
    variables = random_variables(small("auto"), dtype=np.float32)
    deploy_model, deploy_variables = fuse_model(small("auto"), variables)
    forms = ((small("auto"), variables), (deploy_model, deploy_variables))
    both = jax.jit(lambda trees, x: [form[0].apply(v, x, train=False) for form, v in zip(forms, trees, strict=True)])
    assert_equivalent(*both([tree for _, tree in forms], images), rtol=2e-5)
