import dataclasses
import json
import math
import re
import typing
from pathlib import Path

import jax.numpy as jnp
import pytest

import repvgg_jax.training.config.parts as parts_module
import repvgg_jax.training.config.presets as presets_module
import repvgg_jax.training.config.train_config as train_config_module
from repvgg_jax.preprocess import Preprocess
from repvgg_jax.training import PRESETS, TrainConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(variant="repvgg_a9"), "unknown variant 'repvgg_a9': did you mean"),
        (dict(strides=(1, 1, 2, 2, 3)), "strides are .*each 1 or 2"),
        (dict(batch_size=0), "batch_size is 0: expected at least 1"),
        (dict(warmup_epochs=-1), "warmup_epochs is -1: expected at least 0"),
        (dict(learning_rate_batch_size=0), "learning_rate_batch_size is 0: expected at least 1"),
        (dict(learning_rate=0.0), "learning_rate is 0.0: expected more than 0"),
        (dict(momentum=1.0), r"momentum is 1.0: expected in \[0, 1\)"),
        (dict(label_smoothing=1.5), "label_smoothing is 1.5"),
        (dict(color_jitter=1.5), r"color_jitter is 1.5: expected in \[0, 1\]"),
        (dict(frozen="stem"), "frozen is stem: expected init_from as well"),
        (dict(alternate_flip=True, flip=False), "flip is False: expected True where alternate_flip is"),
        (dict(cutout=-1), "cutout is -1: expected at least 0"),
        (dict(cutout=33), r"cutout is 33: expected at most image_size \(=32\)"),
        (dict(refine_epochs=-1), "refine_epochs is -1: expected at least 0"),
        (dict(residual_scale=1.5), r"residual_scale is 1.5: expected in \[0, 1\]"),
        (dict(mixup=-0.2), "mixup is -0.2: expected at least 0"),
        (dict(cutmix=-1.0), "cutmix is -1.0: expected at least 0"),
        (dict(grad_clip_norm=-1.0), "grad_clip_norm is -1.0: expected at least 0"),
        (dict(accumulate_steps=0), "accumulate_steps is 0: expected at least 1"),
        (dict(accumulate_steps=3), r"accumulate_steps is 3: expected a divisor of batch_size \(=256\)"),
        (dict(ema_decay=1.0), r"ema_decay is 1.0: expected in \[0, 1\)"),
        (dict(dtype="float16"), "dtype is float16: expected float32 or bfloat16"),
        (dict(schedule="step"), "schedule is step: expected cosine or linear"),
        (dict(mean=(0.5,)), "mean is .*expected mean and std, or neither; std is None"),
        (dict(mean=(0.5,), std=(0.0,)), "std is .*expected positive"),
        (dict(image_size=224, eval_resize=200), r"eval_resize is 200: expected at least image_size \(=224\)"),
        (dict(eval_image_size=0), "eval_image_size is 0: expected at least 1"),
        (
            dict(image_size=256, eval_image_size=320, eval_resize=300),
            r"eval_resize is 300: expected at least eval_image_size \(=320\)",
        ),
    ],
)
def test_a_value_out_of_range_is_refused_by_field(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig().replace(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(eval_image_size=8193), "image_size is 8193: expected 1 to 8192 pixels"),
        (dict(eval_resize=8193), "eval_resize is 8193: expected .*at most 8192 pixels"),
        (dict(depths=(1, 1, 600, 1)), r"depths are \(1, 1, 600, 1\): expected at most 512 blocks"),
        (dict(width_multiplier=(1.0, 1.0, 1.0, 200.0)), "width_multiplier is .*at most 65536 channels"),
        (dict(mean=(0.5, 0.5), std=(0.5, 0.5)), "mean is .*expected 1 value for gray images, 3 for RGB"),
        (dict(mean=(), std=()), "mean is .*expected 1 value for gray images, 3 for RGB"),
        (dict(mean=(1e38,), std=(1e-3,)), "mean is .*expected numbers of the size of pixels"),
        (dict(mean=(0.5,), std=(1e-45,)), "std is .*expected positive numbers"),
        (dict(mean=(0.5,), std=(1e-39,)), "std is .*expected positive numbers"),
    ],
)
def test_what_no_deploy_form_can_be_saved_with_is_refused_before_training(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig().replace(**fields)


def test_the_preprocessing_of_a_config_is_that_of_its_evaluation():
    config = TrainConfig().replace(image_size=8, eval_image_size=16, eval_resize=20, mean=(0.5,), std=(0.25,))
    preprocess = config.data.preprocess(config.data.normalization, ["a", "b"])
    assert preprocess == Preprocess(16, 1, (0.5,), (0.25,), 20, ("a", "b"))


PARTS = [type(value) for value in vars(TrainConfig()).values() if dataclasses.is_dataclass(value)]
HINTS = {name: hint for part in PARTS for name, hint in typing.get_type_hints(part).items()}
FLOATS = [name for name, hint in HINTS.items() if "float" in str(hint) and name != "dtype"]


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, 1e39, 10**400, "x", True, (0.5, math.nan)], ids=lambda value: f"{value!r:.9}"
)
@pytest.mark.parametrize("field", FLOATS)
def test_a_number_that_is_not_finite_is_refused_by_field(field, value):
    wrapped = {"mean": (value,), "std": (value,), "width_multiplier": (1.0, 1.0, 1.0, value)}.get(field, value)
    with pytest.raises(ValueError, match=f"^{field} is .*: expected (None or )?.*a finite number"):
        TrainConfig().replace(**{"mean": (0.5,), "std": (0.5,), field: wrapped})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(epochs="3"), "epochs is 3: expected a whole number"),
        (dict(epochs=2.0), "epochs is 2.0: expected a whole number"),
        (dict(epochs=True), "epochs is True: expected a whole number"),
        (dict(flip=1), "flip is 1: expected true or false"),
        (dict(dataset=None), "dataset is None: expected a text"),
        (dict(mean="x", std="x"), "mean is x: expected a list of a finite number or None"),
        (dict(strides=(1, 2)), "strides is .*expected a list of 5, each a whole number"),
        (dict(depths=7), "depths is 7: expected a list of 4, each a whole number or None"),
        (dict(variant=["a0"]), "variant is .*expected a text"),
        (dict(seed=2**63), "seed is .*expected in"),
    ],
)
def test_a_value_of_another_type_is_refused_by_field(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig().replace(**fields)


def test_whole_numbers_are_taken_for_floats():
    assert TrainConfig().replace(learning_rate=1, mean=(0,), std=(1,)).optimization.learning_rate == 1


def test_lists_are_taken_for_tuples():
    config = TrainConfig().replace(mean=[0.5], std=[0.25], strides=[1, 1, 2, 2, 2])
    assert config == TrainConfig().replace(mean=(0.5,), std=(0.25,), strides=(1, 1, 2, 2, 2))
    assert hash(config) != hash(TrainConfig())


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_survive_the_way_through_a_file(name, tmp_path):
    path = tmp_path / "config.json"
    PRESETS[name].save(path)
    assert TrainConfig.load(path) == PRESETS[name]


def test_a_file_of_another_version_is_refused_with_the_field(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**dataclasses.asdict(TrainConfig()), "ema": 0.9}))
    with pytest.raises(ValueError, match=r"config.json is not a config of this version .*ema"):
        TrainConfig.load(path)
    path.write_text(json.dumps({**dataclasses.asdict(TrainConfig()), "checkpoints": {"epochs": 3}}))
    with pytest.raises(ValueError, match=r"config.json .*: it has the unknown epochs"):
        TrainConfig.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not a config"):
        TrainConfig.load(path)


