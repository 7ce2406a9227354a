"""Which tensors of a checkpoint are the network's, and what is said of the others."""

import logging

import numpy as np
import pytest

from repvgg_jax.interop.torch.entries import find_state_dict
from repvgg_jax.interop.torch.state_dict import from_state_dict
from tests.interop.small_weights import small_model, small_state_dict

PLAIN, AVERAGE = small_state_dict(seed=0), small_state_dict(seed=1)


def behind(prefix, state_dict):
    return {prefix + key: value for key, value in state_dict.items()}


def assert_is(found, expected):
    weights = {key: value for key, value in expected.items() if not key.endswith("num_batches_tracked")}
    assert found.tensors.keys() == weights.keys()
    assert all(found.tensors[key] is value for key, value in weights.items())


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "model.", "net.", "backbone.", "ema_model.", "student.", "module.model._orig_mod."],
)
@pytest.mark.parametrize("layout", ["official", "timm"])
def test_a_prefix_that_all_keys_share_is_stripped(prefix, layout):
    state_dict = small_state_dict(layout=layout)
    assert_is(find_state_dict(behind(prefix, state_dict)), state_dict)


@pytest.mark.parametrize(
    "nesting",
    ["state_dict", "model_state", "model_state_dict", "state_dict_ema", "model_ema", "ema", "net", "params", "weights"],
)
def test_a_state_dict_is_found_under_any_name(nesting):
    checkpoint = {"epoch": 3, nesting: behind("module.", PLAIN), "lr": np.float64(0.1), "args": None}
    found = find_state_dict(checkpoint)
    assert_is(found, PLAIN)
    assert found.entry == f"{nesting}.module"
    assert_is(find_state_dict({"checkpoint": checkpoint}), PLAIN)


def test_wrappers_inside_a_key_are_stripped():
    wrapped = {key.replace("stage1.0.", "stage1._orig_mod.0._checkpoint_wrapped_module."): PLAIN[key] for key in PLAIN}
    assert wrapped.keys() != PLAIN.keys()
    assert_is(find_state_dict(wrapped), PLAIN)


@pytest.mark.parametrize(
    ("counters", "prefix"),
    [
        ({"n_averaged": np.asarray(4)}, "module."),
        ({"total_ops": np.zeros(1), "stage1.0.total_ops": np.zeros(1), "stage1.0.total_params": np.ones(1)}, ""),
        ({"ema_model.n_averaged": np.asarray(4)}, "ema_model.module."),
        ({"initted": np.ones(1), "step": np.ones(1), "epoch": 7}, "ema_model."),
        ({"epoch": 7, "best": np.asarray(0.7), "optimizer": {"state": {0: {"momentum": np.ones(3)}}}}, ""),
    ],
)
def test_bookkeeping_beside_the_weights_is_left_out(counters, prefix):
    found = find_state_dict({**counters, **behind(prefix, PLAIN)})
    assert_is(found, PLAIN)
    assert found.others == found.left == ()


OFFICIAL_TRAINER = {"model": PLAIN, "ema": AVERAGE, "optimizer": {"state": {}}, "epoch": 3}
TORCHVISION = {
    "model": behind("module.", PLAIN),
    "model_ema": {"n_averaged": np.asarray(1), **behind("module.", AVERAGE)},
}
LIGHTNING = {"state_dict": {**behind("model.", PLAIN), **behind("ema_model.module.", AVERAGE)}, "hyper_parameters": {}}
MIXED = {**PLAIN, "ema": AVERAGE}


@pytest.mark.parametrize(
    ("checkpoint", "average", "plain"),
    [
        (OFFICIAL_TRAINER, "ema", "model"),
        (TORCHVISION, "model_ema.module", "model.module"),
        (LIGHTNING, "state_dict.ema_model.module", "state_dict.model"),
        (MIXED, "ema", "."),
    ],
    ids=["official", "torchvision", "lightning", "mixed"],
)
def test_an_average_is_taken_first_said_and_not_forced(checkpoint, average, plain):
    found = find_state_dict(checkpoint)
    assert_is(found, AVERAGE)
    assert (found.entry, found.others) == (average, (plain,))
    assert found.describe() == f"the weights under {average!r}, an average; there are others under {plain!r}"
    chosen = find_state_dict(checkpoint, plain)
    assert_is(chosen, PLAIN)
    assert average in chosen.describe()


def test_a_count_of_what_was_averaged_tells_an_average_of_any_name():
    averaged = {"n_averaged": np.asarray(4), **behind("module.", AVERAGE)}
    assert find_state_dict(averaged).describe() == "the weights under 'module', an average"
    found = find_state_dict({"student": PLAIN, "teacher": averaged})
    assert_is(found, AVERAGE)
    assert found.describe() == "the weights under 'teacher.module', an average; there are others under 'student'"
    assert "an average" not in find_state_dict(behind("module.", PLAIN)).describe()


def test_a_part_of_a_name_chooses_too():
    assert_is(find_state_dict(LIGHTNING, "model"), PLAIN)
    assert_is(find_state_dict(LIGHTNING, "ema_model"), AVERAGE)


@pytest.mark.parametrize(
    ("checkpoint", "entry", "message"),
    [
        ({"student": PLAIN, "teacher": AVERAGE}, None, "several networks, under 'student', 'teacher': choose"),
        ({**behind("a.", PLAIN), **behind("b.", PLAIN)}, None, "several networks, under 'a', 'b'"),
        (OFFICIAL_TRAINER, "best", "no weights under 'best': expected entry to be one of 'model', 'ema'"),
        ({"encoder.weight": np.ones(3)}, "ema", "no weights of a RepVGG under 'ema'"),
        (
            {**behind("model.", PLAIN), "loss.weight": np.ones(10)},
            None,
            r"begin with 'model\.', but not those of 'loss.weight'; entry='model' \(--entry model\) takes",
        ),
        ({**PLAIN, "linear.bias": [1.0]}, None, "'linear.bias' is a list, expected a tensor"),
        ({**PLAIN, "module.linear.bias": np.ones(5)}, None, "'linear.bias' is there twice"),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(checkpoint, entry, message):
    with pytest.raises(ValueError, match=message):
        find_state_dict(checkpoint, entry)


def test_what_is_left_out_by_choice_is_said():
    found = find_state_dict({**behind("model.", PLAIN), "loss.weight": np.ones(10)}, "model")
    assert_is(found, PLAIN)
    assert found.describe() == "the weights under 'model'; left out: 'loss.weight'"


def test_a_dict_under_two_names_or_inside_itself_is_one():
    checkpoint = {"state_dict": PLAIN, "model": PLAIN}
    checkpoint["me"] = checkpoint
    assert find_state_dict(checkpoint).others == ()


def test_variables_say_in_the_log_which_weights_they_are_unless_chosen(caplog):
    with caplog.at_level(logging.WARNING):
        variables = from_state_dict(small_model(), OFFICIAL_TRAINER)
    np.testing.assert_array_equal(variables["params"]["head"]["bias"], AVERAGE["linear.bias"])
    assert "took the weights under 'ema', an average; there are others under 'model'" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        variables = from_state_dict(small_model(), OFFICIAL_TRAINER, entry="model")
        from_state_dict(small_model(), PLAIN)
    np.testing.assert_array_equal(variables["params"]["head"]["bias"], PLAIN["linear.bias"])
    assert not caplog.text
