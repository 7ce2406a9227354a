"""The result is a function like any other, and so is what it is made from."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from repvgg_jax import create_model
from repvgg_jax.reparam import assert_equivalent
from repvgg_jax.transform import reparameterize
from tests.random_variables import random_images, random_variables
from tests.transform.merging import networks
from tests.transform.merging.comparison import compare, drawn, primitives
from tests.transform.merging.networks import convolve

pytestmark = pytest.mark.usefixtures("float64")


def test_gradients_are_those_of_the_function_custom_ones_included():
    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (rounded(x), None), lambda _, dy: (dy,))
    v = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 2, 2))), "scale": jnp.zeros(2)}
    network = lambda v, x: jax.nn.relu(convolve(rounded(x), v["kernel"])) + jax.nn.relu(x * v["scale"])  # noqa: E731
    images = random_images((1, 5, 5, 2))
    fused = reparameterize(network, v, images)
    expected = jax.grad(lambda x: network(v, x).sum())(images)
    assert float(jnp.abs(expected).max()) > 1
    np.testing.assert_allclose(jax.grad(lambda x: fused(fused.params, x).sum())(images), expected, atol=1e-12)


def test_control_flow_on_inputs_is_passed_through():
    rng = np.random.default_rng(0)
    v = {"kernel": jnp.asarray(rng.normal(size=(3, 3, 3, 3)) / 5), "scale": jnp.asarray(rng.uniform(1, 2, 3))}

    def function(v, x):
        y = jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(convolve(y, v["kernel"]) * v["scale"]), x)
        return jax.lax.cond(x.sum() > 0, lambda y: y * 2, lambda y: y - 1, convolve(y, v["kernel"]) * v["scale"])

    before, after = compare(function, v, (2, 6, 6, 3))
    assert after["conv_general_dilated"] == before["conv_general_dilated"] == 2
    assert after["cond"] == 1


def test_checkpointed_and_jitted_parts_are_read_like_the_rest():
    module = networks.QARepVGG()
    variables = drawn(module, (2, 9, 9, 6))
    _, after = compare(jax.jit(jax.checkpoint(module.apply)), variables, (2, 9, 9, 6))
    assert after["conv_general_dilated"] == 2


def test_inputs_and_outputs_are_pytrees_and_untouched_variables_parameters():
    rng = np.random.default_rng(0)
    v = {"kernel": jnp.asarray(rng.normal(size=(3, 3, 3, 3))), "offset": jnp.asarray(rng.normal(size=(6, 6, 1)))}

    def function(v, inputs, scale):
        return {"sum": (convolve(inputs["a"], v["kernel"]) + v["offset"], inputs["b"] * scale), "given": v["offset"]}

    inputs = {"a": random_images((2, 6, 6, 3)), "b": random_images((4,), seed=3)}
    fused = reparameterize(function, v, inputs, 3.0)
    expected, found = function(v, inputs, 3.0), fused(fused.params, inputs, 3.0)
    chex.assert_trees_all_close(found, expected, atol=1e-12)
    assert sorted(param.shape for param in fused.params.values()) == [(3, 3, 3, 3), (6, 6, 1)]


def test_parameters_kept_in_another_dtype_are_computed_with_in_the_functions_own():
    v = {"kernel": random_images((1, 1, 2, 3)), "scale": random_images((3,), seed=2)}
    images = random_images((1, 4, 4, 2), seed=3)
    fused = reparameterize(lambda v, x: convolve(x, v["kernel"]) * v["scale"], v, images)
    narrow = {name: value.astype(jnp.bfloat16) for name, value in fused.params.items()}
    found = fused(narrow, images)
    assert found.dtype == jnp.float64
    wide = {name: value.astype(jnp.float64) for name, value in narrow.items()}
    np.testing.assert_array_equal(found, fused(wide, images))
    assert float(jnp.abs(found - fused(fused.params, images)).max()) > 1e-4


def test_the_result_can_be_transformed_like_any_function():
    module = networks.QARepVGG()
    variables = drawn(module, (2, 9, 9, 6))
    images = random_images((2, 9, 9, 6))
    fused = reparameterize(module.apply, variables, images)
    many = random_images((3, 2, 9, 9, 6))
    batched = jax.vmap(fused, in_axes=(None, 0))(fused.params, many)
    np.testing.assert_allclose(batched[1], module.apply(variables, many[1]), atol=1e-12)
    ensemble = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), fused.params)
    assert jax.vmap(fused, in_axes=(0, None))(ensemble, images).shape == (2, 2, 9, 9, 6)
    slope = jax.grad(lambda x: fused(fused.params, x).sum())(images)
    np.testing.assert_allclose(slope, jax.grad(lambda x: module.apply(variables, x).sum())(images), atol=1e-11)
    (batch,) = jax.export.symbolic_shape("b")
    exported = jax.export.export(jax.jit(lambda x: fused(fused.params, x)))(
        jax.ShapeDtypeStruct((batch, 9, 9, 6), jnp.float64)
    )
    np.testing.assert_allclose(exported.call(many[0]), batched[0], atol=1e-12)


def test_other_parameters_and_tracers_are_refused():
    module = networks.QARepVGG()
    variables = drawn(module, (2, 9, 9, 6))
    images = random_images((2, 9, 9, 6))
    fused = reparameterize(module.apply, variables, images)
    name, *_ = fused.params
    with pytest.raises(ValueError, match=rf"not those of this function: {name} is missing"):
        fused({key: value for key, value in fused.params.items() if key != name}, images)
    with pytest.raises(ValueError, match=rf"{name} is \(3,\), expected"):
        fused({**fused.params, name: jnp.zeros(3)}, images)
    with pytest.raises(ValueError, match="tracers: the fold is computed once"):
        jax.jit(lambda v: reparameterize(module.apply, v, images)(fused.params, images))(variables)


def test_by_xlas_own_operations_nothing_is_left_but_convolutions():
    """What exporters read: no custom gradients, no choices by platform."""
    model = create_model("repvgg_a0", depths=(1, 1, 1, 1), width_multiplier=(0.25,) * 4, num_classes=5)
    variables = random_variables(model, dtype=np.float32)
    images = random_images((2, 16, 16, 3), np.float32)
    function = lambda v, x: model.apply(v, x, train=False)  # noqa: E731
    fast, plain = (reparameterize(function, variables, images, ops=ops) for ops in ("auto", "xla"))
    assert_equivalent(plain(plain.params, images), fast(fast.params, images), rtol=1e-5)
    assert primitives(fast, fast.params, images)["custom_vjp_call"]
    counted = primitives(plain, plain.params, images)
    assert counted["conv_general_dilated"] == 5
    assert not {"custom_vjp_call", "cond", "platform_index"} & {name for name, count in counted.items() if count}
    with pytest.raises(ValueError, match=r"ops is 'XLA': expected 'auto' or 'xla'"):
        reparameterize(function, variables, images, ops="XLA")


def test_constants_of_symbolic_shapes_are_broadcast_when_the_program_runs():
    v, images = {"kernel": jnp.ones((3, 3, 2, 2))}, random_images((2, 6, 6, 2))
    network = lambda v, x: jnp.where(x > 0.1, convolve(x, v["kernel"]), jnp.full(x.shape, 0.5))  # noqa: E731
    fused = reparameterize(network, v, images)
    (batch,) = jax.export.symbolic_shape("b")
    exported = jax.export.export(jax.jit(lambda x: fused(fused.params, x)))(
        jax.ShapeDtypeStruct((batch, 6, 6, 2), images.dtype)
    )
    np.testing.assert_allclose(exported.call(images), network(v, images), atol=1e-12)


def test_symbolic_shapes_are_merged_alike():
    module = networks.DiverseBranch()
    variables = drawn(module, (2, 9, 9, 3))
    fused = reparameterize(module.apply, variables, random_images((2, 9, 9, 3)))
    batch, height, width = jax.export.symbolic_shape("b, h, w", constraints=["h >= 8", "w >= 8"])
    exported = jax.export.export(jax.jit(lambda x: fused(fused.params, x)))(
        jax.ShapeDtypeStruct((batch, height, width, 3), jnp.float64)
    )
    images = random_images((3, 11, 10, 3))
    np.testing.assert_allclose(exported.call(images), module.apply(variables, images), atol=1e-12)


def test_keys_among_the_variables_are_no_hindrance():
    class Dropping(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), param_dtype=jnp.float64, rngs=rngs)
            self.norm = nnx.BatchNorm(4, use_running_average=True, param_dtype=jnp.float64, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

        def __call__(self, x):
            return self.dropout(nnx.relu(self.norm(self.conv(x))))

    graph, state = nnx.split(Dropping(nnx.Rngs(0)))
    images = random_images((2, 7, 7, 3))
    fused = reparameterize(lambda state, x: nnx.merge(graph, state)(x), state, images)
    np.testing.assert_allclose(fused(fused.params, images), nnx.merge(graph, state)(images), atol=1e-12)
    assert len(fused.params) == 2
