"""What a program computes without its inputs comes out as the program computes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.transform import reparameterize
from repvgg_jax.transform.merging.reading import evaluate
from tests.transform.merging.networks import convolve


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize(
    "network",
    [
        lambda v, x: x[:, (v["a"] * 10).astype(jnp.int32)],
        lambda v, x: x[:, :4] + jnp.floor(v["a"] * 10),
        lambda v, x: jnp.where(v["a"] + 0.2 >= 0.3, x[:, :4], 0),
        lambda v, x: x[:, :4] * jnp.nextafter(v["a"], 1.0),
        lambda v, x: x[:, :4] * jnp.signbit(v["a"] - 0.3),
        lambda v, x: x[:, :4] + jnp.linalg.inv(jnp.diag(v["a"]))[0],
        lambda v, x: x[:, :4] * jax.lax.platform_dependent(default=lambda: jnp.ones(4)),
        lambda v, x: x[:, :4] * v["a"].astype(jnp.bfloat16).astype(jnp.float32),
        lambda v, x: x[:, :4] * (v["a"].astype(jnp.bfloat16) * jnp.bfloat16(1.3)).astype(jnp.float32),
        lambda v, x: x[:, :4] * jnp.sqrt(jnp.minimum(v["a"], 0.5) - jnp.maximum(-v["a"], -0.2) / jnp.square(v["a"])),
        lambda v, x: x[:, :4] * jax.lax.rsqrt(v["a"]),
    ],
    ids=[
        "to integers", "floor", "comparison", "nextafter", "bits", "inverse", "platform", "cast to bfloat16",
        "in bfloat16", "on the host", "rsqrt",
    ],
)  # fmt: skip
def test_steps_and_bits_are_those_of_float32(network):
    v, x = {"a": jnp.asarray([0.7, 0.1, 0.3, 0.6])}, jnp.arange(20.0).reshape(2, 10)
    fused = reparameterize(network, v, x)
    np.testing.assert_allclose(fused(fused.params, x), network(v, x), rtol=1e-6)


@pytest.mark.parametrize(
    "network",
    [
        lambda v, x: x[:, :6] + jax.lax.reshape(v["matrix"], (6,), (1, 0)),
        lambda v, x: x[:, :6] + v["matrix"].ravel(order="F"),
        lambda v, x: jax.vmap(lambda k: convolve(x.reshape(1, 2, 5, 2), k))(v["kernels"]),
    ],
    ids=["reshape", "ravel", "vmap over kernels"],
)
def test_reshapes_that_read_the_axes_in_another_order_do_so(network):
    random = np.random.default_rng(0)
    v = {"matrix": random.normal(size=(2, 3)), "kernels": random.normal(size=(3, 1, 1, 2, 4))}
    v, x = jax.tree.map(jnp.float32, v), jnp.float32(random.normal(size=(2, 10)))
    fused = reparameterize(network, v, x)
    np.testing.assert_allclose(fused(fused.params, x), network(v, x), rtol=1e-5, atol=1e-5)


def test_weak_types_stay_weak():
    kernel = jnp.ones((1, 1, 2, 2), jnp.bfloat16)

    network = lambda v, x: convolve(x, v["kernel"]) * v["scale"]  # noqa: E731
    v, x = {"kernel": kernel, "scale": 2.0}, jnp.ones((1, 3, 3, 2), jnp.bfloat16)
    fused = reparameterize(network, v, x)
    assert fused(fused.params, x).dtype == network(v, x).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", [jax.random.key, jax.random.PRNGKey])
def test_random_keys_may_stand_anywhere(kind):
    outside = kind(1)

    def network(v, x):
        keys = v["key"], outside, kind(2)
        return x * v["scale"] + sum(jax.random.normal(key, x.shape) for key in keys)

    v, x = {"key": kind(0), "scale": jnp.full(3, 2.0)}, jnp.ones((2, 3))
    fused = reparameterize(network, v, x)
    for batch in (x, jnp.ones((4, 3))):
        np.testing.assert_allclose(fused(fused.params, batch), network(v, batch), rtol=1e-5)


def batch_norm(v, x):
    y = (convolve(x, v["kernel"]) - v["mean"]) * (jax.lax.rsqrt(v["var"] + 1e-3) * v["scale"]) + v["bias"]
    return jnp.sqrt(jnp.square(y / jnp.maximum(v["scale"].reshape(1, 1, -1), 0.1)))


def test_the_arithmetic_of_batch_norms_compiles_nothing(monkeypatch):
    """A program is compiled for each operation and shape otherwise, which took most of the time to merge a network."""
    random = np.random.default_rng(0)
    v = {name: random.uniform(0.5, 2, 5).astype(np.float32) for name in ("mean", "var", "scale", "bias")}
    v["kernel"] = random.normal(size=(1, 1, 3, 5)).astype(np.float32)
    x = random.normal(size=(1, 4, 4, 3)).astype(np.float32)
    compiled = []
    monkeypatch.setattr(evaluate, "_on_host", lambda equation, *_: compiled.append(equation.primitive.name))
    fused = reparameterize(batch_norm, v, x)
    assert compiled == []
    np.testing.assert_allclose(fused(fused.params, x), batch_norm(v, x), rtol=1e-5, atol=1e-5)


def test_what_a_function_holds_itself_is_a_parameter_unless_it_is_a_number():
    held, number = jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray(2.0)
    found = [
        reparameterize(network, {}, jax.ShapeDtypeStruct((2, 3), jnp.float32)).params
        for network in (
            lambda v, x: jnp.tanh(x) * held,
            lambda v, x: jnp.tanh(x) * number,
            lambda v, x: -jnp.tanh(x) / 2,
            lambda v, x: jnp.tanh(x) + jnp.arange(3.0),
        )
    ]
    assert [[value.shape for value in params.values()] for params in found] == [[(1, 3)], [], [], []]


def test_effects_are_kept_those_of_constants_too():
    seen = []

    def network(v, x):
        jax.debug.callback(lambda value: seen.append(float(value)), v["a"] * 2)
        jax.debug.callback(lambda value: seen.append(float(value)), x.sum())
        return x * v["a"]

    fused = reparameterize(network, {"a": jnp.float32(3.0)}, jnp.ones(2))
    seen.clear()
    fused(fused.params, 5 * jnp.ones(2)).block_until_ready()
    jax.effects_barrier()
    assert sorted(seen) == [6.0, 10.0]
