"""Real processes, killed at random. `pytest -m slow tests/training/test_killed.py -s` prints the record."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from repvgg_jax.interop.safetensors import load_deploy
from repvgg_jax.training.run.restore import restore
from repvgg_jax.training.steps.mesh import create_mesh

ROOT = Path(__file__).parents[2]
FLAGS = "--depths 1 2 1 1 --width-multiplier 0.25 0.125 0.125 0.125 --epochs 40 --checkpoint-every 1 --ema-decay 0.9"


def start(workdir, data_dir, cache):
    environment = {
        **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "train.py", *FLAGS.split(), "--data-dir", data_dir, "--workdir", str(workdir)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def final_state(workdir):
    return jax.device_get(restore(workdir, create_mesh(jax.devices()[:1]))[1])


def metrics(workdir):
    timing = ("images_per_second", "seconds")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in timing} for line in lines]


def unfinished(workdir):
    """Checkpoints that are being written: Orbax's temporary directories."""
    directory = workdir / "checkpoints"
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return [name for name in names if not name.isdigit() and (directory / name).exists()]


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_bit_identically(data_dir, tmp_path):
    random.seed(0)
    cache = tmp_path / "cache"
    process = start(tmp_path / "whole", data_dir, cache)
    output, _ = process.communicate()
    assert process.returncode == 0, output

    workdir = tmp_path / "killed"
    counts = dict.fromkeys(("starting", "training", "writing a checkpoint", "SIGTERM"), 0)
    damaged = 0
    newest = []
    while len(newest) < 20:
        process = start(workdir, data_dir, cache)
        kind = list(counts)[len(newest) % 4]
        if kind == "starting":
            time.sleep(random.uniform(0.2, 3))
        else:
            while "run directory" not in (line := process.stdout.readline()) and line:
                pass
        if kind in ("training", "SIGTERM"):
            time.sleep(random.uniform(0.05, 0.8))
        while kind == "writing a checkpoint" and not unfinished(workdir) and process.poll() is None:
            time.sleep(0.0005)
        assert process.poll() is None, "too quick: give it more epochs"
        process.send_signal(signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
        output, _ = process.communicate()
        assert process.returncode in ((143, -signal.SIGTERM) if kind == "SIGTERM" else (-signal.SIGKILL,)), output
        # Killed a moment too late, a checkpoint is whole; that is not counted.
        counts[kind] += kind != "writing a checkpoint" or bool(unfinished(workdir))
        names = [path.name for path in (workdir / "checkpoints").glob("*")]
        steps = sorted(int(name) for name in names if name.isdigit())
        newest.append(steps[-1] if steps else 0)
        if len(steps) > 1 and len(newest) % 8 == 0:
            damaged += 1
            for path in (workdir / "checkpoints" / str(steps[-1]) / "state").rglob("d/*"):
                path.write_bytes(path.read_bytes()[:-100])
    process = start(workdir, data_dir, cache)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    killed = sum(counts[kind] for kind in counts if kind != "SIGTERM")
    print(f"killed by SIGKILL: {killed}; stopped by SIGTERM: {counts['SIGTERM']}; checkpoints damaged: {damaged}")
    for name, count in counts.items():
        print(f"- {name}: {count}")
    print(f"newest checkpoint after each (of {metrics(workdir)[-1]['step']} steps): {newest}")

    one, other = final_state(tmp_path / "whole"), final_state(workdir)
    leaves = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    assert all(np.array_equal(a, b) for a, b in leaves)
    print(f"arrays of the state equal to the last bit: {len(leaves)} of {len(leaves)}")
    assert metrics(tmp_path / "whole") == metrics(workdir)
    print(f"lines of metrics equal: {len(metrics(workdir))}")
    # Not the files' bytes: safetensors writes its metadata in any order.
    deployed, again = (load_deploy(run / "deploy.safetensors") for run in (tmp_path / "whole", workdir))
    chex.assert_trees_all_equal(deployed.variables, again.variables)
    assert deployed[2:] == again[2:]
    print("deploy.safetensors: equal")
    assert killed >= 10
    assert counts["writing a checkpoint"] >= 1
    assert damaged >= 1
