"""`reparameterize` merges what is affine, in any code, and nothing else."""

from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from repvgg_jax import VARIANTS, create_model, fuse_model
from repvgg_jax.reparam import assert_equivalent
from repvgg_jax.trace import reparameterize
from tests.random_variables import random_images, random_variables
from tests.trace import networks
from tests.trace.networks import convolve

pytestmark = pytest.mark.usefixtures("float64")


def primitives(function, *arguments):
    """How often each primitive stands in the traced program, calls included."""
    count = Counter()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            count[equation.primitive.name] += 1
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else [value]:
                    walk(inner.jaxpr if hasattr(inner, "jaxpr") else inner) if hasattr(inner, "eqns") or hasattr(
                        inner, "jaxpr"
                    ) else None

    walk(jax.make_jaxpr(function)(*arguments).jaxpr)
    return count


def drawn(module, shape):
    """Random variables of a linen module that takes no `train`."""
    template = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float64))
    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(
            rng.uniform(0.5, 1.5, leaf.shape) if path[-1].key in ("scale", "var") else rng.normal(0, 0.3, leaf.shape)
        ),
        template,
    )


def compare(function, variables, shape, dtype=np.float64, any_size=False, **options):
    """Merge, compare on the images traced with, on more and on larger ones, and count primitives before and after."""
    images = random_images(shape, dtype)
    fused = reparameterize(function, variables, images, **options)
    larger = [(*shape[:1], *(size + 4 for size in shape[1:-1]), shape[-1])] if any_size else []
    for other_shape in (shape, (shape[0] + 1, *shape[1:]), *larger):
        batch = random_images(other_shape, dtype, seed=2)
        expected, found = jax.jit(function)(variables, batch), jax.jit(fused)(fused.params, batch)
        assert jax.tree.structure(expected) == jax.tree.structure(found)
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            np.testing.assert_allclose(b, a, atol=1e-12 * float(jnp.abs(a).max()), rtol=0)
    # Other parameters are another function: negative control.
    other = jax.tree.map(lambda leaf: leaf * 1.01, fused.params)
    assert any(
        float(jnp.abs(a - b).max()) > 1e-6
        for a, b in zip(
            jax.tree.leaves(fused(other, images)), jax.tree.leaves(fused(fused.params, images)), strict=True
        )
    )
    before, after = primitives(function, variables, images), primitives(fused, fused.params, images)
    return before, after


