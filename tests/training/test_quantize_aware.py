"""A run that trains for 8 bits: it starts from another, resumes to the bit, and is exported by its own ranges."""

import chex
import jax
import numpy as np
import pytest

from repvgg_jax.data import load_dataset
from repvgg_jax.interop.safetensors import load_deploy
from repvgg_jax.preprocess import normalize
from repvgg_jax.quantize import simulate
from repvgg_jax.training import fuse_run, loop, train_and_evaluate
from repvgg_jax.training.export.int8 import Int8Settings


@pytest.fixture(scope="module")
def config(tiny, finished):
    return tiny.replace(init_from=str(finished.workdir), quantize_aware=True, ema_decay=0.9)


def test_a_run_begins_with_ranges_of_its_first_batch(config, finished, begin, tmp_path):
    state, batch = begin(config, tmp_path / "run")
    chex.assert_trees_all_equal(state.params, jax.device_get(finished.state.params))
    chex.assert_trees_all_equal(state.ema, state.variables)
    normalization = load_deploy(finished.workdir / "deploy.safetensors").preprocess
    images = np.asarray(normalize(batch["image"], normalization.mean, normalization.std))
    np.testing.assert_allclose(state.ranges["images"], (images.min(), images.max()), rtol=1e-5)
    assert all(low <= 0 < high for low, high in state.ranges.values())


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    return train_and_evaluate(config, tmp_path_factory.mktemp("runs") / "whole")


@pytest.mark.long
def test_a_run_for_8_bits_resumes_bit_identically(config, trained, tmp_path, monkeypatch):
    class StopError(Exception):
        pass

    def save_then_stop(self, state, data_state, **rest):
        save(self, state, data_state, **rest)
        self.wait()
        raise StopError

    save = loop.Checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(loop.Checkpoints, "save", save_then_stop)
        with pytest.raises(StopError):
            train_and_evaluate(config, tmp_path / "run")
    resumed = train_and_evaluate(config, tmp_path / "run")
    chex.assert_trees_all_equal(resumed.state, trained.state)
    assert not np.array_equal(trained.state.ranges["stem"].high, trained.state.ema["ranges"]["stem"].high)


@pytest.mark.long
def test_the_exported_file_computes_what_was_trained(config, trained, data_dir):
    onnx = pytest.importorskip("onnx", reason='pip install -e ".[onnx]"')
    pytest.importorskip("onnxruntime", reason='pip install -e ".[onnx]"')
    from repvgg_jax.interop.onnx import load_onnx

    settings = Int8Settings(allowed_loss=5)
    fuse_run(trained.workdir, export=["onnx-int8"], int8=settings)
    path = trained.workdir / "deploy.int8.onnx"
    (line,) = [each.value for each in onnx.load(path).metadata_props if each.key == "quantization"]
    assert "activations by training" in line
    model, variables, preprocess, _ = load_deploy(trained.workdir / "deploy.safetensors")
    test = load_dataset("digits", data_dir=data_dir).test
    pixels = np.stack([test[index]["image"] for index in range(64)])
    images = normalize(pixels, preprocess.mean, preprocess.std)
    ranges = jax.device_get(trained.state.eval_variables["ranges"])
    expected = jax.jit(lambda v, x: simulate(model, v, x, ranges))(variables, images)
    found = load_onnx(path)(np.asarray(images).transpose(0, 3, 1, 2))
    step = (ranges["logits"].high - ranges["logits"].low) / 255
    assert np.abs(found - expected).max() < 1.01 * step
    assert (np.abs(found - expected) > 0.01 * step).mean() < 0.05
    report = (trained.workdir / "report.md").read_text()
    assert "are of the network in 8 bits" in report
    assert "## In 8 bits" in report


@pytest.mark.long
def test_its_test_figures_are_those_of_8_bits_and_the_deploy_file_is_in_float(trained):
    assert trained.comparison.agreement.predictions_changed == 0
    assert set(trained.state.eval_variables) == {"params", "batch_stats", "ranges"}
    assert trained.history[-1]["test/loss"] != pytest.approx(trained.comparison.training.accuracy)
