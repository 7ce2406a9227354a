"""What `expand` returns is a function of trees: JAX transforms it, shards it and stores what belongs to it."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from repvgg_jax.transform import Average, Kernel, expand
from tests.random_variables import random_images
from tests.transform.expanding.networks import CASES, convolve
from tests.transform.merging.comparison import primitives

pytestmark = pytest.mark.usefixtures("float64")


def network(v, x):
    x = jax.nn.relu(convolve(x, v["a"]) + v["bias"])
    return jnp.tanh(convolve(x, v["b"])).mean((1, 2))


@pytest.fixture
def made(float64):
    variables = {"a": random_images((3, 3, 3, 4)), "bias": random_images((4,)), "b": random_images((3, 3, 4, 4))}
    images = random_images((8, 6, 5, 3))
    wide = expand(network, variables, images)
    params = jax.tree.map(lambda leaf: leaf + 0.1, wide.params)
    return wide, params, wide.state, images


def test_collapse_is_pure_under_jit_vmap_and_grad(made):
    wide, params, state, _ = made
    expected = wide.collapse(params, state)
    chex.assert_trees_all_close(jax.jit(wide.collapse)(params, state), expected, atol=1e-14)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), params)
    stacked = jax.vmap(wide.collapse, in_axes=(0, None))(several, state)
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[0], stacked), expected, atol=1e-14)
    # A penalty on the kernels that will be: its gradient is that of a finite difference.
    penalty = lambda params: sum((leaf**2).sum() for leaf in jax.tree.leaves(wide.collapse(params, state)))  # noqa: E731
    slope = jax.grad(penalty)(params)
    along = jax.tree.map(lambda leaf: random_images(leaf.shape, seed=3), params)
    moved = [jax.tree.map(lambda leaf, by, sign=sign: leaf + sign * 1e-6 * by, params, along) for sign in (1, -1)]
    expected = (penalty(moved[0]) - penalty(moved[1])) / 2e-6
    found = sum(jnp.vdot(*pair) for pair in zip(*map(jax.tree.leaves, (slope, along)), strict=True))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_several_networks_are_trained_at_once(made):
    wide, params, state, images = made
    several, states = (jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), tree) for tree in (params, state))
    outputs, after = jax.vmap(partial(wide, train=True), in_axes=(0, 0, None))(several, states, images)
    expected = wide(params, state, images, train=True)
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[0], (outputs, after)), expected, atol=1e-12)
    assert float(jnp.abs(outputs[1] - outputs[0]).max()) > 1e-3


def test_sharded_batches_are_scaled_by_the_variance_of_the_whole_batch(made):
    wide, params, state, images = made
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))

    @jax.jit
    def step(params, state, images):
        loss = lambda params: (lambda y, after: ((y**2).sum(), after))(*wide(params, state, images, train=True))  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(params)

    params, state = jax.device_put((params, state), NamedSharding(mesh, PartitionSpec()))
    expected, found = (
        step(params, state, jax.device_put(images, NamedSharding(mesh, PartitionSpec()))),
        step(params, state, spread),
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-11, atol=1e-12)
    # Negative control: the images of one device have other variances.
    assert (
        float(
            jnp.abs(
                wide(params, state, images[:1], train=True)[0] - wide(params, state, images, train=True)[0][:1]
            ).max()
        )
        > 1e-3
    )


def test_sharded_kernels_stay_sharded(made):
    wide, params, state, _ = made
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    by_out = NamedSharding(mesh, PartitionSpec(None, None, None, "model"))
    whole = NamedSharding(mesh, PartitionSpec())
    spread = jax.tree.map(lambda leaf: jax.device_put(leaf, by_out if leaf.ndim == 4 else whole), params)
    collapsed = jax.jit(wide.collapse)(spread, jax.device_put(state, whole))
    for name in ("a", "b"):
        assert collapsed[name].sharding.is_equivalent_to(by_out, 4), name
    chex.assert_trees_all_close(jax.device_get(collapsed), jax.device_get(wide.collapse(params, state)), atol=1e-14)


def test_checkpoints_hold_params_and_state(made, tmp_path):
    wide, params, state, images = made
    kept = {"params": params, "state": state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "kept", kept)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "kept", jax.tree.map(jnp.zeros_like, kept))
    chex.assert_trees_all_equal(restored, kept)
    chex.assert_trees_all_equal(wide(*restored.values(), images, train=True), wide(params, state, images, train=True))


@pytest.mark.parametrize("where", ["within", "around"])
def test_rematerialized_parts_stay_rematerialized(made, where):
    _, _, _, images = made

    def layers(v, x):
        part = lambda x: jax.nn.relu(convolve(x, v["a"]) + v["bias"])  # noqa: E731
        x = jax.checkpoint(part)(x) if where == "within" else part(x)
        return jnp.tanh(convolve(x, v["b"])).mean((1, 2))

    variables = made[0].collapse(made[0].params, made[0].state)
    wide = expand(layers, variables, images)
    params = jax.tree.map(lambda leaf: leaf + 0.1, wide.params)
    run = partial(wide, train=True)
    run = jax.checkpoint(run) if where == "around" else run
    counted = primitives(run, params, wide.state, images)
    assert counted["checkpoint"] + counted["remat2"] == 1  # its name in older and in newer JAX
    plain, _ = made[0](params, wide.state, images, train=True)
    found, after = run(params, wide.state, images)
    np.testing.assert_allclose(found, plain, atol=1e-13)
    slopes = [
        jax.jit(jax.grad(lambda p, each=each: (each(p, wide.state, images)[0] ** 2).sum()))(params)
        for each in (run, partial(made[0], train=True))
    ]
    chex.assert_trees_all_close(*slopes, rtol=1e-12, atol=1e-13)
    assert set(after) == {"a", "b"}


@pytest.mark.parametrize("padding", ["SAME", ((1, 1), (1, 1))], ids=str)
@pytest.mark.parametrize("side", [8, 9])
def test_images_of_other_sizes_are_read_by_the_same_branches(padding, side):
    """Under 'SAME', strides centre the window on other pixels of even sizes than of odd ones; so do the branches."""
    function = lambda v, x: convolve(x, v["kernel"], padding=padding, stride=2)  # noqa: E731
    variables = {"kernel": random_images((3, 3, 4, 4))}
    wide = expand(function, variables, random_images((2, 8, 8, 4)), branches="acnet")
    params = jax.tree.map(lambda leaf: leaf + 0.1, wide.params)
    images = random_images((3, side, side + 1, 4))
    found, _ = wide(params, wide.state, images, train=False)
    np.testing.assert_allclose(found, function(wide.collapse(params, wide.state), images), atol=1e-12)


def test_inputs_for_which_the_function_convolves_otherwise_are_refused():
    def function(v, x):
        x = convolve(x, v["kernel"])
        return convolve(x, v["kernel"]) if x.shape[1] > 8 else x

    variables = {"kernel": random_images((3, 3, 4, 4))}
    wide = expand(function, variables, random_images((2, 8, 8, 4)))
    with pytest.raises(ValueError, match=r"convolves otherwise than when it was expanded, with kernel: expected"):
        wide(wide.params, wide.state, random_images((2, 9, 9, 4)), train=False)


def test_other_parameters_are_refused(made):
    wide, params, state, images = made
    wrong = {**params, "branches": {**params["branches"], "a": {"kernel": {"gain": jnp.ones(3)}}}}
    with pytest.raises(ValueError, match=r"1x1/gain is missing, .*; params/branches/a/kernel/gain is \(3,\), "):
        wide(wrong, state, images, train=True)
    with pytest.raises(ValueError, match=r"params and state are not those of this function: state/a/.* is missing"):
        wide.collapse(params, {})


def test_tracers_are_refused(made):
    _, params, _, images = made
    with pytest.raises(ValueError, match=r"3 of 3 variables are tracers: .*; call expand outside of jit"):
        jax.jit(lambda v: expand(network, v, images).params)(params["variables"])


def test_forward_mode_needs_xlas_own_convolutions():
    variables, images = {"kernel": random_images((3, 3, 4, 4))}, random_images((2, 8, 8, 4))
    function = lambda v, x: convolve(x, v["kernel"])  # noqa: E731
    wide = expand(function, variables, images, ops="xla")
    _, tangent = jax.jvp(lambda x: wide(wide.params, wide.state, x, train=False)[0], (images,), (images,))
    np.testing.assert_allclose(tangent, function(variables, images), atol=1e-12)


def test_shapes_are_enough_to_expand_and_then_variances_begin_at_one():
    case = CASES["residual"]()
    shapes = jax.ShapeDtypeStruct(case.images.shape, case.images.dtype)
    wide = expand(case.function, case.variables, shapes)
    assert {float(leaf) for each in jax.tree.leaves(wide.state) for leaf in each} == {1.0}
    found, _ = wide(wide.params, wide.state, case.images, train=False)
    chex.assert_trees_all_close(found, case.function(case.variables, case.images), atol=1e-12)
    # Measured, they are what the branches have; as published the gains are one, and it is another function.
    published = expand(case.function, case.variables, case.images, init="published")
    gains = [each["gain"] for site in published.params["branches"].values() for each in site.values()]
    assert {float(value) for gain in gains for value in gain} == {1.0}
    (outputs, _), after = published(published.params, published.state, case.images, train=True)
    chex.assert_trees_all_close(after, published.state, rtol=1e-12)
    assert float(jnp.abs(outputs - case.function(case.variables, case.images)[0]).max()) > 1e-2


def test_random_kernels_depend_on_the_key_and_the_name_alone():
    variables, images = (
        {"a": random_images((3, 3, 4, 4)), "b": random_images((3, 3, 4, 4))},
        random_images((2, 8, 8, 4)),
    )
    function = lambda v, x: convolve(jnp.tanh(convolve(x, v["a"])), v["b"])  # noqa: E731
    kernel = lambda wide, name: wide.params["branches"][name]["1x1"]["kernel"]  # noqa: E731
    wide, again, other = (expand(function, variables, images, key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(kernel(wide, "b"), kernel(again, "b"))
    alone = expand(function, variables, images, where=lambda path, shape: path == "b")
    np.testing.assert_array_equal(kernel(wide, "b"), kernel(alone, "b"))
    assert float(jnp.abs(kernel(wide, "b") - kernel(other, "b")).max()) > 0.1
    assert float(jnp.abs(kernel(wide, "b") - kernel(wide, "a")).max()) > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"branches": "resnet"},
            "branches is 'resnet': expected one of repvgg, acnet, dbb, mobileone, or a tuple of branches",
        ),
        ({"branches": (Kernel(), Average())}, r"branches has Average\(gain=1.0\): expected .*, an Average in a Chain"),
        ({"branches": (Kernel(), "1x1")}, "branches has '1x1': expected Kernel, Conv, Identity and Chain"),
        ({"branches": ()}, r"branches is \(\): expected one Kernel\(\) among them"),
        ({"init": "random"}, "init is 'random': expected 'same' or 'published'"),
        ({"ops": "fast"}, "ops is 'fast': expected 'auto' or 'xla'"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"epsilon": 0}, "and epsilon 0: expected"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        expand(network, {}, random_images((8, 6, 5, 3)), **options)