def without(fields, name):
    return {each: value for each, value in fields.items() if each != name}


def changed(fields, part, **settings):
    return {**fields, part: {**fields[part], **settings}}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda fields: list(fields), "expected a JSON object"),
        (lambda fields: "text", "it holds text, expected a JSON object"),
        (lambda fields: None, "it holds None, expected a JSON object"),
        (lambda fields: {}, "it lacks dataset, depths, image_size, mean, std, strides, variant, width_multiplier"),
        (lambda fields: {**fields, "network": without(fields["network"], "strides")}, "it lacks strides"),
        (lambda fields: without(fields, "data"), "it lacks dataset, image_size, mean, std"),
        (lambda fields: {**fields, "data": [1]}, r"data is \(1,\): expected a JSON object"),
        (lambda fields: {**fields, "seed": {"seed": 0}}, "seed is .*expected a whole number"),
        (lambda fields: changed(fields, "data", mean=[math.nan]), "NaN is no number"),
        (lambda fields: changed(fields, "optimization", learning_rate=math.inf), "Infinity is no number"),
        (lambda fields: changed(fields, "data", mean="x"), "mean is x: expected a list"),
        (lambda fields: changed(fields, "data", image_size="8"), "image_size is 8: expected a whole number"),
        (lambda fields: changed(fields, "network", strides={"a": 1}), "strides is .*expected a list of 5"),
        (lambda fields: changed(fields, "optimization", batch_size=0), "batch_size is 0: expected at least 1"),
        (lambda fields: changed(fields, "network", variant="repvgg_a9"), "unknown variant"),
    ],
)
def test_a_damaged_file_is_named_with_the_field(change, fault, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(change(dataclasses.asdict(PRESETS["cifar10"]))))
    with pytest.raises(ValueError, match=rf"config.json is not a config of this version .*{fault}"):
        TrainConfig.load(path)


