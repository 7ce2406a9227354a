"""A deploy form that is opened again is the same function, in evaluation and in training, and can be trained."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import create_model, fuse_model, reopen_model
from repvgg_jax.reparam import EquivalenceError, assert_equivalent
from tests.random_variables import random_images, random_variables


def deployed(name="repvgg_a0", dtype=np.float64):
    settings = dict(depths=(1, 1, 2, 1), width_multiplier=(0.25, 0.25, 0.125, 0.125), num_classes=11)
    model = create_model(name, **settings, param_dtype=dtype)
    return fuse_model(model, random_variables(model, dtype=dtype))


def compiled(model, train=False):
    """The model's logits and, in training, without auxiliary ones."""
    apply = partial(model.apply, train=train, mutable=["batch_stats"] if train else False)

    @jax.jit
    def logits(variables, images):
        output = apply(variables, images)[0] if train else apply(variables, images)
        return output[0] if isinstance(output, tuple) else output

    return logits


def reopened(model, variables, images):
    """`reopen_model`, compiled."""
    forms = []

    @jax.jit
    def open_again(variables, images):
        training, opened = reopen_model(model, variables, images, key=jax.random.key(0))
        forms.append(training)
        return opened

    opened = open_again(variables, images)
    return forms[0], opened


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "name", ["repvgg_a0", "repvgg_b1g4", pytest.param("repvgg_d2se", marks=pytest.mark.long), "repvggplus_l2pse"]
)
def test_reopening_preserves_logits_in_float64(name):
    model, variables = deployed(name)
    images, others = random_images((4, 33, 32, 3)), 2 * random_images((4, 33, 32, 3), seed=2)
    training, opened = reopened(model, variables, images)
    fused, evaluated, trained = compiled(model), compiled(training), compiled(training, train=True)
    for batch in (images, others):
        assert_equivalent(fused(variables, batch), evaluated(opened, batch), rtol=1e-12)
    assert_equivalent(fused(variables, images), trained(opened, images), rtol=1e-12)
    # Batch norms whose statistics are those of other images do change what is computed.
    with pytest.raises(EquivalenceError):
        assert_equivalent(fused(variables, others), trained(opened, others), rtol=1e-3)


@pytest.mark.usefixtures("float64")
def test_fusing_gives_the_kernels_back_that_were_opened():
    model, variables = deployed()
    _, again = fuse_model(*reopened(model, variables, random_images((4, 33, 32, 3))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), again, variables)


@pytest.mark.usefixtures("float32")
def test_the_branches_that_begin_silent_get_gradients():
    model, variables = deployed(dtype=np.float32)
    images = random_images((8, 32, 32, 3), np.float32)
    training, opened = reopened(model.clone(ops="xla"), variables, images)

    def loss(params):
        logits, _ = training.apply({**opened, "params": params}, images, train=True, mutable=["batch_stats"])
        return jnp.square(logits).mean()

    gradients = jax.jit(jax.grad(loss))(opened["params"])
    for name in ("stem", "stage2_block1", "stage3_block2"):
        assert jnp.abs(gradients[name]["branch_1x1"]["bn"]["scale"]).max() > 0
        assert not opened["params"][name]["branch_1x1"]["bn"]["scale"].any()
    assert jnp.abs(gradients["stage3_block2"]["branch_identity"]["scale"]).max() > 0


def test_a_training_form_is_not_reopened():
    model = create_model("repvgg_a0", num_classes=3)
    with pytest.raises(ValueError, match="the model is in its training form: expected the deploy form"):
        reopen_model(model, {}, jnp.zeros((1, 32, 32, 3)), key=jax.random.key(0))
