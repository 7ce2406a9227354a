"""A network compiled with its weights inside is the network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import compile_inference, create_model, fuse_model
from repvgg_jax.models.inference import _CUDA_OPTIONS
from repvgg_jax.models.partial_evaluation import split
from repvgg_jax.ops import inference_on
from tests.random_variables import random_variables

SMALL = dict(num_classes=5, depths=(1, 1, 2, 1), width_multiplier=(0.25, 0.25, 0.25, 0.25))


def images(dtype=jnp.float32, batch=2):
    return jax.random.normal(jax.random.key(1), (batch, 33, 33, 3), dtype)


def applied(model):
    """`model.apply`, of variables that it does not know in advance."""
    return jax.jit(lambda variables, x: model.apply(variables, x, train=False))


def forms(name="repvgg_a0", **fields):
    model = create_model(name, **SMALL, **fields)
    variables = random_variables(model, (1, 33, 33, 3), fields.get("param_dtype", jnp.float32))
    return (model, variables), fuse_model(model, variables)


@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_b1g4", "repvgg_d2se"])
def test_both_forms_compiled_are_what_apply_computes_in_float64(name):
    with jax.enable_x64(True):
        for model, variables in forms(name, param_dtype=jnp.float64):
            x = images(jnp.float64)
            found = compile_inference(model, variables, x)(x)
            apply = applied(model)
            expected = apply(variables, x)
            np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())
            other = jax.tree.map(lambda leaf: 1.01 * leaf, variables)
            assert np.abs(found - apply(other, x)).max() > 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_both_forms_compiled_are_what_apply_computes_up_to_rounding(dtype):
    for model, variables in forms(dtype=None if dtype == jnp.float32 else dtype):
        x = images()
        found, expected = compile_inference(model, variables, x)(x), applied(model)(variables, x)
        assert found.dtype == jnp.float32
        tolerance = 1e-5 if dtype == jnp.float32 else 5e-2
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_later_changes_to_the_variables_are_not_seen():
    _, (model, variables) = forms()
    x = images()
    variables = jax.tree.map(lambda leaf: np.array(leaf), variables)
    forward = compile_inference(model, variables, x)
    before = np.asarray(forward(x))
    variables["params"]["head"]["bias"] += 1
    np.testing.assert_array_equal(forward(x), before)


def test_images_of_another_shape_or_dtype_are_refused():
    _, (model, variables) = forms()
    forward = compile_inference(model, variables, jax.ShapeDtypeStruct((2, 33, 33, 3), jnp.float32))
    for wrong in (images(batch=3), images(jnp.bfloat16)):
        with pytest.raises(TypeError):
            forward(wrong)


def test_what_the_weights_alone_determine_is_not_in_the_compiled_program():
    """On CUDA in bfloat16: casts of kernels, and the kernels of grouped convolutions spread over all channels."""
    _, (model, variables) = forms("repvgg_b1g4", dtype=jnp.bfloat16)
    leaves, structure = jax.tree.flatten(variables)

    def forward(leaves, x):
        return model.apply(jax.tree.unflatten(structure, leaves), x, train=False)

    with inference_on("cuda"):
        traced = jax.make_jaxpr(forward)(leaves, images(jnp.bfloat16))
    prepare, run = split(traced)
    prepared = prepare(*leaves)
    late = str(jax.make_jaxpr(run)(prepared, images(jnp.bfloat16)))
    assert "feature_group_count=4" not in late
    assert "select_n" in str(jax.make_jaxpr(prepare)(*leaves))
    assert "select_n" not in late
    assert late.count("convert_element_type") <= 2  # the pooled features and no weight
    assert {leaf.dtype for leaf in prepared if leaf.ndim == 4} == {jnp.dtype(jnp.bfloat16)}


def test_winograd_kernels_are_transformed_ahead_of_time():
    model = create_model("repvgg_a0", depths=(1, 1, 2, 1), num_classes=5, deploy=True)
    x = jax.random.normal(jax.random.key(1), (1, 224, 224, 3))
    variables = random_variables(model, x.shape, jnp.float32)
    leaves, structure = jax.tree.flatten(variables)
    with inference_on("cpu"):
        traced = jax.make_jaxpr(lambda v, x: model.apply(jax.tree.unflatten(structure, v), x, train=False))(leaves, x)
    prepare, _ = split(traced)
    assert (4, 4, 192, 192) in [leaf.shape for leaf in jax.eval_shape(prepare, *leaves)]
    found, expected = compile_inference(model, variables, x)(x), applied(model)(variables, x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_the_options_for_cuda_are_options_of_this_jax():
    """XLA checks names and values on every platform; on the CPU they do nothing."""
    increment = jax.jit(lambda x: x + 1, compiler_options=_CUDA_OPTIONS)
    assert increment(jnp.ones(())) == 2
    with pytest.raises(Exception, match="NONSENSE"):
        jax.jit(lambda x: x + 1, compiler_options={"xla_gpu_enable_command_buffer": "NONSENSE"})(jnp.ones(()))