LINEN = {
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


@pytest.mark.parametrize("name", LINEN)
def test_a_linen_network_keeps_its_function_in_the_fewest_convolutions(name):
    module, expected = LINEN[name]
    shape = (2, 13, 14, 6 if name in ("mobileone_grouped", "qarepvgg", "large_kernel") else 3)
    before, after = compare(module.apply, drawn(module, shape), shape, any_size=True)
    assert (before["conv_general_dilated"], after["conv_general_dilated"]) == expected
    if name.startswith("resnet"):
        # No arithmetic of a batch norm is left: a bias for each convolution, the residual sums, the head's bias.
        sums = 8 if name == "resnet18" else 16
        assert before["rsqrt"] == expected[0]
        assert (after["rsqrt"], after["sub"], after["div"]) == (0, 0, 0)
        assert after["add"] == expected[1] + sums + 1
    if name == "attention":
        # Broadcasts of constants cost nothing.
        assert after.total() - after["broadcast_in_dim"] <= before.total() - before["broadcast_in_dim"]


@pytest.mark.parametrize(("depths", "bottleneck", "count"), [((2, 2, 2, 2), False, 20), ((3, 4, 6, 3), True, 53)])
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


def test_zeros_around_a_value_and_means_over_windows_are_left_where_nothing_takes_them_in():
    def function(v, x):
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        pooled = jax.lax.reduce_window(jnp.tanh(padded), 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return pooled * v["scale"], jnp.pad(x, ((0, 0), (0, 0), (0, 0), (1, 2)), constant_values=1.0)

    before, after = compare(function, {"scale": jnp.arange(1.0, 4.0)}, (2, 6, 6, 3))
    assert after["pad"] == before["pad"] == 2
    assert (after["reduce_window_sum"], after["conv_general_dilated"]) == (1, 0)


def test_a_convolution_with_a_bias_is_not_merged_into_a_padded_one():
    """The padding would be zero where the bias is not: exact inside the border alone."""

    def function(v, x, padding):
        y = convolve(x, v["first"]) + v["bias"]
        return convolve(y, v["second"], padding)

    rng = np.random.default_rng(0)
    v = {
        "first": jnp.asarray(rng.normal(size=(1, 1, 3, 3))),
        "second": jnp.asarray(rng.normal(size=(3, 3, 3, 2))),
        "bias": jnp.asarray(rng.normal(size=2 + 1)),
    }
    for padding, convolutions in (("SAME", 2), ("VALID", 1)):
        _, after = compare(lambda v, x, padding=padding: function(v, x, padding), v, (2, 6, 6, 3))
        assert after["conv_general_dilated"] == convolutions


@pytest.mark.parametrize("asked", [False, True])
def test_a_merge_that_costs_multiply_adds_is_not_made_unless_asked(asked):
    rng = np.random.default_rng(0)
    v = {"wide": jnp.asarray(rng.normal(size=(1, 3, 4, 4))), "tall": jnp.asarray(rng.normal(size=(3, 1, 4, 4)))}
    # 1×3 and 3×1 are six taps, the 3×3 around them nine.
    _, after = compare(
        lambda v, x: convolve(x, v["wide"]) + convolve(x, v["tall"]), v, (2, 6, 6, 4), fewest_convolutions=asked
    )
    assert after["conv_general_dilated"] == (1 if asked else 2)
    narrow = {"down": jnp.asarray(rng.normal(size=(1, 1, 8, 2))), "up": jnp.asarray(rng.normal(size=(1, 1, 2, 8)))}
    _, after = compare(
        lambda v, x: convolve(convolve(x, v["down"]), v["up"]), narrow, (2, 6, 6, 8), fewest_convolutions=asked
    )
    assert after["conv_general_dilated"] == (1 if asked else 2)
    wide = {"up": jnp.asarray(rng.normal(size=(1, 1, 2, 8))), "down": jnp.asarray(rng.normal(size=(1, 1, 8, 2)))}
    _, after = compare(
        lambda v, x: convolve(convolve(x, v["up"]), v["down"]), wide, (2, 6, 6, 2), fewest_convolutions=asked
    )
    assert after["conv_general_dilated"] == 1

    def averaged(v, x):
        y = convolve(x, v["up"])
        return jax.lax.reduce_window(y, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "VALID") * v["mean"]

    wide["mean"] = jnp.asarray(1 / 9)
    _, after = compare(averaged, wide, (2, 6, 6, 2), fewest_convolutions=asked)
    assert after["conv_general_dilated"] == 1
    assert after["reduce_window_sum"] == (0 if asked else 1)
    apart = {"each": jnp.asarray(rng.normal(size=(3, 3, 1, 6))), "all": jnp.asarray(rng.normal(size=(1, 1, 6, 6)))}
    _, after = compare(
        lambda v, x: convolve(x, v["each"], feature_group_count=6) + convolve(x, v["all"]),
        apart,
        (2, 6, 6, 6),
        fewest_convolutions=asked,
    )
    assert after["conv_general_dilated"] == (1 if asked else 2)


@pytest.mark.parametrize("size", [1, 3])
def test_the_smallest_images_take_no_more_multiply_adds_either(size):
    """Of a bottleneck before a stride of 2 there is little to save where few pixels are left out."""
    rng = np.random.default_rng(0)
    v = {"down": jnp.asarray(rng.normal(size=(1, 1, 8, 2))), "up": jnp.asarray(rng.normal(size=(1, 1, 2, 8)))}

    def network(v, x):
        return convolve(convolve(x, v["down"]), v["up"], stride=2)

    fused = reparameterize(network, v, jnp.ones((1, size, size, 8)))
    assert fused.totals["multiply-adds"].after <= fused.totals["multiply-adds"].before


def test_a_value_outside_of_a_kernel_is_not_taken_into_it():
    v = {"kernel": jnp.ones((1, 1, 1, 3))}
    shifted = ((0, 0), (-1, 1))  # the neighbour to the right
    before, after = compare(lambda v, x: convolve(x, v["kernel"], shifted, feature_group_count=3) + x, v, (2, 6, 6, 3))
    assert (before["add"], after["add"]) == (1, 1)


@pytest.mark.parametrize("asked", [False, True])
def test_a_mean_over_windows_takes_factors_of_any_kind(asked):
    v = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 3, 4))), "scale": jnp.arange(1.0, 5.0)}

    def network(v, x):
        y = jax.lax.reduce_window(convolve(x, v["kernel"]), 0.0, jax.lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "VALID")
        return -(y / 4) * 2.0, (y * 0.5) * v["scale"] * 3.0

    compare(network, v, (2, 6, 6, 3), fewest_convolutions=asked)


