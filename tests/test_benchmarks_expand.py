"""The benchmark of training with branches: all ways begin alike, by one recipe, and end in a table."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import branch_training, expand
from benchmarks.branch_training import BATCH, NETWORKS, ConvNet, ResNet, Task, Way
from benchmarks.command import end_with

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(autouse=True)
def digits(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)


@pytest.fixture(autouse=True, scope="module")
def small():
    """Networks that compile fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, "plain", partial(ConvNet, layers=((8, 2), (8, 1))))
        patch.setitem(NETWORKS, "resnet", partial(ResNet, blocks=((8, 2),)))
        yield


@pytest.fixture(scope="module")
def task(data_dir, small):
    with jax.enable_x64(False):
        return Task("plain", branch_training.load("digits", data_dir, 2 * BATCH))


@pytest.fixture(scope="module")
def ways(task):
    with jax.enable_x64(False):
        return {name: Way(name, task, "same", 0.1) for name in ("plain", "repvgg", "multipliers")}


def first_step(way, seed):
    data = way.task.data
    setting = np.arange(BATCH), np.float32(0.1), np.array([seed, 0], np.int32)
    return way.step(way.begin(seed), data.images, data.labels, *setting)


def test_all_ways_begin_as_the_same_network_and_the_same_order_and_augmentation(ways):
    losses = {name: float(first_step(way, 1)[1]) for name, way in ways.items()}
    assert losses == pytest.approx(dict.fromkeys(ways, losses["plain"]), rel=1e-4)
    assert float(first_step(ways["plain"], 2)[1]) != pytest.approx(losses["plain"], rel=1e-3)


def test_multiplied_gradients_train_otherwise(ways):
    plain, multiplied = (first_step(ways[name], 0)[0].params for name in ("plain", "multipliers"))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), plain, multiplied)
    assert moved["Conv_1"]["kernel"] > 1e-4
    # What is not expanded is trained as it was, by the same gradients.
    assert moved["Dense_0"]["kernel"] < 1e-5


@pytest.mark.parametrize("name", ["plain", "repvgg"])
def test_kernels_alone_decay(name, ways):
    way = ways[name]
    training = way.begin(0)
    ones = jax.tree.map(jnp.ones_like, training.params)
    updates, _ = way.optimizer.update(jax.tree.map(jnp.zeros_like, ones), training.momentum, ones)
    decayed = {path[-1].key: bool((leaf != 0).all()) for path, leaf in jax.tree_util.tree_leaves_with_path(updates)}
    expected = {"kernel": True, "bias": False, "scale": False}
    assert decayed == (expected if name == "plain" else {**expected, "gain": False})


def test_the_network_itself_is_what_its_branches_have_become(ways, monkeypatch):
    heard = []
    training = ways["repvgg"].train(0, 2, lambda *epoch: heard.append(epoch))
    assert [number for number, _ in heard] == [1, 2]
    assert heard[1][1] < heard[0][1]
    assert ways["repvgg"].difference(training) < 1e-5
    shapes = [
        jax.tree.map(jnp.shape, tree) for tree in (ways["repvgg"].collapse(training), ways["plain"].begin(0).params)
    ]
    assert shapes[0] == shapes[1]
    # A negative control: the variances at the start make another network.
    wide = ways["repvgg"].wide
    monkeypatch.setitem(vars(ways["repvgg"]), "_collapse", lambda params, state: wide.collapse(params, wide.state))
    assert ways["repvgg"].difference(training) > 1e-4


def test_accuracy_counts_all_test_images(task, monkeypatch):
    variables = task.variables(0)
    logits = task.module.apply(variables, task.normalize(task.data.test_images), train=False)
    expected = 100 * np.mean(np.argmax(logits, -1) == task.data.test_labels)
    monkeypatch.setattr(branch_training, "EVAL_BATCH", 100)
    assert len(task.data.test_labels) % 100
    assert task.accuracy(variables["params"], variables["batch_stats"]) == pytest.approx(expected)


@pytest.mark.long
def test_a_table_for_each_network_and_a_line_for_each_training(capsys):
    few = ["--images", str(BATCH), "--epochs", "2", "--seeds", "2", "--turns", "1", "--same-seconds"]
    expand.main(["--networks", "resnet", "--ways", "repvgg", *few])
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    rows = {line.split()[1]: line for line in lines if line.startswith("| ")}
    assert list(rows) == ["way", "plain", "repvgg"]
    assert rows["plain"].split("|")[4:7] == ["   1.00 ", "     1.00 ", "         1.00 "]
    assert float(rows["repvgg"].split("|")[6]) > 1
    assert rows["plain"].rstrip(" |").endswith(", 2 epochs")
    for seed in (0, 1):
        for way in ("plain", "repvgg"):
            assert any(line.startswith(f"resnet {way}, seed {seed}, 2 epochs: ") for line in lines)
    assert "resnet repvgg, seed 1, 2 epochs: epoch 2, loss " in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "'0': expected a whole number, at least 1"),
        (["--rate", "0"], "'0': expected a finite number above 0"),
        (["--ways", "vgg"], "invalid choice: 'vgg'"),
        (["--images", "127"], "error: --images is 127: expected 128, which is a batch, to 1,437\n"),
        (["--data-dir", "nowhere"], "nowhere"),
    ],
)
def test_arguments_that_train_nothing(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["expand", *arguments])
    with pytest.raises(SystemExit) as end:
        end_with(expand.main)
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines(keepends=True)[-1]
