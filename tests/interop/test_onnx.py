"""ONNX graphs compute what the deploy form computes, in ONNX Runtime."""

import functools
import tempfile
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest

from repvgg_jax import create_model, fuse_model
from repvgg_jax.interop.onnx import OPSETS, load_onnx, to_onnx
from repvgg_jax.preprocess import Preprocess
from repvgg_jax.reparam import EquivalenceError, agreement
from tests.random_variables import random_images, random_variables

SMALL = dict(num_classes=7, depths=(1, 2, 2, 1), width_multiplier=(0.25, 0.25, 0.25, 0.25))


@functools.cache
def deployed(name="repvgg_a0", **fields):
    model = create_model(name, **{**SMALL, **fields})
    return fuse_model(model, random_variables(model, dtype=np.float32))


def run(graph, images):
    with tempfile.TemporaryDirectory() as directory:
        onnx.save(graph, Path(directory) / "deploy.onnx")
        return load_onnx(Path(directory) / "deploy.onnx")(images)


def apply(model, variables, images):
    return np.asarray(_apply(model, variables, np.asarray(images)))


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, variables, images):
    return model.apply(variables, images, train=False)


STRIDES = [(2, 2, 2, 2, 2), (1, 1, 2, 2, 1), "dilated"]
QUICK = [("repvgg_b1g4", strides) for strides in STRIDES] + [
    ("repvgg_a0", STRIDES[1]), ("repvgg_d2se", STRIDES[0]), ("repvggplus_l2pse", STRIDES[0])
]  # fmt: skip
REST = [(name, each) for name in ("repvgg_a0", "repvgg_d2se", "repvggplus_l2pse") for each in STRIDES]


@pytest.mark.parametrize(
    ("name", "strides"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.long) for case in REST if case not in QUICK)],
    ids=str,
)
def test_onnx_runtime_computes_the_logits_of_the_deploy_form(name, strides):
    model, variables = deployed(name, **({"output_stride": 8} if strides == "dilated" else {"strides": strides}))
    graph = to_onnx(model, variables)
    for shape in [(1, 32, 32, 3), (3, 33, 30, 3)]:  # one graph: batch, height and width are free
        images = np.array(random_images(shape, np.float32))
        agreement(apply(model, variables, images), run(graph, images.transpose(0, 3, 1, 2))).require(1e-5)
    with pytest.raises(EquivalenceError):  # another side of padding is another function
        mirrored = images.transpose(0, 3, 1, 2)[..., ::-1, ::-1]
        agreement(apply(model, variables, images), run(graph, np.ascontiguousarray(mirrored))).require(1e-3)


def test_a_graph_in_nhwc_takes_the_images_as_they_are():
    model, variables = deployed()
    graph = to_onnx(model, variables, layout="NHWC", image_size=32)
    images = np.array(random_images((2, 32, 32, 3), np.float32))
    agreement(apply(model, variables, images), run(graph, images)).require(1e-5)
    with pytest.raises(Exception, match="invalid dimensions"):
        run(graph, images[:, :30])


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_preprocessing_baked_in_turns_pixels_into_probabilities(layout):
    model, variables = deployed()
    names = tuple("abcdefg")
    preprocess = Preprocess(32, 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), None, names)
    graph = to_onnx(model, variables, layout=layout, image_size=32, preprocess=preprocess)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    normalised = ((pixels / 255 - preprocess.mean) / preprocess.std).astype(np.float32)
    expected = np.asarray(jax.nn.softmax(apply(model, variables, normalised)))
    found = run(graph, pixels if layout == "NHWC" else pixels.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    assert graph.metadata_props[0].value.split("\n") == list(names)


def test_the_graph_holds_one_convolution_a_block_and_nothing_else():
    model = create_model("repvgg_a0", deploy=True)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
    hollow = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    graph = to_onnx(model, hollow)
    assert Counter(node.op_type for node in graph.graph.node) == {
        "Conv": 22, "Relu": 22, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1,
    }  # fmt: skip
    assert sum(np.prod(weight.dims) for weight in graph.graph.initializer) == 8_309_384
    onnx.checker.check_model(graph, full_check=True)


# Runtimes of the release of ONNX that brought an opset read this IR version, https://onnx.ai (docs/Versioning.md).
IR_VERSIONS = {11: 6, 12: 7, 13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10}


@pytest.fixture(scope="module", params=["repvgg_a0", "repvggplus_l2pse"])
def small(request):
    model = create_model(request.param, num_classes=7, depths=(1, 1, 2, 1), width_multiplier=(0.125,) * 4)
    model, variables = fuse_model(model, random_variables(model, dtype=np.float32))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    preprocess = Preprocess(32, 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), None, tuple("abcdefg"))
    images = ((pixels / 255 - preprocess.mean) / preprocess.std).astype(np.float32)
    return model, variables, preprocess, pixels, images, apply(model, variables, images)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_computes_the_same(small, opset, layout):
    model, variables, preprocess, pixels, images, logits = small
    for baked, inputs, expected in ((None, images, logits), (preprocess, pixels, np.asarray(jax.nn.softmax(logits)))):
        graph = to_onnx(model, variables, opset=opset, layout=layout, preprocess=baked)
        onnx.checker.check_model(graph, full_check=True)
        assert [(each.domain, each.version) for each in graph.opset_import] == [("", opset)]
        assert graph.ir_version == IR_VERSIONS[opset]
        found = run(graph, inputs if layout == "NHWC" else inputs.transpose(0, 3, 1, 2))
        agreement(expected, found).require(1e-5)
        with pytest.raises(EquivalenceError):
            agreement(expected, found[::-1]).require(1e-3)


