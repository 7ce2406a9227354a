"""Against timm itself, where it is installed: it loads our state dicts strictly, and computes the same."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import create_model, fuse_model
from repvgg_jax.interop.torch.state_dict import from_state_dict, to_state_dict
from tests.random_variables import random_variables

REASON = "timm and torch come with the extra: pip install -e '.[bench]'"
QUICK = ["repvgg_a0", "repvgg_b1g4"]
PUBLISHED = [*QUICK, *(f"repvgg_{name}" for name in ("a1", "a2", "b0", "b1", "b2", "b2g4", "b3", "b3g4", "d2se"))]


@pytest.fixture(scope="module")
def timm():
    # Both libraries warn of what their own dependencies deprecate.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torch", reason=REASON)
        return pytest.importorskip("timm", reason=REASON)


def timm_model(timm, name, state_dict):
    import torch

    model = timm.create_model(name, num_classes=7).double().eval()
    model.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in state_dict.items()}, strict=True)
    return model


def timm_logits(model, images):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(np.array(images.transpose(0, 3, 1, 2)))).numpy()


def arrays(model):
    return {key: value.numpy() for key, value in model.state_dict().items()}


def logits(model, variables, images):
    return jax.jit(lambda variables, images: model.apply(variables, images, train=False))(variables, images)


def calmed(path, leaf):
    """Gates of squeeze-excite that depend on the image a little: at random they let nothing of it through, or, open,
    amplify the last bit of a sum from block to block until it is all that is left."""
    *_, module, layer, kind = (None, None, *(entry.key for entry in path))
    if (module, layer) != ("se", "up"):
        return leaf
    return leaf + 4 if kind == "bias" else leaf / 1e7


def relative_error(found, expected):
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]
)
def test_timm_loads_our_state_dict_strictly_and_both_forms_compute_the_same(timm, name):
    model = create_model(name, num_classes=7, param_dtype=jnp.float64)
    variables = jax.tree_util.tree_map_with_path(calmed, random_variables(model))
    published = timm_model(timm, name, to_state_dict(model, variables, "timm"))
    back = from_state_dict(model, arrays(published))
    jax.tree.map(np.testing.assert_array_equal, back, variables)
    fused, fused_variables = fuse_model(model, variables)
    theirs = timm.utils.reparameterize_model(published)
    folded_by_timm = from_state_dict(fused, arrays(theirs))
    for size in (64, 65):
        images = np.random.default_rng(size).normal(size=(2, size, size, 3))
        expected = timm_logits(published, images)
        assert np.ptp(expected, axis=0).max() > 1e-3 * np.abs(expected).max()
        assert relative_error(logits(model, variables, images), expected) < 1e-10
        assert relative_error(logits(fused, fused_variables, images), expected) < 1e-10
        assert relative_error(timm_logits(theirs, images), expected) < 1e-5  # timm folds in float32 alone
        assert relative_error(logits(fused, folded_by_timm, images), timm_logits(theirs, images)) < 1e-10
        assert relative_error(logits(model, variables, images[:, ::-1]), expected) > 1e-3


def test_timm_refuses_the_state_dict_of_another_layout(timm):
    model = create_model("repvgg_a0", num_classes=7)
    state_dict = to_state_dict(model, random_variables(model, dtype=np.float32), "official")
    with pytest.raises(RuntimeError, match="Missing key"):
        timm_model(timm, "repvgg_a0", state_dict)
