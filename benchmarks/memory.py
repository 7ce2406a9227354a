"""Peak memory of both forms, as XLA plans it: `python -m benchmarks.memory [VARIANT] [--size 224] [--batches 1 32]`.

Weights, images, logits and the largest sum of activations that live at one time, in MB (10⁶ bytes), of the compiled
program for the device at hand. Nothing is run. The gradients of a training step are listed too.
"""

import argparse

import jax
import jax.numpy as jnp
from tabulate import tabulate

from benchmarks.command import end_with, whole
from repvgg_jax import create_model
from repvgg_jax.cli.devices import require_devices

HEADERS = ("form", "batch", "weights", "activations", "all")


def megabytes(variant: str, form: str, batch: int, size: int) -> tuple[float, float, float]:
    """Weights, activations and the whole of one compiled program, float32."""
    model = create_model(variant, deploy=form == "deploy form")
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)

    def forward(variables, images):
        return model.apply(variables, images, train=False)

    def gradients(variables, images):
        def loss(params):
            output, updates = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return jax.tree.reduce(lambda total, leaf: total + leaf.mean(), output, 0.0), updates

        return jax.grad(loss, has_aux=True)(variables["params"])

    program = gradients if form == "gradients" else forward
    plan = jax.jit(program).lower(variables, images).compile().memory_analysis()
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))
    total = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return weights / 1e6, plan.temp_size_in_bytes / 1e6, total / 1e6


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", nargs="?", default="repvgg_a0")
    parser.add_argument("--size", type=whole, default=224, help="side of the images")
    parser.add_argument("--batches", type=whole, nargs="+", default=[1, 32, 256])
    options = parser.parse_args()
    device = require_devices()[0]
    rows = [
        (form, batch, *(f"{value:,.1f}" for value in megabytes(options.variant, form, batch, options.size)))
        for batch in options.batches
        for form in ("training form", "deploy form", "gradients")
    ]
    print(f"{options.variant}, {options.size}×{options.size}, float32, {device.device_kind}, MB")
    print(tabulate(rows, HEADERS, disable_numparse=True, colalign=("left", *["right"] * 4)))


if __name__ == "__main__":
    end_with(main)
