"""Rules: foreign networks, and what counts as a block."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import branch_rule, fuse_with
from repvgg_jax.reparam import Replacement, first_match, repvgg_rule
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


def test_rules_are_values():
    assert timm_like() == timm_like() != timm_like(epsilon=0.5)
    assert branch_rule(["a", "b"]) == branch_rule(("a", "b"))
    assert repvgg_rule(1e-3) == repvgg_rule(1e-3) != repvgg_rule(1e-5)
    assert len({timm_like(), timm_like(), first_match(timm_like()), first_match(timm_like())}) == 2


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


def tiny_block(size=(3, 3), into=2, out=2, dtype=np.float32, **statistics):
    """Params and statistics of a branch of two channels, under the default names of `branch_rule`."""
    rng = np.random.default_rng(size[0])
    kernel, vectors = rng.normal(size=(*size, into, out)), rng.uniform(0.5, 1.5, (4, out))
    kernel, (scale, bias, mean, var) = kernel.astype(dtype), vectors.astype(dtype)
    params = {"conv": {"kernel": kernel}, "bn": {"scale": scale, "bias": bias}}
    return params, {"bn": {"mean": mean, "var": var, **statistics}}


def variables_of(params=None, stats=None, **branches):
    """Variables of one block, of branches and what else it holds."""
    return {
        "params": {"block": {**{name: branch[0] for name, branch in branches.items()}, **(params or {})}},
        "batch_stats": {"block": {**{name: branch[1] for name, branch in branches.items()}, **(stats or {})}},
    }


def test_a_rule_needs_no_more_than_the_names_of_convolutions():
    variables = variables_of(a=tiny_block(), b=tiny_block((1, 1)))
    (name,) = fuse_with(branch_rule(["a", "b"]), variables)["params"]["block"]
    assert name == "reparam"
    explicit = branch_rule(["a", "b"], into="reparam", conv="conv", norm="bn", epsilon=1e-5)
    chex.assert_trees_all_equal(fuse_with(branch_rule(["a", "b"]), variables), fuse_with(explicit, variables))
    block = variables_of(branch_3x3=tiny_block(), branch_1x1=tiny_block((1, 1)))
    chex.assert_trees_all_equal(fuse_with(repvgg_rule(), block), fuse_with(repvgg_rule(1e-5), block))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(fuse_with(repvgg_rule(1e-3), block), fuse_with(repvgg_rule(1e-5), block))


def test_a_channel_without_variance_folds_and_any_negative_variance_is_refused():
    """A dead channel divides by the root of epsilon, as its batch norm does."""
    for var in ([0.0, 1.0], [0.0, 0.0]):
        branch = tiny_block(var=np.array(var, np.float32))
        found = fuse_with(branch_rule(["a"], epsilon=1e-4), variables_of(a=branch))["params"]["block"]["reparam"]
        norm, stats = branch[0]["bn"], branch[1]["bn"]
        factor = norm["scale"] / np.sqrt(np.array(var) + 1e-4)
        np.testing.assert_allclose(found["kernel"], branch[0]["conv"]["kernel"] * factor, rtol=1e-6)
        np.testing.assert_allclose(found["bias"], norm["bias"] - stats["mean"] * factor, rtol=1e-5)
    for var in ([1.0, -1e-12], [-0.5, 1.0]):
        with pytest.raises(ValueError, match=rf"a/bn/var holds negative variances \(smallest {min(var):.6g}\)"):
            fuse_with(branch_rule(["a"]), variables_of(a=tiny_block(var=np.array(var, np.float32))))


@pytest.mark.parametrize("name", ["mean", "var"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_statistic_that_is_not_finite_is_refused(name, value):
    branch = tiny_block(**{name: np.array([value, 1], np.float32)})
    with pytest.raises(ValueError, match=rf"a/bn/{name} holds 1 values that are not finite \(of 2\)"):
        fuse_with(branch_rule(["a"]), variables_of(a=branch))


def test_statistics_that_are_known_are_checked_beside_those_that_are_traced():
    variables = variables_of(a=tiny_block(var=np.array([-1.0, 1.0], np.float32)))

    def fused(mean):
        variables["batch_stats"]["block"]["a"]["bn"]["mean"] = mean
        return fuse_with(branch_rule(["a"]), variables)

    with pytest.raises(ValueError, match="negative variances"):
        jax.eval_shape(fused, jax.ShapeDtypeStruct((2,), np.float32))


def test_a_sibling_of_the_branches_keeps_its_weights_and_statistics_whatever_they_are():
    sibling = ({"scale": np.ones(3)}, {"mean": np.full(3, np.nan), "var": -np.ones(3)})
    fused = fuse_with(branch_rule(["a"]), variables_of(a=tiny_block(), after=sibling))
    assert set(fused["params"]["block"]) == {"reparam", "after"}
    assert fused["params"]["block"]["after"] is sibling[0]
    assert fused["batch_stats"] == {"block": {"after": sibling[1]}}


IDENTITY = ({"scale": np.ones(2), "bias": np.ones(2)}, {"mean": np.ones(2), "var": np.ones(2)})


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (variables_of(a=tiny_block(), params={"identity": IDENTITY[0]}), "batch_stats of identity lack mean and var"),
        (
            variables_of(a=tiny_block(), identity=(IDENTITY[0], {"var": np.ones(2)})),
            r"batch_stats of identity lack mean \(found \['var'\]\)",
        ),
        (variables_of(a=tiny_block(), stats={"a": {"bn": {}}}), r"batch_stats of a lack mean and var \(found \[\]\)"),
        (variables_of(a=tiny_block(), stats={"a": {"bn": {"var": np.ones(2)}}}), "batch_stats of a lack mean "),
        ({"params": variables_of(a=tiny_block())["params"]}, "batch_stats of a lack mean and var.*whole variables"),
        (variables_of(a=tiny_block(), params={"b": np.ones(2)}), r"b is an array, expected a mapping with conv/kernel"),
        (variables_of(a=tiny_block(), stats={"a": np.ones(2)}), r"a is an array, expected a mapping with conv/kernel"),
        (
            variables_of(a=tiny_block(into=3, out=4), identity=({}, {"mean": np.ones(4), "var": np.ones(4)})),
            r"identity normalises \(4,\) channels beside a kernel \(3, 3, 3, 4\): expected .*in/groups to divide",
        ),
    ],
    ids=["identity_stats", "identity_mean", "both", "mean", "no_stats", "array", "array_stats", "indivisible"],
)
def test_a_malformed_block_is_refused_by_name(variables, message):
    with pytest.raises(ValueError, match=f"cannot fuse these blocks:\n  block: {message}"):
        fuse_with(branch_rule(["a", "b"], identity="identity"), variables)


@pytest.mark.parametrize(
    "branch",
    [np.ones(2), {"conv": np.ones(2)}, {"conv": {"weight": np.ones(2)}}, {"kernel": np.ones((3, 3, 2, 2))}],
    ids=["array", "array_conv", "other_leaf", "kernel_alone"],
)
def test_what_only_has_the_name_of_a_branch_is_no_block(branch):
    with pytest.raises(ValueError, match="no block to fuse"):
        fuse_with(branch_rule(["a"]), {"params": {"block": {"a": branch}}})


def test_only_an_auxiliary_head_by_name_and_content_goes():
    head = {"conv_bn": {"kernel": np.ones(2)}, "head": {"kernel": np.ones(2)}}
    others = {"aux": head, "neck": {"stage1_aux": {**head, "more": {"kernel": np.ones(2)}}}, "stage2_aux": {"head": {}}}
    variables = variables_of(branch_3x3=tiny_block(), branch_1x1=tiny_block((1, 1)))
    params = {**variables["params"], **others, "body": {"stage2_aux": head, "stage3_first_aux": head}}
    fused = fuse_with(repvgg_rule(), {**variables, "params": params})["params"]
    assert set(fused) == {"block", *others}
    chex.assert_trees_all_equal({name: fused[name] for name in others}, others)


def test_a_malformed_block_at_the_root_is_named_so():
    branch = tiny_block()
    with pytest.raises(ValueError, match="the root: batch_stats of a lack mean and var"):
        fuse_with(branch_rule(["a"]), {"params": {"a": branch[0]}, "batch_stats": {}})


def test_the_first_rule_that_matches_wins():
    once, twice = branch_rule(["a"], into="once"), branch_rule(["a"], into="twice")
    fused = fuse_with(first_match(once, twice), variables_of(a=tiny_block()))
    assert set(fused["params"]["block"]) == {"once"}
