import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import VARIANTS, create_model
from tests.golden.official import GOLDEN_NAMES, parameter_counts

TRACED_TWICE = ("repvgg_a0", "repvgg_b1g4", "repvgg_d2se", "repvggplus_l2pse")


@pytest.mark.parametrize(
    ("name", "deploy"),
    [
        pytest.param(name, deploy, marks=[] if deploy or name in TRACED_TWICE else pytest.mark.long)
        for name in VARIANTS
        for deploy in (False, True)
    ],
)
def test_parameter_counts_equal_the_official_ones_to_the_digit(name, deploy):
    model = create_model(name, deploy=deploy, ops="xla")
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
    found = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes["params"]))
    assert found == parameter_counts(GOLDEN_NAMES[name])[deploy]


def test_every_variant_has_a_golden_count_and_every_golden_network_a_variant():
    assert set(GOLDEN_NAMES) == set(VARIANTS)


@pytest.mark.parametrize("name", ["RepVGG-A0", "repvgg-a0", "REPVGG_A0"])
def test_official_spelling_of_a_name_works(name):
    assert create_model(name) == create_model("repvgg_a0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(name="repvgg_b1g3"),
            r"unknown variant 'repvgg_b1g3': did you mean .*repvgg_b1g2.*expected one of",
        ),
        (dict(name="resnet50"), "unknown variant 'resnet50'.*expected one of repvgg_a0"),
        (dict(strides=(2, 2, 2, 2)), r"strides are \(2, 2, 2, 2\): expected five"),
        (dict(strides=(2, 2, 2, 2, 4)), "each 1 or 2"),
        (dict(depths=(1, 0, 1, 1)), r"depths are \(1, 0, 1, 1\): expected four, each at least 1"),
        (dict(width_multiplier=(1, 1, 1)), r"width_multiplier is \(1, 1, 1\): expected four"),
        (dict(width_multiplier=(0.001, 1, 1, 1)), "gives .*0.* channels"),
        (
            dict(name="repvgg_b1g4", width_multiplier=(0.1, 1, 1, 1)),
            r"\(6, 6, 128, 256, 512\).*multiples of 4",
        ),
        (dict(name="repvggplus_l2pse", depths=(1, 1, 1, 1)), "expected at least 2 blocks in stage 3"),
        (dict(num_classes=0), "num_classes is 0: expected at least 1"),
    ],
)
def test_bad_arguments_are_refused_with_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model(**{"name": "repvgg_a0", **arguments})
