"""The contract of `fuse`, point by point."""

import chex
import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import create_model, fuse, fuse_model, reparameterize
from repvgg_jax.reparam import assert_equivalent, equivalent_kernels, first_divergence, fold_batch_norm
from tests.random_variables import random_images, random_variables

SHAPE = (2, 16, 16, 3)


def small(name="repvgg_a0", **fields):
    settings = dict(depths=(1, 2, 2, 1), width_multiplier=(0.25, 0.25, 0.25, 0.25), num_classes=5, ops="xla")
    return create_model(name, **{**settings, **fields})


def init_shapes(model):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(SHAPE), train=False))


@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_b1g4", "repvgg_d2se", "repvggplus_l2pse"])
def test_the_fused_tree_is_the_deploy_forms_to_the_key(name):
    model = small(name)
    fused = fuse(random_variables(model, dtype=np.float32))
    chex.assert_trees_all_equal_shapes_and_dtypes(fused, init_shapes(model.clone(deploy=True)))


def test_a_block_becomes_kernel_and_bias_beside_its_untouched_siblings():
    variables = random_variables(small("repvgg_d2se"), dtype=np.float32)
    fused = fuse(variables)
    assert set(fused["params"]["stage2_block2"]) == {"reparam", "se"}
    assert set(fused["params"]["stage2_block2"]["reparam"]) == {"kernel", "bias"}
    for path in (("stage2_block2", "se", "up", "kernel"), ("head", "kernel")):
        before, after = variables["params"], fused["params"]
        for key in path:
            before, after = before[key], after[key]
        assert after is before


@pytest.mark.usefixtures("float64")
def test_eager_jit_and_vmap_over_stacked_variables_agree():
    model = small()
    singles = [random_variables(model, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *singles)
    eager = [fuse(variables) for variables in singles]
    compiled, vmapped = jax.jit(lambda single, stacked: (fuse(single), jax.vmap(fuse)(stacked)))(singles[0], stacked)
    chex.assert_trees_all_close(compiled, eager[0], rtol=1e-12, atol=1e-14)
    for index, expected in enumerate(eager):
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, i=index: leaf[i], vmapped), expected, rtol=1e-12, atol=1e-14
        )


@pytest.mark.usefixtures("float64")
def test_gradients_through_fuse_are_finite_and_those_of_the_training_form():
    model = small()
    variables, images = random_variables(model), random_images(SHAPE)
    deploy = model.clone(deploy=True)

    def through_fuse(params):
        return jnp.sum(deploy.apply(fuse({**variables, "params": params}), images, train=False) ** 2)

    def direct(params):
        return jnp.sum(model.apply({**variables, "params": params}, images, train=False) ** 2)

    found, expected = jax.jit(lambda params: (jax.grad(through_fuse)(params), jax.grad(direct)(params)))(
        variables["params"]
    )
    chex.assert_tree_all_finite(found)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-12 * scale)


def test_eval_shape_sees_what_fuse_returns():
    variables = random_variables(small(), dtype=np.float32)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(fuse, variables), fuse(variables))


def test_dict_in_gives_dict_out_and_frozen_dict_in_gives_frozen_dict_out():
    variables = random_variables(small(), dtype=np.float32)
    assert type(fuse(variables)) is dict
    assert type(fuse(variables)["params"]) is dict
    frozen = fuse(flax.core.freeze(variables))
    assert isinstance(frozen, flax.core.FrozenDict)
    chex.assert_trees_all_equal(flax.core.unfreeze(frozen), fuse(variables))


def test_the_input_is_not_changed():
    variables = random_variables(small(), dtype=np.float32)
    before = jax.tree.map(np.array, variables)
    fuse(variables)
    chex.assert_trees_all_equal(variables, before)


