"""What merging a traced function is worth: `python -m benchmarks.reparameterize [--networks …] [options]`.

For each network, before and after `reparameterize`: convolutions, multiply-adds, array elements, the largest difference
of the outputs in float64 and float32, and the time of a forward pass, in turns within one process. Batch statistics are
drawn at random. Times are medians; the ratio is the median of the ratios within a turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from benchmarks.command import end_with, whole
from benchmarks.resnet import create_resnet
from repvgg_jax import create_model, reparameterize
from repvgg_jax.cli.devices import require_devices
from repvgg_jax.cli.huge_pages import restart_with_huge_pages

HEADERS = ("network", "convs", "multiply-adds (10⁹)", "elements (10⁶)", "error, float64", "float32", "merged in (s)",
           "before (ms)", "after (ms)", "ratio")  # fmt: skip


def create(name: str, dtype: Any = jnp.float32) -> Any:
    """A network with batch norms, in evaluation: a RepVGG in its training form, or a ResNet."""
    if name.startswith("resnet"):
        return create_resnet(name, num_classes=1000)
    return create_model(name, param_dtype=dtype)


def draw(model: Any, side: int, dtype: Any) -> Any:
    """Variables with all four leaves of every batch norm at random."""
    images = jax.ShapeDtypeStruct((1, side, side, 3), dtype)
    template = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    rng = np.random.default_rng(0)

    def leaf(path: Sequence[Any], shape: Any) -> np.ndarray:
        name = path[-1].key
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, shape.shape).astype(dtype)
        fan_in = np.prod(shape.shape[:-1]) if name == "kernel" else 25
        return rng.normal(0, fan_in**-0.5, shape.shape).astype(dtype)

    return jax.tree_util.tree_map_with_path(leaf, template)


def error(name: str, side: int, dtype: Any) -> float:
    """The largest difference of the outputs, relative to the largest output."""
    with jax.enable_x64(True), jax.default_matmul_precision("float32"):
        model = create(name, dtype)
        variables = draw(model, side, dtype)
        images = jnp.asarray(np.random.default_rng(1).normal(size=(1, side, side, 3)), dtype)
        function = forward(model)
        fused = reparameterize(function, variables, images)
        expected, found = jax.jit(function)(variables, images), jax.jit(fused)(fused.params, images)
        return float(jnp.abs(expected - found).max() / jnp.abs(expected).max())


def forward(model: Any) -> Callable[[Any, Any], jax.Array]:
    """A function of variables and images."""
    return lambda variables, images: model.apply(variables, images, train=False)


def measure(name: str, *, batch: int, side: int, turns: int, repeats: int) -> tuple[Any, ...]:
    """One row of the table."""
    model = create(name)
    variables = draw(model, side, np.float32)
    images = jnp.asarray(np.random.default_rng(1).normal(size=(batch, side, side, 3)), jnp.float32)
    start = time.perf_counter()
    fused = reparameterize(forward(model), variables, images)
    seconds = time.perf_counter() - start
    variables = jax.device_put(variables)
    contestants = [
        (jax.jit(forward(model)).lower(variables, images).compile(), variables),
        (jax.jit(fused).lower(fused.params, images).compile(), fused.params),
    ]
    times: list[list[float]] = [[], []]
    for turn in range(turns + 1):
        for run, (compiled, parameters) in zip(times, contestants, strict=True):
            start = time.perf_counter()
            for _ in range(repeats):
                jax.block_until_ready(compiled(parameters, images))
            if turn:
                run.append(1000 * (time.perf_counter() - start) / repeats)
    before, after = map(statistics.median, times)
    convolutions, multiply_adds, elements = fused.totals.values()
    return (
        name,
        f"{convolutions.before} → {convolutions.after}",
        f"{multiply_adds.before / 1e9 / batch:.2f} → {multiply_adds.after / 1e9 / batch:.2f}",
        f"{elements.before / 1e6:.2f} → {elements.after / 1e6:.2f}",
        f"{error(name, 64, np.float64):.0e}",
        f"{error(name, 64, np.float32):.0e}",
        f"{seconds:.1f}",
        f"{before:.1f}",
        f"{after:.1f}",
        f"{statistics.median(a / b for a, b in zip(*times, strict=True)):.2f}",
    )


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet50", "repvgg_a0"])
    parser.add_argument("--batch", type=whole, default=16)
    parser.add_argument("--side", type=whole, default=224, help="of the square images, in pixels")
    parser.add_argument("--turns", type=whole, default=7)
    parser.add_argument("--repeats", type=whole, default=1, help="forward passes in a turn")
    options = parser.parse_args(arguments)
    device = require_devices()[0].device_kind
    rows = [
        measure(name, batch=options.batch, side=options.side, turns=options.turns, repeats=options.repeats)
        for name in options.networks
    ]
    print(f"batch {options.batch}, {options.side}×{options.side}, float32, {device}, jax {jax.__version__}\n")
    print(tabulate(rows, HEADERS, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    restart_with_huge_pages()
    end_with(main)
