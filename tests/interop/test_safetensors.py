import chex
import numpy as np
import pytest
import safetensors.numpy

from repvgg_jax import create_model, fuse_model
from repvgg_jax.interop.preprocess import Preprocess
from repvgg_jax.interop.safetensors import load_deploy, save_deploy
from tests.random_variables import random_images, random_variables

PREPROCESS = Preprocess(16, 3, (0.4, 0.5, 0.6), (0.2, 0.2, 0.2), 18, ("cat", "dog", "fish", "bird", "frog"), "bicubic")


@pytest.fixture
def deployed(tmp_path):
    model = create_model(
        "repvgg_b1g2", num_classes=5, depths=(1, 2, 1, 1), width_multiplier=(0.25,) * 4, strides=(1, 1, 2, 2, 1),
        output_stride=2, epsilon=1e-3,
    )  # fmt: skip
    model, variables = fuse_model(model, random_variables(model, dtype=np.float32))
    path = tmp_path / "deploy.safetensors"
    save_deploy(path, "repvgg_b1g2", model, variables, PREPROCESS)
    return path, model, variables


def test_a_saved_file_alone_gives_back_model_weights_and_preprocessing(deployed):
    path, model, variables = deployed
    loaded = load_deploy(path)
    assert loaded.model == model
    assert loaded.preprocess == PREPROCESS
    chex.assert_trees_all_equal(loaded.variables, variables)
    images = random_images((2, 16, 16, 3), np.float32)
    chex.assert_trees_all_equal(
        loaded.model.apply(loaded.variables, images, train=False), model.apply(variables, images, train=False)
    )


def test_earlier_files_are_of_networks_without_dilation_and_of_bilinear_images(tmp_path):
    model = create_model("repvgg_a0", num_classes=5, depths=(1, 1, 1, 1), width_multiplier=(0.25,) * 4, deploy=True)
    path = tmp_path / "deploy.safetensors"
    save_deploy(path, "repvgg_a0", model, random_variables(model, dtype=np.float32), PREPROCESS)
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = {key: value for key, value in file.metadata().items() if key not in ("dilations", "interpolation")}
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path, metadata)
    loaded = load_deploy(path)
    assert loaded.model == model
    assert loaded.preprocess.interpolation == "bilinear"


def test_metadata_tell_a_reader_without_this_package_what_it_needs(deployed):
    metadata = load_deploy(deployed[0]).metadata
    assert metadata["variant"] == "repvgg_b1g2"
    assert metadata["class_names"] == '["cat", "dog", "fish", "bird", "frog"]'
    assert metadata["epsilon"] == "0.001"
    assert set(metadata) >= {"strides", "image_size", "mean", "std", "num_classes", "versions"}


def test_a_save_that_fails_leaves_the_old_file_and_nothing_half_written(deployed, monkeypatch):
    path, model, variables = deployed
    before = path.read_bytes()

    def fail(tensors, partial, metadata):
        partial.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save_deploy(path, "repvgg_b1g2", model, variables, PREPROCESS)
    assert [file.name for file in path.parent.iterdir()] == ["deploy.safetensors"]
    assert path.read_bytes() == before


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors does not exist"):
        load_deploy(tmp_path / "nowhere.safetensors")


def test_a_truncated_file_is_refused(deployed):
    path = deployed[0]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_deploy(path)


def test_a_file_of_another_program_is_refused(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"format None.*fuse.py RUN_DIR"):
        load_deploy(tmp_path / "other.safetensors")


def test_tensors_that_do_not_fit_the_variant_are_named(deployed):
    path = deployed[0]
    metadata = load_deploy(path).metadata
    tensors = safetensors.numpy.load_file(path)
    tensors["head.kernel"] = np.ones((3, 3), np.float32)
    del tensors["stem.reparam.bias"]
    safetensors.numpy.save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"head.kernel is \(3, 3\), expected .*stem.reparam.bias is None"):
        load_deploy(path)


def test_a_training_form_is_refused(tmp_path):
    model = create_model("repvgg_a0")
    with pytest.raises(ValueError, match="training form: fuse first"):
        save_deploy(tmp_path / "x.safetensors", "repvgg_a0", model, {"params": {}}, PREPROCESS)
    assert not list(tmp_path.iterdir())
