import shutil

import numpy as np
import pytest

from repvgg_jax.interop import onnx as interop_onnx
from repvgg_jax.interop.onnx import load_onnx
from repvgg_jax.interop.safetensors import load_deploy
from repvgg_jax.interop.stablehlo import load_stablehlo
from repvgg_jax.training.command import fuse_command


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished.workdir, tmp_path / "run")


def test_a_run_is_exported_and_every_test_image_agrees(run, capsys):
    assert fuse_command([str(run), "--export", "onnx", "stablehlo"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "largest output" in line]
    assert [line.split(":")[0] for line in lines] == [str(run / "deploy.onnx"), str(run / "deploy.stablehlo")]
    assert all(line.endswith("0 of 360 predictions changed") for line in lines)
    images = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)
    model, variables, _, _ = load_deploy(run / "deploy.safetensors")
    expected = np.asarray(model.apply(variables, images, train=False))
    for found in (
        load_onnx(run / "deploy.onnx")(images.transpose(0, 3, 1, 2)),
        load_stablehlo(run / "deploy.stablehlo")(images),
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_files_with_preprocessing_take_pixels(run):
    assert fuse_command([str(run), "--export", "onnx", "stablehlo", "--with-preprocess"]) == 0
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    one, other = load_onnx(run / "deploy.onnx")(pixels), load_stablehlo(run / "deploy.stablehlo")(pixels)
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(one.sum(-1), 1, rtol=1e-5)


def test_a_file_that_computes_something_else_is_removed(run, monkeypatch, capsys):
    right = interop_onnx.to_onnx

    def wrong(model, variables, **options):
        stem = variables["params"]["stem"]["reparam"]
        broken = {**stem, "kernel": np.asarray(stem["kernel"]).transpose(1, 0, 2, 3)}
        return right(model, {"params": {**variables["params"], "stem": {"reparam": broken}}}, **options)

    monkeypatch.setattr(interop_onnx, "to_onnx", wrong)
    assert fuse_command([str(run), "--export", "onnx"]) == 1
    assert "deploy.onnx was not written: in its runtime it computes something else" in capsys.readouterr().err
    assert not list(run.glob("deploy.onnx*"))


def test_exporting_and_only_checking_exclude_each_other(run, capsys):
    assert fuse_command([str(run), "--export", "onnx", "--check-only"]) == 2
    assert "expected one of them" in capsys.readouterr().err
