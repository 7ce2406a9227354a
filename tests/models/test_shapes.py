import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.models import create_model
from repvgg_jax.models.shapes import abstract_variables, differences, few, input_channels, shapes_by_name

SMALL = dict(depths=(1, 1, 1, 1), width_multiplier=(0.25,) * 4, num_classes=5)


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_shapes_are_those_of_fresh_variables_and_tell_the_channels(deploy, channels):
    model = create_model("repvgg_a0", **SMALL, deploy=deploy)
    expected = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((2, 48, 40, channels)), train=False))
    found = abstract_variables(model, channels)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(found)] == [
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(expected)
    ]
    assert input_channels(found) == channels


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")
def test_the_shapes_kept_are_those_of_the_precision_at_hand():
    model = create_model("repvgg_a0", **SMALL, param_dtype=jnp.float64)
    for x64, dtype in ((True, np.float64), (False, np.float32), (True, np.float64)):
        with jax.enable_x64(x64):
            assert {leaf.dtype for leaf in jax.tree.leaves(abstract_variables(model, 3))} == {np.dtype(dtype)}


def test_arrays_are_named_by_their_path_whatever_holds_them():
    tree = {"params": flax.core.freeze({"a": {"kernel": jnp.zeros((2, 3))}}), "steps": [np.zeros(4), 1.5]}
    assert shapes_by_name(tree) == {"params/a/kernel": (2, 3), "steps/0": (4,), "steps/1": ()}


def test_differences_are_named_in_order_and_the_first_are_shown():
    found = {"b": (1, 2), "a": (3,), "same": (5,), "more": ()}
    expected = {"b": (2, 1), "c": (4,), "same": (5,)}
    clauses = ["a is (3,), expected nothing", "b is (1, 2), expected (2, 1)", "c is missing, expected (4,)"]
    assert differences(found, expected) == [*clauses, "more is (), expected nothing"]
    assert differences(expected, expected) == []
    assert few(differences(found, expected)) == "; ".join([*clauses, "and 1 more"])
    assert few(clauses, ", ") == ", ".join(clauses)
