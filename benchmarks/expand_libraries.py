"""Other people's networks, trained with branches: `python -m benchmarks.expand_libraries [--networks …] [--side 32]`.

For each network of another library, as it is trained, and with the branches of RepVGG: convolutions and how many of
them are expanded, array elements before and after, the largest difference of the logits relative to the largest one, at
the start and, after ten steps of SGD, between the branches and the network with what they became, and how long it took
to expand. Eight images, float32. The libraries: `pip install -e ".[foreign]"`.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from tabulate import tabulate

from benchmarks.command import end_with, whole
from benchmarks.foreign import import_keras
from benchmarks.speed import machine
from repvgg_jax import expand
from repvgg_jax.transform.equations import convolutions

BATCH, STEPS = 8, 10
HEADERS = ("library", "network", "convolutions", "expanded", "array elements (10⁶)", "at the start", "after 10 steps",
           "expanded in (s)")  # fmt: skip


class Network(NamedTuple):
    """A network in training.

    Attributes:
      function: A function of variables, inputs and images. The logits are the first of its results.
      variables: What is trained.
      inputs: What is given beside it, before the images: statistics, say.
      channels_first: Whether an image is `(channels, height, width)`.
    """

    function: Callable[..., Any]
    variables: Any
    inputs: tuple[Any, ...]
    channels_first: bool = False

    def images(self, side: int) -> jax.Array:
        """Draw images."""
        shape = (3, side, side) if self.channels_first else (side, side, 3)
        return jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, *shape)), jnp.float32)


class Measurement(NamedTuple):
    """What expanding a network did.

    Attributes:
      convolutions: Its convolutions.
      expanded: How many of them have branches.
      elements: Array elements of the variables, and of the parameters.
      start: Difference of the logits at the start, relative to the largest.
      end: The same after training, between the branches and what they became.
      moved: The same between the network at the start and at the end.
      seconds: That expanding took.
    """

    convolutions: int
    expanded: int
    elements: tuple[int, int]
    start: float
    end: float
    moved: float
    seconds: float


def _keras(side: int) -> Network:
    model = import_keras().applications.MobileNetV2(
        weights=None, input_shape=(side, side, 3), classifier_activation=None
    )
    names = [variable.path for variable in model.trainable_variables]

    def function(variables, non_trainable, images):
        trainable = [variables[name] for name in names]
        return model.stateless_call(trainable, non_trainable, images, training=True)

    trainable = {variable.path: variable.value for variable in model.trainable_variables}
    return Network(function, trainable, ([variable.value for variable in model.non_trainable_variables],))


def _haiku(side: int) -> Network:
    import haiku

    def call(images):
        # Its head begins at zero, so that all images would look the same.
        head = {"w_init": haiku.initializers.VarianceScaling()}
        return haiku.nets.ResNet18(10, logits_config=head)(images, is_training=True)

    network = haiku.transform_with_state(call)
    params, state = network.init(jax.random.key(0), jnp.zeros((1, side, side, 3)))
    return Network(lambda variables, state, images: network.apply(variables, state, None, images), params, (state,))


def _equinox(side: int) -> Network:
    import equinox as eqx

    from benchmarks import equinox_resnet

    model, state = eqx.nn.make_with_state(equinox_resnet.ResNet18)(jax.random.key(0))
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)

    def function(variables, state, images):
        run = jax.vmap(eqx.combine(variables, rest), in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        return run(images, state)

    return Network(function, arrays, (state,), channels_first=True)


def _flaxmodels(side: int) -> Network:
    import flaxmodels

    module = flaxmodels.ResNet18(output="logits", pretrained=None, num_classes=10)
    fresh = module.init(jax.random.key(0), jnp.zeros((1, side, side, 3)), train=False)

    def function(variables, statistics, images):
        both = {"params": variables, "batch_stats": statistics}
        return module.apply(both, images, train=True, mutable=["batch_stats"])

    return Network(function, fresh["params"], (fresh["batch_stats"],))


def _nnx(side: int) -> Network:
    from benchmarks import nnx_resnet

    graph, params, statistics = nnx.split(nnx_resnet.ResNet18(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

    def function(variables, statistics, images):
        model = nnx.merge(graph, variables, statistics)
        return model(images), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    return Network(function, nnx.to_pure_dict(params), (nnx.to_pure_dict(statistics),))


def _lax(side: int) -> Network:
    random = np.random.default_rng(0)
    shapes = ((16, 3, 3, 3), (16, 16, 3, 3), (32, 16, 3, 3), (32, 32, 3, 3))
    variables = [
        {
            "kernel": jnp.asarray(random.normal(0, np.prod(shape[1:]) ** -0.5, shape), jnp.float32),
            "bias": jnp.zeros(shape[0]),
        }
        for shape in shapes
    ]

    def function(variables, images):
        x = images
        for each in variables:
            x = jax.nn.relu(lax.conv(x, each["kernel"], (1, 1), "SAME") + each["bias"][None, :, None, None])
        return x.mean((2, 3)), None

    return Network(function, variables, (), channels_first=True)


LIBRARIES: dict[str, tuple[str, Callable[[int], Network]]] = {
    "flaxmodels": ("ResNet18", _flaxmodels),
    "nnx": ("ResNet18", _nnx),
    "haiku": ("ResNet18", _haiku),
    "keras": ("MobileNetV2", _keras),
    "equinox": ("ResNet18", _equinox),
    "lax": ("four convolutions", _lax),
}


def measure(library: str, side: int, branches: str = "repvgg") -> Measurement:
    """Expand a network, train it for ten steps, collapse it and compare."""
    with jax.default_matmul_precision("float32"):
        network = LIBRARIES[library][1](side)
        inputs = (*network.inputs, network.images(side))
        start = time.perf_counter()
        wide = expand(network.function, network.variables, *inputs, branches=branches)
        seconds = time.perf_counter() - start
        plain = jax.jit(network.function)
        expected = plain(network.variables, *inputs)[0]
        params, state = _trained(wide, inputs)
        collapsed = wide.collapse(params, state)
        _require_alike(collapsed, network.variables)
        evaluate = jax.jit(partial(wide, train=False))
        found = plain(collapsed, *inputs)[0]
        program = jax.make_jaxpr(network.function)(network.variables, *inputs)
        return Measurement(
            sum(map(convolutions, program.eqns)),
            len(wide.state),
            (_size(network.variables), _size(wide.params)),
            _difference(evaluate(wide.params, wide.state, *inputs)[0][0], expected),
            _difference(evaluate(params, state, *inputs)[0][0], found),
            _difference(found, expected),
            seconds,
        )


def _trained(wide: Any, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    optimizer = optax.sgd(0.01, momentum=0.9)

    @jax.jit
    def step(params: Any, state: Any, memory: Any) -> Any:
        def loss(params: Any) -> Any:
            (logits, _), after = wide(params, state, *inputs, train=True)
            labels = jnp.arange(BATCH) % logits.shape[-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), after

        slope, state = jax.grad(loss, has_aux=True)(params)
        updates, memory = optimizer.update(slope, memory, params)
        return optax.apply_updates(params, updates), state, memory

    params, state, memory = wide.params, wide.state, optimizer.init(wide.params)
    for _ in range(STEPS):
        params, state, memory = step(params, state, memory)
    return params, state


def _require_alike(found: Any, expected: Any) -> None:
    """Raise an error unless two trees have one structure, shapes and dtypes."""
    described = [jax.tree.map(lambda leaf: (np.shape(leaf), leaf.dtype), tree) for tree in (found, expected)]
    if jax.tree.structure(found) != jax.tree.structure(expected) or described[0] != described[1]:
        raise ValueError("the collapsed tree is not like the variables: expected their structure, shapes and dtypes")


def _size(tree: Any) -> int:
    return sum(np.size(leaf) for leaf in jax.tree.leaves(tree))


def _difference(found: jax.Array, expected: jax.Array) -> float:
    return float(jnp.abs(found - expected).max() / jnp.abs(expected).max())


def row(library: str, side: int) -> tuple[str, ...]:
    """One line of the table; a library that is missing is named with the command that installs it."""
    name = LIBRARIES[library][0]
    try:
        found = measure(library, side)
    except ModuleNotFoundError as error:
        return library, name, f'not run: {error}: pip install -e ".[foreign]"'
    before, after = found.elements
    return (
        library,
        name,
        str(found.convolutions),
        str(found.expanded),
        f"{before / 1e6:.2f} → {after / 1e6:.2f}",
        f"{found.start:.0e}",
        f"{found.end:.0e}",
        f"{found.seconds:.1f}",
    )


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(LIBRARIES), choices=list(LIBRARIES), metavar="LIBRARY")
    parser.add_argument("--side", type=whole, default=32, help="of the square images, in pixels")
    options = parser.parse_args(arguments)
    setting = machine()
    rows = []
    for library in options.networks:
        rows.append(row(library, options.side))
        print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    print(f"{BATCH} images of {options.side}×{options.side}, float32, {setting['device']}, jax {jax.__version__}\n")
    print(tabulate(rows, HEADERS, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    end_with(main)
