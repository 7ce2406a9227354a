"""The benchmark commands run, measure what they say, and say what they could not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import pipeline, reparameterize, step
from benchmarks.memory import megabytes
from benchmarks.race import Case, Race, Time, ratio
from benchmarks.resnet import create_resnet
from benchmarks.speed import row, suites
from repvgg_jax import create_model
from repvgg_jax.interop.torch.state_dict import from_state_dict

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


def test_every_suite_takes_every_batch_size_asked_for():
    for contests in suites(False, [2, 3], 224, ["a0"]).values():
        assert {case.batch for contest in contests for case in contest} == {2, 3}


@pytest.mark.parametrize("deploy", [False, True])
def test_the_pytorch_peer_is_our_network(deploy):
    torch = pytest.importorskip("torch", reason='pip install -e ".[bench]"')
    from benchmarks.torch_repvgg import RepVGG

    torch.manual_seed(0)
    theirs = RepVGG("repvgg_b1g4", 10, (2, 2, 2, 2, 1), deploy).eval()
    model = create_model("repvgg_b1g4", num_classes=10, strides=(2, 2, 2, 2, 1), deploy=deploy)
    variables = from_state_dict(model, theirs.state_dict())
    images = np.random.default_rng(0).normal(size=(2, 33, 33, 3)).astype(np.float32)
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    apply = jax.jit(lambda v, x: model.apply(v, x, train=False))
    found = np.asarray(apply(variables, images))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.ptp(expected, axis=0).max() > 1e-3 * np.abs(expected).max()  # the images leave a trace


def test_a_resnet_without_its_norms_has_a_bias_in_their_place():
    forms = {}
    for deploy in (False, True):
        model = create_resnet("resnet18", num_classes=10, deploy=deploy)
        images = jnp.zeros((1, 32, 32, 3))
        forms[deploy] = jax.eval_shape(lambda model=model, x=images: model.init(jax.random.key(0), x, train=False))
    trained, folded = forms[False]["params"], forms[True]["params"]
    assert set(trained) == set(folded)
    assert "batch_stats" not in forms[True]
    for name in set(folded) - {"head"}:
        assert folded[name]["kernel"] == trained[name]["conv"]["kernel"]
        assert folded[name]["bias"] == trained[name]["bn"]["bias"]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_every_contest_has_one_subject_and_somebody_to_race_against(on_gpu):
    for contests in suites(on_gpu, None, 224, ["a0", "b1g4"]).values():
        for subject, *others in contests:
            assert subject.peer == "repvgg_jax"
            assert others
            assert subject not in others


def test_gpu_sh_calls_the_two_benchmarks_with_its_sizes_and_options(tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "PEAK_SIDE": "64", "SUITES": "paper variants"}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out"), "--batches", "1"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    peak, speed = run.stdout.splitlines()
    assert peak == "-m benchmarks.peak 64" == (tmp_path / "out" / "peak.txt").read_text().strip()
    assert speed.startswith("-m benchmarks.speed paper variants --minutes 7 ")
    assert speed.endswith(f" --out {tmp_path / 'out'} --batches 1")


@pytest.mark.long
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


@pytest.mark.long
def test_the_deploy_form_needs_less_memory_than_the_training_form_and_gradients_more():
    training, deploy, gradients = (
        megabytes("repvgg_a0", form, batch=2, size=32) for form in ("training form", "deploy form", "gradients")
    )
    assert deploy[0] < training[0] == gradients[0]
    assert deploy[2] < training[2] < gradients[2]
    assert all(whole > weights + activations for weights, activations, whole in (training, deploy, gradients))


@pytest.mark.long
@pytest.mark.parametrize("data", ["memory", "jpeg"])
def test_the_pipeline_is_measured_alone_beside_the_step_and_with_it(data, monkeypatch, capsys):
    small = dict(depths=(1, 1, 2, 1), width_multiplier=(0.25, 0.125, 0.0625, 0.0625), image_size=32)
    presets = {name: config.replace(**small) for name, config in pipeline.PRESETS.items()}
    monkeypatch.setattr(pipeline, "PRESETS", presets)
    few = ["--images", "17", "--batch-size", "8", "--workers", "0", "--turns", "1", "--seconds", "0.01"]
    pipeline.main(["--data", data, *few])
    name, workers, *_, batch, alone, step, together, share, percent = capsys.readouterr().out.splitlines()[-1].split()
    assert (name, workers, batch, percent) == (data, "0", "8", "%")
    assert all(int(rate.replace(",", "")) > 0 for rate in (alone, step, together, share))


def test_the_rates_of_a_preset_and_of_other_flags_stand_beside_their_ratio(monkeypatch, capsys):
    raced = []

    def contestant(config, seconds):
        raced.append(config)
        return lambda: 60.0 if config.augmentation.trivial_augment else 40.0

    monkeypatch.setattr(step, "contestant", contestant)
    step.main(["cifar10_cpu", "--also=--image-size 16 --trivial-augment", "--turns", "2"])
    preset, other = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert preset == ["cifar10_cpu", "40.0", "1.00"]
    assert other == ["cifar10_cpu", "--image-size", "16", "--trivial-augment", "60.0", "1.50"]
    given = step.PRESETS["cifar10_cpu"].replace(image_size=16, trivial_augment=True)
    assert raced == [step.PRESETS["cifar10_cpu"], given]


@pytest.mark.long
def test_a_preset_races_against_itself_with_other_flags(monkeypatch, capsys):
    small = dict(depths=(1, 1, 1, 1), width_multiplier=(0.125,) * 4, image_size=16, batch_size=8)
    monkeypatch.setattr(step, "PRESETS", {"cifar10_cpu": step.PRESETS["cifar10_cpu"].replace(**small)})
    raced, contestant = [], step.contestant
    monkeypatch.setattr(step, "contestant", lambda config, *rest: raced.append(config) or contestant(config, *rest))
    larger = "--image-size 32 --trivial-augment"
    step.main(["cifar10_cpu", f"--also={larger}", "--turns", "1", "--seconds", "0.05"])
    preset, other = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert preset[0] == other[0] == "cifar10_cpu"
    assert preset[-1] == "1.00"
    assert other[1:-2] == larger.split()
    sizes = [(config.data.image_size, config.augmentation.trivial_augment) for config in raced]
    assert sizes == [(16, False), (32, True)]
    first, second = (float(row[-2].replace(",", "")) for row in (preset, other))
    assert float(other[-1]) == pytest.approx(second / first, abs=0.02)


@pytest.mark.long
def test_the_worth_of_merging_a_traced_function_is_measured(capsys):
    reparameterize.main(["--networks", "repvgg_a0", "--batch", "2", "--side", "32", "--turns", "1"])
    header, rule, row = capsys.readouterr().out.strip().splitlines()[-3:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == header.count("|") - 1 == rule.count("|") - 1
    assert cells[:2] == ["repvgg_a0", "44 → 22"]
    assert float(cells[4]) < 1e-12


@pytest.mark.long
def test_the_steps_towards_8_bits_are_lines_of_a_table(finished, tiny, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime", reason='pip install -e ".[onnx]"')
    from benchmarks import int8
    from repvgg_jax.training import train_and_evaluate

    monkeypatch.setattr(int8, "ROWS", (int8.ROWS[0], int8.ROWS[6]))
    monkeypatch.setattr(int8, "CALIBRATE", 64)
    config = tiny.replace(init_from=str(finished.workdir), quantize_aware=True, epochs=1)
    trained = train_and_evaluate(config, tmp_path / "trained").workdir
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["int8", str(finished.workdir), str(trained)])
    int8.main()
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    names = [line[0].strip() for line in lines]
    assert [name for name in names if name and "-" not in name] == [
        "float", "one scale a tensor", "the default: equalized, biases corrected", "float", "trained for 8 bits",
    ]  # fmt: skip
    accuracies = {name: float(line[1]) for name, line in zip(names, lines, strict=True) if name and "-" not in name}
    assert accuracies["float"] == pytest.approx(100 * finished.comparison.deploy.accuracy, abs=0.01)
    assert abs(accuracies["the default: equalized, biases corrected"] - accuracies["float"]) < 3


@pytest.mark.slow
def test_under_stress_8_bits_lose_everything_and_the_default_keeps_more():
    pytest.importorskip("onnxruntime", reason='pip install -e ".[onnx]"')
    from benchmarks.int8 import stress
    from repvgg_jax.quantize import prepare

    subject = stress()
    plain = subject.prove(subject.variables, per_channel=False)
    equalized, corrected = prepare(subject.model, subject.variables, jnp.asarray(subject.calibration))
    kept = subject.prove(corrected, equalized)
    assert plain.decibels < 1
    assert kept.decibels > plain.decibels + 5
    assert kept.lost < plain.lost - 30
