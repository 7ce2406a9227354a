"""A network with branches is the network it began as, and, trained, the one that it collapses to."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from repvgg_jax.transform import PUBLISHED, expand, reparameterize
from tests.random_variables import random_images
from tests.transform.expanding.networks import CASES
from tests.transform.merging.comparison import primitives

pytestmark = pytest.mark.usefixtures("float64")


def shaken(wide, seed=0):
    """Parameters of the branches and a state at random; the caller's variables stay."""
    rng = np.random.default_rng(seed)
    branches = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape)), wide.params["branches"])
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape)), wide.state)
    return {**wide.params, "branches": branches}, state


def distance(one, other):
    """The largest difference of the first results, relative to the largest of them."""
    a, b = jax.tree.leaves(one)[0], jax.tree.leaves(other)[0]
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


@pytest.mark.parametrize(
    ("name", "branches"),
    [
        *(("residual", branches) for branches in PUBLISHED),
        *(("mobile", branches) for branches in ("repvgg", "mobileone")),
        *(("grouped", branches) for branches in ("acnet", "dbb")),
        *(("volumetric", branches) for branches in ("acnet", "dbb")),
        ("nnx", "repvgg"),
        ("bare", "mobileone"),
    ],
)
def test_it_begins_as_the_function_and_collapses_to_what_it_becomes(name, branches):
    case = CASES[name]()
    wide = expand(case.function, case.variables, case.images, branches=branches)
    expected = case.function(case.variables, case.images)
    both = jax.jit(lambda params, state, x, train: wide(params, state, x, train=train), static_argnums=3)

    # The variances were measured on these images, so that even in training all is as it was.
    for train in (False, True):
        outputs, state = both(wide.params, wide.state, case.images, train)
        chex.assert_trees_all_close(outputs, expected, atol=1e-12)
        chex.assert_trees_all_close(state, wide.state, atol=1e-12)
    chex.assert_trees_all_close(wide.collapse(wide.params, wide.state), case.variables, atol=1e-12)

    params, state = shaken(wide)
    found, after = both(params, state, case.images, False)
    collapsed = wide.collapse(params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(collapsed, case.variables)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert distance(found, case.function(collapsed, case.images)) < 1e-12
    chex.assert_trees_all_equal(after, state)
    # Negative controls: it has become another function, and with other variances it is yet another.
    assert distance(found, expected) > 1e-3
    assert distance(found, case.function(wide.collapse(params, wide.state), case.images)) > 1e-6


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_of_training_collapse_into_the_callers_tree(name):
    case = CASES[name]()
    wide = expand(case.function, case.variables, case.images, branches="dbb" if name == "residual" else "repvgg")
    optimizer = optax.sgd(0.05, momentum=0.9)
    images = random_images(case.images.shape, seed=2)

    @jax.jit
    def step(params, state, memory):
        def loss(params):
            outputs, after = wide(params, state, images, train=True)
            return case.loss(outputs), after

        (value, state), slope = jax.value_and_grad(loss, has_aux=True)(params)
        updates, memory = optimizer.update(slope, memory, params)
        return optax.apply_updates(params, updates), state, memory, value

    params, state, memory = wide.params, wide.state, optimizer.init(wide.params)
    losses = []
    for _ in range(10):
        params, state, memory, value = step(params, state, memory)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    collapsed = wide.collapse(params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(collapsed, case.variables)
    found, _ = wide(params, state, case.images, train=False)
    assert distance(found, case.function(collapsed, case.images)) < 1e-12
    # Every branch has learned something, and every variance has moved.
    for name, leaf in jax.tree_util.tree_leaves_with_path(params["branches"]):
        assert float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(name)
    assert distance(found, case.function(case.variables, case.images)) > 1e-4
    assert not any(np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (state, wide.state)), strict=True))


def test_float32_is_as_exact_as_float32_is():
    case = CASES["bare"]()
    with jax.enable_x64(False):
        variables, images = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (case.variables, case.images))
        wide = expand(case.function, variables, images, branches="dbb")
        params, state = shaken(wide)
        found, _ = jax.jit(partial(wide, train=False))(params, state, images)
        assert jax.tree.leaves(found)[0].dtype == jnp.float32
        assert 0 < distance(found, case.function(wide.collapse(params, state), images)) < 1e-5


@pytest.mark.parametrize(
    ("name", "branches"),
    [
        *(("residual", branches) for branches in ("repvgg", "acnet", "mobileone")),
        *(("mobile", "mobileone"), ("volumetric", "acnet"), ("nnx", "repvgg"), ("bare", "mobileone")),
    ],
)
def test_merged_by_reparameterize_it_has_the_callers_number_of_convolutions(name, branches):
    case = CASES[name]()
    wide = expand(case.function, case.variables, case.images, branches=branches)
    params, state = shaken(wide)
    merged = reparameterize(lambda v, x: wide(*v, x, train=False)[0], (params, state), case.images)
    assert merged.totals["convolutions"].before > case.convolutions == merged.totals["convolutions"].after
    found = merged(merged.params, case.images)
    assert distance(found, case.function(wide.collapse(params, state), case.images)) < 1e-11


def test_a_diverse_branch_block_is_merged_back_whole():
    case = CASES["residual"]()
    wide = expand(case.function, case.variables, case.images, branches="dbb")
    merged = reparameterize(lambda v, x: wide(*v, x, train=False)[0], shaken(wide), case.images)
    assert primitives(merged, merged.params, case.images)["conv_general_dilated"] == case.convolutions
