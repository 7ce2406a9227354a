"""Other people's networks, merged: `python -m benchmarks.foreign [--networks …] [--side 224]`.

For each network of another library, before and after `reparameterize` with its default `ops`: convolutions, scales
(multiplications by channel, one in every batch norm), multiply-adds, the largest difference of the outputs in float32
relative to the largest output, and how long it took to merge. All weights and all four arrays of every
batch norm are drawn at random. The libraries: `pip install -e ".[foreign]"`.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tabulate import tabulate

from benchmarks.batch_norms import Arithmetic, channel_arithmetic
from benchmarks.command import end_with, whole
from benchmarks.speed import machine
from examples.other_libraries import from_equinox, from_haiku, from_keras, from_linen, from_nnx
from repvgg_jax import reparameterize
from repvgg_jax.transform.merging.report import Change

# The variance of kernels times their fan-in. At 1 the images leave no trace in the outputs of some networks; at 2
# rounding alone changes the outputs of MobileNetV2 as much as the merge may. Gates halve what they pass.
GAIN, GAINS = 1.6, {"EfficientNetB0": 1.9}
HEADERS = ("library", "network", "convolutions", "scales", "multiply-adds (10⁹)", "error, float32", "merged in (s)")


class Network(NamedTuple):
    """A function of variables and images, with variables at random."""

    function: Callable[..., Any]
    variables: Any
    images: jax.Array


class Measurement(NamedTuple):
    """What merging a network did.

    Attributes:
        convolutions: before and after.
        multiply_adds: for two images, before and after.
        before: the arithmetic by channel of the network.
        after: that of the merged network.
        error: the largest difference of the outputs, relative to the largest output.
        spread: the largest difference between the outputs of the two images, relative to the largest output.
        seconds: that merging took.
    """

    convolutions: Change
    multiply_adds: Change
    before: Arithmetic
    after: Arithmetic
    error: float
    spread: float
    seconds: float


def import_keras() -> Any:
    """Import Keras on JAX; the environment stays as it was, and the home directory without Keras's file."""
    with tempfile.TemporaryDirectory() as home, mock.patch.dict(os.environ, KERAS_BACKEND="jax", KERAS_HOME=home):
        import keras
    if keras.backend.backend() != "jax":
        raise RuntimeError(f"Keras runs on {keras.backend.backend()!r}, expected 'jax': set KERAS_BACKEND=jax")
    return keras


def _keras(name: str, side: int) -> Any:
    model = getattr(import_keras().applications, name)
    return from_keras(model(weights=None, input_shape=(side, side, 3), classifier_activation=None))


def _kimm(name: str, side: int) -> Any:
    import_keras()
    import kimm

    model = getattr(kimm.models, name)
    return from_keras(model(weights=None, input_shape=(side, side, 3), classifier_activation="linear"))


def _haiku(name: str, side: int) -> Any:
    import haiku

    network, version = name.split(" v")

    def call(images, is_training=False):
        return getattr(haiku.nets, network)(1000, resnet_v2=version == "2")(images, is_training)

    transformed = haiku.transform_with_state(call)
    init = partial(transformed.init, is_training=True)
    return from_haiku(transformed, *jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, side, side, 3))))


def _equinox(name: str, side: int) -> Any:
    import equinox as eqx

    from benchmarks import equinox_resnet

    return from_equinox(*eqx.nn.make_with_state(getattr(equinox_resnet, name))(jax.random.key(0)))


def _flaxmodels(name: str, side: int) -> Any:
    import flaxmodels

    module = getattr(flaxmodels, name)(output="logits", pretrained=None)
    init = partial(module.init, train=False)
    return from_linen(module, jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, side, side, 3))))


def _nnx(name: str, side: int) -> Any:
    from benchmarks import nnx_resnet

    return from_nnx(getattr(nnx_resnet, name)(nnx.Rngs(0)))


KERAS = "MobileNetV2 EfficientNetB0 DenseNet121 Xception ResNet50V2 ResNet50 MobileNet MobileNetV3Small"
# library → how its networks are made, and which.
LIBRARIES: dict[str, tuple[Callable[[str, int], Any], tuple[str, ...]]] = {
    "keras": (_keras, tuple(KERAS.split())),
    "kimm": (_kimm, ("RepVGGA0", "MobileOneS0")),
    "haiku": (_haiku, ("ResNet18 v1", "ResNet50 v1", "ResNet50 v2")),
    "equinox": (_equinox, ("ResNet18",)),
    "flaxmodels": (_flaxmodels, ("ResNet18", "ResNet50")),
    "nnx": (_nnx, ("ResNet18",)),
}


