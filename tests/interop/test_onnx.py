"""ONNX graphs compute what the deploy form computes, in ONNX Runtime."""

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
from repvgg_jax.interop.preprocess import Preprocess
from repvgg_jax.reparam import EquivalenceError, agreement
from tests.random_variables import random_images, random_variables

SMALL = dict(num_classes=7, depths=(1, 2, 2, 1), width_multiplier=(0.25, 0.25, 0.25, 0.25))


def deployed(name="repvgg_a0", **fields):
    model = create_model(name, **{**SMALL, **fields})
    return fuse_model(model, random_variables(model, dtype=np.float32))


def run(graph, images):
    with tempfile.TemporaryDirectory() as directory:
        onnx.save(graph, Path(directory) / "deploy.onnx")
        return load_onnx(Path(directory) / "deploy.onnx")(images)


def apply(model, variables, images):
    return np.asarray(jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, jnp.asarray(images)))


@pytest.mark.parametrize("strides", [(2, 2, 2, 2, 2), (1, 1, 2, 2, 1), "dilated"])
@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_b1g4", "repvgg_d2se", "repvggplus_l2pse"])
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