def test_concrete_arrays_are_folded_in_float64_and_rounded_once():
    with jax.enable_x64(True):
        variables64 = random_variables(small())
        exact = jax.tree.map(np.asarray, fuse(variables64))
    with jax.enable_x64(False):
        # float32 values lifted to float64 lose nothing, so only the last rounding separates the two.
        variables32 = jax.tree.map(lambda leaf: jnp.asarray(np.float32(leaf)), variables64)
        folded = fuse(variables32)
        under_jit = jax.jit(fuse)(variables32)
    with jax.enable_x64(True):
        lifted = jax.tree.map(lambda leaf: jnp.asarray(np.float64(leaf)), jax.tree.map(np.asarray, variables32))
        truth = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float32), fuse(lifted))
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, folded), truth)
    chex.assert_trees_all_close(folded, exact, rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(under_jit, truth)


def test_bfloat16_parameters_fold_in_float32_and_come_back_as_bfloat16():
    model = small(param_dtype=jnp.bfloat16)
    variables = random_variables(model, dtype=np.float32)
    low = {
        "params": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables["params"]),
        "batch_stats": variables["batch_stats"],
    }
    lifted = {**low, "params": jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low["params"])}
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), fuse(lifted))
    for found in (fuse(low), jax.jit(fuse)(low)):
        chex.assert_trees_all_equal_shapes_and_dtypes(found, init_shapes(model.clone(deploy=True)))
        # one unit in the last place of bfloat16, where the float32 and the float64 fold round apart
        chex.assert_trees_all_close(
            jax.tree.map(np.float32, found), jax.tree.map(np.float32, expected), rtol=2**-7, atol=1e-6
        )


def test_other_collections_and_foreign_statistics_are_kept_and_an_emptied_batch_stats_goes():
    variables = random_variables(small(), dtype=np.float32)
    assert "batch_stats" not in fuse(variables)
    foreign = {"neck": {"bn": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}}
    fused = fuse({**variables, "batch_stats": {**variables["batch_stats"], **foreign}, "counters": {"n": jnp.ones(())}})
    chex.assert_trees_all_equal(fused["batch_stats"], foreign)
    assert set(fused) == {"params", "batch_stats", "counters"}


class Detector(nn.Module):
    """RepVGG as one component beside layers with batch norms of their own."""

    deploy: bool = False

    @nn.compact
    def __call__(self, images):
        ends = small(deploy=self.deploy).clone(name="backbone", parent=self)(images, train=False, features=True)
        x = nn.Conv(8, (3, 3), name="neck")(ends["stage3"])
        x = nn.BatchNorm(use_running_average=True, name="neck_norm")(x)
        return nn.Dense(4, name="boxes")(nn.relu(x).mean((1, 2)))


@pytest.mark.usefixtures("float64")
def test_a_model_with_repvgg_inside_keeps_the_rest_untouched_and_its_output():
    images = random_images(SHAPE)
    shapes = jax.eval_shape(lambda: Detector().init(jax.random.key(0), images))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.1, 0.9, leaf.shape)), shapes)
    fused = fuse(variables)
    for collection, name in [("params", "neck"), ("params", "neck_norm"), ("params", "boxes")]:
        chex.assert_trees_all_equal(fused[collection][name], variables[collection][name])
    assert set(fused["batch_stats"]) == {"neck_norm"}
    chex.assert_trees_all_close(
        Detector(deploy=True).apply(fused, images), Detector().apply(variables, images), rtol=1e-12
    )


def test_epsilon_is_read_from_the_model():
    with jax.enable_x64(True):
        model = small(epsilon=1e-2)
        variables, images = random_variables(model), random_images(SHAPE)
        expected = model.apply(variables, images, train=False)
        deploy_model, deploy_variables = fuse_model(model, variables)
        chex.assert_trees_all_close(
            deploy_model.apply(deploy_variables, images, train=False), expected, rtol=1e-12, atol=1e-13
        )
        with pytest.raises(AssertionError):
            forgotten = deploy_model.apply(fuse(variables), images, train=False)
            chex.assert_trees_all_close(forgotten, expected, rtol=1e-5)


def test_sharding_over_devices_survives():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    variables = jax.device_put(random_variables(small(), dtype=np.float32), replicated)
    assert all(leaf.sharding == replicated for leaf in jax.tree.leaves(fuse(variables)))


def block(params=None, stats=None):
    """Variables with one sound block, after changes."""
    variables = random_variables(small(), dtype=np.float32)
    variables["params"]["stage1_block1"].update(params or {})
    variables["batch_stats"]["stage1_block1"].update(stats or {})
    return variables


def branch_stats(**leaves):
    leaves = {"mean": jnp.zeros(16), "var": jnp.ones(16), **leaves}
    return {"branch_3x3": {"bn": {key: value for key, value in leaves.items() if value is not None}}}


def test_every_subtree_that_is_wrong_is_named_not_the_first_alone():
    leaf = jnp.ones(2)
    variables = {
        "params": {"first": {"a": leaf}, "second": {"b": leaf}, **block()["params"]},
        "batch_stats": {"first": leaf, "second": leaf, **block()["batch_stats"]},
    }
    with pytest.raises(ValueError, match=r"(?s)first: batch_stats hold an array here.*second: batch_stats hold an"):
        fuse(variables)


