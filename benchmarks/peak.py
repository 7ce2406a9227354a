"""The two ceilings of a device: `python -m benchmarks.peak [SIDE]`. A large matrix product, and a large copy."""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.command import end_with, whole
from repvgg_jax.cli.devices import require_devices


def seconds(function, *operands) -> float:
    """Median seconds per call."""
    jax.block_until_ready(function(*operands))
    turns = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(5):
            result = function(*operands)
        jax.block_until_ready(result)
        turns.append((time.perf_counter() - start) / 5)
    return float(np.median(turns))


def main() -> None:
    """Print TFLOP/s of a product of two square matrices per dtype, and TB/s (read and written) of a copy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", type=whole, nargs="?", default=8192, metavar="SIDE", help="of the matrices")
    side = parser.parse_args().side
    device = require_devices()[0]
    print(f"{device.device_kind} ({device.platform}), matrices of {side}×{side}")
    product = jax.jit(lambda a: a @ a)
    for dtype in (jnp.bfloat16, jnp.float32):
        a = jax.random.normal(jax.random.key(0), (side, side), dtype)
        print(f"{jnp.dtype(dtype).name} product: {2 * side**3 / seconds(product, a) / 1e12:.3f} TFLOP/s", flush=True)
    elements = jax.random.normal(jax.random.key(0), (side * side * 8,), jnp.float32)
    print(f"copy: {2 * elements.nbytes / seconds(jax.jit(lambda b: b + 1), elements) / 1e12:.3f} TB/s", flush=True)


if __name__ == "__main__":
    end_with(main)
