import os
import stat

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from repvgg_jax import create_model, fuse_model
from repvgg_jax.interop.safetensors import load_deploy, save_deploy
from repvgg_jax.preprocess import Preprocess
from tests.random_variables import random_images, random_variables

PREPROCESS = Preprocess(16, 3, (0.4, 0.5, 0.6), (0.2, 0.2, 0.2), 18, ("cat", "dog", "fish", "bird", "frog"), "bicubic")


@pytest.fixture(scope="module")
def network():
    model = create_model(
        "repvgg_b1g2", num_classes=5, depths=(1, 2, 1, 1), width_multiplier=(0.25,) * 4, strides=(1, 1, 2, 2, 1),
        output_stride=2, epsilon=1e-3,
    )  # fmt: skip
    return fuse_model(model, random_variables(model, dtype=np.float32))


@pytest.fixture(scope="module")
def saved(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "deploy.safetensors"
    save_deploy(path, "repvgg_b1g2", *network, PREPROCESS)
    return path.read_bytes()


@pytest.fixture
def path(saved, tmp_path):
    path = tmp_path / "deploy.safetensors"
    path.write_bytes(saved)
    return path


def change_tensors(path, change):
    tensors = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    change(tensors)
    path.write_bytes(safetensors.numpy.save(tensors, metadata))


def test_a_saved_file_alone_gives_back_model_weights_and_preprocessing(network, path):
    model, variables = network
    loaded = load_deploy(path)
    assert loaded.model == model
    assert loaded.preprocess == PREPROCESS
    chex.assert_trees_all_equal(loaded.variables, variables)
    images = random_images((2, 16, 16, 3), np.float32)
    chex.assert_trees_all_equal(
        loaded.model.apply(loaded.variables, images, train=False), model.apply(variables, images, train=False)
    )


def test_a_save_that_fails_leaves_the_old_file_and_nothing_half_written(network, path, saved, monkeypatch):
    def fail(partial, content):
        partial.open("wb").close()
        raise OSError(28, "No space left on device", str(partial))

    monkeypatch.setattr("pathlib.Path.write_bytes", fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*deploy.safetensors'$"):
        save_deploy(path, "repvgg_b1g2", *network, PREPROCESS)
    assert [file.name for file in path.parent.iterdir()] == ["deploy.safetensors"]
    assert path.read_bytes() == saved


def test_a_file_is_for_those_whom_the_umask_lets_read_it(network, tmp_path):
    previous = os.umask(0o027)
    try:
        save_deploy(tmp_path / "deploy.safetensors", "repvgg_b1g2", *network, PREPROCESS)
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "deploy.safetensors").stat().st_mode) == 0o640


