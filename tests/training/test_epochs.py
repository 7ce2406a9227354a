"""What the loop does between steps, with a step that only counts: nothing is compiled but the sums of an evaluation."""

import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.data import ImageDataset
from repvgg_jax.preprocess import Normalization
from repvgg_jax.training import TrainConfig, TrainingDivergedError, loop, progress
from repvgg_jax.training.epoch import summarize_epoch
from repvgg_jax.training.evaluation import evaluate
from repvgg_jax.training.preemption import Interruption, TerminatedError
from repvgg_jax.training.progress import epoch_line
from repvgg_jax.training.run.checkpoints import Restored
from repvgg_jax.training.run.data_record import TrainingData
from repvgg_jax.training.run.directory import evaluation_batches
from repvgg_jax.training.run.plots import Pictures
from repvgg_jax.training.steps.eval_step import make_eval_step
from repvgg_jax.training.steps.mesh import create_mesh
from repvgg_jax.training.steps.state import TrainState

STEPS = 4
CONFIG = TrainConfig().replace(
    batch_size=8, eval_batch_size=8, image_size=8, epochs=5, warmup_epochs=1,
    checkpoint_every=2, cutout=2, refine_epochs=1,
)  # fmt: skip
NORMALIZATION = Normalization((0.0,), (1 / 255,))


def dataset(train=STEPS * 8, test=10):
    """Of the image with pixel i at label i the stub below says that it is of class i; the last three it gets wrong."""

    def record(number, wrong):
        image = np.zeros((8, 8, 1), np.uint8)
        image[0, (number + wrong) % 4] = 5
        return {"image": image, "label": number % 4}

    records = [record(number, number >= test - 3) for number in range(max(train, test))]
    return ImageDataset("pixels", records[:train], records[:test], tuple("abcd"), channels=1)


class FirstPixels:
    """In place of a network: the logits are the first four pixels."""

    def apply(self, variables, images, *, train):
        return images[:, 0, :4, 0] * variables["params"]


class CountingStep:
    """In place of a compiled training step, which takes a second; its loss is a function of the step."""

    def __init__(self, config, loss, clock):
        self.config, self.loss, self.clock = config, loss, clock

    def lower(self, *_):
        return self

    def compile(self):
        return self

    def __call__(self, state, batch):
        self.clock[0] += 1
        metrics = {"loss": self.loss(int(state.step)), "accuracy": 0.25 * (self.config.augmentation.cutout == 0)}
        if self.config.optimization.skip_nonfinite:
            metrics["skipped"] = float(not np.isfinite(metrics["loss"]))
        metrics = {name: jnp.float32(value) for name, value in metrics.items()}
        return state.replace(step=state.step + 1), metrics


class Saved:
    """In place of the checkpoints of a run: what would lie in them."""

    def __init__(self, restored=None):
        self.restored, self.saved, self.set_aside = restored, [], lambda steps: None
        self.latest_step = None if restored is None else int(restored.state.step)

    def restore(self, template):
        return self.restored

    def save(self, state, data_state, *, epoch_metrics=None, accuracy=None):
        self.saved.append((int(state.step), data_state, epoch_metrics or [], accuracy))

    def wait(self):
        pass


