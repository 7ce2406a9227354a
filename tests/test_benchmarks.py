"""The benchmark commands run, measure what they say, and say what they could not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.memory import megabytes
from benchmarks.race import Case, Race, Time, ratio
from benchmarks.speed import row, suites

ROOT = Path(__file__).parents[1]
TINY = Case("repvgg_jax", "repvgg_a0", "deploy", 1, 32)


def test_a_ratio_compares_images_per_second_within_each_turn():
    subject = Time(TINY._replace(batch=2), (1.0, 2.0, 1.0))
    other = Time(TINY, (1.0, 2.0, 100.0))
    assert ratio(subject, other) == 2
    assert ratio(other, subject) == 0.5
    assert subject.images_per_second == 2


def test_competitors_take_turns_and_a_missing_peer_is_named():
    with Race(on_gpu=False) as race:
        ours, missing = race.run([TINY, TINY._replace(peer="onnxruntime", form="training")], turns=2, seconds=0.01)
    assert len(ours.seconds) == 2
    assert min(ours.seconds) > 0
    assert ours.compile_seconds > 0
    assert missing.seconds == ()
    assert "not run: " in row(ours, missing)[-1]
    assert np.isfinite(ours.images_per_second)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_every_contest_has_one_subject_and_somebody_to_race_against(on_gpu):
    for contests in suites(on_gpu, None, 224, ["a0", "b1g4"]).values():
        for subject, *others in contests:
            assert subject.peer == "repvgg_jax"
            assert others
            assert subject not in others


def test_gpu_sh_runs_dry_on_a_cpu(tmp_path):
    sizes = ["--batches", "1", "--size", "32", "--variants", "a0", "--peers", "--turns", "1", "--seconds", "0.01"]
    environment = {**os.environ, "PYTHON": sys.executable, "PEAK_SIDE": "64", "SUITES": "paper variants"}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path), *sizes]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    assert "TFLOP/s" in (tmp_path / "peak.txt").read_text()
    results = json.loads((tmp_path / "speed.json").read_text())["results"]
    assert set(results) == {"paper", "variants"}
    assert all(time["seconds"] for contests in results.values() for contest in contests for time in contest)
    assert "repvgg_b1g4 training" in (tmp_path / "speed.md").read_text()


def test_the_deploy_form_needs_less_memory_than_the_training_form_and_gradients_more():
    training, deploy, gradients = (
        megabytes("repvgg_a0", form, batch=2, size=32) for form in ("training form", "deploy form", "gradients")
    )
    assert deploy[0] < training[0] == gradients[0]
    assert deploy[2] < training[2] < gradients[2]
    assert all(whole > weights + activations for weights, activations, whole in (training, deploy, gradients))
