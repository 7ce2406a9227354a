import dataclasses
import re
import shutil
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import fuse, fuse_model
from repvgg_jax.cli.fuse import fuse_command
from repvgg_jax.interop.safetensors import load_deploy
from repvgg_jax.ops import compiler_options
from repvgg_jax.reparam import EquivalenceError
from repvgg_jax.training import fuse_run
from repvgg_jax.training.run import comparison, directory


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished.workdir, tmp_path / "run")
    return tmp_path / "run"


def test_fusing_a_run_again_finds_the_same_figures_and_writes_the_same_weights(copy, finished):
    before = load_deploy(copy / "deploy.safetensors")
    (copy / "deploy.safetensors").unlink()
    again = fuse_run(copy)
    assert again.agreement == finished.comparison.agreement
    assert again.deploy.accuracy == finished.comparison.deploy.accuracy
    after = load_deploy(copy / "deploy.safetensors")
    assert after.metadata == before.metadata
    chex.assert_trees_all_equal(after.variables, before.variables)


def test_check_only_writes_nothing(copy):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    fuse_run(copy, check_only=True)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "epsilon", [1e-4, pytest.param(0.0, marks=pytest.mark.long), pytest.param(1e-3, marks=pytest.mark.long)]
)
def test_a_wrong_epsilon_is_refused_and_nothing_is_saved(copy, monkeypatch, epsilon):
    (copy / "deploy.safetensors").unlink()

    def wrong(model, variables):
        deploy_model, _ = fuse_model(model, variables)
        return deploy_model, fuse(variables, epsilon=epsilon)

    monkeypatch.setattr(comparison, "fuse_model", wrong)
    with pytest.raises(EquivalenceError, match="not the same function: largest logit difference"):
        fuse_run(copy)
    assert not (copy / "deploy.safetensors").exists()


def test_the_command_exits_with_1_where_the_forms_differ(copy, monkeypatch, capsys):
    def wrong(model, variables):
        deploy_model, _ = fuse_model(model, variables)
        return deploy_model, fuse(variables, epsilon=1e-3)

    monkeypatch.setattr(comparison, "fuse_model", wrong)
    assert fuse_command([str(copy), "--check-only"]) == 1
    assert "not the same function" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["extra key", "dtype"])
def test_a_tree_that_is_not_the_deploy_forms_is_refused(copy, monkeypatch, broken):
    def wrong(model, variables):
        deploy_model, fused = fuse_model(model, variables)
        if broken == "extra key":
            fused["params"]["stem"]["branch_1x1"] = variables["params"]["stem"]["branch_1x1"]
        else:
            fused["params"]["head"]["bias"] = fused["params"]["head"]["bias"].astype("bfloat16")
        return deploy_model, fused

    monkeypatch.setattr(comparison, "fuse_model", wrong)
    with pytest.raises(EquivalenceError, match="fused variables are not those of the deploy form"):
        fuse_run(copy)


def test_the_table_states_every_promised_row(finished):
    table = finished.comparison.table()
    for row in (
        "trainable parameters", "size (MB)", "forward time per image", "test accuracy", "largest difference",
        "predictions changed",
    ):  # fmt: skip
        assert row in table
    figures = finished.comparison
    assert f"{figures.training.parameters:,}" in table
    assert f"{figures.deploy.parameters:,}" in table
    assert figures.deploy.parameters < figures.training.parameters
    assert figures.deploy.megabytes < figures.training.megabytes


def test_the_verdict_follows_the_figures(finished):
    agreement = finished.comparison.agreement
    finished.comparison.check()
    for broken in (agreement._replace(predictions_changed=1), agreement._replace(relative=float("nan"))):
        with pytest.raises(EquivalenceError):
            dataclasses.replace(finished.comparison, agreement=broken).check()


@pytest.mark.parametrize(("missing", "message"), [("config.json", "no config.json"), ("checkpoints", "train first")])
def test_a_directory_that_is_no_run_is_named(copy, missing, message):
    target = copy / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(FileNotFoundError, match=message):
        fuse_run(copy)


def test_damaged_metrics_are_told_before_the_work(copy, monkeypatch):
    (copy / "metrics.jsonl").write_text("[1]\n[2]\n")
    monkeypatch.delattr(directory, "load_dataset")
    with pytest.raises(ValueError, match=r"metrics.jsonl line 1 is damaged \(\[1\] is no object\)"):
        fuse_run(copy)


def test_weights_that_cannot_be_written_are_told_before_the_work(copy, monkeypatch):
    (copy / "deploy.safetensors").unlink()
    (copy / "deploy.safetensors").mkdir()
    monkeypatch.delattr(directory, "load_dataset")
    with pytest.raises(IsADirectoryError, match=r"deploy.safetensors"):
        fuse_run(copy)


def test_a_run_without_a_checkpoint_is_named(copy):
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        fuse_run(copy)


@pytest.mark.parametrize("mean", ["NaN", "Infinity", '"x"', "1e39"])
def test_a_run_whose_normalisation_is_no_number_proves_nothing(copy, mean, capsys):
    path = copy / "dataset.json"
    path.write_text(re.sub(r'"mean": \[[^]]*\]', f'"mean": [{mean}]', path.read_text()))
    assert fuse_command([str(copy), "--check-only"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "dataset.json is damaged" in line


def test_a_network_that_answers_every_image_the_same_proves_nothing(copy, finished, monkeypatch, capsys):
    def dead(model, variables):
        variables["params"]["head"]["kernel"] = 0 * variables["params"]["head"]["kernel"]
        return fuse_model(model, variables)

    monkeypatch.setattr(comparison, "fuse_model", dead)
    (copy / "deploy.safetensors").unlink()
    assert fuse_command([str(copy)]) == 1
    assert "nothing is proven: a form answers every input the same" in capsys.readouterr().err
    assert not (copy / "deploy.safetensors").exists()


def test_what_is_not_finite_stays_so_to_the_end(tiny):
    # XLA:CPU may give the last ReLU and the mean after it to YNNPACK, for which max(nan, 0) is 0.
    model = tiny.network.create_model(10)
    images = jnp.full((128, 8, 8, 1), jnp.nan)
    for form in (model, model.clone(deploy=True), model.clone(squeeze_excite="after_relu")):
        shapes = jax.eval_shape(partial(form.init, train=False), jax.random.key(0), images[:1])
        variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), shapes)

        def apply(variables, images, form=form):
            return form.apply(variables, images, train=False)

        logits = jax.jit(apply, compiler_options=compiler_options("cpu"))(variables, images)
        assert np.isnan(logits).all()
