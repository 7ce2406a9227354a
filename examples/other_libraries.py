"""Networks of Keras, kimm, Haiku, Equinox, Flax NNX and Flax linen, as `reparameterize` takes them.

It takes a function of variables and inputs, and the variables. Each function here makes the two of what its library
calls a model, in evaluation. None of them runs the model, so copy the one you need.

python examples/other_libraries.py     merges a MobileNetV2 of Keras (`pip install keras`)
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax import reparameterize

Network = tuple[Callable[..., Any], Any]


def from_keras(model: Any) -> Network:
    """Take a Keras 3 model on the JAX backend, also one of kimm: set `KERAS_BACKEND=jax` before Keras is imported."""

    def function(variables, *inputs):
        trainable, non_trainable = variables
        outputs, _ = model.stateless_call(trainable, non_trainable, *inputs, training=False)
        return outputs

    kinds = model.trainable_variables, model.non_trainable_variables
    return function, tuple([variable.value for variable in kind] for kind in kinds)


def from_haiku(network: Any, params: Any, state: Any) -> Network:
    """Take what `hk.transform_with_state` returns, of a function that calls the network with `is_training=False`."""

    def function(variables, *inputs):
        outputs, _ = network.apply(*variables, None, *inputs)
        return outputs

    return function, (params, state)


def from_equinox(model: Any, state: Any) -> Network:
    """Take the two halves of `eqx.nn.make_with_state`, a model of one image `(channels, height, width)` and a state."""
    import equinox as eqx

    arrays, rest = eqx.partition((eqx.nn.inference_mode(model), state), eqx.is_array)

    def function(variables, images):
        model, state = eqx.combine(variables, rest)
        return jax.vmap(lambda image: model(image, state)[0], axis_name="batch")(images)

    return function, arrays


def from_nnx(model: Any) -> Network:
    """Take a Flax NNX module; it is put into evaluation."""
    from flax import nnx

    model.eval()
    graph, state = nnx.split(model)
    return lambda variables, *inputs: nnx.merge(graph, variables)(*inputs), nnx.to_pure_dict(state)


def from_linen(module: Any, variables: Any) -> Network:
    """Take a Flax linen module whose `__call__` has a flag `train`, as those of flaxmodels have."""
    return lambda variables, *inputs: module.apply(variables, *inputs, train=False), variables


def main() -> None:
    """Merge a MobileNetV2 whose weights are random, and compare."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    function, variables = from_keras(keras.applications.MobileNetV2(weights=None, input_shape=(64, 64, 3)))
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 64, 3)), jnp.float32)
    fused = reparameterize(function, variables, images)
    print(fused.report())
    expected, found = jax.jit(function)(variables, images), jax.jit(fused)(fused.params, images)
    print(f"\nlargest difference: {abs(found - expected).max() / abs(expected).max():.1e} of the largest output")


if __name__ == "__main__":
    main()
