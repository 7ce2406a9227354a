"""Foreign networks, fused by rules."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import branch_rule, first_match, fuse_with
from repvgg_jax.reparam import Replacement
from tests.random_variables import random_images

EPSILON = 1e-3


class ForeignConvBN(nn.Module):
    size: int
    stride: int
    groups: int
    dilation: int
    affine: bool
    conv_bias: bool

    @nn.compact
    def __call__(self, x):
        padding = self.size // 2 * self.dilation
        x = nn.Conv(
            8, (self.size, self.size), self.stride, [(padding, padding)] * 2, kernel_dilation=self.dilation,
            feature_group_count=self.groups, use_bias=self.conv_bias, name="conv",
        )(x)  # fmt: skip
        return norm(self.affine, "bn")(x)


def norm(affine, name):
    return nn.BatchNorm(use_running_average=True, epsilon=EPSILON, use_scale=affine, use_bias=affine, name=name)


class ForeignBlock(nn.Module):
    """A block with the names of timm's `RepVggBlock`, in the form of the variables given."""

    stride: int = 1
    groups: int = 1
    size: int = 3
    dilation: int = 1
    affine: bool = True
    conv_bias: bool = False
    fused: bool = False

    @nn.compact
    def __call__(self, x):
        if self.fused:
            padding = self.size // 2 * self.dilation
            y = nn.Conv(
                8, (self.size, self.size), self.stride, [(padding, padding)] * 2, kernel_dilation=self.dilation,
                feature_group_count=self.groups, name="reparam_conv",
            )(x)  # fmt: skip
        else:
            branch = dict(stride=self.stride, groups=self.groups, affine=self.affine, conv_bias=self.conv_bias)
            y = ForeignConvBN(self.size, dilation=self.dilation, name="conv_kxk", **branch)(x)
            y += ForeignConvBN(1, dilation=1, name="conv_1x1", **branch)(x)
            if self.stride == 1:
                y += norm(self.affine, "identity")(x)
        return nn.Dense(8, name="attn")(nn.relu(y))


class ForeignNet(nn.Module):
    block: dict
    fused: bool = False

    @nn.compact
    def __call__(self, x):
        x = ForeignBlock(**self.block, fused=self.fused, name="stages_0")(x)
        x = nn.BatchNorm(use_running_average=True, name="head_norm")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def draw(net, images):
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), images))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.2, 1.2, leaf.shape) - 0.1), shapes)


def timm_like(epsilon=EPSILON):
    return branch_rule(("conv_kxk", "conv_1x1"), identity="identity", into="reparam_conv", epsilon=epsilon)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "fields",
    [
        {}, {"stride": 2}, {"groups": 2}, {"groups": 8}, {"size": 5}, {"dilation": 2}, {"affine": False},
        {"conv_bias": True}, {"groups": 4, "size": 7, "affine": False, "conv_bias": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_foreign_network_with_timm_names_keeps_its_output(fields):
    net, images = ForeignNet(fields), random_images((2, 12, 12, 8))
    variables = draw(net, images)
    expected = net.apply(variables, images)
    fused = fuse_with(timm_like(), variables)
    assert set(fused["params"]["stages_0"]) == {"reparam_conv", "attn"}
    chex.assert_trees_all_equal(fused["batch_stats"], {"head_norm": variables["batch_stats"]["head_norm"]})
    chex.assert_trees_all_close(net.clone(fused=True).apply(fused, images), expected, rtol=1e-12)

    wrong = fuse_with(timm_like(epsilon=1e-5), variables)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(net.clone(fused=True).apply(wrong, images), expected, rtol=1e-6)


def test_first_match_composes_and_a_rule_of_ones_own_is_a_function():
    asked = []

    def drop_dropout(path, params, batch_stats):
        asked.append(path)
        return Replacement({}, {}) if path[-1:] == ("auxiliary",) else None

    leaf = np.ones(2, np.float32)
    bn = {"scale": leaf, "bias": leaf}
    statistics = {"mean": leaf, "var": leaf}
    branch = {"conv": {"kernel": np.ones((3, 3, 2, 2), np.float32)}, "bn": bn}
    variables = {
        "params": {"a": {"conv_kxk": branch}, "auxiliary": {"kernel": leaf}},
        "batch_stats": {"a": {"conv_kxk": {"bn": statistics}}, "auxiliary": {"bn": statistics}},
    }
    fused = fuse_with(first_match(drop_dropout, timm_like()), variables)
    assert jax.tree.map(np.shape, fused) == {"params": {"a": {"reparam_conv": {"kernel": (3, 3, 2, 2), "bias": (2,)}}}}
    assert asked == [(), ("a",), ("auxiliary",)]


def test_numpy_variables_come_back_as_numpy():
    leaf = np.ones(2, np.float32)
    variables = {
        "params": {"a": {"conv_kxk": {"conv": {"kernel": np.ones((1, 1, 2, 2), np.float32)}}}},
        "batch_stats": {"a": {"conv_kxk": {"bn": {"mean": leaf, "var": leaf}}}},
    }
    kernel = fuse_with(timm_like(), variables)["params"]["a"]["reparam_conv"]["kernel"]
    assert isinstance(kernel, np.ndarray)
    assert kernel.dtype == np.float32


@pytest.mark.usefixtures("float64")
def test_official_names_are_one_rule_away():
    images = random_images((2, 8, 8, 8))
    net = ForeignNet({})
    variables = draw(net, images)
    names = {"conv_kxk": "rbr_dense", "conv_1x1": "rbr_1x1", "identity": "rbr_identity"}
    renamed = {
        kind: {**tree, "stages_0": {names.get(key, key): value for key, value in tree["stages_0"].items()}}
        for kind, tree in variables.items()
    }
    official_like = branch_rule(("rbr_dense", "rbr_1x1"), identity="rbr_identity", into="rbr_reparam", epsilon=EPSILON)
    fused = fuse_with(official_like, renamed)["params"]["stages_0"]["rbr_reparam"]
    chex.assert_trees_all_equal(fused, fuse_with(timm_like(), variables)["params"]["stages_0"]["reparam_conv"])