def test_gradients_are_those_of_the_function_custom_ones_included():
    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (rounded(x), None), lambda _, dy: (dy,))
    v = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 2, 2))), "scale": jnp.zeros(2)}
    network = lambda v, x: jax.nn.relu(convolve(rounded(x), v["kernel"])) + jax.nn.relu(x * v["scale"])  # noqa: E731
    images = random_images((1, 5, 5, 2))
    fused = reparameterize(network, v, images)
    expected = jax.grad(lambda x: network(v, x).sum())(images)
    assert float(jnp.abs(expected).max()) > 1
    np.testing.assert_allclose(jax.grad(lambda x: fused(fused.params, x).sum())(images), expected, atol=1e-12)


def test_an_elementwise_map_stays_elementwise():
    before, after = compare(lambda v, x: jax.nn.gelu(x * v["scale"]), {"scale": jnp.arange(1.0, 4.0)}, (2, 5, 5, 3))
    assert after["conv_general_dilated"] == 0
    assert after["mul"] + after["add"] <= before["mul"] + before["add"]


def test_a_scale_before_a_convolution_goes_into_its_kernel():
    rng = np.random.default_rng(0)
    v = {"kernel": jnp.asarray(rng.normal(size=(3, 3, 2, 6))), "scale": jnp.asarray(rng.normal(size=4)), "shift": 2.0}
    grouped = lambda x, v, padding: convolve(x, v["kernel"], padding, feature_group_count=2)  # noqa: E731
    _, after = compare(lambda v, x: grouped(x * v["scale"], v, "SAME"), v, (2, 6, 6, 4))
    assert after["mul"] == 0
    _, after = compare(lambda v, x: grouped(x * v["scale"] + v["shift"], v, "VALID"), v, (2, 6, 6, 4))
    assert (after["mul"], after["add"]) == (0, 1)
    _, after = compare(lambda v, x: grouped(x * v["scale"] + v["shift"], v, "SAME"), v, (2, 6, 6, 4))
    assert (after["mul"], after["add"]) == (1, 1)


def test_control_flow_on_inputs_is_passed_through():
    rng = np.random.default_rng(0)
    v = {"kernel": jnp.asarray(rng.normal(size=(3, 3, 3, 3)) / 5), "scale": jnp.asarray(rng.uniform(1, 2, 3))}

    def function(v, x):
        y = jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(convolve(y, v["kernel"]) * v["scale"]), x)
        return jax.lax.cond(x.sum() > 0, lambda y: y * 2, lambda y: y - 1, convolve(y, v["kernel"]) * v["scale"])

    before, after = compare(function, v, (2, 6, 6, 3))
    assert after["conv_general_dilated"] == before["conv_general_dilated"] == 2
    assert after["cond"] == 1


def test_checkpointed_and_jitted_parts_are_read_like_the_rest():
    module = networks.QARepVGG()
    variables = drawn(module, (2, 9, 9, 6))
    _, after = compare(jax.jit(jax.checkpoint(module.apply)), variables, (2, 9, 9, 6))
    assert after["conv_general_dilated"] == 2