def test_every_field_is_explained_beside_it():
    source = Path(parts_module.__file__).read_text() + Path(train_config_module.__file__).read_text()
    for name in TrainConfig().settings:
        assert re.search(rf'^    {name}: .*\n    """.+"""$', source, re.MULTILINE), name


def test_every_setting_has_one_name_and_is_replaced_by_it_whatever_its_part():
    names = [field.name for part in (*PARTS, TrainConfig) for field in dataclasses.fields(part)]
    assert len(names) == len(set(names))
    config = TrainConfig().replace(depths=(1, 1, 1, 1), cutout=8, epochs=10, seed=3)
    assert (config.network.depths, config.augmentation.cutout) == ((1, 1, 1, 1), 8)
    assert (config.optimization.epochs, config.seed) == (10, 3)
    kept = dict(depths=None, cutout=0, epochs=120, seed=0)
    assert config.replace(**kept) == TrainConfig() != config
    assert TrainConfig().settings == {**config.settings, **kept}
    with pytest.raises(TypeError, match=r"epoch is no setting: expected some of variant, .*, seed"):
        TrainConfig().replace(epoch=10)


def test_the_imagenet_preset_is_the_recipe_of_the_paper():
    preset = PRESETS["imagenet"]
    steps, data = preset.optimization, preset.data
    assert (steps.epochs, steps.batch_size, steps.learning_rate, steps.weight_decay) == (120, 256, 0.1, 1e-4)
    assert (steps.momentum, preset.augmentation.label_smoothing, steps.warmup_epochs) == (0.9, 0.0, 0)
    assert (data.image_size, data.eval_resize, data.random_resized_crop) == (224, 256, True)


@pytest.mark.parametrize(
    ("name", "rate"),
    [("digits", 0.1), ("cifar10", 0.4), ("cifar100", 0.4), ("cifar10_fast", 0.4), ("cifar10_cpu", 0.1),
     ("cifar10_a0_stride32", 0.2), ("imagenet", 0.1), ("imagenet_heavy", 0.1), ("imagenet_plus", 0.1)],
)  # fmt: skip
def test_presets_train_at_the_rates_of_their_recipes(name, rate):
    assert PRESETS[name].optimization.peak_learning_rate == pytest.approx(rate)


def test_every_preset_has_its_command_beside_it():
    source = Path(presets_module.__file__).read_text()
    for name in PRESETS:
        command = "python train.py" if name == "digits" else f"python train.py {name} --data-dir DIR"
        assert re.search(rf"^# {command}.*\n# [A-Z].+\n(# .+\n)*_{name.upper()} = ", source, re.MULTILINE), name


def test_the_plus_preset_is_tested_at_320_pixels_with_its_auxiliary_heads():
    preset = PRESETS["imagenet_plus"]
    assert (preset.data.image_size, preset.data.evaluation_size) == (256, 320)
    assert (preset.optimization.epochs, preset.optimization.weight_decay) == (300, 4e-5)
    assert preset.network.create_model(10).auxiliary_heads
    assert PRESETS["imagenet"].data.evaluation_size == 224


def test_the_network_is_built_as_the_config_says():
    config = TrainConfig().replace(
        variant="repvgg_b1g4", strides=(1, 1, 2, 2, 1), depths=(1, 2, 1, 1), width_multiplier=(0.5, 0.25, 0.25, 0.125),
        dtype="bfloat16", remat=True, init_from="run", frozen="stage2",
    )  # fmt: skip
    model = config.network.create_model(7)
    for name in ("strides", "depths", "width_multiplier", "remat", "frozen"):
        assert getattr(model, name) == getattr(config.network, name), name
    assert (model.num_classes, model.dtype, model.deploy) == (7, jnp.bfloat16, False)
    plain = TrainConfig().network.create_model(7)
    assert (plain.dtype, plain.remat, plain.frozen) == (None, False, None)
