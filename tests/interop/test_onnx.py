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
from repvgg_jax.interop.onnx import load_onnx, to_onnx
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


def test_a_training_form_is_refused():
    with pytest.raises(ValueError, match="fuse first"):
        to_onnx(create_model("repvgg_a0", num_classes=3), {})
