import builtins
import json

import chex
import jax
import numpy as np
import pytest

from repvgg_jax import create_model
from repvgg_jax.interop.hub import load_pretrained
from tests.interop.hub_cache import COMMIT, CONFIG, write_hub_cache, write_hub_config
from tests.random_variables import random_variables


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


pytestmark = pytest.mark.usefixtures("short_variants")


@pytest.fixture(scope="module")
def variables(short_variants):
    return random_variables(create_model("repvgg_a0", num_classes=5), dtype=np.float32)


@pytest.fixture
def cache(variables, tmp_path):
    write_hub_cache(tmp_path, create_model("repvgg_a0", num_classes=5), variables)
    return tmp_path


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_published_weights_come_with_their_preprocessing_and_commit(variables, cache, revision):
    model, found, preprocess, commit = load_pretrained("RepVGG-A0", revision=revision, cache_dir=cache)
    chex.assert_trees_all_equal(found, variables)
    assert model == create_model("repvgg_a0", num_classes=5)
    assert (preprocess.image_size, preprocess.eval_resize) == (224, 256)
    assert preprocess.mean == (0.485, 0.456, 0.406)
    assert preprocess.class_names[4] == "class 4"
    assert commit == COMMIT


def test_another_classifier_is_initialised_for_other_classes(variables, cache):
    found = load_pretrained("repvgg_a0", num_classes=3, head="reinit", key=jax.random.key(0), cache_dir=cache)
    assert found.variables["params"]["head"]["kernel"].shape == (1280, 3)
    assert found.preprocess.class_names == ("class 0", "class 1", "class 2")
    chex.assert_trees_all_equal(found.variables["params"]["stem"], variables["params"]["stem"])


@pytest.mark.parametrize("interpolation", ["bicubic", "nearest"])
def test_the_interpolation_of_the_images_travels_with_the_weights_or_is_refused(variables, tmp_path, interpolation):
    config = {**CONFIG["pretrained_cfg"], "interpolation": interpolation}
    write_hub_cache(tmp_path, create_model("repvgg_a0", num_classes=5), variables, pretrained_cfg=config)
    if interpolation == "bicubic":
        assert load_pretrained("repvgg_a0", cache_dir=tmp_path).preprocess.interpolation == "bicubic"
    else:
        with pytest.raises(ValueError, match="interpolation is nearest: expected one of bilinear, bicubic"):
            load_pretrained("repvgg_a0", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON"),
        ("\xff", "no JSON"),
        ("[]", r"it holds \[\], expected a JSON object"),
        ('{"pretrained_cfg": [1]}', r"pretrained_cfg is \(1,\): expected a JSON object"),
        ("{}", "input_size is missing"),
        ({"mean": None}, "mean is None: expected a list of a finite number"),
        ({"mean": [0.4]}, r"mean is \(0.4,\): expected as many values as channels"),
        ({"mean": [float("nan")] * 3}, "NaN is no number"),
        ({"std": [0, 1, 1]}, "std is .*: expected positive numbers"),
        ({"std": [-1, 1, 1]}, "std is .*: expected positive numbers"),
        ({"input_size": [3, 224]}, "input_size is .*: expected a list of 3, each a whole number"),
        ({"input_size": 224}, "input_size is 224: expected a list"),
        ({"input_size": [3, 224, 256]}, r"input_size is .*: expected \[channels, side, side\]"),
        ({"input_size": [3, 10**400, 10**400]}, "input_size is "),
        ({"input_size": [4, 224, 224]}, "channels is 4"),
        ({"crop_pct": 0}, "crop_pct is 0: expected a share from 0.01 to 1"),
        ({"crop_pct": "0.9"}, "crop_pct is 0.9: expected a finite number"),
        ({"interpolation": ["bicubic"]}, "interpolation is .*: expected a text"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_with_file_and_field_before_the_weights(text, message, tmp_path):
    if isinstance(text, dict):
        text = json.dumps({"pretrained_cfg": {**CONFIG["pretrained_cfg"], **text}})
    write_hub_config(tmp_path, text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"config.json is not what timm writes: .*{message}"):
        load_pretrained("repvgg_a0", cache_dir=tmp_path)


def test_names_of_classes_are_taken_where_the_repository_has_them(variables, tmp_path):
    names = ["cat", "dog", "fish", "bird", "frog"]
    write_hub_cache(tmp_path, create_model("repvgg_a0", num_classes=5), variables, label_names=names)
    assert load_pretrained("repvgg_a0", cache_dir=tmp_path).preprocess.class_names == tuple(names)


def test_what_is_not_in_the_cache_cannot_be_had_offline(tmp_path):
    with pytest.raises(ConnectionError, match=r"cannot fetch config.json of https://huggingface.co/timm/repvgg_b1g4"):
        load_pretrained("repvgg_b1g4", cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["repvgg_b1g2", "repvggplus_l2pse"])
def test_names_without_published_weights_are_refused(name):
    with pytest.raises(ValueError, match=rf"no published weights of '{name}': expected one of repvgg_a0, "):
        load_pretrained(name)


def test_without_huggingface_hub_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "huggingface_hub":
            raise ImportError
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"huggingface_hub.*\[hub\]"):
        load_pretrained("repvgg_a0")
