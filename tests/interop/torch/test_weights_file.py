import builtins
import contextlib
import json
import os
import zipfile

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy

from repvgg_jax import create_model, fuse_model
from repvgg_jax.interop.torch.state_dict import from_state_dict, to_state_dict
from repvgg_jax.interop.torch.weights_file import load_weights, read_state_dict
from repvgg_jax.models.shapes import abstract_variables
from tests.random_variables import random_variables

VARIANT = "repvgg_a0"
pytestmark = pytest.mark.usefixtures("short_variants")


@pytest.fixture(scope="module")
def published(short_variants):
    """A0 for ten classes, and its variables."""
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


def test_the_block_is_read_off_the_file(tmp_path):
    model = create_model(VARIANT, num_classes=10, block="quantizable")
    variables = random_variables(model, dtype=np.float32)
    loaded = load_weights(write(tmp_path / "weights.safetensors", model, variables), VARIANT)
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


@pytest.mark.parametrize(
    ("name", "layout", "deploy"),
    [
        ("repvgg_a1", "official", False),
        ("repvgg_b0", "timm", True),
        ("repvgg_b1g4", "official", False),
        ("repvgg_d2se", "timm", False),
        ("repvggplus_l2pse", "official", False),
    ],
)
def test_the_variant_that_would_fit_is_named_in_a_few_lines(name, layout, deploy):
    model = create_model(name, num_classes=10, deploy=deploy)
    hollow = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), abstract_variables(model, 3))
    state_dict = to_state_dict(model, hollow, layout)
    with pytest.raises(ValueError) as error:
        from_state_dict(create_model(VARIANT, num_classes=10, deploy=deploy), state_dict)
    form = "deploy" if deploy else "training"
    assert f"these are the weights of {name} in its {form} form, 10 classes: give that variant" in str(error.value)
    assert len(str(error.value).splitlines()) <= 8


def test_weights_with_one_tensor_of_another_shape_only_resemble_a_variant(published):
    state_dict = to_state_dict(*published)
    state_dict["stage2.0.rbr_1x1.conv.weight"] = np.ones((7, 48, 1, 1), np.float32)
    with pytest.raises(ValueError, match=r"these resemble the weights of repvgg_a0 in its training form, 10 classes: "):
        from_state_dict(create_model("repvgg_a1", num_classes=10), state_dict)


def test_a_stride_that_the_weights_tell_is_named(tmp_path):
    model = create_model(VARIANT, num_classes=10, strides=(2, 1, 2, 2, 2))
    path = write(tmp_path / "weights.safetensors", model, random_variables(model, dtype=np.float32))
    with pytest.raises(
        ValueError, match=r"weights of repvgg_a0 in its training form, 10 classes, stride 1 in stage1; "
    ):
        load_weights(path, VARIANT)


def test_of_several_weights_in_a_file_the_choice_is_in_the_result(published, tmp_path):
    model, variables = published
    plain = to_state_dict(model, variables)
    average = {key: np.asarray(value + 1, value.dtype) for key, value in plain.items()}
    both = {**{f"model.{key}": plain[key] for key in plain}, **{f"ema.{key}": average[key] for key in plain}}
    safetensors.numpy.save_file(both, tmp_path / "both.safetensors")
    first = load_weights(tmp_path / "both.safetensors", VARIANT)
    assert first.source == "the weights under 'ema', an average; there are others under 'model'"
    loaded, chosen = load_weights(tmp_path / "both.safetensors", VARIANT, entry="model")
    chex.assert_trees_all_equal(chosen, variables)
    chex.assert_trees_all_equal(first.variables, jax.tree.map(lambda leaf: leaf + 1, variables))
    assert loaded == model
    with pytest.raises(ValueError, match=r"both.safetensors: there are no weights under 'best'"):
        load_weights(tmp_path / "both.safetensors", VARIANT, entry="best")


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