def create(library: str, name: str, side: int) -> Network:
    """Build a network for two images of this side, its batch norms far from the identity."""
    function, fresh = LIBRARIES[library][0](name, side)
    random = np.random.default_rng(0)
    channels_first = library == "equinox"
    variables = drawn(fresh, random, GAINS.get(name, GAIN), channels_first)
    shape = (2, 3, side, side) if channels_first else (2, side, side, 3)
    return Network(function, variables, jnp.asarray(random.normal(size=shape), jnp.float32))


def drawn(fresh: Any, random: np.random.Generator, gain: float = GAIN, channels_first: bool = False) -> Any:
    """Draw variables at random, by their shapes and names.

    Args:
        fresh: the variables, or their shapes.
        random: what draws them.
        gain: the variance of a kernel times its fan-in.
        channels_first: whether the output channels are the first axis of a kernel.
    """

    def draw(path: Any, leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.size == 1:
            return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
        if leaf.size == max(leaf.shape):
            if _is_positive(path, leaf):
                return jnp.asarray(random.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
            return jnp.asarray(random.normal(0, 0.2, leaf.shape), leaf.dtype)
        *inside, outside = (*leaf.shape[1:], leaf.shape[0]) if channels_first else leaf.shape
        # Keras's depthwise kernels are (height, width, channels, 1).
        fan_in = np.prod(inside[:-1] if outside == 1 else inside)
        return jnp.asarray(random.normal(0, (gain / fan_in) ** 0.5, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, fresh)


def _is_positive(path: Any, leaf: Any) -> bool:
    """Whether a vector is a scale or a variance: by its name, or, where it has a value, because it begins as ones."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return any(word in jax.tree_util.keystr(path[-2:]) for word in ("scale", "var"))
    return bool((leaf == 1).all())


def measure(library: str, name: str, side: int) -> Measurement:
    """Merge a network and compare."""
    with jax.default_matmul_precision("float32"):
        function, variables, images = create(library, name, side)
        start = time.perf_counter()
        fused = reparameterize(function, variables, images)
        seconds = time.perf_counter() - start
        expected = np.asarray(jax.jit(function)(variables, images))
        found = np.asarray(jax.jit(fused)(fused.params, images))
        plain = reparameterize(function, variables, images, ops="xla")
        largest = np.abs(expected).max()
        return Measurement(
            fused.totals["convolutions"],
            fused.totals["multiply-adds"],
            channel_arithmetic(function, variables, images),
            channel_arithmetic(plain, plain.params, images),
            float(np.abs(found - expected).max() / largest),
            float(np.ptp(expected, axis=0).max() / largest),
            seconds,
        )


def row(library: str, name: str, side: int) -> tuple[str, ...]:
    """One line of the table; a library that is missing is named with the command that installs it."""
    try:
        found = measure(library, name, side)
    except ModuleNotFoundError as error:
        return library, name, f'not run: {error}: pip install -e ".[foreign]"'
    convolutions, multiply_adds = found.convolutions, found.multiply_adds
    return (
        library,
        name,
        f"{convolutions.before} → {convolutions.after}",
        f"{found.before.scales} → {found.after.scales}",
        f"{multiply_adds.before / 2e9:.2f} → {multiply_adds.after / 2e9:.2f}",
        f"{found.error:.0e}",
        f"{found.seconds:.1f}",
    )


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    known = {f"{library}/{name}": (library, name) for library, (_, names) in LIBRARIES.items() for name in names}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(known), choices=list(known), metavar="LIBRARY/NETWORK")
    parser.add_argument("--side", type=whole, default=224, help="of the square images, in pixels")
    options = parser.parse_args(arguments)
    setting = machine()
    rows = []
    for network in options.networks:
        rows.append(row(*known[network], options.side))
        print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    print(f"2 images of {options.side}×{options.side}, float32, {setting['device']}, jax {jax.__version__}\n")
    print(tabulate(rows, HEADERS, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    end_with(main)
