"""What a network starts with: PyTorch's scales, and norms that change nothing."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.models import RepVGG
from repvgg_jax.models.norm import BatchNorm

MODEL = RepVGG(
    num_classes=20, depths=(1, 2, 2, 1), width_multiplier=(0.25, 0.25, 0.25, 0.125), groups=4,
    squeeze_excite="after_relu", squeeze_excite_reduction=2, auxiliary_heads=True,
)  # fmt: skip


@cache
def fresh(deploy):
    model, images = MODEL.clone(deploy=deploy), jnp.ones((1, 8, 8, 3))
    # Under jit, where the output of the network is never computed.
    variables = jax.jit(lambda: model.init(jax.random.key(0), images, train=False))()
    leaves = jax.tree_util.tree_flatten_with_path(jax.device_get(variables))[0]
    return {"/".join(entry.key for entry in path): leaf for path, leaf in leaves}


def kernels(deploy):
    return {path: leaf for path, leaf in fresh(deploy).items() if path.endswith("kernel")}


@pytest.mark.parametrize("deploy", [False, True], ids=["training", "deploy"])
def test_kernels_are_uniform_up_to_one_over_the_root_of_what_an_output_reads(deploy):
    """U(-1/√fan_in, 1/√fan_in) for convolutions, grouped or not, for squeeze-excite and for all classifiers."""
    for path, kernel in kernels(deploy).items():
        fan_in = math.prod(kernel.shape[:-1])
        drawn = np.sort(kernel.ravel()) * math.sqrt(fan_in)
        assert -1 <= drawn[0] < drawn[-1] <= 1, path
        # Kolmogorov's distance from the uniform distribution, by which one in 10⁶ would differ by chance.
        distance = np.abs((drawn + 1) / 2 - (np.arange(drawn.size) + 0.5) / drawn.size).max()
        assert distance < 2.7 / math.sqrt(drawn.size), path
    convolution = "reparam" if deploy else "branch_3x3/conv"
    assert kernels(deploy)[f"params/stage2_block1/{convolution}/kernel"].shape == (3, 3, 16 // 4, 32)


def test_every_kind_of_layer_is_there():
    ends = {"/".join(path.split("/")[2:]) for path in kernels(False)}
    assert ends == {
        "branch_3x3/conv/kernel", "branch_1x1/conv/kernel", "se/down/kernel", "se/up/kernel", "conv_bn/conv/kernel",
        "head/kernel", "kernel",
    }  # fmt: skip
    assert {path.split("/")[-2] for path in kernels(True)} == {"reparam", "down", "up", "head"}


@pytest.mark.parametrize("deploy", [False, True], ids=["training", "deploy"])
def test_norms_start_as_the_identity_and_biases_at_zero(deploy):
    constants = {"scale": 1, "bias": 0, "mean": 0, "var": 1}
    found = {path: leaf for path, leaf in fresh(deploy).items() if not path.endswith("kernel")}
    assert {path.split("/")[-1] for path in found} == ({"bias"} if deploy else set(constants))
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, constants[path.split("/")[-1]], err_msg=path)


def test_kernels_of_one_shape_are_drawn_apart():
    seen = {leaf.tobytes() for leaf in kernels(False).values()}
    assert len(seen) == len(kernels(False))


@pytest.mark.parametrize("ops", ["auto", "xla"])
def test_initialising_in_training_mode_takes_no_statistics(ops):
    x = jnp.full((2, 3, 3, 2), 5.0)
    variables = BatchNorm(use_running_average=False, ops=ops).init(jax.random.key(0), x)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)