def test_where_nothing_is_fused_four_places_are_named_and_the_rest_is_an_ellipsis():
    def heads(count):
        return {"params": {f"head{number}": {"kernel": jnp.ones((2, 2))} for number in range(count)}}

    shown = ", ".join(f"head{number}/kernel" for number in range(4))
    with pytest.raises(ValueError, match=rf"among 4 parameters \({shown}\): "):
        fuse(heads(4))
    with pytest.raises(ValueError, match=rf"among 5 parameters \({shown}, …\): "):
        fuse(heads(5))

    def fused(count):
        return {"params": {f"block{number}": {"reparam": {"kernel": jnp.ones(2)}} for number in range(count)}}

    shown = ", ".join(f"block{number}" for number in range(4))
    with pytest.raises(ValueError, match=f"'reparam' stands in {shown}; use it"):
        fuse(fused(4))
    with pytest.raises(ValueError, match=f"'reparam' stands in {shown}, …; use it"):
        fuse(fused(5))


def test_what_is_not_the_subject_of_a_function_is_named():
    leaf = jnp.ones(2)
    for call in (
        lambda: fuse(block(), 1e-3),
        lambda: equivalent_kernels(block(), 1e-3),
        lambda: fold_batch_norm(jnp.ones((3, 3, 1, 2)), leaf, leaf, leaf, leaf, 1e-3),
        lambda: first_divergence({"a": leaf}, {"a": leaf}, 1e-3),
        lambda: assert_equivalent(leaf, leaf, 1e-3),
    ):
        with pytest.raises(TypeError, match="positional argument"):
            call()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"params": {"head": {"kernel": jnp.ones((2, 2))}}}, r"no block to fuse.*head/kernel.*branch_rule"),
        ({"stem": {}}, r"mapping with the key 'params'.*found \['stem'\]"),
        ([1, 2], "found list"),
        (lambda: fuse(block()), r"fused already.*stage1_block1.*deploy=True"),
        (lambda: block(stats=branch_stats(mean=jnp.full(16, jnp.nan))),
         r"stage1_block1: branch_3x3/bn/mean holds 16 values that are not finite.*earlier checkpoint"),
        (lambda: block(stats=branch_stats(var=jnp.full(16, -0.5))),
         r"stage1_block1: branch_3x3/bn/var holds negative variances \(smallest -0.5\)"),
        (lambda: block(stats=branch_stats(var=None)), r"stage1_block1: batch_stats of branch_3x3 lack var"),
        (lambda: block(stats=branch_stats(mean=jnp.zeros(3))),
         r"stage1_block1: branch_3x3: mean has shape \(3,\), expected \(16,\)"),
        (lambda: block({"branch_3x3": {"conv": {"kernel": jnp.ones((7, 3, 3, 16, 16))}, "bn": {}}}),
         r"stage1_block1: branch_3x3/conv/kernel has shape \(7, 3, 3, 16, 16\), expected rank 4.*jax.vmap\(fuse\)"),
        (lambda: block({"branch_3x3": {"conv": {"kernel": jnp.ones((4, 4, 16, 16))}, "bn": {}}}),
         r"stage1_block1: cannot pad a 1x1 kernel to 4x4"),
        (lambda: block({"branch_1x1": {"conv": {"kernel": jnp.ones((1, 1, 8, 16))}, "bn": {}}}),
         r"stage1_block1: the kernels of the branches are .*expected the same in/groups"),
        (lambda: block(stats={"branch_identity": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}),
         r"stage1_block1: branch_identity normalises \(4,\) channels beside a kernel \(3, 3, 16, 16\)"),
        (lambda: block({"branch_3x3": {"conv": {"kernel": nn.Partitioned(jnp.ones((3, 3, 16, 16)), (None,) * 4)}}}),
         r"params/stage1_block1/branch_3x3/conv/kernel is a Partitioned.*unbox"),
    ],
    ids=["no_block", "params_alone", "not_a_mapping", "fused_already", "not_finite", "negative_variance",
         "statistics_missing", "wrong_length", "scanned", "even_kernel", "channels_differ", "identity_channels",
         "boxed"],
)  # fmt: skip
def test_what_cannot_be_fused_is_refused_with_path_finding_and_remedy(variables, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        fuse(variables() if callable(variables) else variables)


def test_every_broken_block_is_named_in_one_error():
    variables = block(stats=branch_stats(var=jnp.full(16, -1.0)))
    variables["batch_stats"]["stage2_block1"]["branch_1x1"]["bn"]["mean"] = jnp.full(32, jnp.inf)
    with pytest.raises(ValueError, match=r"(?s)stage1_block1: .*stage2_block1: "):
        fuse(variables)


STACK, OTHER_RANK = "jax.vmap(fuse)", "-D convolutions are merged by repvgg_jax.reparameterize"


def vectors(*shape):
    return {"mean": jnp.zeros(shape), "var": jnp.ones(shape)}


@pytest.mark.parametrize(
    ("kernel", "statistics", "advice"),
    [
        ((3, 16, 16), vectors(16), ["1" + OTHER_RANK]),
        ((3, 3, 3, 16, 16), vectors(16), ["3" + OTHER_RANK]),
        ((3, 3, 3, 16, 16), vectors(3, 16), [STACK]),
        ((7, 3, 3, 16, 16), vectors(7, 16), [STACK]),
        ((2, 7, 3, 3, 16, 16), vectors(2, 7, 16), [STACK]),
        ((1, 3, 3, 16, 16), vectors(16), [STACK, "3" + OTHER_RANK]),
        ((3, 3, 3, 16, 16), {}, [STACK, "3" + OTHER_RANK]),
        ((7, 3, 16, 16), vectors(7, 16), ["1" + OTHER_RANK, "unrolled"]),
        ((7, 3, 3, 3, 16, 16), vectors(7, 16), ["3" + OTHER_RANK, "unrolled"]),
        ((16, 16), vectors(16), ["a rule names convolutions alone"]),
    ],
)
def test_kernels_of_another_rank_get_the_advice_that_helps_them(kernel, statistics, advice):
    branch = {"branch_3x3": {"conv": {"kernel": jnp.ones(kernel)}, "bn": {}}}
    with pytest.raises(ValueError, match=r"stage1_block1: branch_3x3/conv/kernel has shape \(") as error:
        fuse(block(branch, {"branch_3x3": {"bn": statistics}}))
    message = str(error.value)
    assert [text for text in (STACK, "1" + OTHER_RANK, "3" + OTHER_RANK, "unrolled", "a rule names convolutions alone")
            if text in message] == advice  # fmt: skip


@pytest.mark.parametrize("dimensions", [1, 3])
def test_convolutions_of_other_ranks_are_merged_as_the_advice_says(dimensions):
    class Branches(nn.Module):
        @nn.compact
        def __call__(self, x):
            norms = [nn.BatchNorm(use_running_average=True, name=f"bn{number}") for number in range(3)]
            kernels = [nn.Conv(4, (size,) * dimensions, use_bias=False) for size in (3, 1)]
            return norms[0](kernels[0](x)) + norms[1](kernels[1](x)) + norms[2](x)

    images = random_images((2, *(5,) * dimensions, 4), np.float32)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.1, 0.9, leaf.shape), jnp.float32),
        Branches().init(jax.random.key(0), images),
    )
    merged = reparameterize(Branches().apply, variables, images)
    assert merged.totals["convolutions"] == (2, 1)
    np.testing.assert_allclose(merged(merged.params, images), Branches().apply(variables, images), atol=1e-5)


