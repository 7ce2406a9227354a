"""The metadata of a `deploy.safetensors`: what is written is read again, and nothing else is believed."""

import dataclasses
import time

import numpy as np
import pytest
import safetensors.numpy

from repvgg_jax import create_model
from repvgg_jax.interop.deploy_metadata import DeployMetadata
from repvgg_jax.interop.safetensors import load_deploy, save_deploy
from repvgg_jax.preprocess import Preprocess, imagenet_preprocess
from tests.random_variables import random_variables

PREPROCESS = Preprocess(16, 3, (0.4, 0.5, 0.6), (0.2, 0.2, 0.2), 18, ("cat", "dog"), "bicubic")
REQUIRED = (
    "variant", "num_classes", "class_names", "strides", "depths", "width_multiplier", "image_size", "channels", "mean",
    "std", "eval_resize", "epsilon",
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = create_model("repvgg_a0", num_classes=2, depths=(1, 1, 1, 1), width_multiplier=(0.25,) * 4, deploy=True)
    path = tmp_path_factory.mktemp("saved") / "deploy.safetensors"
    save_deploy(path, "repvgg_a0", model, random_variables(model, dtype=np.float32), PREPROCESS)
    return path


@pytest.fixture(scope="module")
def strings(saved):
    return load_deploy(saved).metadata


@pytest.fixture
def rewrite(saved, strings, tmp_path):
    """Writes the file with other metadata; None leaves a field out."""

    def write(**changes):
        metadata = {name: value for name, value in (strings | changes).items() if value is not None}
        path = tmp_path / "deploy.safetensors"
        path.write_bytes(safetensors.numpy.save(safetensors.numpy.load_file(saved), metadata))
        return path

    return write


def test_metadata_tell_a_reader_without_this_package_what_it_needs(strings):
    assert strings["variant"] == "repvgg_a0"
    assert strings["class_names"] == '["cat", "dog"]'
    assert strings["epsilon"] == "1e-05"
    assert set(strings) == {*REQUIRED, "format", "versions", "dilations", "interpolation"}


def test_earlier_files_are_of_networks_without_dilation_and_of_bilinear_images(rewrite):
    loaded = load_deploy(rewrite(dilations=None, interpolation=None))
    assert loaded.model.dilations == (1, 1, 1, 1, 1)
    assert loaded.preprocess.interpolation == "bilinear"


def test_fields_of_others_and_of_versions_are_passed_over(rewrite):
    assert load_deploy(rewrite(author="{", versions=None)).preprocess == PREPROCESS


@pytest.mark.parametrize("field", REQUIRED)
def test_a_missing_field_is_named(field, rewrite):
    with pytest.raises(ValueError, match=rf"deploy\.safetensors is no deploy form .*: {field} is missing"):
        load_deploy(rewrite(**{field: None}))


HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("format", None, "it has the format None, expected 'repvgg_jax deploy 1'"),
        ("format", "repvgg_jax deploy 2", "it has the format repvgg_jax deploy 2"),
        ("variant", "repvgg_a9", "unknown variant 'repvgg_a9': did you mean"),
        ("variant", "", "unknown variant ''"),
        ("variant", "x" * 10_000, "variant is xxx"),
        ("num_classes", "{", r"num_classes is \{: expected JSON"),
        ("num_classes", "true", "num_classes is True: expected a whole number"),
        ("num_classes", "2.0", "num_classes is 2.0: expected a whole number"),
        ("num_classes", "3", "class_names are 2, num_classes is 3"),
        ("num_classes", HUGE, "class_names are 2, num_classes is 10000"),
        ("num_classes", "1" * 5000, "num_classes is 1111"),
        ("class_names", '["cat"]', "class_names are 1, num_classes is 2"),
        ("class_names", '["cat", 1]', r"class_names is \('cat', 1\): expected a list of a text"),
        ("class_names", '"ab"', "class_names is ab: expected a list of a text"),
        ("class_names", "null", "class_names is None"),
        ("strides", "[2, 2, 2, 2]", "strides is .*: expected a list of 5, each a whole number"),
        ("strides", "[2, 2, 2, 2, 3]", "strides are .*: expected five, each 1 or 2"),
        ("strides", "[2, 2, 2, 2, true]", "strides is"),
        ("dilations", "[1, 1, 1, 1]", "dilations is .*: expected a list of 5"),
        ("dilations", "[1, 1, 1, 1, 0]", "dilations are .*: expected five, each 1 to 32"),
        ("dilations", "[1, 1, 1, 1, 1000000]", "dilations are .*: expected five, each 1 to 32"),
        ("depths", "[1, 1, 1]", "depths is .*: expected a list of 4"),
        ("depths", "[1, 1, 1, 0]", "depths are .*: expected four, each at least 1"),
        ("depths", "[1, 1, 1, 2]", "stage4_block2.reparam.bias is missing"),
        ("depths", "[1, 1, 1, 400]", "depths are .*, with 12 tensors: expected at least two tensors for each block"),
        ("depths", "[1000000, 1, 1, 1]", "depths are .*: expected at most 512 blocks"),
        ("depths", "[-1000000, 1000000, 1, 1]", "depths are .*: expected four, each at least 1"),
        ("depths", '{"1": 1}', "depths is"),
        ("depths", "[" * 100_000, r"depths is \[\[\[.*: expected JSON"),
        ("width_multiplier", "[1, 1, 1]", "width_multiplier is .*: expected a list of 4"),
        ("width_multiplier", "[1, 1, 1, 0]", "width_multiplier is .*: expected four positive factors"),
        ("width_multiplier", "[1, 1, 1, 1e-9]", "width_multiplier .* gives .* channels"),
        ("width_multiplier", "[1, 1, 1, Infinity]", "width_multiplier is .*: expected JSON .*Infinity is no number"),
        ("width_multiplier", "[1, 1, 1, 1e400]", r"width_multiplier is \[1, 1, 1, 1e400\]: .* 1e400 is no number"),
        ("width_multiplier", f"[1, 1, 1, {HUGE}]", "width_multiplier is"),
        ("width_multiplier", "[1, 1, 1, 1e6]", "width_multiplier is .*: expected factors that give at most"),
        ("width_multiplier", "[0.25, 0.25, 0.25, 0.5]", r"do not fit .*, width_multiplier \(0.25, .*: head.kernel is"),
        ("epsilon", "NaN", "epsilon is NaN: expected JSON .*NaN is no number"),
        ("epsilon", "-1e-5", "epsilon is -1e-05: expected at least 0"),
        ("epsilon", '"1e-5"', "epsilon is 1e-5: expected a finite number"),
        ("image_size", "0", "image_size is 0: expected 1 to 8192 pixels"),
        ("image_size", "-16", "image_size is -16: expected 1 to 8192 pixels"),
        ("image_size", HUGE, "image_size is 10000"),
        ("image_size", "16.0", "image_size is 16.0: expected a whole number"),
        ("channels", "1", "mean is .*: expected as many values as channels \\(=1\\)"),
        ("channels", "4", r"channels is 4: expected 1 \(gray\) or 3 \(RGB\)"),
        ("channels", "true", "channels is True: expected a whole number"),
        ("mean", "[0.4, 0.5]", "mean is .*: expected as many values as channels \\(=3\\)"),
        ("mean", "0.4", "mean is 0.4: expected a list of a finite number"),
        ("mean", "[NaN, 0, 0]", "mean is .*NaN is no number"),
        ("mean", "[1e400, 0, 0]", r"mean is \[1e400, 0, 0\]: .* 1e400 is no number"),
        ("mean", "[3e38, 0, 0]", "mean is .*: expected numbers of the size of pixels"),
        ("std", "[0.2, 0, 0.2]", "std is .*: expected positive numbers"),
        ("std", "[0.2, -0.2, 0.2]", "std is .*: expected positive numbers"),
        ("std", "[0.2, 1e-300, 0.2]", "std is .*: expected positive numbers"),
        ("std", '["0.2", 1, 1]', "std is .*: expected a list of a finite number"),
        ("eval_resize", "15", r"eval_resize is 15: expected None, or at least image_size \(=16\)"),
        ("eval_resize", HUGE, "eval_resize is 1000"),
        ("eval_resize", "[18]", "eval_resize is .*: expected a whole number or None"),
        ("interpolation", '"magic"', "interpolation is magic: expected bilinear or bicubic"),
        ("interpolation", "1", "interpolation is 1: expected bilinear or bicubic"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_used_is_named_at_once(field, text, message, rewrite):
    path = rewrite(**{field: text})
    before = time.process_time()
    with pytest.raises(
        ValueError, match=rf"deploy\.safetensors is no deploy form that can be used: .*{message}"
    ) as caught:
        load_deploy(path)
    assert time.process_time() - before < 5
    assert len(str(caught.value)) < 700 + len(str(path))


def test_names_of_classes_are_kept_to_the_letter(saved, tmp_path):
    names = ("caf\udce9", "a\x1b[2J\n\u202eb")
    loaded = load_deploy(saved)
    preprocess = dataclasses.replace(PREPROCESS, class_names=names)
    save_deploy(tmp_path / "deploy.safetensors", "repvgg_a0", loaded.model, loaded.variables, preprocess)
    assert load_deploy(tmp_path / "deploy.safetensors").preprocess.class_names == names


def test_metadata_survive_the_way_through_strings(strings):
    metadata = DeployMetadata.from_strings(strings)
    assert metadata.to_strings() == strings
    assert DeployMetadata.from_strings(metadata.to_strings()) == metadata


def test_lists_are_taken_for_tuples():
    assert Preprocess(16, 1, [0.4], [1], None, ["cat"]) == Preprocess(16, 1, (0.4,), (1,), None, ("cat",))


def test_gray_images_are_normalised_by_the_averages_of_the_three_channels():
    gray, rgb = imagenet_preprocess(["cat"], gray=True), imagenet_preprocess(["cat"])
    assert (gray.channels, rgb.channels) == (1, 3)
    np.testing.assert_allclose([gray.mean[0], gray.std[0]], [np.mean(rgb.mean), np.mean(rgb.std)], atol=1e-3)


def test_the_shorter_side_is_resized_to_8_7_of_the_image_rounded():
    sizes = range(1, 1000)
    assert [imagenet_preprocess([], image_size=size).eval_resize for size in sizes] == [round(s * 8 / 7) for s in sizes]
