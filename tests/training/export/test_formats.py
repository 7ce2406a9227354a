import dataclasses
import errno
import json
import os
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest

from repvgg_jax.cli.fuse import fuse_command
from repvgg_jax.data import normalize
from repvgg_jax.interop import onnx as interop_onnx
from repvgg_jax.interop.onnx import load_onnx
from repvgg_jax.interop.safetensors import load_deploy
from repvgg_jax.interop.stablehlo import load_stablehlo
from repvgg_jax.reparam import EquivalenceError
from repvgg_jax.training.export.formats import _compare, _noise


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished.workdir, tmp_path / "run")


def test_a_run_is_exported_and_every_test_image_agrees(run, capsys):
    assert fuse_command([str(run), "--export", "onnx", "stablehlo"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ": largest difference" in line]
    assert [line.split(":")[0] for line in lines] == [str(run / "deploy.onnx"), str(run / "deploy.stablehlo")]
    assert all(line.endswith(" 0 predictions changed on 360 test images") for line in lines)
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


def fails(arguments, message, capsys):
    assert fuse_command([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_deploy_form_alone_is_exported_whatever_its_name(run, tmp_path, capsys):
    (tmp_path / "alone").mkdir()
    source = shutil.copy(run / "deploy.safetensors", tmp_path / "alone" / "net.v1.pth")
    assert fuse_command([str(source), "--export", "onnx", "stablehlo", "--opset", "12"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ": largest difference" in line]
    assert [line.split(":")[0] for line in lines] == [f"{source}.onnx", f"{source}.stablehlo"]
    assert all(line.endswith("0 predictions changed on 8 images of noise") for line in lines)
    graph = onnx.load(f"{source}.onnx")
    assert (graph.opset_import[0].version, graph.ir_version) == (12, 7)
    assert sorted(path.name for path in source.parent.iterdir()) == [
        f"net.v1.pth{e}" for e in ("", ".onnx", ".stablehlo")
    ]


def test_a_deploy_form_alone_has_nothing_else_done_to_it(run, capsys):
    path = run / "deploy.safetensors"
    fails([path], "there is nothing to do", capsys)
    fails([path, "--check-only"], "--export onnx stablehlo exports it", capsys)
    fails([path, "--export", "onnx", "--variant", "repvgg_a0"], "is fused already, and says itself what it is", capsys)


def without_images(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    config["data"]["dataset"] = f"folder:{tmp_path / 'gone'}"
    (run / "config.json").write_text(json.dumps(config))


def test_a_run_whose_images_are_gone_exports_its_deploy_form_and_says_so(run, tmp_path, capsys):
    without_images(run, tmp_path)
    before = (run / "deploy.safetensors").read_bytes()
    assert fuse_command([str(run), "--export", "onnx"]) == 0
    printed = capsys.readouterr().out
    assert f"the data set of {run} is not at hand: folder {tmp_path / 'gone'} does not exist" in printed
    assert f"so {run / 'deploy.safetensors'} is exported as it is, proven on images of noise" in printed
    assert "0 predictions changed on 8 images of noise" in printed
    assert (run / "deploy.safetensors").read_bytes() == before
    fails([run], "is not at hand", capsys)
    fails([run, "--export", "onnx", "--data-dir", tmp_path / "no"], "without --data-dir, ", capsys)
    (run / "deploy.safetensors").unlink()
    fails([run, "--export", "onnx"], "is not at hand", capsys)


@pytest.mark.parametrize("size", [1, 8, 33, 224])
@pytest.mark.parametrize("channels", [1, 3])
def test_noise_differs_from_image_to_image(run, size, channels):
    deployed = load_deploy(run / "deploy.safetensors")
    preprocess = dataclasses.replace(
        deployed.preprocess, image_size=size, channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels
    )
    images = np.concatenate([batch["image"] for batch in _noise(deployed._replace(preprocess=preprocess))])
    assert images.shape == (8, size, size, channels)
    means = images.mean(axis=(1, 2)).max(-1)
    assert len(np.unique(means)) == 8 or size == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--export", "onnx", "--opset", "10"], "opset is 10: expected a whole number from 11 to 21"),
        (["--export", "onnx", "--opset", "22"], "opset is 22: expected a whole number from 11 to 21"),
        (["--export", "stablehlo", "--opset", "12"], "opset is 12 without an ONNX file to write"),
        (["--with-preprocess"], "with_preprocess is given without export"),
    ],
)
def test_what_is_wrong_is_said_before_the_work(run, arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("repvgg_jax.training.run.directory.create_mesh", None)  # the work begins with it
    fails([run, *arguments], message, capsys)


def test_a_file_that_cannot_be_written_is_known_before_the_work(run, capsys, monkeypatch):
    monkeypatch.setattr("repvgg_jax.training.run.directory.create_mesh", None)
    (run / "deploy.stablehlo").mkdir()
    fails([run, "--export", "onnx", "stablehlo"], f"Is a directory: '{run / 'deploy.stablehlo'}'", capsys)
    assert not (run / "deploy.onnx").exists()


def test_a_missing_runtime_is_known_before_the_work(run, capsys, monkeypatch):
    monkeypatch.setattr("repvgg_jax.training.run.directory.create_mesh", None)
    for module, name in (("onnxruntime", "onnx"), ("flatbuffers", "stablehlo")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            fails([run, "--export", name], f'pip install -e ".[{name}]"', capsys)


def test_no_room_for_the_last_file_keeps_the_others(run, capsys, monkeypatch):
    write = Path.write_bytes

    def full(path, data):
        if "stablehlo" in path.name:
            write(path, data[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    path = run / "deploy.safetensors"
    fails(
        [path, "--export", "onnx", "stablehlo"],
        f"deploy.stablehlo could not be written: No space left on device; make room or give permission, and export "
        f"{path} anew. Whole: {path} and {run / 'deploy.onnx'}",
        capsys,
    )
    assert load_onnx(run / "deploy.onnx")
    assert sorted(each.name for each in run.glob("deploy.*")) == ["deploy.onnx", "deploy.safetensors"]


def test_normalised_noise_that_is_not_finite_proves_nothing(run, monkeypatch):
    deployed = load_deploy(run / "deploy.safetensors")
    monkeypatch.setattr("repvgg_jax.training.export.formats.normalize", lambda images, *_: images * jnp.nan)
    with pytest.raises(EquivalenceError, match=r"nothing would be proven: .*images are not finite"):
        _compare(lambda images: images, None, deployed, _noise(deployed))


def saturated(run):
    """A deploy form whose probabilities are 0 and 1: float32 shows nothing of its logits behind the softmax."""
    deployed = load_deploy(run / "deploy.safetensors")
    params = deployed.variables["params"]
    head = {name: leaf * 1e6 for name, leaf in params["head"].items()}
    return deployed._replace(variables={"params": {**params, "head": head}})


def test_logits_are_proven_where_probabilities_are_0_and_1(run):
    deployed = saturated(run)
    batches = _noise(deployed)
    pixels = np.concatenate([batch["image"] for batch in batches])
    model, preprocess = deployed.model, deployed.preprocess

    def logits(pixels, factor=1.0):
        images = jnp.asarray(normalize(jnp.asarray(pixels), preprocess.mean, preprocess.std))
        return factor * np.asarray(model.apply(deployed.variables, images, train=False))

    def probabilities(pixels):
        return np.asarray(jax.nn.softmax(logits(pixels)))

    wrong = probabilities(pixels)
    np.testing.assert_array_equal(wrong, jax.nn.softmax(logits(pixels, 1.01)))
    _compare(logits, probabilities, deployed, batches)
    with pytest.raises(EquivalenceError, match="not the same function"):
        _compare(lambda pixels: logits(pixels, 1.01), probabilities, deployed, batches)
    with pytest.raises(EquivalenceError, match="not the softmax of its logits"):
        _compare(logits, lambda pixels: probabilities(pixels)[:, ::-1], deployed, batches)