def remove(variables, *path):
    *parents, last = path
    for key in parents:
        variables = variables[key]
    del variables[last]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("branch_3x3",), "found the branches branch_1x1, expected branch_3x3, branch_1x1"),
        (("branch_3x3", "conv"), r"branch_3x3 has the children \['bn'\] in params"),
    ],
)
def test_a_block_without_one_of_its_branches_is_refused_and_not_half_fused(path, message):
    variables = block()
    remove(variables["params"]["stage1_block1"], *path)
    with pytest.raises(ValueError, match=f"stage1_block1: {message}"):
        fuse(variables)


def test_a_branch_without_its_norm_is_refused():
    variables = block()
    for collection in variables.values():
        remove(collection["stage1_block1"]["branch_3x3"], "bn")
    with pytest.raises(
        ValueError, match=r"branch_3x3 has the children \['conv'\] in params .*expected conv/kernel and bn"
    ):
        fuse(variables)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: {**v, "params": {"blocks": [v["params"]["stem"]]}}, "params/blocks is a list"),
        (lambda v: {**v, "params": {**v["params"], 3: {}}}, "params has the key 3"),
        (lambda v: {**v, "batch_stats": None}, "batch_stats is a NoneType"),
        (lambda v: {**v, "batch_stats": jnp.ones(3)}, "batch_stats is an array"),
        (lambda v: {**v, "batch_stats": {**v["batch_stats"], "head": jnp.ones(3)}}, "head: batch_stats hold an array"),
        (lambda v: jax.eval_shape(lambda: v), "is a ShapeDtypeStruct.*eval_shape"),
        (lambda v: {**v, "params": {**v["params"], "temperature": 1.0}}, "params/temperature is a float"),
    ],
    ids=["list", "integer_key", "none", "array", "array_beside_mapping", "shapes", "scalar"],
)
def test_trees_that_are_not_variables_are_refused_by_path(change, message):
    with pytest.raises(ValueError, match=message):
        fuse(change(block()))


