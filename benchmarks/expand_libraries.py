"""Other people's networks, trained as branches: `python -m benchmarks.expand_libraries [--networks …] [--side 32]`.

Each network is one of another library as it is trained, most with the statistics of the batch. `expand` gives it the
branches of RepVGG, and ten steps of SGD train them. The table has its convolutions and how many became branches, the
array elements that are trained before and after, two differences in float32, relative to the largest output, and how
long it took to expand. The first difference is that to the network itself at the start. The second is that to the
network of the collapsed variables after training. All variables and statistics are drawn at random. The libraries:
`pip install -e ".[foreign]"`.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from tabulate import tabulate

from benchmarks.command import end_with, whole
from benchmarks.speed import machine
from benchmarks.trained_networks import BATCH, NETWORKS, Training
from repvgg_jax import expand
from repvgg_jax.transform import Expanded
from repvgg_jax.transform.equations import convolutions

STEPS = 10
HEADERS = (
    "library",
    "network",
    "convolutions",
    "expanded",
    "elements (10⁶)",
    "error at the start",
    "error, collapsed",
    "expanded in (s)",
)


class Measurement(NamedTuple):
    """What expanding and training a network did.

    Attributes:
        convolutions: that the network has.
        expanded: how many of them have branches.
        before: array elements of the variables.
        after: array elements that are trained as branches.
        start: the largest difference of the outputs at the start, relative to the largest output.
        collapsed: the same after training, between the network with branches and that of the collapsed variables.
        moved: the same between the network after training and at the start.
        seconds: that expanding took.
    """

    convolutions: int
    expanded: int
    before: int
    after: int
    start: float
    collapsed: float
    moved: float
    seconds: float


def train(wide: Expanded, network: Training) -> tuple[Any, Any, Any]:
    """Take ten steps of SGD on the batch, and return parameters, state and statistics."""
    optimizer = optax.sgd(0.02, momentum=0.9)

    @jax.jit
    def step(params, state, statistics, memory):
        def loss(params):
            (logits, after), following = wide(params, state, network.images, statistics, train=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(len(logits)))
            return losses.mean(), (following, after)

        slope, (state, statistics) = jax.grad(loss, has_aux=True)(params)
        updates, memory = optimizer.update(slope, memory, params)
        return optax.apply_updates(params, updates), state, statistics, memory

    params, state, statistics, memory = wide.params, wide.state, network.statistics, optimizer.init(wide.params)
    for _ in range(STEPS):
        params, state, statistics, memory = step(params, state, statistics, memory)
    return params, state, statistics


def distance(found: jax.Array, expected: jax.Array) -> float:
    """Return the largest difference, relative to the largest expected number."""
    return float(jnp.abs(found - expected).max() / jnp.abs(expected).max())


def measure(network: Training) -> Measurement:
    """Expand a network, train it and compare."""
    function, variables, statistics, images = network
    begin = time.perf_counter()
    wide = expand(function, variables, images, statistics)
    seconds = time.perf_counter() - begin
    plain, apart = jax.jit(function), jax.jit(wide, static_argnames="train")
    expected, _ = plain(variables, images, statistics)
    (first, _), _ = apart(wide.params, wide.state, images, statistics, train=True)
    params, state, statistics = train(wide, network)
    (found, _), _ = apart(params, state, images, statistics, train=False)
    collapsed, _ = plain(wide.collapse(params, state), images, statistics)
    return Measurement(
        sum(map(convolutions, jax.make_jaxpr(function)(variables, images, statistics).eqns)),
        len(wide.state),
        *(sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (variables, wide.params)),
        distance(first, expected),
        distance(collapsed, found),
        distance(found, expected),
        seconds,
    )


def row(network: str, side: int) -> tuple[str, ...]:
    """One line of the table; a library that is missing is named with the command that installs it."""
    library, name = network.split("/")
    try:
        with jax.default_matmul_precision("float32"):
            found = measure(NETWORKS[network](name, side))
    except ModuleNotFoundError as error:
        return library, name, f'not run: {error}: pip install -e ".[foreign]"'
    return (
        library,
        name,
        f"{found.convolutions}",
        f"{found.expanded}",
        f"{found.before / 1e6:.2f} → {found.after / 1e6:.2f}",
        f"{found.start:.0e}",
        f"{found.collapsed:.0e}",
        f"{found.seconds:.1f}",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), metavar="LIBRARY/NETWORK"
    )
    parser.add_argument("--side", type=whole, default=32, help="of the square images, in pixels")
    options = parser.parse_args(arguments)
    setting = machine()
    rows = []
    for network in options.networks:
        rows.append(row(network, options.side))
        print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    print(
        f"{BATCH} images of {options.side}×{options.side}, {STEPS} steps, float32, {setting['device']}, "
        f"jax {jax.__version__}\n"
    )
    print(tabulate(rows, HEADERS, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    end_with(main)
