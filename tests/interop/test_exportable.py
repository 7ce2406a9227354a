"""What no exporter can write is refused before anything is built, by both in the same words."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import create_model
from repvgg_jax.interop.exportable import require_exportable
from repvgg_jax.interop.onnx import to_onnx
from repvgg_jax.interop.stablehlo import to_stablehlo
from repvgg_jax.preprocess import Preprocess

PREPROCESS = Preprocess(32, 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), None, tuple("abc"))
WRITERS = pytest.mark.parametrize("write", [to_onnx, to_stablehlo])


def hollow(width=0.25):
    """A deploy form whose weights are there by shape alone."""
    model = create_model("repvgg_a0", num_classes=3, width_multiplier=(width,) * 4, deploy=True)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
    return model, jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)


@WRITERS
def test_a_training_form_is_refused(write):
    with pytest.raises(ValueError, match="training form: fuse first"):
        write(create_model("repvgg_a0", num_classes=3), {})


@WRITERS
@pytest.mark.parametrize("name", ["batch_size", "image_size"])
@pytest.mark.parametrize("size", [0, -1])
def test_a_size_less_than_one_is_refused(write, name, size):
    with pytest.raises(ValueError, match=f"{name} is {size}: expected at least 1, or None"):
        write(*hollow(), **{name: size})


@WRITERS
def test_the_preprocessing_of_another_network_is_refused(write):
    gray = dataclasses.replace(PREPROCESS, channels=1, mean=(0.5,), std=(0.2,))
    with pytest.raises(ValueError, match="expected 3 values each, one for each channel"):
        write(*hollow(), preprocess=gray)
    with pytest.raises(ValueError, match="there are 2 class names: expected 3"):
        write(*hollow(), preprocess=dataclasses.replace(PREPROCESS, class_names=("a", "b")))


@WRITERS
def test_weights_beyond_one_file_are_refused_at_once(write):
    with pytest.raises(ValueError, match=r"the weights take 2.0\d GiB in float32: expected less than 2"):
        write(*hollow(width=7.5))


def test_the_largest_network_of_one_file_is_not_refused():
    model, variables = hollow(width=7.4)
    assert require_exportable(model, variables, batch_size=None, image_size=None, preprocess=None) == 3


def test_a_layout_by_another_name_is_refused():
    with pytest.raises(ValueError, match="layout is 'nhwc': expected 'NCHW' or 'NHWC'"):
        to_onnx(*hollow(), layout="nhwc")
