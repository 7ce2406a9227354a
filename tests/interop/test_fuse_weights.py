import re
from functools import partial

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from repvgg_jax import create_model, fuse_model
from repvgg_jax.cli.fuse import _read_names, fuse_command
from repvgg_jax.interop import fuse_weights as module
from repvgg_jax.interop.fuse_weights import fuse_weights
from repvgg_jax.interop.safetensors import load_deploy
from repvgg_jax.interop.torch.state_dict import to_state_dict
from repvgg_jax.predict import predict
from repvgg_jax.reparam import EquivalenceError
from tests.random_variables import random_images, random_variables

pytestmark = pytest.mark.usefixtures("short_variants")


@pytest.fixture(scope="module")
def published(short_variants):
    model = create_model("repvgg_a0", num_classes=10)
    return model, random_variables(model, dtype=np.float32)


@pytest.fixture
def weights(published, tmp_path):
    safetensors.numpy.save_file(to_state_dict(*published, "timm"), tmp_path / "a0.safetensors")
    return tmp_path / "a0.safetensors"


def test_foreign_weights_are_fused_saved_and_predict_the_same(published, weights, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("\n".join(f"kind {index}" for index in range(10)) + "\n")
    arguments = [str(weights), "--variant", "RepVGG-A0", "--image-size", "32"]
    assert fuse_command([*arguments, "--class-names", str(tmp_path / "names.txt")]) == 0
    output = tmp_path / "a0.deploy.safetensors"
    printed = capsys.readouterr().out
    assert "the two forms agree on 8 images of noise" in printed
    assert "0 predictions changed" in printed
    assert f"weights: {output}" in printed
    model, variables, preprocess, _ = load_deploy(output)
    assert preprocess.class_names[3] == "kind 3"
    assert (preprocess.image_size, preprocess.eval_resize, preprocess.mean) == (32, 37, (0.485, 0.456, 0.406))
    images = random_images((2, 32, 32, 3), np.float32)
    expected, found = (
        jax.jit(partial(form.apply, train=False))(weights, images) for form, weights in (published, (model, variables))
    )
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_weights_of_a_deploy_form_are_saved_as_they_are(published, tmp_path, capsys):
    model, variables = fuse_model(*published)
    safetensors.numpy.save_file(to_state_dict(model, variables), tmp_path / "fused.safetensors")
    output = tmp_path / "out.safetensors"
    assert fuse_command([str(tmp_path / "fused.safetensors"), "--variant", "repvgg_a0", "--output", str(output)]) == 0
    assert "there is nothing to fuse" in capsys.readouterr().out
    kernel = load_deploy(output).variables["params"]["stem"]["reparam"]["kernel"]
    np.testing.assert_array_equal(kernel, variables["params"]["stem"]["reparam"]["kernel"])


@pytest.mark.parametrize(("chosen", "taken"), [([], "ema"), (["--entry", "model"], "model")])
def test_which_weights_of_a_file_were_taken_is_printed(published, chosen, taken, tmp_path, capsys):
    model, variables = fuse_model(*published)
    state_dict = to_state_dict(model, variables)
    both = {f"{entry}.{key}": value for entry in ("model", "ema") for key, value in state_dict.items()}
    both["ema.linear.bias"] = both["ema.linear.bias"] + 1
    safetensors.numpy.save_file(both, tmp_path / "both.safetensors")
    output = tmp_path / "out.safetensors"
    arguments = ["--variant", "repvgg_a0", "--output", str(output), *chosen]
    assert fuse_command([str(tmp_path / "both.safetensors"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert f"both.safetensors: took the weights under '{taken}'" in printed
    assert f"there are others under '{'model' if taken == 'ema' else 'ema'}'" in printed
    bias = load_deploy(output).variables["params"]["head"]["bias"]
    np.testing.assert_array_equal(bias, state_dict["linear.bias"] + (taken == "ema"))


def test_checking_alone_writes_nothing(weights, tmp_path):
    assert fuse_command([str(weights), "--variant", "repvgg_a0", "--image-size", "32", "--check-only"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a0.safetensors"]


def test_foreign_weights_are_exported_too(weights, tmp_path, capsys):
    arguments = ["--variant", "repvgg_a0", "--image-size", "32", "--export", "onnx"]
    assert fuse_command([str(weights), *arguments]) == 0
    assert "a0.deploy.onnx: largest difference" in capsys.readouterr().out
    assert (tmp_path / "a0.deploy.onnx").is_file()


def test_a_wrong_fold_is_refused_and_nothing_is_written(weights, tmp_path, monkeypatch):
    wrong = lambda model, variables: fuse_model(model.clone(epsilon=1e-4), variables)  # noqa: E731
    monkeypatch.setattr(module, "fuse_model", wrong)
    with pytest.raises(EquivalenceError, match="not the same function"):
        fuse_weights(weights, "repvgg_a0", tmp_path / "out.safetensors", image_size=32)
    assert [path.name for path in tmp_path.iterdir()] == ["a0.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "variant is None: expected that of"),
        (["--variant", "repvgg_a1"], "is not repvgg_a1: the state dict (timm layout) does not fit"),
        (["--variant", "repvgg_a0", "--data-dir", "x"], "is a file: expected data_dir with a run directory alone"),
        (
            ["--variant", "repvgg_a0", "--class-names", "missing.txt"],
            "missing.txt does not exist: expected a text file",
        ),
        (["--variant", "repvgg_a0", "--class-names", "/tmp"], "/tmp is no file: expected a text file"),
        (["--variant", "repvgg_a0", "--image-size", "0"], "image_size is 0: expected at least 1"),
        (["--variant", "repvgg_a0", "--output", "/nowhere/x"], "'/nowhere/x'; see to its folder, permissions"),
        (["--variant", "repvgg_a0", "--output", "/tmp"], "Is a directory: '/tmp'"),
        (["--variant", "repvgg_a0", "--output", "/nowhere/x", "--export", "onnx"], "'/nowhere/x.onnx'"),
        (["--variant", "repvgg_a0", "--export", "onnx", "--opset", "22"], "from 11 to 21"),
        (["--variant", "repvgg_a0", "--check-only", "--export", "onnx"], "export and check_only are both given"),
    ],
)
def test_arguments_that_do_not_fit_exit_with_2(arguments, message, weights, capsys):
    assert fuse_command([str(weights), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a0.safetensors", "a0.pth"])
def test_a_file_that_is_not_there_is_told_before_what_it_needs(name, tmp_path, capsys):
    assert fuse_command([str(tmp_path / name)]) == 2
    assert f"{name} does not exist: expected PyTorch weights" in capsys.readouterr().err


def test_arguments_for_weights_do_not_fit_a_run(tmp_path, capsys):
    assert fuse_command([str(tmp_path), "--variant", "repvgg_a0"]) == 2
    assert "is no file of weights: expected variant with one alone" in capsys.readouterr().err


def test_a_list_of_names_of_another_length_is_refused(weights, tmp_path):
    with pytest.raises(ValueError, match="there are 2 class names: expected 10"):
        fuse_weights(weights, "repvgg_a0", tmp_path / "out.safetensors", class_names=["cat", "dog"])


def test_names_that_are_no_text_are_named_before_the_work(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("repvgg_jax.cli.fuse.fuse_weights", None)
    (tmp_path / "names.txt").write_bytes(b"caf\xe9\n")
    assert fuse_command([str(weights), "--variant", "repvgg_a0", "--class-names", str(tmp_path / "names.txt")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "names.txt is no text in UTF-8" in line


def test_only_line_ends_part_names(tmp_path):
    (tmp_path / "names.txt").write_bytes("\ufeffa\u2028b\r\nc\x0bd\n".encode())
    assert _read_names(tmp_path / "names.txt") == ["a\u2028b", "c\x0bd"]


def weights_of(channels, path, fused=False):
    model = create_model("repvgg_a0", num_classes=3)
    network = model, random_variables(model, (1, 16, 16, channels), dtype=np.float32)
    path.write_bytes(safetensors.numpy.save(to_state_dict(*(fuse_model(*network) if fused else network))))
    return path


def test_weights_for_gray_images_are_saved_for_gray_images(tmp_path):
    path = weights_of(1, tmp_path / "gray.safetensors", fused=True)
    fuse_weights(path, "repvgg_a0", tmp_path / "deploy.safetensors", image_size=16)
    deployed = load_deploy(tmp_path / "deploy.safetensors")
    assert (deployed.preprocess.channels, deployed.preprocess.mean, deployed.preprocess.std) == (1, (0.449,), (0.226,))
    Image.new("RGB", (20, 30), "red").save(tmp_path / "red.png")
    assert [prediction.error for prediction in predict(deployed, [tmp_path / "red.png"])] == [None]


@pytest.mark.parametrize("fused", [False, True])
def test_weights_for_images_that_nothing_reads_are_refused_before_the_proof(fused, tmp_path, monkeypatch):
    path = weights_of(4, tmp_path / "x.safetensors", fused)
    monkeypatch.setattr(module, "_prove", lambda *_: "proven")
    assert fuse_weights(path, "repvgg_a0", None)[0] == (None if fused else "proven")
    monkeypatch.delattr(module, "_prove")
    with pytest.raises(ValueError, match=r"x.safetensors has a stem of 4 channels: expected 1 \(gray\) or 3 \(RGB\)"):
        fuse_weights(path, "repvgg_a0", tmp_path / "deploy.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("nowhere/x", "No such file or directory: '{}/nowhere/x'"),
        ("", "Is a directory: '{}'"),
        ("a0.safetensors/x", "Not a directory: '{}/a0.safetensors/x'"),
        ("x" * 300, "File name too long: '{}/xxx"),
    ],
    ids=["missing folder", "directory", "file as folder", "long name"],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_weights_are_read(
    output, message, weights, tmp_path, monkeypatch
):
    monkeypatch.delattr(module, "load_weights")
    with pytest.raises(OSError, match=re.escape(message.format(tmp_path))):
        fuse_weights(weights, "repvgg_a0", tmp_path / output)
    assert [path.name for path in tmp_path.iterdir()] == ["a0.safetensors"]


def test_the_weights_are_not_written_over(weights):
    before = weights.read_bytes()
    with pytest.raises(ValueError, match="the weights themselves"):
        fuse_weights(weights, "repvgg_a0", weights.parent / ".." / weights.parent.name / weights.name)
    assert weights.read_bytes() == before


def test_an_image_size_without_pixels_is_refused(weights, capsys):
    assert fuse_command([str(weights), "--variant", "repvgg_a0", "--image-size", "-1"]) == 2
    assert "image_size is -1: expected at least 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="image_size is 8193: expected 1 to 8192 pixels"):
        fuse_weights(weights, "repvgg_a0", None, image_size=8193)