def test_inputs_and_outputs_are_pytrees_and_untouched_variables_parameters():
    rng = np.random.default_rng(0)
    v = {"kernel": jnp.asarray(rng.normal(size=(3, 3, 3, 3))), "offset": jnp.asarray(rng.normal(size=(6, 6, 1)))}

    def function(v, inputs, scale):
        return {"sum": (convolve(inputs["a"], v["kernel"]) + v["offset"], inputs["b"] * scale), "given": v["offset"]}

    inputs = {"a": random_images((2, 6, 6, 3)), "b": random_images((4,), seed=3)}
    fused = reparameterize(function, v, inputs, 3.0)
    expected, found = function(v, inputs, 3.0), fused(fused.params, inputs, 3.0)
    chex.assert_trees_all_close(found, expected, atol=1e-12)
    assert sorted(param.shape for param in fused.params.values()) == [(3, 3, 3, 3), (6, 6, 1)]


@pytest.mark.parametrize(
    "name", [name if name == "repvgg_a0" else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_every_repvgg_comes_out_as_fuse_model_makes_it(name):
    """As many convolutions, multiply-adds and parameters as the deploy form, and its logits."""
    model = create_model(name, num_classes=10, param_dtype=jnp.float64)
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


def test_another_rounding_is_kept():
    """In bfloat16 a batch norm rounds between convolution and sum, where a fold would not: nothing is merged."""
    model = create_model(
        "repvgg_a0", depths=(1, 1, 1, 1), width_multiplier=(0.25,) * 4, num_classes=5, dtype=jnp.bfloat16, ops="xla"
    )
    variables = random_variables(model, dtype=np.float32)
    images = random_images((2, 16, 16, 3), np.float32)
    function = lambda v, x: model.apply(v, x, train=False)  # noqa: E731
    fused = reparameterize(function, variables, images)
    before, after = primitives(function, variables, images), primitives(fused, fused.params, images)
    assert before["conv_general_dilated"] == after["conv_general_dilated"]
    np.testing.assert_allclose(fused(fused.params, images), function(variables, images), atol=0.05)


def test_the_result_can_be_transformed_like_any_function():
    module = networks.QARepVGG()
    variables = drawn(module, (2, 9, 9, 6))
    images = random_images((2, 9, 9, 6))
    fused = reparameterize(module.apply, variables, images)
    many = random_images((3, 2, 9, 9, 6))
    batched = jax.vmap(fused, in_axes=(None, 0))(fused.params, many)
    np.testing.assert_allclose(batched[1], module.apply(variables, many[1]), atol=1e-12)
    ensemble = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), fused.params)
    assert jax.vmap(fused, in_axes=(0, None))(ensemble, images).shape == (2, 2, 9, 9, 6)
    slope = jax.grad(lambda x: fused(fused.params, x).sum())(images)
    np.testing.assert_allclose(slope, jax.grad(lambda x: module.apply(variables, x).sum())(images), atol=1e-11)
    (batch,) = jax.export.symbolic_shape("b")
    exported = jax.export.export(jax.jit(lambda x: fused(fused.params, x)))(
        jax.ShapeDtypeStruct((batch, 9, 9, 6), jnp.float64)
    )
    np.testing.assert_allclose(exported.call(many[0]), batched[0], atol=1e-12)


def test_training_mode_is_pointed_out():
    model = create_model("repvgg_a0", depths=(1, 1, 1, 1), width_multiplier=(0.25,) * 4, num_classes=5, ops="xla")
    variables = random_variables(model, dtype=np.float32)
    images = random_images((2, 16, 16, 3), np.float32)
    train = lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])[0]  # noqa: E731
    fused = reparameterize(train, variables, images)
    assert "Was the function traced with train=True?" in fused.report()
    np.testing.assert_allclose(fused(fused.params, images), train(variables, images), atol=1e-4)
    assert "train=True" not in reparameterize(lambda v, x: model.apply(v, x, train=False), variables, images).report()


def test_a_norm_before_any_convolution_in_training_mode_is_pointed_out_too():
    module = nn.BatchNorm(param_dtype=jnp.float64)
    images = random_images((2, 5, 5, 3))
    variables = module.init(jax.random.key(0), images, use_running_average=True)
    for train in (True, False):
        apply = lambda v, x, train=train: module.apply(v, x, not train, mutable=["batch_stats"])[0]  # noqa: E731
        assert ("train=True?" in reparameterize(apply, variables, images).report()) == train


