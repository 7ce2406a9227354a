"""A benchmark that cannot go on says why in one line, as every command does."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.command import end_with

ROOT = Path(__file__).parents[1]
# The processes of a race are started by it, not by a user.
SOURCES = {path.stem: path.read_text() for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "race"}
COMMANDS = sorted(name for name, source in SOURCES.items() if '__name__ == "__main__"' in source)


def ended(main):
    with pytest.raises(SystemExit) as end:
        end_with(main)
    return end.value.code


@pytest.mark.parametrize("name", COMMANDS)
def test_where_jax_cannot_start(name, monkeypatch, capsys):
    def cannot():
        raise ValueError("JAX cannot start (why): what to do")

    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(module, "require_devices" if hasattr(module, "require_devices") else "machine", cannot)
    arguments = {"step": ["cifar10"], "int8": ["--stress"]}
    monkeypatch.setattr(sys, "argv", [name, *arguments.get(name, [])])
    assert SOURCES[name].endswith("    end_with(main)\n")
    assert ended(module.main) == 2
    assert capsys.readouterr().err == "error: JAX cannot start (why): what to do\n"


def test_a_race_is_not_begun_where_jax_cannot_start():
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "nonsense"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: JAX cannot start (")
    assert "JAX_PLATFORMS (=nonsense)" in line


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ModuleNotFoundError("No module named 'timm'"), 2, "No module named 'timm': pip install -e \".[bench]\""),
        (ValueError("unknown variant 'x'"), 2, "unknown variant 'x'"),
        (FileNotFoundError(2, "No such file", "out"), 2, "[Errno 2] No such file: 'out'"),
        (MemoryError(), 1, "MemoryError"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_line_and_the_status(error, status, line, capsys):
    def main():
        raise error

    assert ended(main) == status
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("memory", ["--size", "0"], "'0': expected a whole number, at least 1"),
        ("peak", ["x"], "'x': expected a whole number, at least 1"),
        ("speed", ["--seconds", "nan"], "'nan': expected a finite number above 0"),
        ("speed", ["--turns", "-1"], "'-1': expected a whole number, at least 1"),
        ("tune", ["nothing"], "no title holds 'nothing': expected part of one of "),
    ],
)
def test_arguments_that_measure_nothing(name, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    assert ended(importlib.import_module(f"benchmarks.{name}").main) == 2
    assert message in capsys.readouterr().err


def test_a_race_whose_files_cannot_be_written_is_not_begun(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["speed", "--out", str(tmp_path / "file" / "out")])
    assert ended(importlib.import_module("benchmarks.speed").main) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "file" / "out") in line
