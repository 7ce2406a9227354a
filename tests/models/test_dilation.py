from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import create_model, fuse_model
from tests.random_variables import random_images, random_variables

SMALL = dict(depths=(1, 2, 2, 2), width_multiplier=(0.25,) * 4, num_classes=5, param_dtype=jnp.float64)
SIZES = {"even": 64, "odd": 65}


def stages(model, variables, images):
    ends = jax.jit(lambda v, x: model.apply(v, x, train=False, features=True))(variables, images)
    return {name: np.asarray(ends[name]) for name in ("stage2", "stage3", "stage4")}


@cache
def undilated(size):
    """Variables, images and the maps of the strided network, for every output stride."""
    model, images = create_model("repvgg_a0", **SMALL), random_images((2, size, size, 3))
    variables = random_variables(model)
    return variables, images, stages(model, variables, images)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("output_stride", [8, 16])
def test_a_dilated_network_computes_the_undilated_one_at_every_pixel_between(output_stride, size):
    """Every k-th pixel of a dilated map is a pixel of the strided one, for the same variables."""
    variables, images, strided = undilated(size)
    dilated_model = create_model("repvgg_a0", output_stride=output_stride, **SMALL)
    dilated = stages(dilated_model, variables, images)
    for name, stride in (("stage2", 8), ("stage3", 16), ("stage4", 32)):
        step = max(1, stride // output_stride)
        assert dilated[name].shape[1] == -(-size // min(stride, output_stride))
        np.testing.assert_allclose(dilated[name][:, ::step, ::step], strided[name], atol=1e-12)
    # Strides of 1 without dilation: negative control.
    plain = stages(dilated_model.clone(dilations=(1, 1, 1, 1, 1)), variables, images)
    step = 32 // output_stride
    assert np.abs(plain["stage4"][:, ::step, ::step] - strided["stage4"]).max() > 1e-3


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_b1g4"])
def test_fuse_preserves_a_dilated_network(name):
    model = create_model(name, output_stride=8, **SMALL)
    variables = random_variables(model)
    images = random_images((2, 65, 65, 3))
    expected, found = (stages(*form, images) for form in ((model, variables), fuse_model(model, variables)))
    for end in expected:
        np.testing.assert_allclose(found[end], expected[end], atol=1e-12 * np.abs(expected[end]).max())


@pytest.mark.parametrize(
    ("output_stride", "message"),
    [
        (5, r"output_stride is 5: expected one of \[2, 4, 8, 16, 32\]"),
        (64, r"output_stride is 64: expected one of"),
        (2, r"output_stride is 2: expected a larger one, since stage1 .* its 48 channels"),
    ],
)
def test_output_strides_that_cannot_be_are_refused(output_stride, message):
    with pytest.raises(ValueError, match=message):
        create_model("repvgg_a0", output_stride=output_stride)


def test_the_output_stride_of_the_strides_changes_nothing():
    assert create_model("repvgg_a0", output_stride=32) == create_model("repvgg_a0")
