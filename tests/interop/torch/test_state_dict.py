import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import VARIANTS, create_model, fuse_model
from repvgg_jax.interop.torch.state_dict import from_state_dict, to_state_dict
from repvgg_jax.models.shapes import abstract_variables
from tests.golden.official import GOLDEN_NAMES, draw_images, draw_tensor, logits, qarepvgg, state_dict_shapes
from tests.random_variables import random_variables


def shapes_of(state_dict):
    return {key: list(value.shape) for key, value in state_dict.items()}


GOLDEN_KEYS = [
    ("repvgg_a0", "official", False, "official/RepVGG-A0"),
    ("repvgg_a0", "official", True, "official-fused/RepVGG-A0"),
    ("repvgg_a0", "timm", False, "timm/repvgg_a0"),
    ("repvgg_a0", "timm", True, "timm-fused/repvgg_a0"),
    ("repvgg_b1g4", "official", False, "official/RepVGG-B1g4"),
    ("repvgg_b1g4", "timm", False, "timm/repvgg_b1g4"),
    ("repvgg_d2se", "official", False, "official/RepVGG-D2se"),
    ("repvgg_d2se", "timm", False, "timm/repvgg_d2se"),
    ("repvggplus_l2pse", "official", False, "official/RepVGGplus-L2pse"),
]


@pytest.mark.parametrize(
    ("name", "layout", "deploy", "golden"),
    [pytest.param(*case, marks=() if case[0] == "repvgg_a0" else pytest.mark.long) for case in GOLDEN_KEYS],
)
def test_state_dicts_have_the_keys_and_shapes_of_the_other_side(name, layout, deploy, golden):
    model = create_model(name, deploy=deploy)
    assert shapes_of(to_state_dict(model, hollow(model), layout)) == state_dict_shapes(golden)


def block_of(key):
    return re.match(r"stage\w*_aux|stage\w*\.(blocks\.)?\d+(\.\d+)?(?=\.)|\w+", key)[0]


@pytest.mark.parametrize(("name", "layout", "deploy", "golden"), GOLDEN_KEYS)
def test_each_block_of_a_shorter_network_has_the_keys_and_shapes_of_the_other_side(name, layout, deploy, golden):
    # Even depths as published: every other block is in groups.
    model = create_model(name, deploy=deploy, depths=(2, 2, 2, 1))
    found = shapes_of(to_state_dict(model, hollow(model), layout))
    blocks = {block_of(key) for key in found}
    assert len(blocks) == len(model.blocks) + 1 + 3 * model.auxiliary_heads
    assert found == {key: shape for key, shape in state_dict_shapes(golden).items() if block_of(key) in blocks}


def official_state_dict(model):
    keys = to_state_dict(model, hollow(model), "official")
    return {key: draw_tensor(key, value.shape) for key, value in keys.items() if "num_batches" not in key}


def hollow(model):
    return jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), abstract_variables(model, 3))


def relative_error(expected, found):
    return float(np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max())


MARKS = {"repvgg_a0": (), "repvgg_b1g4": pytest.mark.long}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, pytest.mark.slow)) for name in VARIANTS])
def test_logits_equal_the_official_ones_in_both_forms_at_even_and_odd_size(name):
    golden = GOLDEN_NAMES[name]
    model = create_model(name, param_dtype=jnp.float64)
    state_dict = official_state_dict(model)
    forms = [(model, from_state_dict(model, state_dict))]
    forms.append(fuse_model(*forms[0]))
    narrow = [(form.clone(param_dtype=jnp.float32), to_float32(variables)) for form, variables in forms]
    for size in (64, 65):
        images = jnp.asarray(draw_images(size))
        expected = {"logits": logits(golden, size)}
        if model.auxiliary_heads:
            heads = ("stage1_aux", "stage2_aux", "stage3_first_aux")
            expected |= {head: logits(golden, size, head) for head in heads}
        for form, variables in forms:
            ends = run(form, variables, images)
            assert form.deploy or set(expected) <= set(ends)
            for end in expected.keys() & ends.keys():
                assert relative_error(expected[end], ends[end]) < 1e-10, (end, size, form.deploy)
        for form, variables in narrow:
            found = run(form, variables, images.astype(jnp.float32))["logits"]
            assert found.dtype == np.float32
            assert relative_error(expected["logits"], found) < 2e-5, (size, form.deploy)
        flipped = run(*forms[0], images[:, ::-1])
        if model.squeeze_excite:
            # Random gates leave nothing of the image in these logits; tests/models/test_blocks.py has the proof.
            assert np.ptp(expected["logits"], axis=0).max() < 1e-12
            if model.auxiliary_heads:
                assert relative_error(expected["stage1_aux"], flipped["stage1_aux"]) > 1e-5
        else:
            assert relative_error(expected["logits"], flipped["logits"]) > 1e-3


