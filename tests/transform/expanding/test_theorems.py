"""What training with branches is, as equations: full batch norms, and multiplied gradients."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from repvgg_jax.optimizers import scale_by_branches
from repvgg_jax.transform import Chain, Conv, Identity, Kernel, expand
from tests.random_variables import random_images
from tests.transform.expanding.networks import CASES
from tests.transform.merging.networks import convolve

pytestmark = pytest.mark.usefixtures("float64")


def published(branches, gains, x, epsilon=1e-5):
    """RepVGG's block in training as published: a batch norm with mean and bias in each branch, and then the sum."""
    total = 0
    for index, branch in enumerate(branches):
        y = branch(x)
        y = (y - y.mean((0, 1, 2))) / jnp.sqrt(y.var((0, 1, 2)) + epsilon)
        total += y * gains[index] + 0.3 * (index - 1)  # with a bias of its own
    return total


def followed(y):
    """Behind the sum: a batch norm and a ReLU."""
    return nn.relu((y - y.mean((0, 1, 2))) / jnp.sqrt(y.var((0, 1, 2)) + 1e-3) * 1.3 + 0.2)


def test_before_a_batch_norm_the_branches_are_those_with_full_batch_norms():
    """Outputs and gradients in training are the same: that norm subtracts the mean of the sum, and every bias."""
    rng = np.random.default_rng(0)
    gains = jnp.asarray(rng.normal(size=(3, 4)))
    kernels = {"full": jnp.asarray(rng.normal(size=(3, 3, 4, 4))), "point": jnp.asarray(rng.normal(size=(1, 1, 4, 4)))}
    images = random_images((3, 7, 6, 4))

    def loss_of(behind):
        function = lambda v, x: behind(convolve(x, v["kernel"]))  # noqa: E731
        wide = expand(function, {"kernel": kernels["full"]}, images, init="published")

        def ours(kernels, gains, x):
            branches = dict(zip(("kernel", "1x1", "identity"), ({"gain": gain} for gain in gains), strict=True))
            branches["1x1"]["kernel"] = kernels["point"]
            params = {"variables": {"kernel": kernels["full"]}, "branches": {"kernel": branches}}
            return jnp.sin(wide(params, wide.state, x, train=True)[0]).sum()

        def theirs(kernels, gains, x):
            branches = (partial(convolve, kernel=kernels["full"]), partial(convolve, kernel=kernels["point"]))
            return jnp.sin(behind(published([*branches, lambda x: x], gains, x))).sum()

        return (jax.jit(jax.value_and_grad(each, argnums=(0, 1, 2)))(kernels, gains, images) for each in (ours, theirs))

    ours, theirs = loss_of(followed)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(ours)) > 1e-3
    # Negative control: with no batch norm behind the sum they differ.
    ours, theirs = loss_of(nn.relu)
    assert abs(float(ours[0] - theirs[0])) > 1e-2


GAINS = (Kernel(gain=0.7), Conv(1, gain=1.5), Conv((None, 1), gain=-0.4), Identity(gain=0.6))


@pytest.mark.parametrize("name", [pytest.param("residual", marks=pytest.mark.long), "bare"])
@pytest.mark.parametrize("init", ["same", "published"])
def test_with_constant_gains_sgd_is_that_of_the_kernel_with_multiplied_gradients(name, init):
    """RepOptimizer, arXiv:2205.15242, section 3.2, with momentum and decay; ten steps."""
    case = CASES[name]()
    branches = (*GAINS, Conv((1, None, 1)))
    wide = expand(case.function, case.variables, case.images, branches=branches, norms=False, init=init)
    rest = (optax.add_decayed_weights(1e-2), optax.sgd(0.05, momentum=0.9, nesterov=True))
    plain = optax.chain(*rest)
    multiplied = optax.chain(scale_by_branches(wide.gradient_multipliers()), *rest)
    apart = lambda params, x: wide(params, wide.state, x, train=True)[0]  # noqa: E731

    def trained(function, optimizer, params):
        @jax.jit
        def step(params, memory, images):
            slope = jax.grad(lambda params: case.loss(function(params, images)))(params)
            updates, memory = optimizer.update(slope, memory, params)
            return optax.apply_updates(params, updates), memory

        memory = optimizer.init(params)
        for seed in range(10):
            params, memory = step(params, memory, random_images(case.images.shape, seed=seed))
        return params

    begin = wide.collapse(wide.params, wide.state)
    if init == "same":
        chex.assert_trees_all_close(begin, case.variables, atol=1e-14)
    expected = wide.collapse(trained(apart, plain, wide.params), wide.state)
    chex.assert_trees_all_close(trained(case.function, multiplied, begin), expected, rtol=1e-12, atol=1e-12)
    # Negative control: without multipliers it is another network.
    leaves = zip(*map(jax.tree.leaves, (trained(case.function, plain, begin), expected)), strict=True)
    assert max(float(jnp.abs(one - other).max()) for one, other in leaves) > 1e-3


def test_a_multiplier_is_the_sum_of_the_squared_gains_that_reach_a_tap():
    function = lambda v, x: convolve(x, v["kernel"]) + v["bias"]  # noqa: E731
    variables = {"kernel": random_images((3, 3, 2, 2)), "bias": jnp.zeros(2)}
    wide = expand(function, variables, random_images((1, 5, 5, 2)), branches=GAINS, norms=False)
    multipliers = wide.gradient_multipliers()
    assert multipliers["bias"].tolist() == 1
    squares = {
        name: gain**2 for name, gain in zip(("kernel", "point", "line", "identity"), (0.7, 1.5, 0.4, 0.6), strict=True)
    }
    expected = np.full((3, 3, 2, 2), squares["kernel"])
    expected[:, 1] += squares["line"]
    expected[1, 1] += squares["point"] + np.eye(2) * squares["identity"]
    np.testing.assert_allclose(multipliers["kernel"], expected, rtol=1e-12)
    doubled = jax.tree.map(lambda gain: 2 * gain, wide.state)
    np.testing.assert_allclose(wide.gradient_multipliers(doubled)["kernel"], 4 * expected, rtol=1e-12)


def test_where_gradients_are_no_multiples_it_is_said():
    function, variables = lambda v, x: convolve(x, v["kernel"]), {"kernel": random_images((3, 3, 2, 2))}
    images = random_images((1, 5, 5, 2))
    with pytest.raises(ValueError, match=r"the branches have norms.* expected expand\(…, norms=False\)"):
        expand(function, variables, images).gradient_multipliers()
    wide = expand(function, variables, images, branches=(Kernel(), Chain(Conv())), norms=False)
    with pytest.raises(ValueError, match=r"kernel has the branch 1x1_3x3.* expected no Chain"):
        wide.gradient_multipliers()