def test_without_a_word_the_opset_is_17():
    assert to_onnx(*deployed()).opset_import[0].version == 17
    assert (OPSETS[0], OPSETS[-1]) == (11, 21)


@pytest.mark.parametrize("opset", [10, 22, 0, -1, 17.0, True, "17", None])
def test_another_opset_is_refused_with_the_range(opset):
    with pytest.raises(ValueError, match=f"opset is {opset!r}: expected a whole number from 11 to 21"):
        to_onnx(*deployed(), opset=opset)


def test_class_names_of_any_text_are_one_line_each():
    model, variables = deployed()
    names = ("a\nb", "caf\udce9", "猫", "d", "e", "f", "")
    preprocess = Preprocess(32, 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), None, names)
    (found,) = to_onnx(model, variables, preprocess=preprocess).metadata_props
    assert found.value.split("\n") == ["a\\nb", "caf\\xe9", "猫", "d", "e", "f", ""]


def test_a_file_that_is_no_graph_is_named(tmp_path):
    whole = to_onnx(*deployed()).SerializeToString()
    for name, data in [("truncated", whole[:200]), ("other", b"no such thing"), ("empty", b"")]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"does not read .*{name}.*write or copy it again"):
            load_onnx(tmp_path / name)


def attributes(node):
    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}


@pytest.mark.parametrize("fields", [{}, {"strides": (1, 1, 2, 2, 1)}, {"output_stride": 8}], ids=str)
@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_b1g4"])
def test_every_convolution_is_padded_by_its_dilation_on_all_four_sides(name, fields):
    """Begin and end alike, at stride 2 too, where `auto_pad` would pad even sizes at the end alone."""
    model = create_model(name, **{**SMALL, **fields}, deploy=True)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False))
    graph = to_onnx(model, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
    convolutions = [node for node in graph.graph.node if node.op_type == "Conv"]
    dimensions = {weight.name: list(weight.dims) for weight in graph.graph.initializer}
    assert len(convolutions) == len(model.blocks)
    for node, block in zip(convolutions, model.blocks, strict=True):
        assert attributes(node) == {
            "strides": [block.stride] * 2, "pads": [block.dilation] * 4, "dilations": [block.dilation] * 2,
            "group": block.groups, "kernel_shape": [3, 3],
        }  # fmt: skip
        out, inside, *taps = dimensions[node.input[1]]
        assert (out, taps) == (block.features, [3, 3])
        assert inside == shapes["params"][block.name]["reparam"]["kernel"].shape[2]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_weights_of_any_dtype_are_written_in_float32(dtype):
    model = create_model("repvggplus_l2pse", **SMALL, deploy=True, param_dtype=dtype)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False))
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), shapes)
    graph = to_onnx(model, variables).graph
    assert {weight.data_type for weight in graph.initializer} == {onnx.TensorProto.FLOAT}
    expected = np.float32(np.asarray(0.1, dtype))
    assert {value for weight in graph.initializer for value in onnx.numpy_helper.to_array(weight).ravel()} == {expected}


@pytest.mark.parametrize(
    ("options", "images", "outputs"),
    [
        ({}, ["batch", 3, "height", "width"], ["batch", 7]),
        ({"layout": "NHWC"}, ["batch", "height", "width", 3], ["batch", 7]),
        ({"batch_size": 2, "image_size": 24}, [2, 3, 24, 24], [2, 7]),
        ({"batch_size": 2, "image_size": 24, "layout": "NHWC"}, [2, 24, 24, 3], [2, 7]),
    ],
    ids=str,
)
def test_the_graph_says_the_sizes_that_were_fixed_and_names_the_others(options, images, outputs):
    model = create_model("repvgg_a0", **SMALL, deploy=True)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False))
    graph = to_onnx(model, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes), **options).graph

    def sizes(value):
        return [each.dim_param or each.dim_value for each in value.type.tensor_type.shape.dim]

    assert [(each.name, sizes(each)) for each in graph.input] == [("images", images)]
    assert [(each.name, sizes(each)) for each in graph.output] == [("logits", outputs)]
