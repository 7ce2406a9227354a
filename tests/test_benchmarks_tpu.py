"""The benchmark that compiles for TPUs: what it counts, what it refuses, and, with libtpu, that it compiles."""

import importlib.util
import sys

import jax
import pytest

from benchmarks import tpu_compile
from benchmarks.command import end_with
from benchmarks.step import lowered_step
from repvgg_jax.training.steps.mesh import create_mesh

INSTALLED = importlib.util.find_spec("libtpu") is not None


@pytest.mark.usefixtures("float32")
def test_a_program_is_compiled_and_counted(tiny):
    config = tiny.replace(image_size=16, batch_size=16)
    row = tpu_compile.figures(lowered_step(config, create_mesh()), "v5e:2x2")
    alone = tpu_compile.figures(lowered_step(config, create_mesh(jax.devices()[:1])), "v5e:2x2")
    assert len(row) == len(tpu_compile.HEADERS) - 2
    *_, reduced, convolutions = row
    assert int(reduced) >= 1
    assert int(alone[-2]) == 0  # on one device there is nothing to sum
    assert float(alone[4]) >= float(row[4]) >= 0
    found, total = map(int, convolutions.split(" of "))
    assert found <= total


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topologies", "v9:2x2"], "error: topologies are v9:2x2: expected those of v4, v5e, v5p, v6e"),
        pytest.param(
            ["--topologies", "v5e:2x2", "--presets", "digits"],
            'pip install -e ".[tpu-check]"',
            marks=pytest.mark.skipif(INSTALLED, reason="libtpu is installed"),
        ),
    ],
)
def test_what_cannot_be_compiled_ends_in_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tpu_compile", *arguments])
    with pytest.raises(SystemExit) as end:
        end_with(tpu_compile.main)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason='pip install -e ".[tpu-check]"')
def test_the_step_of_the_digits_compiles_for_four_chips(capsys):
    tpu_compile.main(["--presets", "digits", "--topologies", "v5e:2x2"])
    *_, step, deploy = capsys.readouterr().out.strip().splitlines()
    assert "digits, step" in step
    assert int(step.split("|")[9]) >= 1
    assert int(deploy.split("|")[9]) == 0
