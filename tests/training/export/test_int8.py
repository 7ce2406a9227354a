"""The command that writes 8 bits proves what it writes, and writes nothing that loses more than is allowed."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

onnx = pytest.importorskip("onnx", reason='pip install -e ".[onnx]"')
pytest.importorskip("onnxruntime", reason='pip install -e ".[onnx]"')

from repvgg_jax.cli.fuse import fuse_command  # noqa: E402
from repvgg_jax.cli.predict import predict_command  # noqa: E402
from repvgg_jax.data import load_dataset  # noqa: E402
from repvgg_jax.interop.onnx import load_onnx  # noqa: E402
from repvgg_jax.interop.onnx_file import load_onnx_network  # noqa: E402
from repvgg_jax.interop.safetensors import load_deploy, save_deploy  # noqa: E402
from repvgg_jax.training.export.int8 import Int8Settings, export_int8  # noqa: E402
from repvgg_jax.training.export.int8_images import Int8Images, draw_images, folder_images  # noqa: E402
from repvgg_jax.training.export.int8_proof import AccuracyLostError  # noqa: E402
from repvgg_jax.training.run.directory import fuse_run  # noqa: E402


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished.workdir, tmp_path / "run")


@pytest.fixture(scope="session")
def exported(finished, tmp_path_factory):
    """A run whose network is in 8 bits too, with the file that takes pixels."""
    run = shutil.copytree(finished.workdir, tmp_path_factory.mktemp("int8") / "run")
    fuse_run(run, export=["onnx-int8"], with_preprocess=True)
    return run


@pytest.fixture
def digits(data_dir):
    return load_dataset("digits", data_dir=data_dir)


def fails(arguments, status, message, capsys):
    assert fuse_command([str(argument) for argument in arguments]) == status
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("repvgg_jax")]
    assert message in line


def pixels_of(digits, count=16):
    return np.stack([digits.test[index]["image"] for index in range(count)])


def test_a_run_is_written_in_8_bits_with_its_proof_in_print_and_report(run, capsys):
    assert fuse_command([str(run), "--export", "onnx-int8", "--calibrate", "128", "--allowed-loss", "5"]) == 0
    printed = capsys.readouterr().out
    report = (run / "report.md").read_text()
    for line in ("test accuracy", "images per second, ONNX Runtime", "predictions changed", "stage1_block1", "head"):
        assert line in printed
        assert line in report.split("## In 8 bits")[1]
    assert " of 360" in printed
    assert not (run / "deploy.onnx").exists()
    # Beside int8 weights there are the scales, and in a network this small they count.
    assert (run / "deploy.int8.onnx").stat().st_size < 0.6 * (run / "deploy.safetensors").stat().st_size


def test_the_file_takes_pixels_where_that_is_asked(exported, digits):
    pixels = pixels_of(digits)
    probabilities = load_onnx(exported / "deploy.int8.onnx")(pixels)
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
    deployed = load_deploy(exported / "deploy.safetensors")
    mean, std = deployed.preprocess.mean, deployed.preprocess.std
    images = (jnp.asarray(pixels, jnp.float32) / 255 - mean[0]) / std[0]
    expected = jax.nn.softmax(deployed.model.apply(deployed.variables, images, train=False))
    assert np.abs(probabilities - expected).max() < 0.1
    assert np.abs(probabilities - expected).max() > 1e-6  # it is not the float network


def test_predict_takes_the_file(exported, digits, tmp_path, capsys):
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, image in zip(paths, pixels_of(digits, 3), strict=True):
        Image.fromarray(image[..., 0]).save(path)
    network = load_onnx_network(exported / "deploy.int8.onnx")
    for weights in ("deploy.int8.onnx", "deploy.safetensors"):
        assert predict_command([str(exported / weights), *map(str, paths), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for quantized, floating in zip(lines[:3], lines[3:], strict=True):
        assert quantized["path"] == floating["path"]
        probability = {each["name"]: each["probability"] for each in floating["classes"]}
        best = quantized["classes"][0]
        assert abs(probability[best["name"]] - best["probability"]) < 0.1
    assert network.preprocess == load_deploy(exported / "deploy.safetensors").preprocess


def skewed(run, factor):
    """The deploy form of a run with a channel that is far larger than the others: the same function in float."""
    path = run / "deploy.safetensors"
    model, variables, preprocess, metadata = load_deploy(path)
    params = dict(variables["params"])
    names = [block.name for block in model.blocks]
    size = np.ones(params["stem"]["reparam"]["bias"].shape, np.float32)
    size[::2] = factor
    stem, following = (params[name]["reparam"] for name in names[:2])
    params["stem"] = {"reparam": {name: leaf * size for name, leaf in stem.items()}}
    params[names[1]] = {"reparam": {**following, "kernel": following["kernel"] / size[:, None]}}
    save_deploy(path, metadata["variant"], model, {"params": params}, preprocess)
    return path


def images_of(digits, path):
    preprocess = load_deploy(path).preprocess
    batch = {
        "image": np.stack([record["image"] for record in digits.test]),
        "label": np.asarray([record["label"] for record in digits.test]),
        "mask": np.arange(len(digits.test)) < 200,
    }
    return Int8Images(draw_images(digits.train, preprocess, 64), lambda: [batch], labelled=True)


def test_a_network_that_loses_too_much_is_not_written_and_equalizing_saves_it(run, digits, capsys):
    path = skewed(run, 100)
    images = images_of(digits, path)
    broken = Int8Settings(equalize=False, correct_biases=False, calibrate=64)
    with pytest.raises(AccuracyLostError, match=r"int8.onnx was not written: 8 bits lose .*--keep-float ") as lost:
        export_int8(path, images, broken)
    assert "allowed 0.5" in str(lost.value)
    assert "stage1_block1" in str(lost.value)  # which reads the skewed channels
    assert not list(run.glob("*.int8.onnx*"))
    proof = export_int8(path, images, Int8Settings(calibrate=64, allowed_loss=2))
    assert proof.agreement.compared == 200
    assert proof.decibels > 20
    assert (run / "deploy.int8.onnx").exists()


def test_a_loss_is_an_exit_status_and_one_line(run, monkeypatch, capsys):
    monkeypatch.setattr(
        "repvgg_jax.training.export.int8_proof.Int8Proof.lost", property(lambda self: 0.75), raising=True
    )
    (run / "deploy.int8.onnx").write_bytes(b"older")
    assert fuse_command([str(run), "--export", "onnx-int8", "--calibrate", "32"]) == 1
    printed, errors = capsys.readouterr()
    line = errors.splitlines()[-1]
    assert "8 bits lose 0.75 points of accuracy" in line
    assert "or train for 8 bits (" in line
    assert line.endswith("The file of this name there is an older one")
    assert "signal to noise" in printed  # the figures are there to choose layers by
    assert (run / "deploy.int8.onnx").read_bytes() == b"older"


def test_the_remedy_is_one_that_was_not_tried(exported, digits):
    path = exported / "deploy.safetensors"
    proof = export_int8(path, images_of(digits, path), Int8Settings(calibrate=32, allowed_loss=50))
    lossy = proof._replace(quantized=proof.quantized._replace(accuracy=0.2))
    with pytest.raises(AccuracyLostError, match="or train longer for 8 bits"):
        lossy.check(0.5, trained=True)
    with pytest.raises(AccuracyLostError, match=r"8 bits lose \S+ % of the predictions"):
        lossy._replace(labelled=False).check(0.5)


def test_images_that_prove_nothing_are_refused(run, digits):
    path = run / "deploy.safetensors"
    images = images_of(digits, path)
    (batch,) = images.batches()
    same = {**batch, "image": np.zeros_like(batch["image"])}
    with pytest.raises(AccuracyLostError, match="nothing is proven: the float network answers every image the same"):
        export_int8(path, images._replace(batches=lambda: [same]), Int8Settings(allowed_loss=100))


def write_images(folder, digits, count, *, by_class):
    for index in range(count):
        record = digits.test[index]
        directory = folder / str(record["label"]) if by_class else folder
        directory.mkdir(parents=True, exist_ok=True)
        Image.fromarray(record["image"][..., 0]).save(directory / f"{index}.png")


def test_a_deploy_form_alone_takes_a_folder_of_images(run, digits, tmp_path, capsys):
    path = shutil.copy(run / "deploy.safetensors", tmp_path / "deploy.safetensors")
    write_images(tmp_path / "images", digits, 40, by_class=False)
    export = [str(path), "--export", "onnx-int8"]
    assert fuse_command([*export, "--images", str(tmp_path / "images"), "--allowed-loss", "10"]) == 0
    printed = capsys.readouterr().out
    assert "predicted as by float" in printed
    assert " of 20" in printed  # the other half calibrates
    assert (tmp_path / "deploy.int8.onnx").exists()
    fails(export, 2, "images is None: expected a folder, --images FOLDER", capsys)
    fails([*export, "--images", tmp_path / "no"], 2, "expected a folder of images", capsys)
    (tmp_path / "empty").mkdir()
    fails([*export, "--images", tmp_path / "empty"], 2, "has 0 images: expected at least two files", capsys)


def test_directories_named_as_the_classes_give_labels(run, digits, tmp_path):
    preprocess = load_deploy(run / "deploy.safetensors").preprocess
    write_images(tmp_path / "images", digits, 100, by_class=True)
    images = folder_images(tmp_path / "images", preprocess, 64)
    assert images.labelled
    assert images.calibration.shape == (64, 8, 8, 1)
    labels = np.concatenate([batch["label"] for batch in images.batches()])
    assert sorted(set(labels)) == list(range(10))
    # Names in another order than the logits'.
    turned = type(preprocess)(**{**vars(preprocess), "class_names": preprocess.class_names[::-1]})
    other = np.concatenate([batch["label"] for batch in folder_images(tmp_path / "images", turned, 64).batches()])
    np.testing.assert_array_equal(other, 9 - labels)


def test_drawn_images_are_always_the_same_and_no_test_image(digits, run):
    preprocess = load_deploy(run / "deploy.safetensors").preprocess
    first, again, fewer = (draw_images(digits.train, preprocess, count) for count in (100, 100, 30))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[:30], fewer)
    assert len(draw_images(digits.train, preprocess, 10**6)) == len(digits.train)


def test_a_run_whose_images_are_gone_says_what_can_be_done(run, tmp_path, capsys):
    config = json.loads((run / "config.json").read_text())
    config["data"]["dataset"] = f"folder:{tmp_path / 'gone'}"
    (run / "config.json").write_text(json.dumps(config))
    message = f"or export {run / 'deploy.safetensors'} with --images"
    fails([run, "--export", "onnx-int8"], 2, message, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--export", "onnx", "--calibrate", "64"], "settings of 8 bits are given without --export onnx-int8"),
        (["--export", "onnx-int8", "--opset", "12"], "opset is 12: expected at least 13 for onnx-int8"),
        (["--export", "onnx-int8", "--images", "."], "expected none, since a run has its own; to take others, export"),
        (["--export", "onnx-int8", "--keep-float", "stage7"], "keep_float has stage7: expected some of stem, "),
    ],
)
def test_what_does_not_go_together_is_refused(run, arguments, message, capsys):
    fails([run, *arguments], 2, message, capsys)


@pytest.mark.parametrize(
    ("field", "value", "expected"), [("calibrate", 0, "at least 1"), ("allowed_loss", -1.0, r"in \[0, 100\]")]
)
def test_settings_check_themselves(field, value, expected):
    with pytest.raises(ValueError, match=f"{field} is {value}: expected {expected}"):
        Int8Settings(**{field: value})
    bits = [Int8Settings(weight_bits=bits).reduce_range for bits in ("auto", "7", "8")]
    assert bits == [None, True, False]


def test_layers_that_are_kept_in_float_have_no_noise_of_their_own(run, digits):
    path = run / "deploy.safetensors"
    every = [block.name for block in load_deploy(path).model.blocks]
    settings = partial(Int8Settings, calibrate=64, allowed_loss=50)
    proof = export_int8(path, images_of(digits, path), settings(keep_float=(*every, "head")))
    assert proof.decibels > 60
    assert proof.decibels > export_int8(path, images_of(digits, path), settings()).decibels + 20