@pytest.mark.long
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("name", "golden"), [("repvgg_a0", "QARepVGGV2-A0"), ("repvgg_b1g4", "QARepVGGV2-B1g4")])
def test_logits_of_quantizable_blocks_equal_those_of_qarepvgg_in_both_forms(name, golden):
    model = create_model(name, block="quantizable", param_dtype=jnp.float64)
    variables = from_state_dict(model, official_state_dict(model))
    forms = [(model, variables), fuse_model(model, variables)]
    for (_, each), count in zip(forms, qarepvgg()[f"{golden}/params"], strict=True):
        assert sum(leaf.size for leaf in jax.tree.leaves(each["params"])) == count
    for size in (64, 65):
        images, expected = jnp.asarray(draw_images(size)), qarepvgg()[f"{golden}/{size}"]
        for form, each in forms:
            assert relative_error(expected, run(form, each, images)["logits"]) < 1e-10, (size, form.deploy)
        flipped = run(*forms[0], images[:, ::-1])["logits"]
        assert relative_error(expected, flipped) > 1e-3


@partial(jax.jit, static_argnums=0)
def run(form, variables, images):
    return form.apply(variables, images, train=False, features=True)


def to_float32(variables):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), variables)


@pytest.mark.long
@pytest.mark.usefixtures("float64")
def test_ten_classes_have_the_official_logits_too():
    model = create_model("repvgg_a0", num_classes=10, param_dtype=jnp.float64)
    variables = from_state_dict(model, official_state_dict(model))
    found = run(model, variables, jnp.asarray(draw_images(64)))["logits"]
    assert relative_error(logits("RepVGG-A0-10", 64), found) < 1e-10


def small(name="repvgg_a0", **fields):
    return create_model(name, depths=(1, 2, 2, 1), width_multiplier=(0.25,) * 4, num_classes=5, **fields)


