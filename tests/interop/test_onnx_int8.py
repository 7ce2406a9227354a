"""The INT8 graph computes what the float graph does, to the precision of 8 bits, with integer convolutions alone."""

import collections
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason='pip install -e ".[onnx]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='pip install -e ".[onnx]"')

from repvgg_jax import create_model, fuse_model  # noqa: E402
from repvgg_jax.interop.onnx import to_onnx  # noqa: E402
from repvgg_jax.interop.onnx_int8 import layer_nodes, to_onnx_int8  # noqa: E402
from repvgg_jax.quantize import equalize  # noqa: E402
from tests.random_variables import random_variables  # noqa: E402

SMALL = dict(num_classes=5, depths=(1, 2, 1, 1), width_multiplier=(0.25, 0.125, 0.125, 0.0625), strides=(1, 1, 2, 2, 1))


def pictures(count, seed):
    """Noise of another colour and contrast in each image, so that logits differ."""
    rng = np.random.default_rng(seed)
    colour, contrast = rng.normal(size=(count, 3, 1, 1)), rng.uniform(0.2, 1, (count, 1, 1, 1))
    return (colour + contrast * rng.normal(size=(count, 3, 16, 16))).astype(np.float32)


IMAGES, TEST = pictures(96, 0), pictures(64, 1)


@cache
def deployed(variant="repvgg_a0", skew=0.0):
    """A deploy form; with skew its channels differ by powers of ten, and it is the same function."""
    model = create_model(variant, **SMALL)
    model, variables = fuse_model(model, random_variables(model, dtype=np.float32))
    params = dict(equalize(model, variables)["params"])
    if skew:
        stem, block = (params[name]["reparam"] for name in ("stem", "stage1_block1"))
        size = jnp.asarray(10.0 ** np.linspace(-skew, skew, len(stem["bias"])), jnp.float32)
        params["stem"] = {"reparam": {name: leaf * size for name, leaf in stem.items()}}
        params["stage1_block1"] = {"reparam": {**block, "kernel": block["kernel"] / size[:, None]}}
    return model, {"params": params}


@cache
def graph(variant="repvgg_a0", skew=0.0):
    return to_onnx(*deployed(variant, skew))


def run(model, images=TEST):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


def decibels(quantized, reference):
    """Signal to noise of the logits."""
    expected, found = run(reference), run(quantized)
    expected = expected - expected.mean(0)
    return 10 * np.log10((expected**2).sum() / ((found - run(reference)) ** 2).sum())


def optimized(model, tmp_path):
    """The operators that ONNX Runtime makes of a graph, counted."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_the_logits_are_those_of_float_to_the_precision_of_8_bits(method):
    assert decibels(to_onnx_int8(graph(), IMAGES, method=method), graph()) > 20


@pytest.mark.parametrize("variant", ["repvgg_a0", "repvgg_b1g4"])
def test_each_block_is_one_integer_convolution_and_no_relu_is_left(variant, tmp_path):
    blocks = len(deployed(variant)[0].blocks)
    quantized = to_onnx_int8(graph(variant), IMAGES)
    counts = optimized(quantized, tmp_path)
    assert counts["QLinearConv"] == blocks
    assert counts["Conv"] == counts["Relu"] == counts["Gemm"] == 0
    assert decibels(quantized, graph(variant)) > 12


def test_unequal_channels_lose_everything_per_tensor_and_equalizing_brings_it_back():
    skewed = graph(skew=2.0)
    np.testing.assert_allclose(run(skewed), run(graph()), rtol=0, atol=1e-4 * np.abs(run(graph())).max())
    lost = decibels(to_onnx_int8(skewed, IMAGES, method="minmax", per_channel=False), skewed)
    model, variables = deployed(skew=2.0)
    equal = to_onnx(model, equalize(model, variables))
    kept = decibels(to_onnx_int8(equal, IMAGES, method="minmax", per_channel=False), skewed)
    assert lost < 5
    assert kept > 15
    assert decibels(to_onnx_int8(equal, IMAGES), skewed) > 20


def test_what_is_kept_in_float_is_named_by_its_layer(tmp_path):
    assert list(layer_nodes(graph())) == [*(block.name for block in deployed()[0].blocks), "head"]
    kept = ["stage1_block1", "stage2_block2", "stage4_block1", "head"]
    quantized = to_onnx_int8(graph(), IMAGES, keep_float=kept)
    onnx.checker.check_model(quantized)
    counts = optimized(quantized, tmp_path)
    assert (counts["Conv"] + counts["FusedConv"], counts["QLinearConv"]) == (3, len(deployed()[0].blocks) - 3)
    assert counts["Gemm"] == 1
    # What a runtime makes of the file is what it says.
    plain = onnxruntime.SessionOptions()
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    literal = onnxruntime.InferenceSession(quantized.SerializeToString(), plain, providers=["CPUExecutionProvider"])
    differences = np.abs(run(quantized) - literal.run(None, {"images": TEST})[0])
    assert np.median(differences) < 1e-4  # sums that lie between two steps round to either
    assert quantized.metadata_props[0].value.endswith("stage1_block1 stage2_block2 stage4_block1 head in float")
    with pytest.raises(ValueError, match=r"keep_float has stage9_block1: expected some of stem, .*, head"):
        to_onnx_int8(graph(), IMAGES, keep_float=["stage9_block1"])


@pytest.mark.parametrize("count", [1, 64, 95])
def test_calibration_is_repeatable_with_any_number_of_images(count):
    first, second = (to_onnx_int8(graph(), IMAGES[:count]).SerializeToString() for _ in range(2))
    assert first == second
    assert first != to_onnx_int8(graph(), 2 * IMAGES).SerializeToString()


@pytest.mark.parametrize(("reduce_range", "largest"), [(False, 127), (True, 64)])
def test_a_reduced_range_leaves_a_bit_of_the_weights_unused(reduce_range, largest):
    quantized = to_onnx_int8(graph(), IMAGES, reduce_range=reduce_range)
    weights = [onnx.numpy_helper.to_array(each) for each in quantized.graph.initializer]
    kernels = [each for each in weights if each.dtype == np.int8 and each.ndim == 4]
    assert len(kernels) == len(deployed()[0].blocks)
    assert max(np.abs(kernel.astype(int)).max() for kernel in kernels) == largest
    (line,) = [each.value for each in quantized.metadata_props if each.key == "quantization"]
    assert ("7 of 8 bits" in line) == reduce_range


def test_what_cannot_be_calibrated_is_refused():
    with pytest.raises(ValueError, match="images are none: expected at least one"):
        to_onnx_int8(graph(), IMAGES[:0])
    with pytest.raises(ValueError, match="method is 'best': expected minmax, percentile"):
        to_onnx_int8(graph(), IMAGES, method="best")


def test_it_prints_nothing(capfd):
    to_onnx_int8(graph(), IMAGES)
    assert "".join(capfd.readouterr()) == ""