def test_a_scalar_where_statistics_are_expected_is_refused():
    statistics = {"branch_identity": {"mean": jnp.zeros(()), "var": jnp.ones(())}}
    with pytest.raises(ValueError, match=r"branch_identity normalises \(\) channels"):
        fuse(block(stats=statistics))


def official_custom_l2(params, batch_stats, epsilon):
    """`RepVGGBlock.get_custom_L2` of the official repository, in HWIO."""
    kernels = {name: params[name]["conv"]["kernel"] for name in ("branch_3x3", "branch_1x1")}
    factors = {
        name: params[name]["bn"]["scale"] / jnp.sqrt(batch_stats[name]["bn"]["var"] + epsilon) for name in kernels
    }
    k3, k1 = kernels["branch_3x3"], kernels["branch_1x1"]
    circle = jnp.sum(k3**2) - jnp.sum(k3[1, 1] ** 2)
    centre = k3[1, 1] * factors["branch_3x3"] + k1[0, 0] * factors["branch_1x1"]
    return circle + jnp.sum(centre**2 / (factors["branch_3x3"] ** 2 + factors["branch_1x1"] ** 2))


@pytest.mark.usefixtures("float64")
def test_equivalent_kernels_are_those_of_fuse_and_the_official_custom_l2_sees_the_same():
    model = create_model("repvgg_a0", depths=(2, 1, 1, 1), width_multiplier=(0.25,) * 4, num_classes=5)
    variables = random_variables(model)
    kernels = equivalent_kernels(variables)
    fused = fuse(variables)["params"]
    assert set(kernels) == set(fused) - {"head"}
    for name, convolution in kernels.items():
        np.testing.assert_array_equal(convolution.kernel, fused[name]["reparam"]["kernel"])
        np.testing.assert_array_equal(convolution.bias, fused[name]["reparam"]["bias"])
    # The stem has no identity branch: there the official penalty is a function of the equivalent kernel's parts.
    params, stats = variables["params"]["stem"], variables["batch_stats"]["stem"]
    factor = {name: params[name]["bn"]["scale"] / jnp.sqrt(stats[name]["bn"]["var"] + 1e-5) for name in stats}
    kernel = kernels["stem"].kernel
    ring = jnp.ones((3, 3, 1, 1)).at[1, 1].set(0)
    squares = jnp.sum((kernel * ring / factor["branch_3x3"]) ** 2)
    squares += jnp.sum(kernel[1, 1] ** 2 / (factor["branch_3x3"] ** 2 + factor["branch_1x1"] ** 2))
    np.testing.assert_allclose(squares, official_custom_l2(params, stats, 1e-5), rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_gradients_pass_through_equivalent_kernels():
    model = create_model("repvgg_a0", depths=(1, 1, 1, 1), width_multiplier=(0.125,) * 4, num_classes=5)
    variables = random_variables(model)

    def penalty(params):
        kernels = equivalent_kernels({**variables, "params": params})
        return sum(jnp.sum(convolution.kernel**2) for convolution in kernels.values())

    gradients = jax.jit(jax.grad(penalty))(variables["params"])
    direction = jax.tree.map(lambda leaf: jnp.asarray(np.random.default_rng(0).normal(size=leaf.shape)), gradients)
    step = 1e-6
    ahead, behind = (
        penalty(jax.tree.map(lambda leaf, way, sign=sign: leaf + sign * step * way, variables["params"], direction))
        for sign in (1, -1)
    )
    slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(direction), strict=True))
    np.testing.assert_allclose((ahead - behind) / (2 * step), slope, rtol=1e-6)
    assert float(jnp.abs(gradients["head"]["kernel"]).max()) == 0