@pytest.mark.parametrize("deploy", [False, True], ids=["training", "deploy"])
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("repvgg_a0", "official"),
        ("repvgg_a0", "timm"),
        ("repvgg_d2se", "timm"),
        ("repvggplus_l2pse", "official"),
    ],
)
def test_the_round_trip_is_exact_to_the_bit(name, layout, deploy):
    model = small(name, deploy=deploy)
    variables = random_variables(model, dtype=np.float32)
    state_dict = to_state_dict(model, variables, layout)
    back = from_state_dict(model, {f"module.{key}": value for key, value in state_dict.items()})
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    for found, expected in zip(jax.tree.leaves(back), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_gray_images_are_recognised_by_the_stem():
    model = small()
    variables = random_variables(model, (1, 16, 16, 1), np.float32)
    back = from_state_dict(model, to_state_dict(model, variables))
    assert back["params"]["stem"]["branch_3x3"]["conv"]["kernel"].shape == (3, 3, 1, 16)


def test_every_missing_unexpected_and_misshaped_key_is_named_in_one_error():
    model = small()
    state_dict = to_state_dict(model, random_variables(model, dtype=np.float32))
    del state_dict["stage2.1.rbr_identity.weight"]
    state_dict["stage9.weight"] = np.ones(3)
    state_dict["linear.weight"] = np.ones((1000, 128))
    with pytest.raises(ValueError) as error:
        from_state_dict(model, state_dict)
    message = str(error.value)
    assert "missing stage2.1.rbr_identity.weight (32,)" in message
    assert "unexpected stage9.weight (3,)" in message
    assert "linear.weight has shape (1000, 128), expected (5, 128)" in message
    assert "check the variant, strides, num_classes and deploy" in message


def test_a_fused_state_dict_for_a_training_form_is_refused():
    deploy = small(deploy=True)
    state_dict = to_state_dict(deploy, random_variables(deploy, dtype=np.float32))
    with pytest.raises(ValueError, match=r"(?s)training form.*unexpected stage0.rbr_reparam.weight"):
        from_state_dict(small(), state_dict)


def test_layouts_that_do_not_exist_are_refused():
    plus = small("repvggplus_l2pse")
    variables = random_variables(plus, dtype=np.float32)
    with pytest.raises(ValueError, match="timm has no RepVGGplus"):
        to_state_dict(plus, variables, "timm")
    with pytest.raises(ValueError, match="unknown layout 'keras'"):
        to_state_dict(plus, variables, "keras")


def test_variables_of_another_model_are_refused_by_path():
    variables = random_variables(small(), dtype=np.float32)
    with pytest.raises(
        ValueError, match=r"(?s)not those of this model \(deploy form\).*stem/reparam/kernel is missing"
    ):
        to_state_dict(small(deploy=True), variables)
    variables["params"]["extra"] = {"kernel": np.ones((2, 2))}
    variables["params"]["head"]["bias"] = np.ones(7)
    with pytest.raises(
        ValueError, match=r"(?s)extra/kernel is .*expected nothing.*head/bias is \(7,\), expected \(5,\)"
    ):
        to_state_dict(small(), variables)


def test_a_kernel_of_another_rank_is_named():
    model = small()
    state_dict = to_state_dict(model, random_variables(model, dtype=np.float32))
    state_dict["stage0.rbr_dense.conv.weight"] = np.ones(4)
    with pytest.raises(ValueError, match=r"stage0.rbr_dense.conv.weight has shape \(4,\), expected \(16, 3, 3, 3\)"):
        from_state_dict(model, state_dict)


@pytest.mark.parametrize("nesting", ["state_dict", "model", "model_ema", "state_dict_ema"])
def test_a_checkpoint_gives_up_the_state_dict_inside_it(nesting):
    model = small()
    variables = random_variables(model, dtype=np.float32)
    inside = {f"module._orig_mod.{key}": value for key, value in to_state_dict(model, variables).items()}
    for checkpoint in ({nesting: inside, "epoch": 3}, {"model": {nesting: inside}}):
        back = from_state_dict(model, checkpoint)
        chex.assert_trees_all_equal(back, variables)


def test_of_a_checkpoint_with_an_average_the_average_is_read():
    model = small()
    variables = [random_variables(model, dtype=np.float32, seed=seed) for seed in (0, 1)]
    plain, average = (to_state_dict(model, each) for each in variables)
    back = from_state_dict(model, {"state_dict": plain, "state_dict_ema": average})
    chex.assert_trees_all_equal(back, variables[1])


def test_a_checkpoint_without_a_state_dict_is_refused_by_what_it_holds():
    with pytest.raises(ValueError, match=r"'epoch' is a int, expected a tensor.*'state_dict'"):
        from_state_dict(small(), {"epoch": 3, "weights": {}})


@pytest.mark.parametrize("name", ["repvgg_a0", "repvggplus_l2pse"])
def test_a_classifier_of_another_size_is_refused_or_initialised_anew(name):
    pretrained = small(name)
    variables = random_variables(pretrained, dtype=np.float32)
    state_dict = to_state_dict(pretrained, variables)
    model = pretrained.clone(num_classes=7)
    with pytest.raises(ValueError, match=r"(?s)the rest does: .*head='reinit'.*linear.weight has shape \(5, \d+\)"):
        from_state_dict(model, state_dict)
    first, again, other = (
        from_state_dict(model, state_dict, head="reinit", key=jax.random.key(seed)) for seed in (0, 0, 1)
    )
    heads = {path for path in by_path(first) if path[-2] == "head"}
    assert len(heads) == (8 if name == "repvggplus_l2pse" else 2)
    for path, leaf in by_path(first).items():
        if path in heads:
            assert leaf.shape[-1] == 7
            if path[-1] == "kernel":
                assert not np.array_equal(leaf, by_path(other)[path])
                assert 0.5 < float(jnp.std(leaf)) * np.sqrt(3 * leaf.shape[0]) < 1.5
        else:
            np.testing.assert_array_equal(leaf, by_path(variables)[path])
    chex.assert_trees_all_equal(first, again)
    del state_dict["linear.weight"], state_dict["linear.bias"]
    assert from_state_dict(model, state_dict, head="reinit")["params"]["head"]["bias"].shape == (7,)


def test_another_network_is_not_excused_by_its_classifier():
    model = small()
    state_dict = to_state_dict(model, random_variables(model, dtype=np.float32))
    state_dict["linear.weight"] = np.ones((1000, 128))
    del state_dict["stage0.rbr_dense.conv.weight"]
    with pytest.raises(ValueError, match="check the variant"):
        from_state_dict(model, state_dict)


def by_path(tree):
    return {tuple(entry.key for entry in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")
def test_variables_have_the_models_dtype_whatever_was_converted_before():
    model = create_model("repvgg_a0", num_classes=4, depths=(1, 1, 1, 1), param_dtype=jnp.float64)
    for x64 in (False, True, False):
        with jax.enable_x64(x64):
            state_dict = {key: np.zeros(value.shape) for key, value in to_state_dict(model, hollow(model)).items()}
            dtypes = {leaf.dtype for leaf in jax.tree.leaves(from_state_dict(model, state_dict))}
        assert dtypes == {np.dtype(np.float64 if x64 else np.float32)}


def quantizable(strides=(2, 2, 2, 2, 2), **settings):
    return create_model("repvgg_a0", block="quantizable", strides=strides, num_classes=10, **settings)


def test_quantizable_blocks_have_the_keys_of_qarepvgg():
    model = quantizable(depths=(1, 2, 1, 1))
    found = to_state_dict(model, hollow(model))
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    block = ["rbr_dense.conv.weight", *(f"rbr_dense.bn.{name}" for name in norm), "rbr_1x1.weight"]
    block += [f"bn.{name}" for name in norm]
    blocks = ["stage0", "stage1.0", "stage2.0", "stage2.1", "stage3.0", "stage4.0"]
    assert set(found) == {f"{name}.{key}" for name in blocks for key in block} | {"linear.weight", "linear.bias"}
    assert found["stage2.1.rbr_1x1.weight"].shape == (96, 96, 1, 1)


@pytest.mark.parametrize("strides", [(2, 2, 2, 2, 2), (1, 1, 2, 2, 1)])
def test_weights_of_quantizable_blocks_come_back_as_they_were(strides):
    model = quantizable(strides, depths=(1, 2, 1, 1), width_multiplier=(0.25, 0.25, 0.25, 0.25))
    variables = random_variables(model, dtype=np.float32)
    chex.assert_trees_all_equal(from_state_dict(model, to_state_dict(model, variables)), variables)


def test_weights_of_the_other_block_are_named():
    plain, other = create_model("repvgg_a0", num_classes=10), quantizable()
    with pytest.raises(ValueError, match="these are weights of quantizable blocks, the model has repvgg ones: give bl"):
        from_state_dict(plain, to_state_dict(other, hollow(other)))
    with pytest.raises(ValueError, match="these are weights of repvgg blocks, the model has quantizable ones: give bl"):
        from_state_dict(other, to_state_dict(plain, hollow(plain)))


def test_timm_has_no_quantizable_block():
    with pytest.raises(ValueError, match="timm has no quantizable block: expected layout='official'"):
        to_state_dict(quantizable(), hollow(quantizable()), "timm")
