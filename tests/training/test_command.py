import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

import repvgg_jax.training.config as config_module
from repvgg_jax.training import TrainConfig, command
from repvgg_jax.training.command import fuse_command, train_command

TINY = "--depths 1 1 1 1 --width-multiplier 0.25 0.125 0.0625 0.0625 --strides 1 2 1 2 1 --epochs 1"


def test_training_by_flags_ends_with_the_table_and_a_run_directory(data_dir, tmp_path, capsys):
    run = tmp_path / "run"
    assert train_command([*TINY.split(), "--data-dir", data_dir, "--workdir", str(run)]) == 0
    output = capsys.readouterr().out
    assert "peak learning rate 0.1 at batch size 64" in output
    assert "epoch 1/1  train loss" in output
    assert "predictions changed" in output
    assert f"report: {run / 'report.md'}" in output
    assert json.loads((run / "config.json").read_text())["depths"] == [1, 1, 1, 1]


def test_without_a_workdir_a_run_is_named_by_preset_and_time(monkeypatch):
    seen = []
    monkeypatch.setattr(command, "train_and_evaluate", lambda config, workdir: seen.append(workdir))
    assert train_command([]) == 0
    assert re.fullmatch(r"runs/digits-\d{8}-\d{6}", str(seen[0]))


def test_fusing_by_command_prints_the_table_and_saves(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished.workdir, run)
    (run / "deploy.safetensors").unlink()
    assert fuse_command([str(run), "--check-only"]) == 0
    assert "predictions changed" in capsys.readouterr().out
    assert not (run / "deploy.safetensors").exists()
    assert fuse_command([str(run)]) == 0
    assert (run / "deploy.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digit"], "unknown preset 'digit', did you mean digits? Expected one of digits, cifar10"),
        (["--batch-size", "0"], "batch_size is 0: expected at least 1"),
        (["--batch-size", "many"], "many"),
        (["--learning-rat", "1"], "--learning-rate"),
        (["cifar10", "--data-dir", "/nowhere"], "data_dir /nowhere does not exist"),
        (["--dataset", "folder:/nowhere"], "folder /nowhere does not exist"),
        (["--dataset", "digit", "--summary"], "unknown data set 'digit'"),
        (["--dataset", "folder:/proc/version"], "folder /proc/version does not exist or is no directory"),
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
    text = "".join(capsys.readouterr().out.replace("│", " ").split())
    source = Path(config_module.__file__).read_text()
    for field in dataclasses.fields(TrainConfig):
        (explanation,) = re.findall(rf'^    {field.name}: .*\n    """(.+)"""$', source, re.MULTILINE)
        assert f"--{field.name.replace('_', '-')}" in text
        assert "".join(explanation.split()) in text
    assert "(default:11222)" in text


def test_a_directory_that_cannot_be_made_exits_with_2(data_dir, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    workdir = str(tmp_path / "file" / "run")
    assert train_command([*TINY.split(), "--data-dir", data_dir, "--workdir", workdir]) == 2
    assert "name another --workdir" in capsys.readouterr().err


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