KEY = "stage1.0.rbr_dense.bn.bias"


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "I8", "BOOL", "U64", "F4"])
def test_safetensors_of_types_that_are_no_weights_are_refused(kind, published, tmp_path):
    tensors = {key: value for key, value in to_state_dict(*published).items() if key != KEY}
    safetensors.numpy.save_file(tensors, tmp_path / "weights.safetensors")
    contents = (tmp_path / "weights.safetensors").read_bytes()
    length = int.from_bytes(contents[:8], "little")
    header = json.loads(contents[8 : 8 + length])
    raw = contents[8 + length :]
    size = 48 * {"U64": 8, "F4": 1}.get(kind, 1) // {"F4": 2}.get(kind, 1)
    header[KEY] = {"dtype": kind, "shape": [48], "data_offsets": [len(raw), len(raw) + size]}
    written = json.dumps(header).encode()
    (tmp_path / "weights.safetensors").write_bytes(len(written).to_bytes(8, "little") + written + raw + bytes(size))
    with pytest.raises(ValueError, match=f"weights.safetensors.*'{KEY}' holds .* values: expected") as error:
        load_weights(tmp_path / "weights.safetensors", VARIANT)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("header", [b'{"x":{"dtype":"F32","shape":[10000000000],"data_offsets":[0,4]}}', b"[]", b"{"])