def test_a_missing_folder_is_an_error_of_the_system_that_names_the_file(network, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/deploy.safetensors'$"):
        save_deploy(tmp_path / "nowhere" / "deploy.safetensors", "repvgg_b1g2", *network, PREPROCESS)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors does not exist"):
        load_deploy(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "is a directory: expected"),
        (os.mkfifo, "is no file: expected"),
        (lambda path: path.write_bytes(b""), "is not a whole safetensors file"),
        (lambda path: path.write_bytes(b"\xff" * 7 + b"\x0f{}"), "is not a whole safetensors file"),
        (lambda path: path.write_bytes(b"\x05" + b"\0" * 7 + b"[1,2]"), "is not a whole safetensors file"),
    ],
    ids=["directory", "fifo", "empty", "header without end", "header of a list"],
)
def test_what_is_no_safetensors_file_is_named_and_not_waited_for(make, message, tmp_path):
    make(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors {message}"):
        load_deploy(tmp_path / "x.safetensors")


def test_a_truncated_file_is_refused(path):
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_deploy(path)


def test_a_file_of_another_program_is_refused(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors.*format None.*repvgg-fuse wrote"):
        load_deploy(tmp_path / "other.safetensors")


def set_to(name, value):
    return lambda tensors: tensors.update({name: value})


def with_last(value, dtype):
    array = np.zeros(16, dtype)
    array[-1] = value
    return array


BIAS = "stem.reparam.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_to("head.kernel", np.ones((3, 3), np.float32)), r"head.kernel is \(3, 3\), expected \(128, 5\)"),
        (lambda tensors: tensors.pop(BIAS), rf"{BIAS} is missing, expected \(16,\)"),
        (set_to("extra", np.ones(2)), r"extra is \(2,\), expected nothing"),
        (set_to(BIAS, np.zeros(16, np.int8)), f"{BIAS} is I8: expected float32"),
        (set_to(BIAS, np.zeros(16, bool)), f"{BIAS} is BOOL: expected float32"),
        (set_to(BIAS, np.zeros(16, np.complex64)), f"{BIAS} is C64: expected float32"),
        (set_to(BIAS, np.zeros(16, jnp.float8_e4m3fn)), f"{BIAS} is F8_E4M3: expected float32"),
        (set_to(BIAS, with_last(np.nan, np.float32)), f"not finite in float32 are in {BIAS}"),
        (set_to(BIAS, with_last(-np.inf, np.float16)), f"not finite in float32 are in {BIAS}"),
        (set_to(BIAS, with_last(1e300, np.float64)), f"not finite in float32 are in {BIAS}"),
    ],
    ids=["shape", "missing", "extra", "int8", "bool", "complex", "float8", "NaN", "infinity", "too large for float32"],
)
def test_tensors_that_do_not_fit_are_named(change, message, path):
    change_tensors(path, change)
    with pytest.raises(ValueError, match=f"deploy.safetensors is no deploy form that can be used: .*{message}"):
        load_deploy(path)


def test_many_wrong_tensors_take_one_line(path):
    change_tensors(path, lambda tensors: [tensors.update({name: np.ones(1)}) for name in list(tensors)])
    with pytest.raises(ValueError, match="and 11 more") as caught:
        load_deploy(path)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_floats_of_another_width_become_float32(dtype, path):
    before = load_deploy(path).variables["params"]["head"]["kernel"]
    narrow = np.asarray(before).astype(dtype)
    change_tensors(path, set_to("head.kernel", narrow))
    found = load_deploy(path).variables["params"]["head"]["kernel"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, narrow.astype(np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(variant="repvgg_a0"), "groups of the model is 2: expected 1, that of repvgg_a0"),
        (dict(variant="repvgg_b1g3"), "unknown variant 'repvgg_b1g3'"),
        (dict(preprocess=Preprocess(16, 1, (0.4,), (0.2,), 18, PREPROCESS.class_names)), r"stem.reparam.kernel is \(3"),
        (
            dict(preprocess=Preprocess(16, 3, (0.4,) * 3, (0.2,) * 3, 18, ("cat",))),
            "class_names are 1, num_classes is 5",
        ),
    ],
    ids=["groups", "variant", "channels", "class names"],
)
def test_what_could_not_be_read_again_is_not_written(change, message, network, tmp_path):
    model, variables = network
    arguments = dict(variant="repvgg_b1g2", model=model, variables=variables, preprocess=PREPROCESS) | change
    with pytest.raises(ValueError, match=message):
        save_deploy(tmp_path / "x.safetensors", **arguments)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_not_written(network, tmp_path):
    model, variables = network
    bias = {"bias": jnp.full(5, jnp.nan), "kernel": variables["params"]["head"]["kernel"]}
    with pytest.raises(ValueError, match=r"not finite in float32 are in head\.bias"):
        save_deploy(tmp_path / "x", "repvgg_b1g2", model, {"params": variables["params"] | {"head": bias}}, PREPROCESS)
    assert not list(tmp_path.iterdir())


def test_a_training_form_is_refused(tmp_path):
    model = create_model("repvgg_a0")
    with pytest.raises(ValueError, match="training form: fuse first"):
        save_deploy(tmp_path / "x.safetensors", "repvgg_a0", model, {"params": {}}, PREPROCESS)
    assert not list(tmp_path.iterdir())
