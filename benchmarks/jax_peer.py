"""Our networks, and ResNets in Flax: `repvgg_jax` as shipped, 'flax' with XLA's own convolutions."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks.race import Case
from benchmarks.resnet import create_resnet
from repvgg_jax import compile_inference, create_model
from repvgg_jax.ops import compiler_options

CLASSES = 1000


def network(case: Case) -> tuple[nn.Module, Any]:
    """The model and random variables of the form and the compute dtype of the case."""
    policy: dict[str, Any] = dict(
        num_classes=CLASSES,
        deploy=case.form == "deploy",
        ops="xla" if case.peer == "flax" else "auto",
        dtype=jnp.bfloat16 if case.dtype == "bfloat16" else None,
    )
    if case.network.startswith("resnet"):
        model: nn.Module = create_resnet(case.network, **policy)
    else:
        model = create_model(case.network, strides=case.strides, **policy)
    image = jnp.zeros((1, case.size, case.size, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))

    random = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if len(leaf.shape) == 1:  # bias, scale and statistics
            return jnp.ones(leaf.shape, leaf.dtype)
        fan_in = math.prod(leaf.shape[:-1])
        return jnp.asarray((2 / fan_in) ** 0.5 * random.standard_normal(leaf.shape, np.float32), leaf.dtype)

    return model, jax.tree.map(draw, shapes)


def build(case: Case) -> Callable[[int], None]:
    """A function that runs the case so many times, and waits."""
    model, variables = network(case)
    shape = (case.batch, case.size, case.size, 3)
    images = jax.random.normal(jax.random.key(1), shape, jnp.bfloat16 if case.dtype == "bfloat16" else jnp.float32)
    if case.form == "step":
        options = {} if case.peer == "flax" else compiler_options(jax.default_backend())
        return _steps(model, variables, images, options)
    if case.peer == "flax":
        plain = jax.jit(lambda variables, images: model.apply(variables, images, train=False))

        def forward(images: jax.Array) -> jax.Array:
            return plain(variables, images)
    else:
        forward = compile_inference(model, variables, images)

    def calls(count: int) -> None:
        for _ in range(count):
            logits = forward(images)
        jax.block_until_ready(logits)

    return calls


def _steps(model, variables, images: jax.Array, options: dict[str, Any]) -> Callable[[int], None]:
    optimizer = optax.sgd(0.01, momentum=0.9, nesterov=True)
    labels = jnp.arange(len(images)) % CLASSES

    def step(state, images):
        params, batch_stats, momentum = state

        def loss(params):
            logits, updates = model.apply(
                {"params": params, "batch_stats": batch_stats}, images, train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates["batch_stats"]

        gradients, statistics = jax.grad(loss, has_aux=True)(params)
        updates, momentum = optimizer.update(gradients, momentum, params)
        return optax.apply_updates(params, updates), statistics, momentum

    state = [(variables["params"], variables["batch_stats"], optimizer.init(variables["params"]))]
    compiled = jax.jit(step, donate_argnums=0).lower(state[0], images).compile(options)

    def calls(count: int) -> None:
        for _ in range(count):
            state[0] = compiled(state[0], images)
        jax.block_until_ready(state[0])

    return calls
