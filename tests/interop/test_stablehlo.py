"""StableHLO files compute what the deploy form computes, without flax and without this package."""

import functools
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import export

from repvgg_jax import create_model, fuse_model
from repvgg_jax.interop.stablehlo import load_stablehlo, to_stablehlo
from repvgg_jax.preprocess import Preprocess
from repvgg_jax.reparam import EquivalenceError, agreement
from tests.random_variables import random_images, random_variables

SMALL = dict(num_classes=7, depths=(1, 2, 2, 1), width_multiplier=(0.25, 0.25, 0.25, 0.25))


@functools.cache
def deployed(name="repvgg_a0"):
    model = create_model(name, **SMALL)
    return fuse_model(model, random_variables(model, dtype=np.float32))


def apply(model, variables, images):
    return np.asarray(_apply(model, variables, np.asarray(images)))


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, variables, images):
    return model.apply(variables, images, train=False)


@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_b1g4", "repvgg_d2se", "repvggplus_l2pse"])
def test_a_file_computes_the_logits_of_the_deploy_form_at_any_size(name, tmp_path):
    model, variables = deployed(name)
    (tmp_path / "deploy.stablehlo").write_bytes(to_stablehlo(model, variables))
    forward = load_stablehlo(tmp_path / "deploy.stablehlo")
    for shape in [(1, 32, 32, 3), (3, 33, 30, 3)]:
        images = random_images(shape, np.float32)
        agreement(apply(model, variables, images), forward(images)).require(1e-5)
    with pytest.raises(EquivalenceError):
        agreement(apply(model, variables, images), forward(images[:, ::-1, ::-1])).require(1e-3)


def test_it_runs_in_a_process_that_has_neither_flax_nor_this_package(tmp_path):
    model, variables = deployed()
    images = np.array(random_images((2, 32, 32, 3), np.float32))
    (tmp_path / "deploy.stablehlo").write_bytes(to_stablehlo(model, variables, image_size=32))
    np.save(tmp_path / "images.npy", images)
    code = (
        "import sys, jax.export, numpy as np\n"
        "sys.modules['flax'] = sys.modules['repvgg_jax'] = None  # importing them would raise\n"
        "call = jax.export.deserialize(bytearray(open('deploy.stablehlo', 'rb').read())).call\n"
        "np.save('logits.npy', call(np.load('images.npy')))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    agreement(apply(model, variables, images), np.load(tmp_path / "logits.npy")).require(1e-5)


def test_preprocessing_baked_in_turns_pixels_into_probabilities(tmp_path):
    model, variables = deployed()
    preprocess = Preprocess(32, 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), None, tuple("abcdefg"))
    (tmp_path / "deploy.stablehlo").write_bytes(to_stablehlo(model, variables, image_size=32, preprocess=preprocess))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    normalised = ((pixels / 255 - preprocess.mean) / preprocess.std).astype(np.float32)
    expected = np.asarray(jax.nn.softmax(apply(model, variables, normalised)))
    np.testing.assert_allclose(load_stablehlo(tmp_path / "deploy.stablehlo")(pixels), expected, rtol=1e-3, atol=1e-6)


def test_the_program_of_a_platform_holds_one_convolution_a_block_and_nothing_else():
    data = to_stablehlo(*deployed(), batch_size=1, image_size=32, platforms=("cpu",))
    exported = export.deserialize(bytearray(data))
    operations = re.findall(r"stablehlo\.(convolution|dot_general|batch_norm\w*)", exported.mlir_module())
    assert operations.count("convolution") == 7
    assert operations.count("dot_general") == 1
    assert len(operations) == 8


def test_one_file_is_for_three_platforms():
    exported = export.deserialize(bytearray(to_stablehlo(*deployed(), image_size=32)))
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}


def test_what_is_not_a_deploy_form_or_not_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fuse first"):
        to_stablehlo(create_model("repvgg_a0", num_classes=3), {})
    whole = to_stablehlo(*deployed(), image_size=32)
    for name, data in [("truncated", whole[:200]), ("other", b"no such thing"), ("empty", b"")]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="write or copy it again"):
            load_stablehlo(tmp_path / name)