def test_the_report_names_what_was_merged():
    model = create_model("repvgg_a0", depths=(1, 1, 1, 1), width_multiplier=(0.25,) * 4, num_classes=5)
    variables = random_variables(model, dtype=np.float32)
    fused = reparameterize(
        lambda v, x: model.apply(v, x, train=False), variables, jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    )
    report = fused.report()
    assert "convolutions" in report
    assert "RepVGG/stage1_block1" in report
    assert list(fused.params)[:2] == ["RepVGG/stem/kernel", "RepVGG/stem/bias"]


def test_the_report_says_what_was_left_and_why():
    v = {"a": jnp.ones((1, 1, 2, 4)), "bias": jnp.ones(4), "b": jnp.ones((3, 3, 4, 2)), "c": jnp.ones((1, 1, 2, 8))}
    images = jnp.ones((1, 5, 5, 2))
    padded = reparameterize(lambda v, x: convolve(convolve(x, v["a"]) + v["bias"], v["b"]), v, images).report()
    assert "left apart in convolution: a convolution pads with zeros what was shifted before it" in padded
    up_and_down = lambda v, x: convolve(convolve(x, v["c"][..., :1]), v["c"][:, :, :1])  # noqa: E731
    costly = reparameterize(up_and_down, v, images)
    assert "would take more multiply-adds: fewest_convolutions=True merges it" in costly.report()
    half = lambda v, x: convolve(x, v["a"]).astype(jnp.bfloat16)  # noqa: E731
    assert "the dtype changes after a convolution" in reparameterize(half, v, images).report()
    assert "left apart" not in reparameterize(lambda v, x: convolve(x, v["a"]) + v["bias"], v, images).report()


def test_other_parameters_and_tracers_are_refused():
    module = networks.QARepVGG()
    variables = drawn(module, (2, 9, 9, 6))
    images = random_images((2, 9, 9, 6))
    fused = reparameterize(module.apply, variables, images)
    name, *_ = fused.params
    with pytest.raises(ValueError, match=rf"not those of this function: {name} is missing"):
        fused({key: value for key, value in fused.params.items() if key != name}, images)
    with pytest.raises(ValueError, match=rf"{name} is \(3,\), expected"):
        fused({**fused.params, name: jnp.zeros(3)}, images)
    with pytest.raises(ValueError, match="tracers: the fold is computed once"):
        jax.jit(lambda v: reparameterize(module.apply, v, images)(fused.params, images))(variables)


def test_by_xlas_own_operations_nothing_is_left_but_convolutions():
    """What exporters read: no custom gradients, no choices by platform."""
    model = create_model("repvgg_a0", depths=(1, 1, 1, 1), width_multiplier=(0.25,) * 4, num_classes=5)
    variables = random_variables(model, dtype=np.float32)
    images = random_images((2, 16, 16, 3), np.float32)
    function = lambda v, x: model.apply(v, x, train=False)  # noqa: E731
    fast, plain = (reparameterize(function, variables, images, ops=ops) for ops in ("auto", "xla"))
    assert_equivalent(plain(plain.params, images), fast(fast.params, images), rtol=1e-5)
    assert primitives(fast, fast.params, images)["custom_vjp_call"]
    counted = primitives(plain, plain.params, images)
    assert counted["conv_general_dilated"] == 5
    assert not {"custom_vjp_call", "cond", "platform_index"} & {name for name, count in counted.items() if count}
    with pytest.raises(ValueError, match=r"ops is 'XLA': expected 'auto' or 'xla'"):
        reparameterize(function, variables, images, ops="XLA")


def test_constants_of_symbolic_shapes_are_broadcast_when_the_program_runs():
    v, images = {"kernel": jnp.ones((3, 3, 2, 2))}, random_images((2, 6, 6, 2))
    network = lambda v, x: jnp.where(x > 0.1, convolve(x, v["kernel"]), jnp.full(x.shape, 0.5))  # noqa: E731
    fused = reparameterize(network, v, images)
    (batch,) = jax.export.symbolic_shape("b")
    exported = jax.export.export(jax.jit(lambda x: fused(fused.params, x)))(
        jax.ShapeDtypeStruct((batch, 6, 6, 2), images.dtype)
    )
    np.testing.assert_allclose(exported.call(images), network(v, images), atol=1e-12)