def initial(weight=1.0):
    return TrainState(jnp.int32(0), jnp.float32(weight), {}, {})


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains in `tmp_path`: (config, loss by step, restored, weight) -> (state, history, what was saved)."""

    def start(config=CONFIG, *, loss=float, restored=None, weight=1.0):
        clock = [0]
        monkeypatch.setattr(loop, "create_state", lambda *_: initial(weight))
        monkeypatch.setattr(loop, "abstract_state", lambda *_: None)

        def make_train_step(model, optimizer, each, normalization, mesh, *, steps_per_epoch):
            assert (normalization, steps_per_epoch) == (NORMALIZATION, STEPS)
            return CountingStep(each, loss, clock)

        monkeypatch.setattr(loop, "make_train_step", make_train_step)
        monkeypatch.setattr(
            loop, "make_eval_step", lambda _, *settings, **bits: make_eval_step(FirstPixels(), *settings, **bits)
        )
        monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: float(clock[0])))
        monkeypatch.setattr(Pictures, "draw", lambda *_: None)
        checkpoints = Saved(restored)
        start.saved = checkpoints.saved
        data = TrainingData(dataset(), NORMALIZATION)
        _, state, history = loop.train(config, data, create_mesh(jax.devices()[:1]), tmp_path, checkpoints)
        return state, history, checkpoints.saved

    return start


def stop_before(monkeypatch, step):
    """SIGTERM comes before this step; the steps that are asked about are returned."""
    asked = []

    def at_step(self, number):
        asked.append(number)
        if number == step:
            self.signal = signal.SIGTERM
        return bool(self)

    monkeypatch.setattr(Interruption, "at_step", at_step)
    return asked


def test_an_epochs_line_has_the_means_of_its_steps_and_the_rate_of_its_last(train):
    state, history, _ = train()
    assert int(state.step) == 5 * STEPS
    assert [(line["epoch"], line["step"]) for line in history] == [(n, n * STEPS) for n in range(1, 6)]
    assert [line["train/loss"] for line in history] == [1.5, 5.5, 9.5, 13.5, 17.5]
    schedule = loop.learning_rate_schedule(CONFIG.optimization, STEPS)
    assert [line["learning_rate"] for line in history] == [float(schedule(n * STEPS - 1)) for n in range(1, 6)]
    assert all(line["seconds"] > 0 and line["images_per_second"] > 0 for line in history)


def test_the_last_epochs_are_trained_by_their_own_settings(train):
    assert [line["train/accuracy"] for line in train()[1]] == [0, 0, 0, 0, 0.25]


def test_evaluation_is_a_mean_over_records_and_not_over_batches(train):
    (line, *_), saved = train()[1:]
    right, wrong = (np.log(3 + np.exp(5.0)) - pixel for pixel in (5.0, 0.0))
    assert line["test/accuracy"] == pytest.approx(0.7)
    assert line["test/loss"] == pytest.approx((7 * right + 3 * wrong) / 10, rel=1e-5)
    assert {accuracy for *_, accuracy in saved} == {line["test/accuracy"]}


def test_labels_and_predictions_are_of_the_records_alone_and_by_the_average_where_there_is_one():
    mesh = create_mesh(jax.devices()[:1])
    step = make_eval_step(FirstPixels(), NORMALIZATION, mesh)
    for state, accuracy in ((initial(), 0.7), (initial().replace(ema={"params": jnp.float32(-1.0)}), 0.3)):
        batches = evaluation_batches(CONFIG.data, dataset())
        metrics, labels, predictions = evaluate(step, state.eval_variables, batches, mesh)
        assert labels.tolist() == [number % 4 for number in range(10)]
        assert np.mean(labels == predictions) == pytest.approx(metrics["accuracy"])
        assert (metrics["accuracy"] > 0.5) == (accuracy > 0.5)


def test_an_epoch_is_evaluated_at_the_size_of_evaluation():
    seen = []

    class Seeing(FirstPixels):
        def apply(self, variables, images, *, train):
            seen.append(images.shape)
            return super().apply(variables, images, train=train)

    mesh, config = create_mesh(jax.devices()[:1]), CONFIG.replace(eval_image_size=12)
    step = make_eval_step(Seeing(), NORMALIZATION, mesh)
    evaluate(step, initial().eval_variables, evaluation_batches(config.data, dataset()), mesh)
    assert seen == [(8, 12, 12, 1)]


def test_checkpoints_come_every_so_many_epochs_and_after_the_last(train):
    for every, steps in ((2, [2, 4, 5]), (1, [1, 2, 3, 4, 5]), (9, [5])):
        saved = train(CONFIG.replace(checkpoint_every=every))[2]
        assert [step for step, *_ in saved] == [STEPS * epoch for epoch in steps]
        assert all(metrics == [] for _, _, metrics, _ in saved)


@pytest.mark.parametrize("step", [6, 8, 17])
def test_a_stopped_run_saves_its_place_and_goes_on_as_if_it_had_not_been(step, train, monkeypatch, tmp_path):
    whole_state, whole, whole_saved = train()
    with monkeypatch.context() as patch:
        asked = stop_before(patch, step)
        with pytest.raises(TerminatedError, match=rf"stopped at step {step} of 20, and saved: .*--workdir {tmp_path} "):
            train()
    assert asked == list(range(step + 1))
    at, data_state, metrics, accuracy = train.saved[-1]
    assert (at, accuracy) == (step, None)
    assert [each["loss"] for each in metrics] == list(range(step // STEPS * STEPS, step))
    restored = Restored(initial().replace(step=jnp.int32(step)), data_state, metrics, [])
    state, history, saved = train(restored=restored)
    assert int(state.step) == int(whole_state.step)
    # The rate is that of the steps which were made.
    whole[step // STEPS]["seconds"] -= step % STEPS
    assert history == whole
    assert saved == [each for each in whole_saved if each[0] > step]


@pytest.mark.parametrize(("every", "last"), [(1, 10), (2, 11)])
def test_a_loss_that_is_not_finite_is_found_within_the_epoch_by_its_step(every, last, train, monkeypatch):
    monkeypatch.setattr("repvgg_jax.training.epoch._STEPS_BETWEEN_CHECKS", every)
    asked = stop_before(monkeypatch, None)
    message = r"the loss is nan at epoch 3, step 1; step 8 is saved. Lower learning_rate \(=0.1\)"
    with pytest.raises(TrainingDivergedError, match=message):
        train(loss=lambda step: np.nan if step == 8 else 1.0)
    # The host is two steps ahead of the device when it looks.
    assert asked[-1] == last
    assert [step for step, *_ in train.saved] == [8]


def test_the_steps_of_an_epoch_are_counted_on_where_it_was_stopped(train):
    earlier = [{"loss": 8.0, "accuracy": 0.0}]
    restored = Restored(initial().replace(step=jnp.int32(9)), {"next_index": 9}, earlier, [])
    with pytest.raises(TrainingDivergedError, match=r"the loss is inf at epoch 3, step 3; step 9 is saved"):
        train(loss=lambda step: np.inf if step == 10 else 1.0, restored=restored)


def test_steps_left_out_are_counted_and_stop_nothing(train):
    config = CONFIG.replace(skip_nonfinite=True)
    _, history, _ = train(config, loss=lambda step: np.nan if step in (4, 5) else float(step))
    assert [line["train/skipped"] for line in history] == [0, 2, 0, 0, 0]
    assert [line["train/loss"] for line in history[:2]] == [1.5, 6.5]
    with pytest.raises(TrainingDivergedError, match="the loss is nan at epoch 2"):
        train(config, loss=lambda step: np.nan if step >= 4 else 1.0)


def test_a_network_that_the_last_update_broke_reaches_no_checkpoint(train, monkeypatch):
    with pytest.raises(TrainingDivergedError, match="at the end of epoch 1; there is no checkpoint yet"):
        train(weight=np.nan)
    stop_before(monkeypatch, 2)
    with pytest.raises(TrainingDivergedError, match="the loss is nan at step 2; there is no checkpoint yet"):
        train(weight=np.nan)
    assert train.saved == []


def test_means_leave_out_what_was_skipped_and_an_epoch_of_nothing_else_has_none():
    steps = [{"loss": 1.0, "accuracy": 0.5}, {"loss": 2.0, "accuracy": 1.0}]
    assert summarize_epoch(steps) == {"loss": 1.5, "accuracy": 0.75}
    nothing = summarize_epoch([{**step, "skipped": 1.0} for step in steps])
    assert nothing.pop("loss") != nothing
    assert nothing == {"skipped": 2.0}


def test_a_process_that_is_not_the_first_writes_and_says_nothing(train, monkeypatch, tmp_path, capfd):
    _, history, saved = train()
    assert (tmp_path / "metrics.jsonl").is_file()
    assert "epoch 5/5" in capfd.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for module in (loop, progress):
        monkeypatch.setattr(module, "is_primary", lambda: False)
    _, same_history, same_saved = train()
    assert same_history == history
    assert same_saved == saved  # Orbax writes each process's part.
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert "".join(capfd.readouterr()) == ""


def test_an_epoch_is_told_in_a_line():
    line = {"epoch": 3, "train/loss": 1.23456, "train/accuracy": 0.5, "test/loss": 2.0, "test/accuracy": 0.98765}
    assert epoch_line({**line, "images_per_second": 12345.6}, 120) == (
        "epoch   3/120  train loss 1.2346 accuracy 50.00 %  test loss 2.0000 accuracy 98.77 %  12,346 images/s"
    )
