"""What a folded batch norm leaves behind is told from what one that was not folded does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from benchmarks.batch_norms import channel_arithmetic
from repvgg_jax import reparameterize

IMAGES = np.ones((2, 6, 6, 3), np.float32)
WEIGHTS = {
    "kernel": np.ones((3, 3, 3, 4), np.float32),
    "scale": np.arange(1, 5, dtype=np.float32),
    "shift": np.ones(4, np.float32),
}


def convolved(v, x):
    return lax.conv_general_dilated(x, v["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def normalized(y, v):
    return (y - v["shift"]) / jnp.sqrt(v["scale"] + 1e-3) + v["shift"]


# name → function, scales, unfolded
PROGRAMS = {
    "a convolution": (lambda v, x: convolved(v, x), 0, 0),
    "a bias": (lambda v, x: jax.nn.relu(convolved(v, x) + v["shift"]), 0, 0),
    "two biases": (lambda v, x: convolved(v, x) + v["shift"] - v["scale"], 0, 1),
    "a batch norm": (lambda v, x: normalized(convolved(v, x), v), 1, 2),
    "a batch norm in jit": (lambda v, x: jax.jit(normalized)(jax.jit(convolved)(v, x), v), 1, 2),
    "a batch norm after a cast and reshapes": (
        lambda v, x: normalized(convolved(v, x).astype("bfloat16")[:, None].reshape(2, 36, 4), v), 1, 2
    ),
    "a batch norm of no convolution": (lambda v, x: normalized(jax.nn.relu(convolved(v, x)), v), 1, 0),
    "a number": (lambda v, x: 2 * convolved(v, x) / 3 + jnp.full(4, 6.0), 0, 0),
    "a gate that depends on the images": (lambda v, x: convolved(v, x) * x.mean((1, 2, 3), keepdims=True), 0, 0),
}  # fmt: skip


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("name", PROGRAMS)
def test_scales_and_what_was_not_folded_are_counted(name):
    function, *expected = PROGRAMS[name]
    assert list(channel_arithmetic(function, WEIGHTS, IMAGES)) == expected
    fused = reparameterize(function, WEIGHTS, IMAGES, ops="xla")
    if "cast" not in name:  # across one nothing is folded
        assert channel_arithmetic(fused, fused.params, IMAGES).unfolded == 0
