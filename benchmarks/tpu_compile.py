"""What would a TPU run? `python -m benchmarks.tpu_compile [--presets …] [--topologies v5e:2x2 …] [--also FLAGS …]`.

Compiles the training step of a preset, and its network in the deploy form, for TPUs that are not at hand: libtpu does
so on any Linux machine (`pip install -e ".[tpu-check]"`). It says nothing of how fast they run.

For each program: how long it took to compile; megabytes of its arguments, and of what it holds beside them while it
runs, on one chip; their share of the chip's memory; by XLA's own count, operations and bytes moved on one chip; how
many all-reduces there are, and how many of its convolutions are in float32.
"""

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tabulate import tabulate

from benchmarks.command import end_with, whole
from benchmarks.speed import machine
from benchmarks.step import CHANNELS, lowered_step
from repvgg_jax.training import PRESETS, TrainConfig
from repvgg_jax.training.steps.mesh import create_mesh

# Memory of a chip, from https://cloud.google.com/tpu/docs/system-architecture-tpu-vm.
GIBIBYTES = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
HEADERS = ("program", "topology", "compiled in (s)", "arguments (MB)", "temporaries (MB)", "of memory", "GFLOP",
           "GB moved", "all-reduces", "float32 convolutions")  # fmt: skip


def devices(topology: str) -> list[Any]:
    """Return the chips of a topology.

    Raises:
      ValueError: If libtpu is missing, or knows no such topology.
    """
    # Else libtpu looks for a TPU on this machine, and asks the cloud for it.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        return list(topologies.get_topology_desc(topology_name=topology, platform="tpu").devices)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        (reason, *_) = str(error).splitlines() or [type(error).__name__]
        raise ValueError(
            f"{topology} cannot be compiled for: {reason}. Expected a topology such as v5e:2x2, and libtpu: "
            'pip install -e ".[tpu-check]"'
        ) from None


def figures(lowered: jax.stages.Lowered, topology: str) -> tuple[str, ...]:
    """Compile a program and return its row, from the third column on."""
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    chip = GIBIBYTES[topology.partition(":")[0]] * 2**30
    convolutions = re.findall(r"= (\w+)\[[\d,]*\]\S* convolution\(", text)
    return (
        f"{seconds:.0f}",
        f"{memory.argument_size_in_bytes / 1e6:,.0f}",
        f"{memory.temp_size_in_bytes / 1e6:,.0f}",
        f"{100 * held / chip:.0f} %",
        f"{cost['flops'] / 1e9:,.0f}",
        f"{cost['bytes accessed'] / 1e9:.2f}",
        str(len(re.findall(r" all-reduce(?:-start)?\(", text))),
        f"{convolutions.count('f32')} of {len(convolutions)}",
    )


def lowered_deploy(config: TrainConfig, mesh: Mesh, batch: int) -> jax.stages.Lowered:
    """Return the forward pass of the deploy form, lowered for the first chip of a mesh."""
    model = config.network.create_model(num_classes=1000 if config.data.image_size > 64 else 10).clone(deploy=True)
    one = NamedSharding(Mesh(np.ravel(mesh.devices)[:1], ("data",)), PartitionSpec())
    place = partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one))
    size = config.data.image_size
    images = place(jax.ShapeDtypeStruct((batch, size, size, CHANNELS), jnp.float32))
    variables = place(jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images))
    return jax.jit(partial(model.apply, train=False)).lower(variables, images)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=list(PRESETS), metavar="PRESET")
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x2", "v6e:2x2"], metavar="NAME")
    parser.add_argument(
        "--also", action="append", default=[], metavar="FLAGS", help="of train.py, quoted: one more row"
    )
    parser.add_argument("--deploy-batch", type=whole, default=256, help="images in a call of the deploy form")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.topologies if name.partition(":")[0] not in GIBIBYTES]
    if unknown:
        raise ValueError(f"topologies are {', '.join(unknown)}: expected those of {', '.join(GIBIBYTES)}")
    setting = machine()
    flat = (tyro.conf.OmitArgPrefixes,)
    rows = []
    for topology in options.topologies:
        mesh = create_mesh(devices(topology))
        for preset in options.presets:
            for flags in ("", *options.also):
                config = tyro.cli(TrainConfig, args=shlex.split(flags), default=PRESETS[preset], config=flat)
                name = f"{preset} {flags}".strip()
                for program, lowered in (
                    (f"{name}, step", partial(lowered_step, config, mesh)),
                    (f"{name}, deploy form", partial(lowered_deploy, config, mesh, options.deploy_batch)),
                ):
                    rows.append((program, topology, *figures(lowered(), topology)))
                    print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    print(f"compiled on {setting['device']}, jax {jax.__version__}; a step takes the preset's batch, on all chips\n")
    print(tabulate(rows, HEADERS, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    # A TPU that is at hand is left alone.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    end_with(main)
