import builtins
import json

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy

from repvgg_jax import create_model, fuse_model
from repvgg_jax.interop.torch import to_state_dict
from repvgg_jax.interop.weights_file import load_weights, read_state_dict
from tests.random_variables import random_variables

VARIANT = "repvgg_a0"


@pytest.fixture(scope="module")
def published():
    """A0 as published, for ten classes, and its variables."""
    model = create_model(VARIANT, num_classes=10)
    return model, random_variables(model, dtype=np.float32)


def write(path, model, variables, layout="official"):
    safetensors.numpy.save_file(to_state_dict(model, variables, layout), path)
    return path


@pytest.mark.parametrize("layout", ["official", "timm"])
@pytest.mark.parametrize("deploy", [False, True], ids=["training", "deploy"])
def test_form_and_classes_are_read_off_the_file(published, layout, deploy, tmp_path):
    model, variables = fuse_model(*published) if deploy else published
    loaded = load_weights(write(tmp_path / "weights.safetensors", model, variables, layout), VARIANT)
    assert loaded.model == model
    chex.assert_trees_all_equal(loaded.variables, variables)


def test_strides_and_another_classifier_are_given(tmp_path):
    # A stem and a first block of stride 1 leave stage 1 an identity branch more.
    strides = (1, 1, 2, 2, 2)
    model = create_model(VARIANT, num_classes=10, strides=strides)
    path = write(tmp_path / "weights.safetensors", model, random_variables(model, dtype=np.float32))
    loaded = load_weights(path, VARIANT, num_classes=3, strides=strides, head="reinit", key=jax.random.key(0))
    assert loaded.model.strides == strides
    assert loaded.variables["params"]["head"]["kernel"].shape == (1280, 3)
    with pytest.raises(ValueError, match=r"(?s)check the variant, strides.*unexpected stage1.0.rbr_identity"):
        load_weights(path, VARIANT)


def test_weights_of_another_variant_are_refused(published, tmp_path):
    path = write(tmp_path / "weights.safetensors", *published)
    with pytest.raises(ValueError, match=r"(?s)weights.safetensors is not repvgg_a1.*stage1.0.*expected \(64, "):
        load_weights(path, "repvgg_a1")


def test_a_file_without_a_classifier_says_what_it_takes(tmp_path):
    safetensors.numpy.save_file({"encoder.weight": np.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"no classifier .* but encoder.weight"):
        load_weights(tmp_path / "other.safetensors", VARIANT)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_file_that_is_not_there_is_named(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize("kept", [0, 4, 1000])
def test_a_truncated_safetensors_file_is_refused(published, kept, tmp_path):
    path = write(tmp_path / "weights.safetensors", *published)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_state_dict(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(published, value, tmp_path):
    state_dict = to_state_dict(*published)
    state_dict["stage1.0.rbr_dense.conv.weight"][0, 0, 0, 0] = value
    safetensors.numpy.save_file(state_dict, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"not finite, in stage1\.0\.rbr_dense\.conv\.weight:"):
        read_state_dict(tmp_path / "weights.safetensors")


def test_bfloat16_weights_are_read(tmp_path):
    values = np.array([1.5, -2.0], np.float32)
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    raw = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw)
    np.testing.assert_array_equal(read_state_dict(tmp_path / "x.safetensors")["x"].astype(np.float32), values)


def test_without_torch_a_pth_file_says_so(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(b"")
    real = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *rest: (_ for _ in ()).throw(ImportError) if name == "torch" else real(name, *rest),
    )
    with pytest.raises(ImportError, match=r"takes PyTorch: pip install torch"):
        read_state_dict(tmp_path / "weights.pth")


class Attack:
    """Pickles to a call that leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def torch():
    """PyTorch itself, where it is installed: the extra `[bench]`."""
    return pytest.importorskip("torch", reason="PyTorch alone writes its own files: pip install -e '.[bench]'")


def save_torch(torch, path, published, **around):
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in to_state_dict(*published).items()}
    torch.save({"state_dict": tensors, **around} if around else tensors, path)
    return path


@pytest.mark.parametrize("around", [{}, {"epoch": 7}])
def test_a_file_of_torch_save_is_read_to_the_bit(torch, published, around, tmp_path):
    loaded = load_weights(save_torch(torch, tmp_path / "weights.pth", published, **around), VARIANT)
    chex.assert_trees_all_equal(loaded.variables, published[1])


def test_code_in_a_file_is_refused_and_not_run(torch, published, tmp_path):
    trace = tmp_path / "trace"
    path = save_torch(torch, tmp_path / "weights.pth", published, args=Attack(trace))
    with pytest.raises(ValueError, match=r"holds more than tensors .* was not read"):
        read_state_dict(path)
    assert not trace.exists()
    # Reading it with pickle's trust does run the code: negative control.
    torch.load(path, weights_only=False)["args"].close()
    assert trace.exists()


@pytest.mark.parametrize("kept", [0, 100, 100_000])
def test_a_truncated_file_is_refused(torch, published, kept, tmp_path):
    path = save_torch(torch, tmp_path / "weights.pth", published)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"is not a whole file of torch.save|holds more than tensors"):
        read_state_dict(path)


def test_half_precision_and_nan_are_seen(torch, tmp_path):
    torch.save({"x": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="not finite, in x"):
        read_state_dict(tmp_path / "x.pth")
