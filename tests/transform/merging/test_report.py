"""The report says what was merged, what was left, and why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from repvgg_jax import create_model
from repvgg_jax.models.blocks import RepVGGBlock
from repvgg_jax.transform import reparameterize
from tests.random_variables import random_images, random_variables
from tests.transform.merging.networks import convolve

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("ops", ["auto", "xla"])
def test_training_mode_is_pointed_out(ops):
    model = create_model("repvgg_a0", depths=(1, 1, 1, 1), width_multiplier=(0.25,) * 4, num_classes=5, ops=ops)
    variables = random_variables(model, dtype=np.float32)
    images = random_images((2, 16, 16, 3), np.float32)
    train = lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])[0]  # noqa: E731
    fused = reparameterize(train, variables, images)
    assert fused.report().count("Was the function traced with train=True?") == 1
    np.testing.assert_allclose(jax.jit(fused)(fused.params, images), jax.jit(train)(variables, images), atol=1e-4)
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


class Scanned(nn.Module):
    """Three RepVGG blocks with stacked variables."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda block, x, _: (block(x, train=False), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        return scan(RepVGGBlock(4), x, None)[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_convolutions_in_a_loop_are_counted_and_pointed_out(dtype):
    """In float32 on CPU a lowering stands beside the plain convolution, and is not counted again."""
    images = jnp.ones((1, 5, 5, 4), dtype)
    module = Scanned()
    variables = jax.jit(module.init)(jax.random.key(0), images)
    fused = reparameterize(module.apply, variables, images)
    assert fused.totals["convolutions"] == (6, 6)
    assert fused.totals["multiply-adds"].before == 3 * 25 * (9 + 1) * 4 * 4
    assert "inside of `scan`, where nothing is merged. Trace the layers one after the other" in fused.report()
    expected = jax.jit(module.apply)(variables, images)
    np.testing.assert_allclose(jax.jit(fused)(fused.params, images), expected, rtol=1e-6)


def branches(function):
    return lambda v, x: jax.lax.cond(x.sum() > 0, function, lambda v, x: function(v, -x), v, x)


def shards(function):
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    here, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("batch")
    return jax.shard_map(function, mesh=mesh, in_specs=(here, split), out_specs=split)


@pytest.mark.parametrize(("inside_of", "name"), [(branches, "cond"), (shards, "shard_map")], ids=["cond", "shard_map"])
def test_convolutions_inside_of_what_is_no_loop_get_advice_of_their_own(inside_of, name):
    v, images = {"a": jnp.ones((1, 1, 2, 4)), "scale": jnp.full(4, 2.0)}, jnp.ones((1, 5, 5, 2))
    layer = lambda v, x: convolve(x, v["a"]) * v["scale"]  # noqa: E731
    report = reparameterize(inside_of(layer), v, images).report()
    assert f"inside of `{name}`, where nothing is merged. Reparameterize the function inside of it" in report
    assert "loop" not in report
    inner = reparameterize(layer, v, images)
    assert "inside of" not in inner.report()
    np.testing.assert_allclose(inside_of(inner)(inner.params, images), inside_of(layer)(v, images))


def test_nested_loops_and_products_are_counted_in_full():
    v = {"kernel": jnp.ones((3, 3, 4, 4)), "weights": jnp.ones((4, 5))}

    def network(v, x):
        once = lambda y, _: (jnp.tanh(convolve(y, v["kernel"])), None)  # noqa: E731
        twice = lambda y, _: (jax.lax.scan(once, y, length=3)[0], None)  # noqa: E731
        return jax.lax.scan(twice, x, length=2)[0] @ v["weights"]

    totals = reparameterize(network, v, jax.ShapeDtypeStruct((1, 5, 5, 4), jnp.float64)).totals
    assert totals["convolutions"] == (6, 6)
    assert totals["multiply-adds"] == (6 * 25 * 9 * 4 * 4 + 25 * 4 * 5,) * 2
    assert totals["array elements"] == (9 * 4 * 4 + 4 * 5,) * 2


@pytest.mark.parametrize(
    ("mean", "of_the_batch"),
    [
        (lambda x: x.mean((0, 1, 2)), True),
        (lambda x: x.mean((0, 2, 3)), True),
        (lambda x: x.mean((1, 2, 3)), False),
        (lambda x: x.mean((1, 2)), False),
        (lambda x: x.mean((0, 1)), False),
        (lambda x: x.mean(), False),
        (lambda x: x[:, 0, 0].mean(0), False),
    ],
    ids=["NHWC", "NCHW", "of each image", "pooling", "of rows", "of all", "of vectors"],
)
def test_only_a_mean_of_each_channel_over_the_batch_is_taken_for_training_mode(mean, of_the_batch):
    fused = reparameterize(lambda v, x: mean(jnp.tanh(x)), {}, jax.ShapeDtypeStruct((2, 5, 6, 4), jnp.float64))
    assert ("train=True?" in fused.report()) == of_the_batch


def test_the_report_counts_each_scope_and_names_it_once():
    v = {name: jnp.ones((3, 3, 2, 2)) for name in "abcd"}

    def network(v, x):
        for index in range(5):
            with jax.named_scope(f"block{index}"):
                y = convolve(x, v["a"]) + convolve(x, v["b"]) + x
                # Shifted before padding, twice in one scope.
                x = jnp.tanh(convolve(y + 1.0, v["c"]) + convolve(y + 1.0, v["d"]))
        return x

    fused = reparameterize(network, v, jax.ShapeDtypeStruct((1, 5, 5, 2), jnp.float64))
    report = fused.report()
    assert fused.totals["convolutions"] == (20, 15)
    merged = [line.split() for line in report.splitlines() if line.startswith("block")]
    assert merged == [[f"block{index}", "2", "1"] for index in range(5)]
    assert "left apart in block0, block1, block2 and 2 more: a convolution pads with zeros" in report
    first = jax.ShapeDtypeStruct((1, 5, 5, 2), jnp.float64)
    only = reparameterize(lambda v, x: convolve(jnp.tanh(x).astype(jnp.float32), v["a"].astype(jnp.float32)), v, first)
    assert "the dtype changes" not in only.report()
    assert "merged" not in only.report()
