import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import VARIANTS, create_model
from repvgg_jax.models import RepVGG
from repvgg_jax.models.shapes import abstract_variables
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


FIELDS = [
    (dict(strides=(2, 2, 2, 2)), r"strides are \(2, 2, 2, 2\): expected five"),
    (dict(strides=(2, 2, 2, 2, 4)), "each 1 or 2"),
    (dict(depths=(1, 0, 1, 1)), r"depths are \(1, 0, 1, 1\): expected four, each at least 1"),
    (dict(depths=[1, 1, 1]), r"depths are \(1, 1, 1\): expected four"),
    (dict(width_multiplier=(1, 1, 1)), r"width_multiplier is \(1, 1, 1\): expected four"),
    (dict(width_multiplier=(1, 1, 1, 0)), "expected four positive factors"),
    (dict(width_multiplier=(1, 1, 1, math.inf)), "expected four positive factors"),
    (dict(width_multiplier=(1, 1, math.nan, 1)), "expected four positive factors"),
    (dict(width_multiplier=(0.001, 1, 1, 1)), "gives .*0.* channels"),
    (dict(num_classes=0), "num_classes is 0: expected at least 1"),
    (dict(epsilon=-1e-5), "epsilon is -1e-05: expected at least 0"),
    (dict(momentum=1.1), r"momentum is 1.1: expected in \[0, 1\]"),
    (dict(frozen="head"), "frozen is 'head': expected None or one of stem, stage1, stage2, stage3, stage4"),
    (dict(ops="fast"), "ops is 'fast': expected one of auto, xla"),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *FIELDS,
        (
            dict(variant="repvgg_b1g3"),
            r"unknown variant 'repvgg_b1g3': did you mean .*repvgg_b1g2.*expected one of",
        ),
        (dict(variant="resnet50"), "unknown variant 'resnet50'.*expected one of repvgg_a0"),
        (
            dict(variant="repvgg_b1g4", width_multiplier=(0.1, 1, 1, 1)),
            r"\(6, 6, 128, 256, 512\).*multiples of 4",
        ),
        (
            dict(variant="repvgg_d2se", width_multiplier=(0.1, 1, 1, 1)),
            r"\(6, 6, 128, 256, 512\).*multiples of 1 \(groups\), at least 16",
        ),
        (dict(variant="repvggplus_l2pse", depths=(1, 1, 1, 1)), "expected at least 2 blocks in stage 3"),
        (dict(strides=(2, 2, 2, 2, 4), output_stride=16), r"strides are \(2, 2, 2, 2, 4\): expected five, each 1 or 2"),
    ],
)
def test_bad_arguments_are_refused_with_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model(**{"variant": "repvgg_a0", **arguments})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *FIELDS,
        (dict(dilations=(1, 1, 2)), r"dilations are \(1, 1, 2\): expected five, each at least 1"),
        (dict(dilations=(1, 1, 1, 0, 1)), r"dilations are \(1, 1, 1, 0, 1\): expected five, each at least 1"),
        (dict(groups=0), "groups is 0: expected at least 1"),
        (dict(groups=5), "expected multiples of 5"),
        (dict(squeeze_excite="after"), "squeeze_excite is 'after': expected None or one of before_relu, after_relu"),
        (dict(squeeze_excite_reduction=0), "squeeze_excite_reduction is 0: expected at least 1"),
        (dict(squeeze_excite="after_relu", squeeze_excite_reduction=65), "at least 65"),
        (dict(auxiliary_heads=True), "expected at least 2 blocks in stage 3"),
    ],
)
def test_neither_the_class_nor_a_clone_skips_a_check(fields, message):
    sound = dict(num_classes=5, depths=(1, 1, 1, 1), width_multiplier=(1, 1, 1, 1))
    model = RepVGG(**sound)
    with pytest.raises(ValueError, match=message):
        RepVGG(**{**sound, **fields})
    with pytest.raises(ValueError, match=message):
        model.clone(**fields)


def test_a_model_is_a_value():
    fields = dict(num_classes=5, depths=[1, 1, 2, 1], width_multiplier=[0.5] * 4, strides=[1, 1, 2, 2, 2])
    model = RepVGG(**fields)
    assert model.strides == (1, 1, 2, 2, 2)
    others = (
        create_model("repvgg_a0", **fields),
        model.clone(),
        model.clone(deploy=True).clone(deploy=False),
        pickle.loads(pickle.dumps(model)),
    )
    for other in others:
        assert other == model
        assert hash(other) == hash(model)
        assert abstract_variables(other, 3) is abstract_variables(model, 3)
    assert model.clone(epsilon=1e-3) != model
