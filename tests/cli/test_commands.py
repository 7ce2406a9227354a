import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from PIL import Image
from safetensors import SafetensorError

import repvgg_jax.training.config.parts as parts_module
import repvgg_jax.training.config.train_config as train_config_module
from repvgg_jax.cli import train as train_module
from repvgg_jax.cli.fuse import fuse_command
from repvgg_jax.cli.train import train_command
from repvgg_jax.interop.safetensors import load_deploy
from repvgg_jax.training import TrainConfig, fuse_run, train_and_evaluate
from repvgg_jax.training.run import directory
from repvgg_jax.training.run.data_record import DataRecord

TINY = "--depths 1 1 1 1 --width-multiplier 0.25 0.125 0.0625 0.0625 --strides 1 2 1 2 1 --epochs 1"
# The config of the fixture `tiny`, as flags.
FINISHED = (
    "--depths 1 2 1 1 --width-multiplier 0.25 0.125 0.0625 0.0625 --strides 1 2 1 2 1 --epochs 2 --warmup-epochs 0 "
    "--checkpoint-every 1"
)


def test_training_by_flags_ends_with_the_table_and_a_run_directory(data_dir, tmp_path, capsys):
    run = tmp_path / "run"
    assert train_command([*TINY.split(), "--data-dir", data_dir, "--workdir", str(run)]) == 0
    output = capsys.readouterr().out
    assert "peak learning rate 0.1 at batch size 64" in output
    assert "epoch 1/1  train loss" in output
    assert "predictions changed" in output
    assert f"report: {run / 'report.md'}" in output
    assert json.loads((run / "config.json").read_text())["network"]["depths"] == [1, 1, 1, 1]


def test_without_a_workdir_a_run_is_named_by_preset_and_time(monkeypatch):
    seen = []
    monkeypatch.setattr(train_module, "train_and_evaluate", lambda config, workdir: seen.append(workdir))
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
        (["digit"], "unknown preset 'digit' (did you mean digits?): expected one of digits, cifar10"),
        (["nope"], "unknown preset 'nope': expected one of digits, cifar10"),
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
    source = Path(parts_module.__file__).read_text() + Path(train_config_module.__file__).read_text()
    for name in TrainConfig().settings:
        (explanation,) = re.findall(rf'^    {name}: .*\n    """(.+)"""$', source, re.MULTILINE)
        assert f"--{name.replace('_', '-')}" in text
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


class Unread(io.StringIO):
    """A pipe whose reader has gone away."""

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_the_end_of_a_training_that_nobody_reads_is_written_whole(finished, data_dir, tmp_path, monkeypatch):
    run = shutil.copytree(finished.workdir, tmp_path / "run")
    for name in ("deploy.safetensors", "report.md", "confusion.png"):
        (run / name).unlink()
    monkeypatch.setattr(sys, "stdout", Unread())
    assert train_command([*FINISHED.split(), "--data-dir", data_dir, "--workdir", str(run)]) == 0
    assert {"deploy.safetensors", "report.md", "confusion.png"} <= {path.name for path in run.iterdir()}


