"""Networks that know nothing of this package come out in the fewest convolutions, RepVGG as `fuse_model` makes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from repvgg_jax import VARIANTS, create_model, fuse_model
from repvgg_jax.reparam import assert_equivalent
from repvgg_jax.transform import reparameterize
from tests.random_variables import random_images, random_variables
from tests.transform.merging import networks
from tests.transform.merging.comparison import compare, drawn, primitives

pytestmark = pytest.mark.usefixtures("float64")


LINEN = {
    "resnet": (networks.ResNet((1, 2)), (8, 8)),
    "bottleneck": (networks.ResNet((2, 1), bottleneck=True), (12, 12)),
    "resnet18": (networks.ResNet(), (20, 20)),
    "resnet50": (networks.ResNet((3, 4, 6, 3), bottleneck=True), (53, 53)),
    "mobileone": (networks.MobileOne(), (18, 6)),
    "mobileone_grouped": (networks.MobileOne(groups=2), (18, 6)),
    "diverse_branch": (networks.DiverseBranch(), (5, 1)),
    "acnet": (networks.Asymmetric(), (6, 2)),
    "qarepvgg": (networks.QARepVGG(), (4, 2)),
    "large_kernel": (networks.LargeKernel(), (2, 1)),
    "dilated": (networks.Dilated(), (6, 5)),
    "attention": (networks.Attention(), (0, 0)),
    "shared": (networks.Shared(), (2, 2)),
}


LONG = ("resnet18", "resnet50")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in LINEN])
def test_a_linen_network_keeps_its_function_in_the_fewest_convolutions(name):
    module, expected = LINEN[name]
    shape = (2, 13, 14, 6 if name in ("mobileone_grouped", "qarepvgg", "large_kernel") else 3)
    before, after = compare(module.apply, drawn(module, shape), shape, any_size=True)
    assert (before["conv_general_dilated"], after["conv_general_dilated"]) == expected
    if isinstance(module, networks.ResNet):
        # No arithmetic of a batch norm is left: a bias for each convolution, the residual sums, the head's bias.
        assert before["rsqrt"] == expected[0]
        assert (after["rsqrt"], after["sub"], after["div"]) == (0, 0, 0)
        assert after["add"] == expected[1] + sum(module.depths) + 1
    if name == "attention":
        # Broadcasts of constants cost nothing.
        assert after.total() - after["broadcast_in_dim"] <= before.total() - before["broadcast_in_dim"]


@pytest.mark.parametrize(
    ("depths", "bottleneck", "count"),
    [
        ((1, 2), False, 8),
        ((2, 1), True, 12),
        pytest.param((2, 2, 2, 2), False, 20, marks=pytest.mark.long),
        pytest.param((3, 4, 6, 3), True, 53, marks=pytest.mark.long),
    ],
)
def test_a_resnet_in_nnx_is_merged_too(depths, bottleneck, count):
    module = networks.NNXResNet(depths, bottleneck, nnx.Rngs(0))
    graph, state = nnx.split(module)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape)), state)
    before, after = compare(lambda state, x: nnx.merge(graph, state)(x), state, (2, 9, 9, 3))
    assert before["conv_general_dilated"] == after["conv_general_dilated"] == count
    assert (before["rsqrt"], after["rsqrt"]) == (count, 0)


def test_a_network_of_bare_lax_is_merged_too():
    rng = np.random.default_rng(0)
    weights = {
        "kernels": [jnp.asarray(rng.normal(size=(4, channels, 3, 3))) for channels in (3, 4, 4)],
        "means": [jnp.asarray(rng.normal(size=4)) for _ in range(3)],
        "deviations": [jnp.asarray(rng.uniform(0.5, 1.5, 4)) for _ in range(3)],
    }
    before, after = compare(networks.bare, weights, (2, 3, 8, 9))
    assert before["conv_general_dilated"] == after["conv_general_dilated"] == 3
    assert (after["sub"], after["div"]) == (0, 0)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long if name == "repvgg_a0" else pytest.mark.slow) for name in VARIANTS],
)
def test_every_repvgg_comes_out_as_fuse_model_makes_it(name):
    """As many convolutions, multiply-adds and parameters as the deploy form, and its logits. A quarter as wide and half
    as deep: at its own size one network takes gigabytes in float64."""
    size = {
        "depths": tuple(-(-depth // 2) for depth in VARIANTS[name].depths),
        "width_multiplier": tuple(width / 4 for width in VARIANTS[name].width_multiplier),
    }
    compare_with_fuse_model(create_model(name, **size, num_classes=10, param_dtype=jnp.float64))


@pytest.mark.parametrize("name", ["repvgg_b1g4", "repvgg_d2se"])
def test_a_short_repvgg_comes_out_as_fuse_model_makes_it(name):
    """Dense and in groups by turns, and with squeeze-excite."""
    small = dict(depths=(1, 1, 2, 1), width_multiplier=(0.25,) * 4, num_classes=5)
    compare_with_fuse_model(create_model(name, **small, param_dtype=jnp.float64))


def compare_with_fuse_model(model):
    variables = random_variables(model, (1, 32, 32, 3))
    images = random_images((2, 33, 33, 3))
    apply = lambda model: lambda v, x: model.apply(v, x, train=False)  # noqa: E731
    fused = reparameterize(apply(model), variables, images)
    deploy, deploy_variables = fuse_model(model, variables)
    assert sum(p.size for p in fused.params.values()) == sum(p.size for p in jax.tree.leaves(deploy_variables))
    as_deploy = reparameterize(apply(deploy), deploy_variables, images)
    assert fused.totals["multiply-adds"].after == as_deploy.totals["multiply-adds"].after
    counts = [primitives(f, f.params, images)["conv_general_dilated"] for f in (fused, as_deploy)]
    assert counts[0] == counts[1]
    expected, found = jax.jit(apply(model))(variables, images), jax.jit(fused)(fused.params, images)
    assert_equivalent(expected, found, rtol=1e-12)
    assert_equivalent(jax.jit(apply(deploy))(deploy_variables, images), found, rtol=1e-12)
    narrow = jax.tree.map(lambda leaf: leaf.astype(np.float32), variables)
    function, images = apply(model.clone(param_dtype=jnp.float32)), images.astype(np.float32)
    fused = reparameterize(function, narrow, images)
    found = jax.jit(fused)(fused.params, images)
    assert found.dtype == jnp.float32
    assert_equivalent(jax.jit(function)(narrow, images), found, rtol=1e-5)


def test_the_projects_own_lowerings_are_seen_through_and_used_again():
    model = create_model("repvgg_a0", depths=(1, 2, 2, 1), width_multiplier=(0.25,) * 4, num_classes=5)
    variables = random_variables(model, dtype=np.float32)
    images = random_images((2, 17, 17, 3), np.float32)
    function = lambda v, x: model.apply(v, x, train=False)  # noqa: E731
    fused = reparameterize(function, variables, images)
    assert len(fused.params) == 2 * 7 + 2
    assert_equivalent(jax.jit(function)(variables, images), jax.jit(fused)(fused.params, images), rtol=1e-5)
    # Traced as plain convolutions, they are lowered as the network's own when the result runs.
    deploy, deploy_variables = fuse_model(model, variables)
    own = primitives(lambda v, x: deploy.apply(v, x, train=False), deploy_variables, images)
    assert primitives(fused, fused.params, images)["custom_vjp_call"] == own["custom_vjp_call"] > 0
