"""`python -m repvgg_jax.predict` prints what the deploy form computes."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import repvgg_jax
from repvgg_jax import create_model, fuse_model
from repvgg_jax.cli.predict import list_images, predict_command, read_list
from repvgg_jax.data import fit, read_image
from repvgg_jax.data.sources.folder import load_folder
from repvgg_jax.interop.safetensors import load_deploy, save_deploy
from repvgg_jax.predict import predict
from repvgg_jax.preprocess import Preprocess
from repvgg_jax.terminal import printable
from tests.data.tiny_data import lock_directories
from tests.random_variables import random_variables

NAMES = ("cat", "dog", "fish", "bird", "Frösche")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A deploy file, five images of several kinds and sizes, one file that is none."""
    place = tmp_path_factory.mktemp("predict")
    model = create_model(
        "repvgg_a0", num_classes=5, depths=(1, 1, 1, 1), width_multiplier=(0.25,) * 4, strides=(1, 1, 2, 2, 1)
    )
    model, variables = fuse_model(model, random_variables(model, dtype=np.float32))
    preprocess = Preprocess(16, 3, (0.4, 0.5, 0.6), (0.2, 0.2, 0.2), 18, NAMES, "bicubic")
    save_deploy(place / "deploy.safetensors", "repvgg_a0", model, variables, preprocess)
    random = np.random.default_rng(0)
    (place / "images" / "more").mkdir(parents=True)
    for name, size in [("a.png", (16, 16)), ("b.jpg", (40, 30)), ("c.JPEG", (25, 50)), ("more/d.png", (18, 18))]:
        pixels = random.integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(place / "images" / name)
    Image.fromarray(random.integers(0, 256, (20, 20), np.uint8)).save(place / "images" / "grey.png")
    (place / "broken.jpg").write_bytes(b"not an image")
    return place


def expected(deployed, path):
    """By the plain way: one image, `apply`, softmax."""
    preprocess = deployed.preprocess
    image = read_image(path, 3)
    pixels = fit(image, preprocess.image_size, preprocess.eval_resize, "bicubic")[None]
    images = ((pixels / 255 - preprocess.mean) / preprocess.std).astype(np.float32)
    probabilities = np.asarray(
        jax.nn.softmax(deployed.model.apply(deployed.variables, jnp.asarray(images), train=False))
    )
    return sorted(zip(NAMES, probabilities[0].tolist(), strict=True), key=lambda pair: -pair[1])


@pytest.mark.parametrize("batch_size", [2, 32])
def test_predictions_are_those_of_the_deploy_form_whatever_the_batch(place, batch_size):
    deployed = load_deploy(place / "deploy.safetensors")
    paths = list_images([str(place / "images")])
    assert len(paths) == 5
    predictions = list(predict(deployed, paths, top=3, batch_size=batch_size))
    assert [prediction.path for prediction in predictions] == paths
    for prediction in predictions:
        assert prediction.error is None
        names, probabilities = zip(*expected(deployed, prediction.path)[:3], strict=True)
        assert tuple(name for name, _ in prediction.classes) == names
        np.testing.assert_allclose([p for _, p in prediction.classes], probabilities, rtol=1e-4)
    assert len({prediction.classes for prediction in predictions}) == 5  # each image has its own