def test_symbolic_shapes_are_merged_alike():
    module = networks.DiverseBranch()
    variables = drawn(module, (2, 9, 9, 3))
    fused = reparameterize(module.apply, variables, random_images((2, 9, 9, 3)))
    batch, height, width = jax.export.symbolic_shape("b, h, w", constraints=["h >= 8", "w >= 8"])
    exported = jax.export.export(jax.jit(lambda x: fused(fused.params, x)))(
        jax.ShapeDtypeStruct((batch, height, width, 3), jnp.float64)
    )
    images = random_images((3, 11, 10, 3))
    np.testing.assert_allclose(exported.call(images), module.apply(variables, images), atol=1e-12)


def test_keys_among_the_variables_are_no_hindrance():
    class Dropping(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), param_dtype=jnp.float64, rngs=rngs)
            self.norm = nnx.BatchNorm(4, use_running_average=True, param_dtype=jnp.float64, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

        def __call__(self, x):
            return self.dropout(nnx.relu(self.norm(self.conv(x))))

    graph, state = nnx.split(Dropping(nnx.Rngs(0)))
    images = random_images((2, 7, 7, 3))
    fused = reparameterize(lambda state, x: nnx.merge(graph, state)(x), state, images)
    np.testing.assert_allclose(fused(fused.params, images), nnx.merge(graph, state)(images), atol=1e-12)
    assert len(fused.params) == 2


def test_an_evenly_spaced_part_of_a_value_is_an_identity_kernel_beside_a_strided_convolution():
    rng = np.random.default_rng(0)
    v = {"kernel": jnp.asarray(rng.normal(size=(3, 3, 3, 3))), "scale": jnp.asarray(rng.uniform(1, 2, 3))}

    def strided(x, kernel, padding=((1, 1), (1, 1))):
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    for first, convolutions in ((0, 1), (1, 1)):
        _, after = compare(
            lambda v, x, first=first: strided(x, v["kernel"]) + x[:, first::2, first::2] * v["scale"], v, (2, 6, 8, 3),
            any_size=True,
        )  # fmt: skip
        assert (after["conv_general_dilated"], after["mul"], after["slice"]) == (convolutions, 0, 0)
    # A part that no tap of the kernel reads, and one on another grid, stay what they are.
    for part in (
        lambda x: jnp.pad(x, ((0, 0), (4, 0), (4, 0), (0, 0)))[:, ::2, ::2][:, :3, :4],
        lambda x: x[:, :3, :4],
    ):
        _, after = compare(lambda v, x, part=part: strided(x, v["kernel"]) + part(x), v, (2, 6, 8, 3))
        assert after["conv_general_dilated"] == 1
        assert after["add"] == 1


def test_a_padded_convolution_of_a_part_does_not_see_the_rest():
    v = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 3, 2)))}
    for padding, slices in (("SAME", 1), ("VALID", 0)):
        _, after = compare(
            lambda v, x, padding=padding: convolve(x[:, 1:-1, 2:], v["kernel"], padding), v, (2, 7, 8, 3), any_size=True
        )
        assert after["slice"] + after["pad"] == slices


def test_a_merge_of_crops_crops_as_much_and_a_crop_after_a_convolution_is_kept():
    rng = np.random.default_rng(0)
    v = {"kernel": jnp.asarray(rng.normal(size=(3, 3, 3, 3))), "point": jnp.asarray(rng.normal(size=(1, 1, 3, 3)))}
    zeros = lambda low, high: ((low, high), (low, high))  # noqa: E731

    def shifted(v, x):
        return convolve(x, v["point"], zeros(1, -3)) + convolve(x, v["point"], zeros(0, -2)) + convolve(
            x, v["kernel"], zeros(1, -1)
        )  # fmt: skip

    _, after = compare(shifted, v, (2, 8, 9, 3), any_size=True)
    assert after["conv_general_dilated"] == 1
    compare(lambda v, x: convolve(convolve(x, v["kernel"]), v["point"], zeros(-1, -2)), v, (2, 8, 9, 3), any_size=True)
