"""The tables of networks, the recipes for users, and what importing Keras leaves behind."""

import os
import re
import subprocess
import sys

import jax
import pytest
from flax import nnx

from benchmarks import expand_libraries, foreign
from benchmarks.trained_networks import of_lax, random_images
from examples import other_libraries
from repvgg_jax import reparameterize
from tests.docs.pages import ROOT, blocks

GUIDE = ROOT / "docs" / "guides" / "fuse-any-function.md"


def tiny(name, side):
    """Stands in for a network of NNX."""
    module = nnx.Sequential(nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    return other_libraries.from_nnx(module)


@pytest.mark.usefixtures("float32")
def test_the_command_prints_a_row_for_each_network_and_names_what_is_missing(capsys, monkeypatch):
    def absent(name, side):
        raise ModuleNotFoundError("No module named 'absent'")

    monkeypatch.setattr(foreign, "LIBRARIES", {"nnx": (tiny, ("Tiny",)), "absent": (absent, ("Net",))})
    foreign.main(["--side", "8"])
    *_, header, rule, first, second = capsys.readouterr().out.strip().splitlines()
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert len(cells) == header.count("|") - 1 == rule.count("|") - 1
    assert cells[:4] == ["nnx", "Tiny", "1 → 1", "1 → 0"]
    assert float(cells[5]) < 1e-6
    assert "not run: No module named 'absent': pip install -e \".[foreign]\"" in second


@pytest.mark.usefixtures("float32")
def test_the_error_of_a_wrong_merge_is_seen(monkeypatch):
    reparameterize = foreign.reparameterize

    def wrong(*arguments, **options):
        fused = reparameterize(*arguments, **options)
        fused.params = jax.tree.map(lambda leaf: leaf * 1.001, fused.params)
        return fused

    monkeypatch.setattr(foreign, "LIBRARIES", {"nnx": (tiny, ("Tiny",))})
    assert foreign.measure("nnx", "Tiny", side=8).error < 1e-6
    monkeypatch.setattr(foreign, "reparameterize", wrong)
    assert foreign.measure("nnx", "Tiny", side=8).error > 5e-4


def tiny_training(name, side):
    """Stands in for a network as it is trained."""
    return of_lax((4, 4), random_images(side, channels_first=True))


@pytest.mark.usefixtures("float32")
def test_the_command_trains_each_network_as_branches_and_names_what_is_missing(capsys, monkeypatch):
    def absent(name, side):
        raise ModuleNotFoundError("No module named 'absent'")

    monkeypatch.setattr(expand_libraries, "NETWORKS", {"jax.lax/Tiny": tiny_training, "absent/Net": absent})
    expand_libraries.main(["--side", "8"])
    title, _, header, rule, first, second = capsys.readouterr().out.strip().splitlines()
    assert title.startswith("8 images of 8×8, 10 steps, float32, ")
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert len(cells) == header.count("|") - 1 == rule.count("|") - 1
    assert cells[:5] == ["jax.lax", "Tiny", "2", "2", "0.00 → 0.00"]
    assert max(float(cells[5]), float(cells[6])) < 1e-5
    assert "not run: No module named 'absent': pip install -e \".[foreign]\"" in second


@pytest.mark.usefixtures("float32")
def test_the_error_of_a_wrong_collapse_is_seen(monkeypatch):
    network = tiny_training("Tiny", side=8)
    found = expand_libraries.measure(network)
    assert (found.convolutions, found.expanded) == (2, 2)
    # Two kernels and biases; then a 1×1 kernel for each, and the gains of two branches.
    assert (found.before, found.after) == (108 + 4 + 144 + 4, 260 + 12 + 16 + 2 * 8)
    assert found.collapsed < 1e-5
    assert found.moved > 1e-2
    monkeypatch.setattr(expand_libraries.Expanded, "collapse", lambda self, params, state: params["variables"])
    assert expand_libraries.measure(network).collapsed > 1e-2


def test_importing_keras_changes_no_environment_and_no_home(require, tmp_path):
    require("keras")
    code = """if True:
        import os
        before = dict(os.environ)
        from benchmarks.foreign import import_keras
        assert import_keras().backend.backend() == "jax"
        assert dict(os.environ) == before
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KERAS")}
    environment["HOME"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)
    assert not (tmp_path / ".keras").exists()


@pytest.fixture
def keras(require, monkeypatch):
    require("keras")
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # restored, whatever sets it
    return foreign.import_keras()


@pytest.mark.usefixtures("float32")
def test_the_keras_recipe_of_the_guide_runs(keras):
    (block,) = [block for block in blocks(GUIDE, "text") if "import keras" in block]
    namespace = {"reparameterize": reparameterize, "images": jax.random.normal(jax.random.key(0), (1, 32, 32, 3))}
    exec(compile(block, GUIDE.name, "exec"), namespace)
    fused, expected = namespace["fused"], namespace["model"](namespace["images"], training=False)
    assert fused.totals["convolutions"] == (52, 52)
    assert jax.numpy.allclose(fused(fused.params, namespace["images"]), expected, atol=1e-5)


@pytest.mark.usefixtures("float32")
def test_the_example_prints_what_was_merged_and_the_difference(keras, capsys, monkeypatch):
    def tiny(weights, input_shape):
        layers = keras.layers
        return keras.Sequential([keras.Input(input_shape), layers.Conv2D(4, 3), layers.BatchNormalization()])

    monkeypatch.setattr(keras.applications, "MobileNetV2", tiny)
    other_libraries.main()
    printed = capsys.readouterr().out
    assert re.search(r"convolutions +1 +1", printed)
    assert float(re.search(r"difference: (\S+) of", printed)[1]) < 1e-5