@pytest.mark.long
def test_a_training_that_nobody_reads_loses_no_work(data_dir, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(sys, "stdout", Unread())
    assert train_command([*TINY.split(), "--data-dir", data_dir, "--workdir", str(run)]) == 0
    assert {"deploy.safetensors", "report.md", "confusion.png"} <= {path.name for path in run.iterdir()}
    (run / "deploy.safetensors").unlink()
    assert fuse_command([str(run)]) == 0
    assert (run / "deploy.safetensors").exists()


def test_help_and_summary_that_nobody_reads_end_quietly(data_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Unread())
    assert train_command(["--summary", "--data-dir", data_dir]) == 0
    with pytest.raises(SystemExit) as ended:
        train_command(["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error", [RuntimeError("Unable to initialize backend 'x': no (set JAX_PLATFORMS='')"), AssertionError()]
)
def test_a_jax_that_cannot_start_is_told_in_a_line(error, monkeypatch, capsys, tmp_path):
    def fails():
        raise error

    monkeypatch.setattr(jax, "devices", fails)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    for run, arguments in ((train_command, ["--workdir", str(tmp_path / "run")]), (fuse_command, [str(tmp_path)])):
        assert run(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: JAX cannot start (")
        assert "unset JAX_PLATFORMS (=cuda), or set it to cpu" in line
    assert not (tmp_path / "run").exists()


def test_a_platform_that_there_is_not_is_told_by_the_real_jax(tmp_path):
    done = subprocess.run(
        [sys.executable, "train.py", "--workdir", str(tmp_path / "run")],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "nonsense"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "JAX cannot start (Unable to initialize backend 'nonsense'" in line


@pytest.mark.parametrize(
    "error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")]
)
def test_memory_that_is_short_is_told_in_a_line(error, monkeypatch, capsys, tmp_path):
    def fails(*_):
        raise error

    monkeypatch.setattr(train_module, "train_and_evaluate", fails)
    assert train_command(["--workdir", str(tmp_path / "run")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("where memory is short, lower --batch-size and --eval-batch-size")


def test_names_of_others_reach_the_terminal_as_text_alone(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(train_module, "train_and_evaluate", lambda config, workdir: None)
    assert train_command(["--workdir", str(tmp_path / "a\x1b[2J\nb")]) == 0
    assert f"report: {tmp_path}/a\\x1b[2J\\nb/report.md\n" in capsys.readouterr().out
    assert train_command(["--dataset", "folder:/no\x1b[2J\nerror: forged", "--workdir", str(tmp_path)]) == 0
    monkeypatch.undo()
    assert train_command(["--dataset", "folder:/no\x1b[2J\nerror: forged", "--workdir", str(tmp_path / "c")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "/no\\x1b[2J\\nerror: forged does not exist" in line


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            "save_deploy",
            OSError(28, "No space left on device"),
            "deploy.safetensors could not be written: .*The checkpoints are",
        ),
        (
            "save_deploy",
            SafetensorError("I/O error: No space left"),
            "deploy.safetensors could not be written: .*The checkpoints are",
        ),
        (
            "write_report",
            OSError(28, "No space left on device"),
            "report.md could not be written: .*deploy.safetensors",
        ),
    ],
)
def test_a_last_file_that_cannot_be_written_is_told_and_what_is_whole(
    function, error, message, finished, tmp_path, monkeypatch, capsys
):
    def full(*_):
        raise error

    shutil.copytree(finished.workdir, tmp_path / "run")
    monkeypatch.setattr(directory, function, full)
    assert fuse_command([str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"{message}.* (is )?whole: make room or give permission, and run: repvgg-fuse ", line)


def test_a_run_of_odd_names_is_fused_and_started_from(tiny, finished, begin, tmp_path):
    run = shutil.copytree(finished.workdir, tmp_path / "lr=0.1,widths=[1,2]")
    assert fuse_run(run).agreement == finished.comparison.agreement
    record = (run / "dataset.json").read_bytes()
    state, _ = begin(tiny.replace(init_from=str(run)), tmp_path / "next=[1]")
    assert (run / "dataset.json").read_bytes() == record
    chex.assert_trees_all_equal(state.variables, jax.device_get(finished.state.variables))


@pytest.fixture
def odd_classes(tiny, tmp_path):
    """A config of images in folders of odd names, and the names."""
    names = ("Ba$$in", os.fsdecode(b"caf\xe9"), "猫", "a\nb|c")
    for label, name in enumerate(names):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(np.full((8, 8, 3), 60 * label + number, np.uint8)).save(
                tmp_path / "data" / name / f"{number}.png"
            )
    config = tiny.replace(dataset=f"folder:{tmp_path / 'data'}", epochs=1, batch_size=16, eval_batch_size=8)
    return config, tuple(sorted(names))


def test_a_run_on_classes_of_any_name_begins_and_goes_on(odd_classes, begin, tmp_path):
    config, names = odd_classes
    first = begin(config, tmp_path / "run")
    assert DataRecord.load(tmp_path / "run").class_names == names
    chex.assert_trees_all_equal(begin(config, tmp_path / "run"), first)


@pytest.mark.long
def test_classes_of_any_name_train_to_the_end_and_may_move(odd_classes, tmp_path):
    config, names = odd_classes
    result = train_and_evaluate(config, tmp_path / "run")
    assert (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert load_deploy(tmp_path / "run" / "deploy.safetensors").preprocess.class_names == names
    (tmp_path / "data").rename(tmp_path / "moved")
    again = train_and_evaluate(config.replace(dataset=f"folder:{tmp_path / 'moved'}"), tmp_path / "run")
    chex.assert_trees_all_equal(again.state, result.state)
    fused = fuse_run(tmp_path / "run", data_dir=str(tmp_path / "moved"))
    assert fused.agreement == result.comparison.agreement


def test_a_damaged_checkpoint_is_told_in_one_line(finished, tmp_path):
    run = shutil.copytree(finished.workdir, tmp_path / "run")
    for path in (run / "checkpoints").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:10])
    done = subprocess.run(
        [sys.executable, "fuse.py", str(run), "--check-only"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.search(r"none of the checkpoints in .* can be read \(step 44: .*restore them from a copy", line)
