import json
import shutil

import pytest

from repvgg_jax.training import command
from repvgg_jax.training.command import fuse_command, train_command

TINY = "--depths 1 1 1 1 --width-multiplier 0.25 0.125 0.0625 0.0625 --strides 1 2 1 2 1 --epochs 1"


def test_training_by_flags_ends_with_the_table_and_a_run_directory(data_dir, tmp_path, capsys):
    run = tmp_path / "run"
    assert train_command([*TINY.split(), "--data-dir", data_dir, "--workdir", str(run)]) == 0
    output = capsys.readouterr().out
    assert "epoch 1/1  train loss" in output
    assert "predictions changed" in output
    assert f"report: {run / 'report.md'}" in output
    assert json.loads((run / "config.json").read_text())["depths"] == [1, 1, 1, 1]


def test_without_a_workdir_a_run_is_named_by_preset_and_time(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train_command([*TINY.split(), "--data-dir", data_dir]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("digits-2")


def test_fusing_by_command_prints_the_table_and_saves(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished.workdir, run)
    (run / "deploy.safetensors").unlink()
    assert fuse_command([str(run), "--check-only"]) == 0
    assert "predictions changed" in capsys.readouterr().out
    assert not (run / "deploy.safetensors").exists()
    assert fuse_command([str(run)]) == 0
    assert (run / "deploy.safetensors").exists()


@pytest.mark.parametrize("changed", [0, 3])
def test_failed_equivalence_exits_with_1(finished, monkeypatch, capsys, changed):
    def fuse_run(*_, **__):
        finished.comparison.agreement._replace(predictions_changed=changed).require(1e-4)

    monkeypatch.setattr(command, "fuse_run", fuse_run)
    assert fuse_command([str(finished.workdir)]) == (1 if changed else 0)
    if changed:
        assert "3 of 360 predictions changed (allowed 0)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digit"], "unknown preset 'digit', did you mean digits? Expected one of digits, cifar10"),
        (["--batch-size", "0"], "batch_size is 0: expected at least 1"),
        (["--batch-size", "many"], "many"),
        (["--learning-rat", "1"], "--learning-rate"),
        (["cifar10", "--data-dir", "/nowhere"], "data_dir /nowhere does not exist"),
        (["--dataset", "folder:/nowhere"], "folder /nowhere does not exist"),
    ],
)
def test_bad_input_exits_with_2_and_says_what_is_wrong(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    try:
        status = train_command(arguments)
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    assert status == 2
    assert message in " ".join((captured.err + captured.out).replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_fusing_what_is_no_run_exits_with_2(tmp_path, capsys):
    assert fuse_command([str(tmp_path)]) == 2
    assert "holds no config.json: expected a run directory" in capsys.readouterr().err


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit):
        train_command(["cifar10", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Pixels" in text or "pixels" in text
    assert "(default: 1 1 2 2 2)" in text
    for flag in ("--weight-decay", "--label-smoothing", "--workdir", "--summary", "--data-dir"):
        assert flag in text


def test_summary_prints_both_forms_and_trains_nothing(data_dir, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert train_command(["--summary", "--data-dir", data_dir]) == 0
    output = capsys.readouterr().out
    assert "stage4_block1" in output
    assert "584,170" in output
    assert train_command(["imagenet", "--summary", "--data-dir", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "8,309,384" in output
    assert "imagenet2012 is not at hand: counted with 1000 classes and 3 channels" in output
    assert not list(tmp_path.iterdir())
