"""What `fuse` gives back: dtypes, containers and shardings."""

import collections

import flax.core
import jax
import numpy as np
import pytest

from repvgg_jax.reparam import branch_rule, equivalent_kernels, fuse, fuse_with
from tests.reparam.test_rules import tiny_block, variables_of

RULE = branch_rule(["a", "b"], identity="identity")


def mixed(kernels, conv_bias=None, norm="float32"):
    """A block whose two kernels, perhaps a bias, and norms have these dtypes."""
    branches = {}
    for name, dtype in zip("ab", kernels, strict=True):
        params, stats = jax.tree.map(lambda leaf: leaf.astype(norm), tiny_block())
        branches[name] = ({**params, "conv": {"kernel": params["conv"]["kernel"].astype(dtype)}}, stats)
    if conv_bias:
        branches["b"][0]["conv"]["bias"] = np.ones(2, conv_bias)
    branches["identity"] = jax.tree.map(lambda leaf: leaf.astype(norm), (tiny_block()[0]["bn"], tiny_block()[1]["bn"]))
    return variables_of(**branches)


@pytest.mark.parametrize(
    ("kernels", "conv_bias", "norm", "expected"),
    [
        (("bfloat16", "float32"), None, "float32", "float32"),
        (("float32", "bfloat16"), None, "float32", "float32"),
        (("bfloat16", "float16"), None, "float32", "float32"),
        (("bfloat16", "bfloat16"), "float32", "float32", "float32"),
        (("bfloat16", "bfloat16"), "bfloat16", "float32", "bfloat16"),
        (("bfloat16", "bfloat16"), None, "float32", "bfloat16"),
        (("float16", "float16"), None, "float32", "float16"),
        (("float32", "float32"), None, "bfloat16", "float32"),
        (("float32", "float32"), None, "float16", "float32"),
    ],
    ids=str,
)
def test_a_fused_block_has_the_widest_dtype_of_its_convolutions_whatever_its_norms_have(
    kernels, conv_bias, norm, expected
):
    variables = mixed(kernels, conv_bias, norm)
    for found in (fuse_with(RULE, variables), jax.eval_shape(lambda v: fuse_with(RULE, v), variables)):
        leaves = found["params"]["block"]["reparam"]
        assert {name: str(leaf.dtype) for name, leaf in leaves.items()} == {"kernel": expected, "bias": expected}


@pytest.mark.parametrize("norm", ["bfloat16", "float16"])
def test_narrow_norms_fold_as_what_they_hold_and_not_in_their_own_precision(norm):
    variables = mixed(("float32", "float32"), norm=norm)
    widened = jax.tree.map(lambda leaf: leaf.astype(np.float32), variables)
    expected = jax.tree.leaves(fuse_with(RULE, widened))
    for fold in (fuse_with, jax.jit(fuse_with, static_argnums=0)):
        for found, wide in zip(jax.tree.leaves(fold(RULE, variables)), expected, strict=True):
            np.testing.assert_allclose(found, wide, rtol=1e-6, atol=1e-6)
    in_its_own = jax.tree.map(lambda leaf: leaf.astype(norm).astype(np.float32), expected)
    assert max(np.abs(a - b).max() for a, b in zip(in_its_own, expected, strict=True)) > 1e-5


def test_each_mapping_keeps_its_own_kind():
    variables = variables_of(a=tiny_block(), b=tiny_block((1, 1)))
    rest = flax.core.freeze({"kernel": np.ones(2)})
    ordered = collections.OrderedDict(inner={"mean": np.ones(2)})
    frozen = {
        "params": flax.core.freeze({**variables["params"], "dense": rest}),
        "batch_stats": flax.core.freeze({**variables["batch_stats"], "dense": {"mean": np.ones(2)}}),
    }
    fused = fuse_with(RULE, frozen)
    assert [type(fused), type(fused["params"]), type(fused["batch_stats"])] == [dict, *[flax.core.FrozenDict] * 2]
    mixture = {
        "params": {"backbone": collections.OrderedDict(variables["params"]), "dense": rest},
        "batch_stats": {"backbone": collections.OrderedDict(variables["batch_stats"], norm=ordered), "dense": ordered},
    }
    fused = fuse_with(RULE, mixture)
    assert type(fused["params"]["backbone"]) is collections.OrderedDict
    assert type(fused["params"]["dense"]) is flax.core.FrozenDict
    assert type(fused["batch_stats"]["backbone"]) is collections.OrderedDict
    assert list(fused["batch_stats"]["backbone"]) == ["norm"]
    outer = collections.OrderedDict(variables, counters=np.ones(()))
    assert type(fuse_with(RULE, outer)) is collections.OrderedDict


def test_empty_modules_and_parameters_of_the_root_stay():
    variables = variables_of(a=tiny_block())
    params = {**variables["params"], "pool": {}, "temperature": np.ones(())}
    fused = fuse_with(RULE, {**variables, "params": params})
    assert set(fused["params"]) == {"block", "pool", "temperature"}
    assert "batch_stats" not in fused


def test_a_kernel_split_over_devices_stays_split_and_its_bias_is_whole():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, None, "data"))
    variables = variables_of(a=tiny_block(out=8), b=tiny_block((1, 1), out=8))
    expected = fuse_with(RULE, variables)["params"]["block"]["reparam"]
    spread = jax.tree.map(lambda leaf: jax.device_put(leaf, split if leaf.ndim == 4 else None), variables)
    fused = fuse_with(RULE, spread)["params"]["block"]["reparam"]
    assert fused["kernel"].sharding == split
    assert fused["bias"].sharding.is_fully_replicated
    for name, leaf in fused.items():
        np.testing.assert_array_equal(leaf, expected[name])


def test_equivalent_kernels_go_by_whole_paths_in_the_order_of_the_tree_with_the_epsilon_given():
    variables = variables_of(branch_3x3=tiny_block(), branch_1x1=tiny_block((1, 1)))
    head = {"conv_bn": {"kernel": np.ones(2)}, "head": {"kernel": np.ones(2)}}
    both = {
        "params": {"z": variables["params"], "a": variables["params"], "stage1_aux": head},
        "batch_stats": {"z": variables["batch_stats"], "a": variables["batch_stats"]},
    }
    kernels = equivalent_kernels(both, epsilon=0.1)
    assert list(kernels) == ["z/block", "a/block"]
    fused = fuse(both, epsilon=0.1)["params"]["z"]["block"]["reparam"]
    np.testing.assert_array_equal(kernels["z/block"].kernel, fused["kernel"])
    np.testing.assert_array_equal(kernels["z/block"].bias, fused["bias"])
    default = fuse(both, epsilon=1e-5)["params"]["z"]["block"]["reparam"]["kernel"]
    np.testing.assert_array_equal(equivalent_kernels(both)["z/block"].kernel, default)
    np.testing.assert_array_equal(fuse(both)["params"]["z"]["block"]["reparam"]["kernel"], default)
    assert np.abs(default - fused["kernel"]).max() > 1e-3