def test_a_folder_a_file_and_a_list_on_standard_input_are_all_taken(place, monkeypatch, capsys):
    images = place / "images"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{images / 'a.png'}\n\n{images / 'b.jpg'}\n"))
    weights = str(place / "deploy.safetensors")
    assert predict_command([weights, str(images / "more"), "-", str(images / "c.JPEG"), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if not line.startswith(" ")]
    assert shown == [str(images / name) for name in ("more/d.png", "a.png", "b.jpg", "c.JPEG")]
    assert len(lines) == 4 * 3
    assert all("%  " in line for line in lines if line.startswith(" "))


def test_an_image_that_cannot_be_read_does_not_stop_the_others(place, capsys):
    weights, good = str(place / "deploy.safetensors"), str(place / "images" / "a.png")
    bad = [str(place / "broken.jpg"), str(place / "absent.png")]
    assert predict_command([weights, *bad, good]) == 1
    output = capsys.readouterr()
    assert output.out.splitlines()[0] == good
    assert len(output.out.splitlines()) == 6
    assert "broken.jpg: cannot be decoded" in output.err
    assert "absent.png" in output.err
    assert predict_command([weights, *bad, good, "--json"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["error" in line for line in lines] == [True, True, False]
    assert sum(one["probability"] for one in lines[2]["classes"]) == pytest.approx(1, abs=1e-5)
    assert {one["name"] for one in lines[2]["classes"]} == set(NAMES)


def test_bad_input_is_refused_with_the_remedy(place, tmp_path, capsys):
    good, image = str(place / "deploy.safetensors"), str(place / "images" / "a.png")
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes((place / "deploy.safetensors").read_bytes()[:-100])
    for arguments, message in [
        ([str(tmp_path / "absent.safetensors"), image], "absent.safetensors does not exist"),
        ([str(truncated), image], "not a whole safetensors file"),
        ([good, str(tmp_path)], "holds no image: expected files ending in .jpg"),
        ([good, image, "--top", "0"], "top is 0: expected at least 1"),
        ([good], "no image is named"),
    ]:
        assert predict_command(arguments) == 2, arguments
        assert message in capsys.readouterr().err


def test_the_module_runs_as_a_command(place):
    weights, image = str(place / "deploy.safetensors"), str(place / "images" / "a.png")
    command = [sys.executable, "-m", "repvgg_jax.predict", weights, image]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0] == image


def test_predicting_needs_neither_tensorflow_nor_grain_nor_orbax():
    heavy = {"tensorflow", "tensorflow_datasets", "grain", "orbax"}
    code = f"import sys, repvgg_jax.cli.predict; print({heavy} & {{*sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_a_reader_that_goes_away_ends_the_work_quietly(place, monkeypatch, capsys):
    class Unread(io.StringIO):
        def write(self, text):
            written.append(text)
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    written = []
    monkeypatch.setattr(sys, "stdout", Unread())
    arguments = [str(place / "deploy.safetensors"), str(place / "broken.jpg"), str(place / "images")]
    assert predict_command([*arguments, "--batch-size", "1"]) == 1
    assert len(written) == 1
    assert capsys.readouterr().err.count("error:") == 1
    with pytest.raises(SystemExit) as ended:
        predict_command(["--help"])
    assert ended.value.code == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_exact_in_every_encoding(place, tmp_path, encoding, monkeypatch):
    image = tmp_path / "Frösche 👩‍🔬 猫.png"
    image.write_bytes((place / "images" / "a.png").read_bytes())
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    assert predict_command([str(place / "deploy.safetensors"), str(image), "--json"]) == 0
    line = json.loads(stdout.buffer.getvalue().decode(encoding))
    assert line["path"] == str(image)
    assert {one["name"] for one in line["classes"]} == set(NAMES)


def test_names_reach_the_terminal_as_text_alone(place, tmp_path, capsys):
    image = tmp_path / "a\x1b[2J\n  99.00 %  cat.png"
    image.write_bytes((place / "images" / "a.png").read_bytes())
    assert (
        predict_command([str(place / "deploy.safetensors"), str(image), str(tmp_path / "no\x1b[2J.png"), "--top", "1"])
        == 1
    )
    output = capsys.readouterr()
    assert output.out.splitlines()[0] == rf"{tmp_path}/a\x1b[2J\n  99.00 %  cat.png"
    assert len(output.out.splitlines()) == 2
    assert "\x1b" not in output.err


@pytest.mark.parametrize(
    "name", [b"broken.png", b"caf\xe9.png", b"a\n.png", b"\x1b[2J.png", b"no\xe9.png", b"pipe\n.png"]
)
def test_an_error_names_its_image_once(place, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    image = os.fsdecode(name)
    if name.startswith(b"pipe"):
        os.mkfifo(image)
    elif not name.startswith(b"no"):
        Path(image).write_bytes(b"not an image")
    reason = {"n": "No such file or directory", "p": "is no regular file"}.get(
        image[0], "cannot be decoded as an image"
    )
    assert predict_command([str(place / "deploy.safetensors"), image]) == 1
    assert capsys.readouterr().err.startswith(f"error: {printable(image)}: {reason}")
    assert predict_command([str(place / "deploy.safetensors"), image, "--json"]) == 1
    line = json.loads(capsys.readouterr().out)
    assert line["path"] == image
    assert line["error"].startswith(reason)


def test_a_jax_that_cannot_start_is_told_in_a_line(place, monkeypatch, capsys):
    def fails():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", fails)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert predict_command([str(place / "deploy.safetensors"), str(place / "images")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "JAX cannot start" in line


def test_a_directory_holds_the_images_that_training_finds_in_it(place, tmp_path):
    for name in ("data/a", "data/a/.hidden", "data/__MACOSX", "data/b/below", "linked"):
        (tmp_path / name).mkdir(parents=True)
        for file in ("x.png", "y.JPG", ".z.png", "notes.txt"):
            (tmp_path / name / file).write_bytes((place / "images" / "a.png").read_bytes())
    (tmp_path / "data" / "b" / "linked").symlink_to(tmp_path / "linked")
    (tmp_path / "data" / "b" / "round").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "b" / "directory.png").mkdir()
    dataset = load_folder(tmp_path / "data")
    said = []
    found = list_images([f"{tmp_path / 'data'}/"], say=said.append)
    assert found == sorted(dataset.train._files + dataset.test._files)
    assert len(found) == 6
    assert len(said) == 1
    assert "3 .txt (" in said[0]


def run(place, *arguments, **options):
    command = [sys.executable, "-m", "repvgg_jax.predict", place / "deploy.safetensors", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(repvgg_jax.__file__).parents[1])}
    return subprocess.run(command, capture_output=True, check=False, timeout=100, env=environment, **options)


def test_one_images_trouble_is_one_images(place, tmp_path):
    image = (place / "images" / "a.png").read_bytes()
    names = [b"caf\xe9.png", b" spaces .png", "猫.png".encode(), b"two\nlines.png", b"\x1b[2J.png", b"locked.png"]
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(image)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "empty").mkdir()
    listed = [*names, b"pipe.png", b"empty", b"absent.png", b"/dev/zero", b"a" * 5000, b"images"]
    (tmp_path / "images").symlink_to(place / "images")
    result = run(place, "-", "--json", cwd=tmp_path, input=b"".join(name + b"\0" for name in listed))
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 1
    assert [os.fsencode(line["path"]) for line in lines[:-5]] == listed[:-1]
    assert ["error" in line for line in lines] == [False] * 6 + [True] * 5 + [False] * 5
    assert result.stdout.isascii()
    for line, expected in zip(
        lines[6:11], ["no regular file", "no image", "No such", "no regular", "too long"], strict=True
    ):
        assert expected in line["error"]
    text = run(place, *names, "absent\x1b[2J.png", cwd=tmp_path)
    assert text.returncode == 1
    assert b"\x1b" not in text.stdout + text.stderr
    shown = [line for line in text.stdout.decode().splitlines() if "%" not in line]
    assert shown == [r"caf\xe9.png", " spaces .png", "猫.png", r"two\nlines.png", r"\x1b[2J.png", "locked.png"]
    assert text.stderr.decode() == "error: absent\\x1b[2J.png: No such file or directory\n"


