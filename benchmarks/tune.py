"""Times every lowering of `repvgg_jax.ops` on the convolutions of RepVGG: `python -m benchmarks.tune [FILTER]`.

One row per convolution and direction (forward, input gradient, kernel gradient): the milliseconds of the plain
lowering, then what the others take of it. The lowerings take turns in one process; a figure is the median over the
turns of the ratio to the plain lowering in the same turn. `<` marks what `repvgg_jax.ops.choose` chooses.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.command import end_with
from repvgg_jax.cli.devices import require_devices
from repvgg_jax.models.partial_evaluation import split
from repvgg_jax.ops import compiler_options, inference_on
from repvgg_jax.ops.choose import LOWERINGS, choose
from repvgg_jax.ops.lowerings.base import Window

PADDED = ((1, 1), (1, 1))
TURNS = 9

# (batch, side, in, out, kernel side, stride, groups)
CONVOLUTIONS = {
    "A0 train 32, strides 1,1,2,2,2": [
        (128, 32, 3, 48, 3, 1, 1),
        (128, 32, 48, 48, 3, 1, 1),
        (128, 32, 48, 96, 3, 2, 1),
        (128, 16, 96, 96, 3, 1, 1),
        (128, 16, 96, 192, 3, 2, 1),
        (128, 8, 192, 192, 3, 1, 1),
        (128, 8, 192, 1280, 3, 2, 1),
        (128, 32, 48, 48, 1, 1, 1),
        (128, 32, 48, 96, 1, 2, 1),
        (128, 8, 192, 192, 1, 1, 1),
    ],
    "A0 train 32, strides 2,2,2,2,2": [
        (128, 32, 3, 48, 3, 2, 1),
        (128, 16, 48, 48, 3, 2, 1),
        (128, 8, 48, 48, 3, 1, 1),
        (128, 8, 48, 96, 3, 2, 1),
        (128, 4, 96, 96, 3, 1, 1),
        (128, 4, 96, 192, 3, 2, 1),
        (128, 2, 192, 192, 3, 1, 1),
        (128, 2, 192, 1280, 3, 2, 1),
        (128, 2, 192, 192, 1, 1, 1),
    ],
    "digits 8": [
        (64, 8, 1, 16, 3, 1, 1),
        (64, 8, 16, 16, 3, 1, 1),
        (64, 8, 16, 32, 3, 2, 1),
        (64, 4, 32, 32, 3, 1, 1),
        (64, 2, 64, 64, 3, 1, 1),
        (64, 1, 64, 64, 3, 1, 1),
    ],
    "A0 deploy 224, batch 1": [
        (1, 224, 3, 48, 3, 2, 1),
        (1, 112, 48, 48, 3, 2, 1),
        (1, 56, 48, 48, 3, 1, 1),
        (1, 28, 96, 96, 3, 1, 1),
        (1, 28, 96, 192, 3, 2, 1),
        (1, 14, 192, 192, 3, 1, 1),
        (1, 14, 192, 1280, 3, 2, 1),
    ],
    "A0 deploy 224, batch 16": [
        (16, 224, 3, 48, 3, 2, 1),
        (16, 112, 48, 48, 3, 2, 1),
        (16, 56, 48, 48, 3, 1, 1),
        (16, 28, 96, 96, 3, 1, 1),
        (16, 14, 192, 192, 3, 1, 1),
        (16, 14, 192, 1280, 3, 2, 1),
    ],
    "groups": [(16, 28, 128, 128, 3, 1, 4), (16, 14, 256, 256, 3, 1, 2), (16, 28, 128, 256, 3, 2, 4)],
    "many groups": [
        (2, 56, 128, 128, 3, 1, 32),
        (2, 28, 256, 256, 3, 2, 32),
        (16, 14, 512, 512, 3, 1, 32),
        (1, 14, 512, 512, 3, 1, 32),
        (4, 14, 512, 512, 3, 2, 64),
        (16, 2, 512, 512, 3, 1, 128),
        (4, 14, 256, 256, 1, 1, 16),
    ],
    "depthwise": [
        (batch, side, channels, channels, 3, stride, channels)
        for batch in (1, 32)
        for side, channels in ((56, 144), (14, 512), (7, 960), (2, 512))
        for stride in (1, 2)
    ],
}


def medians(convolution, directions, kernel_ahead):
    """{direction: {name: (milliseconds, ratio to plain)}}; with the kernel ahead, its transforms are not timed."""
    batch, side, inside, out, taps, stride, groups = convolution
    window = Window((stride, stride), PADDED if taps == 3 else ((0, 0), (0, 0)), groups)
    shapes = (batch, side, side, inside), (taps, taps, inside // groups, out)
    random = np.random.default_rng(0)
    x, kernel, dy = (
        jnp.asarray(random.normal(size=shape), jnp.float32)
        for shape in (*shapes, (batch, *window.output_size(*shapes), out))
    )
    result = {}
    for direction in directions:
        runs = {}
        for name, lowering in LOWERINGS.items():
            if not lowering.supports(*shapes, window):
                continue
            arguments, run = {
                "forward": ((x, kernel), lambda a, b, f=lowering.forward: f(a, b, window)),
                "input": ((dy, kernel), lambda a, b, f=lowering.input_gradient: f(a, b, window, shapes[0])),
                "kernel": ((x, dy), lambda a, b, f=lowering.kernel_gradient: f(a, b, window, shapes[1])),
            }[direction]
            if kernel_ahead:
                with inference_on("cpu"):
                    traced = jax.make_jaxpr(lambda b, a, run=run: run(a, b))(kernel, x)
                prepare, run = split(traced)
                arguments = jax.jit(prepare)(kernel), x
            runs[name] = jax.jit(run).lower(*arguments).compile(compiler_options("cpu")), arguments
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(TURNS + 1):
            for name, (run, arguments) in runs.items():
                start = time.perf_counter()
                jax.block_until_ready(run(*arguments))
                if turn:
                    seconds[name].append(time.perf_counter() - start)
        result[direction] = {
            name: (1e3 * np.median(times), np.median(np.divide(times, seconds["plain"])))
            for name, times in seconds.items()
        }
    return result, choose(*shapes, window, kernel_ahead=kernel_ahead)["cpu"].names


def main():
    """Print the table of the groups of convolutions whose title holds what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("filter", nargs="?", default="", metavar="FILTER", help="part of the title of a group")
    wanted = parser.parse_args().filter
    if not any(wanted in title for title in CONVOLUTIONS):
        parser.error(f"no title holds {wanted!r}: expected part of one of {'; '.join(CONVOLUTIONS)}")
    require_devices()
    names = [name for name in LOWERINGS if name != "plain"]
    for title, convolutions in CONVOLUTIONS.items():
        if wanted not in title:
            continue
        print(f"\n{title}\n{'':44}{'plain':>9}" + "".join(f"{name:>13}" for name in names))
        for convolution in convolutions:
            batch, side, inside, out, taps, stride, groups = convolution
            deploy = "deploy" in title
            directions = ("forward",) if deploy else ("forward", "input", "kernel")
            result, choice = medians(convolution, directions, kernel_ahead=deploy)
            for direction, chosen in zip(directions, choice, strict=False):
                name = f"{batch}×{side}²×{inside}→{out} {taps}×{taps}/{stride}" + f" g{groups}" * (groups > 1)
                plain = f"{result[direction]['plain'][0]:.2f}" + " <" * (chosen == "plain")
                line = f"{name:32}{direction:12}{plain:>9}"
                for other in names:
                    cell = f"{result[direction][other][1]:.2f}" if other in result[direction] else "-"
                    line += f"{cell + ' <' * (chosen == other):>13}"
                print(line, flush=True)


if __name__ == "__main__":
    end_with(main)
