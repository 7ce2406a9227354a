"""What is simulated in floating point is what ONNX Runtime computes with integers, and gradients pass through it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import create_model, fuse_model
from repvgg_jax.quantize import (
    Range,
    bias_errors,
    correct_biases,
    equalize,
    fake_quantize,
    fake_quantize_weights,
    prepare,
    range_of,
    simulate,
    tensor_ranges,
    widen,
)
from repvgg_jax.quantize.simulation import rounded_activations
from tests.random_variables import random_variables

SMALL = dict(num_classes=5, depths=(1, 2, 1, 1), width_multiplier=(0.25, 0.125, 0.125, 0.0625), strides=(1, 1, 2, 2, 1))


def pictures(count, seed):
    """Noise of another colour and contrast in each image, so that logits differ."""
    rng = np.random.default_rng(seed)
    colour, contrast = rng.normal(size=(count, 1, 1, 3)), rng.uniform(0.2, 1, (count, 1, 1, 1))
    return jnp.asarray(colour + contrast * rng.normal(size=(count, 16, 16, 3)), jnp.float32)


IMAGES, TEST = pictures(64, 0), pictures(64, 1)


@pytest.fixture(scope="module", params=["repvgg_a0", "repvgg_b1g4"])
def deployed(request):
    model = create_model(request.param, ops="xla", **SMALL)
    model, variables = fuse_model(model, random_variables(model, dtype=np.float32))
    variables = equalize(model, variables)
    ranges = jax.jit(partial(tensor_ranges, model))(variables, IMAGES)
    return model, variables, ranges


def decibels(found, expected):
    signal = expected - expected.mean(0)
    return 10 * np.log10(np.square(signal).sum() / np.square(found - expected).sum())


def test_values_become_those_of_the_grid_and_0_stays_0():
    x = jnp.linspace(-1.5, 3.5, 1001)
    found = fake_quantize(x, Range(jnp.float32(-1), jnp.float32(3)))
    scale = 4 / 255
    steps = np.asarray(found) / scale
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    assert len(np.unique(np.round(steps))) == 256
    inside = (x > -1 + scale) & (x < 3 - scale)
    assert np.abs(found - x)[inside].max() <= scale / 2 + 1e-6
    assert fake_quantize(jnp.zeros(()), Range(jnp.float32(-0.3), jnp.float32(1))) == 0


def test_gradients_pass_within_the_range_alone():
    slope = jax.vmap(jax.grad(lambda x: fake_quantize(x, Range(jnp.float32(-1), jnp.float32(1)))))
    np.testing.assert_array_equal(slope(jnp.asarray([-2.0, -0.5, 0.3, 0.9, 1.5])), [0, 1, 1, 1, 0])


def test_an_array_of_zeros_stays_one():
    zero = Range(jnp.float32(0), jnp.float32(0))
    np.testing.assert_array_equal(fake_quantize(jnp.zeros(3), zero), 0)


def test_simulated_logits_are_those_of_onnx_runtime_to_one_step_of_few(deployed):
    pytest.importorskip("onnx", reason='pip install -e ".[onnx]"')
    onnxruntime = pytest.importorskip("onnxruntime", reason='pip install -e ".[onnx]"')
    from repvgg_jax.interop.onnx import to_onnx
    from repvgg_jax.interop.onnx_int8 import to_onnx_int8

    model, variables, ranges = deployed
    images = np.asarray(TEST).transpose(0, 3, 1, 2)
    step = float(ranges["logits"].high - ranges["logits"].low) / 255
    for reduce_range in (False, True):
        graph = to_onnx_int8(to_onnx(model, variables), images[:0], ranges=ranges, reduce_range=reduce_range)
        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        expected = session.run(None, {"images": images})[0]
        found = jax.jit(partial(simulate, model, reduce_range=reduce_range))(variables, TEST, ranges)
        differing = np.abs(found - expected) / step
        # Sums that lie between two steps round to either.
        assert differing.max() < 1.01
        assert (differing > 0.01).mean() < 0.05
        other = jax.jit(partial(simulate, model, reduce_range=not reduce_range))(variables, TEST, ranges)
        assert (np.abs(other - expected) > 0.01 * step).mean() > 0.2
    assert "uint8 activations by training" in graph.metadata_props[0].value


def test_the_ranges_are_those_that_onnx_runtime_finds(deployed):
    pytest.importorskip("onnx", reason='pip install -e ".[onnx]"')
    pytest.importorskip("onnxruntime", reason='pip install -e ".[onnx]"')
    from repvgg_jax.interop.onnx import to_onnx
    from repvgg_jax.interop.onnx_int8 import to_onnx_int8

    model, variables, ranges = deployed
    images = np.asarray(IMAGES).transpose(0, 3, 1, 2)
    scales = []
    for options in ({"images": images}, {"images": images[:0], "ranges": ranges}):
        graph = to_onnx_int8(to_onnx(model, variables), **options).graph
        scales.append({each.name: np.frombuffer(each.raw_data or np.float32(each.float_data), np.float32)
                       for each in graph.initializer if each.name.endswith("_scale")})  # fmt: skip
    ours, theirs = scales[1], scales[0]
    assert set(ours) == set(theirs)
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, err_msg=name)


def test_kernels_have_a_scale_for_each_output_and_biases_are_sums_of_products(deployed):
    model, variables, ranges = deployed
    quantized = fake_quantize_weights(model, variables, ranges)["params"]
    read = "images"
    for block in model.blocks:
        kernel = np.asarray(variables["params"][block.name]["reparam"]["kernel"], np.float64)
        scale = np.abs(kernel).max((0, 1, 2)) / 127
        steps = np.asarray(quantized[block.name]["reparam"]["kernel"]) / scale
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
        assert np.abs(np.round(steps)).max() == 127
        of_bias = scale * float(ranges[read].high - ranges[read].low) / 255
        steps = np.asarray(quantized[block.name]["reparam"]["bias"], np.float64) / of_bias
        np.testing.assert_allclose(steps, np.round(steps), atol=0.05)
        read = block.name


def test_what_is_kept_in_float_is_not_rounded(deployed):
    model, variables, ranges = deployed
    names = [block.name for block in model.blocks]
    everything = rounded_activations(model)
    assert everything == set(ranges)
    assert rounded_activations(model, ["stem"]) == everything - {"images"}
    assert rounded_activations(model, ["head"]) == everything - {"pooled", "logits"}
    assert rounded_activations(model, names[1:3]) == everything - {names[1]}
    exact = jax.jit(partial(model.apply, train=False))(variables, TEST)
    kept = jax.jit(partial(simulate, model, keep_float=(*names, "head")))(variables, TEST, ranges)
    np.testing.assert_allclose(kept, exact, rtol=1e-5, atol=1e-5)
    assert np.abs(jax.jit(partial(simulate, model))(variables, TEST, ranges) - exact).max() > 1e-3


def test_the_gradient_of_a_simulated_network_is_near_that_of_the_float_network(deployed):
    model, variables, ranges = deployed
    wide = jax.tree.map(lambda end: 1.2 * end, ranges)  # nothing is cut off

    def loss(forward, variables):
        return jnp.square(forward(variables, TEST)).mean()

    quantized = jax.jit(jax.grad(partial(loss, partial(simulate, model, ranges=wide))))(variables)
    exact = jax.jit(jax.grad(partial(loss, partial(model.apply, train=False))))(variables)
    for path, found in jax.tree_util.tree_leaves_with_path(quantized):
        expected = exact
        for key in path:
            expected = expected[key.key]
        cosine = np.vdot(found, expected) / (np.linalg.norm(found) * np.linalg.norm(expected))
        assert cosine > 0.9, path


def test_corrected_biases_take_back_the_mean_error(deployed):
    model, variables, ranges = deployed
    measure = jax.jit(partial(bias_errors, model))
    errors = measure(variables, IMAGES, ranges)
    assert set(errors) == {*(block.name for block in model.blocks), "head"}
    corrected = correct_biases(variables, errors)
    assert jax.tree.map(jnp.shape, corrected) == jax.tree.map(jnp.shape, variables)
    logits = jax.jit(partial(model.apply, train=False))(variables, IMAGES)
    forward = jax.jit(partial(simulate, model))
    before, after = (np.abs((forward(each, IMAGES, ranges) - logits).mean(0)).max() for each in (variables, corrected))
    mistaken = correct_biases(variables, jax.tree.map(jnp.negative, errors))
    worse = np.abs((forward(mistaken, IMAGES, ranges) - logits).mean(0)).max()
    # What is left is less than half a step of the logits.
    step = float(ranges["logits"].high - ranges["logits"].low) / 255
    assert after < max(0.3 * before, 0.5 * step)
    assert worse > 1.5 * before
    # On other images too.
    others = jax.jit(partial(model.apply, train=False))(variables, TEST)
    noise = [decibels(forward(each, TEST, ranges), others) for each in (mistaken, variables, corrected)]
    assert noise == sorted(noise)


def test_preparing_is_equalizing_and_correcting_in_any_number_of_batches(deployed):
    model, variables, _ = deployed
    many = jnp.concatenate([IMAGES, TEST, TEST[:7]])
    equal, corrected = prepare(model, variables, many)
    images = [many[:64], many[64:128]]
    ranges = widen(*(jax.jit(partial(tensor_ranges, model))(equal, batch) for batch in images))
    errors = [jax.jit(partial(bias_errors, model))(equal, batch, ranges) for batch in images]
    expected = correct_biases(equal, jax.tree.map(lambda a, b: (a + b) / 2, *errors))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), corrected, expected)
    neither = prepare(model, variables, many, equal_channels=False, corrected_biases=False)
    assert neither.corrected == neither.equalized == variables
    with pytest.raises(ValueError, match="images are none"):
        prepare(model, variables, many[:0])


def test_a_range_holds_0_and_those_of_all_batches():
    assert range_of(jnp.asarray([1.0, 2.0])) == (0, 2)
    assert range_of(jnp.asarray([-3.0, -2.0])) == (-3, 0)
    first, second = {"x": Range(-1.0, 2.0)}, {"x": Range(-2.0, 1.0)}
    assert widen(first, second)["x"] == (-2, 2)


@pytest.mark.parametrize("deploy", [True, False])
def test_other_networks_are_refused(deploy):
    name = "repvgg_d2se" if deploy else "repvgg_a0"
    model = create_model(name, deploy=deploy)
    message = "squeeze_excite is 'before_relu'" if deploy else "fuse first"
    for function in (
        partial(simulate, ranges={}),
        partial(bias_errors, ranges={}),
        tensor_ranges,
        prepare,
    ):
        with pytest.raises(ValueError, match=message):
            function(model, {"params": {}}, images=IMAGES)