def test_any_exception_of_one_image_is_told_and_the_others_are_classified(place, monkeypatch):
    paths = [str(place / "images" / name) for name in ("a.png", "b.jpg", "c.JPEG")]
    failures = {paths[0]: MemoryError(), paths[1]: RecursionError("too deep")}

    def read(path, channels):
        if path in failures:
            raise failures[path]
        return read_image(path, channels)

    monkeypatch.setattr("repvgg_jax.predict.classify.read_image", read)
    first, second, third = predict(load_deploy(place / "deploy.safetensors"), paths)
    assert (first.error, second.error) == ("MemoryError", "too deep")
    assert third.error is None
    assert third.classes


def test_a_directory_that_cannot_be_read_is_an_error_of_its_own(place, tmp_path, monkeypatch):
    for name in ("a.png", "locked/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((place / "images" / "a.png").read_bytes())
    lock_directories(monkeypatch)
    good, locked = predict(load_deploy(place / "deploy.safetensors"), list_images([str(tmp_path)]))
    assert good.error is None
    assert (locked.path, locked.error) == (str(tmp_path / "locked"), "Permission denied")


@pytest.mark.parametrize(
    ("content", "paths"),
    [
        (b"a.png\r\n b.png \n\n", ["a.png", " b.png ", "", ""]),
        (b"two\nlines\r\0caf\xe9\0", ["two\nlines\r", os.fsdecode(b"caf\xe9"), ""]),
        (b"a\0b.png\nc.png", ["a\0b.png", "c.png"]),
        (b"", [""]),
    ],
)
def test_a_list_names_files_byte_by_byte(content, paths):
    assert read_list(io.TextIOWrapper(io.BytesIO(content), encoding="ascii")) == paths


def test_a_nul_in_a_line_and_a_closed_standard_input_are_no_traceback(place):
    good = place / "images" / "a.png"
    result = run(place, "-", "--json", input=b"a\0b.png\n" + os.fsencode(good))
    bad, fine = [json.loads(line) for line in result.stdout.splitlines()]
    assert (bad["path"], fine["path"], result.returncode) == ("a\0b.png", str(good), 1)
    assert "null" in bad["error"]
    assert read_list(None) == []