def test_a_header_that_lies_is_refused(header, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=r"x\.safetensors is not a whole safetensors file"):
        read_state_dict(tmp_path / "x.safetensors")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(suffix, tmp_path):
    (tmp_path / f"folder.{suffix}").mkdir()
    os.mkfifo(tmp_path / f"pipe.{suffix}")
    with pytest.raises(ValueError, match="is a directory: expected a file of weights"):
        read_state_dict(tmp_path / f"folder.{suffix}")
    with pytest.raises(ValueError, match="is no regular file: expected a file of weights"):
        read_state_dict(tmp_path / f"pipe.{suffix}")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.float32(1), r"linear.bias has shape \(\), expected \(classes,\)"),
        (np.ones((0,), np.float32), r"linear.bias has shape \(0,\), expected \(classes,\)"),
    ],
)
def test_a_classifier_without_classes_is_refused(value, message, tmp_path):
    safetensors.numpy.save_file({"linear.bias": np.asarray(value)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "x.safetensors", VARIANT)


def test_a_view_that_repeats_one_value_to_any_size_is_refused_unmade(published):
    state_dict = {**to_state_dict(*published), KEY: np.broadcast_to(np.float32(0), (10**10,))}
    with pytest.raises(ValueError, match=rf"'{KEY}' repeats 1 stored values to \(10000000000,\)"):
        from_state_dict(published[0], state_dict)
    # One that has the shape of the weights is read.
    state_dict[KEY] = np.broadcast_to(np.float32(2), (48,))
    bias = from_state_dict(published[0], state_dict)["params"]["stage1_block1"]["branch_3x3"]["bn"]["bias"]
    np.testing.assert_array_equal(bias, np.full(48, 2))


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


ODD = {
    "sparse": (lambda torch: torch.ones(48).to_sparse(), "is a sparse tensor .*expected a dense one"),
    "scalar": (lambda torch: torch.tensor(1.0), r"has shape \(\), expected \(48,\)"),
    "endless": (lambda torch: torch.zeros(1).expand(10**10), r"repeats 1 stored values to \(10000000000,\)"),
    "overlapping": (
        lambda torch: torch.as_strided(torch.zeros(2 * 10**5), (10**5, 10**5), (1, 1)),
        r"repeats 200,000 stored values to \(100000, 100000\)",
    ),
    "meta": (lambda torch: torch.ones(48, device="meta"), "is on the meta device, without values"),
    "complex": (lambda torch: torch.ones(48, dtype=torch.complex64), "holds complex64 values: expected float32"),
    "integer": (lambda torch: torch.ones(48, dtype=torch.int32), "holds int32 values: expected float32"),
    "bool": (lambda torch: torch.ones(48, dtype=torch.bool), "holds bool values: expected float32"),
    "float8": (lambda torch: torch.ones(48).to(torch.float8_e4m3fn), "holds float8_e4m3fn values: expected float32"),
    "number": (lambda torch: 1.0, "is a float, expected a tensor"),
}


@pytest.mark.parametrize(("make", "message"), ODD.values(), ids=ODD)
def test_tensors_that_are_no_weights_are_refused_by_key(torch, published, make, message, tmp_path):
    path = save_torch(torch, tmp_path / "weights.pth", published)
    torch.save({**torch.load(path), KEY: make(torch)}, path)
    with pytest.raises(ValueError, match=rf"(?s)weights.pth.*{KEY}'? {message}"):
        load_weights(path, VARIANT)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("kind", ["nested", "jagged", "quantized"])
def test_nested_and_quantized_tensors_are_refused(torch, kind, tmp_path):
    pieces = [torch.ones(2), torch.ones(3)]
    if kind == "quantized":
        value = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    else:
        value = torch.nested.nested_tensor(pieces, layout=torch.jagged if kind == "jagged" else torch.strided)
    torch.save({KEY: value}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x.pth.*(nested tensor|quantized \(torch.qint8\))"):
        read_state_dict(tmp_path / "x.pth")


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64", "parameter", "negative view", "repeated"])
def test_tensors_of_other_kinds_that_are_weights_are_read(torch, published, kind, tmp_path):
    make = {
        "parameter": lambda: torch.nn.Parameter(torch.full((48,), 1.5)),
        "negative view": lambda: torch.full((48,), 0 - 1.5j, dtype=torch.complex64).conj().imag,
        "repeated": lambda: torch.tensor([1.5]).expand(48),
    }.get(kind, lambda: torch.full((48,), 1.5, dtype=getattr(torch, kind)))
    path = save_torch(torch, tmp_path / "weights.pth", published)
    torch.save({**torch.load(path), KEY: make()}, path)
    bias = load_weights(path, VARIANT).variables["params"]["stage1_block1"]["branch_3x3"]["bn"]["bias"]
    np.testing.assert_array_equal(bias, np.full(48, 1.5, np.float32))


def test_the_official_trainers_average_is_taken_and_said(torch, published, tmp_path):
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in to_state_dict(*published).items()}
    average = {key: value + 1 for key, value in tensors.items()}
    torch.save({"model": tensors, "ema": average, "optimizer": {"state": {}}, "epoch": 3}, tmp_path / "x.pth")
    loaded = load_weights(tmp_path / "x.pth", VARIANT)
    assert loaded.source == "the weights under 'ema', an average; there are others under 'model'"
    chex.assert_trees_all_equal(loaded.variables, jax.tree.map(lambda leaf: leaf + 1, published[1]))


def test_text_and_a_zip_that_unpacks_without_end_are_refused(torch, tmp_path):
    (tmp_path / "x.pth").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"not a whole file of torch.save \(it begins with b'vers'"):
        read_state_dict(tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10**6))
    with pytest.raises(ValueError, match=r"unpacks to 1,000,000 bytes from"):
        read_state_dict(tmp_path / "x.pth")


@pytest.mark.parametrize("at", range(30, 2000, 197))
def test_damage_anywhere_ends_in_weights_or_in_a_value_error_and_nothing_else(torch, at, tmp_path):
    torch.save({"x": torch.ones(8)}, tmp_path / "x.pth")
    contents = bytearray((tmp_path / "x.pth").read_bytes())
    contents[at % len(contents)] ^= 0xFF
    (tmp_path / "x.pth").write_bytes(contents)
    with contextlib.suppress(ValueError):
        read_state_dict(tmp_path / "x.pth")


def test_half_precision_and_nan_are_seen(torch, tmp_path):
    torch.save({"x": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="not finite, in x"):
        read_state_dict(tmp_path / "x.pth")
