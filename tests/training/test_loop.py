import json
import shutil

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from repvgg_jax import fuse_model
from repvgg_jax.interop.safetensors import load_deploy
from repvgg_jax.training import TrainConfig, TrainingDivergedError, fuse_run, loop, train_and_evaluate
from repvgg_jax.training.epoch import summarize_epoch
from repvgg_jax.training.run import comparison, directory, plots
from repvgg_jax.training.run.checkpoints import Checkpoints
from repvgg_jax.training.run.data_record import DataRecord
from repvgg_jax.training.run.metrics_log import read_metrics
from repvgg_jax.training.run.plots import draw_confusion
from repvgg_jax.training.start.warm_start import start_from


def test_a_run_directory_holds_all_that_is_promised(finished):
    names = {path.name for path in finished.workdir.iterdir()} - {".lock"}
    assert names == {
        "config.json", "dataset.json", "metrics.jsonl", "tensorboard", "checkpoints", "deploy.safetensors", "report.md",
        "curves.png", "confusion.png", "differences.png",
    }  # fmt: skip
    assert sorted(path.name for path in (finished.workdir / "checkpoints").iterdir()) == ["22", "44"]
    assert any((finished.workdir / "tensorboard").iterdir())
    lines = [json.loads(line) for line in (finished.workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert set(lines[0]) >= {"step", "train/loss", "test/accuracy", "learning_rate", "images_per_second", "seconds"}


def test_the_report_shows_table_pictures_and_settings(finished):
    report = (finished.workdir / "report.md").read_text()
    assert finished.comparison.table("github") in report
    for name in ("curves.png", "confusion.png", "differences.png"):
        assert f"]({name})" in report
        with Image.open(finished.workdir / name) as picture:
            assert min(picture.size) > 300
    assert "| learning_rate" in report


def test_training_learns_and_fusing_changes_no_prediction(finished):
    assert finished.comparison.deploy.accuracy == finished.comparison.training.accuracy > 0.3
    assert finished.comparison.agreement.predictions_changed == 0
    assert finished.comparison.agreement.relative < 1e-5
    assert finished.comparison.agreement.compared == 360
    assert finished.history[-1]["test/accuracy"] == pytest.approx(finished.comparison.training.accuracy)


def test_another_seed_is_another_run(tiny, begin, tmp_path):
    """From its first step on: other weights, and other images first."""
    (state, batch), (other, other_batch) = (begin(tiny.replace(seed=seed), tmp_path / f"run-{seed}") for seed in (0, 1))
    kernels = [each.params["stem"]["branch_3x3"]["conv"]["kernel"] for each in (state, other)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01
    assert not np.array_equal(batch["label"], other_batch["label"])


def test_the_deploy_file_classifies_raw_images_as_the_run_did(finished, tiny):
    from repvgg_jax.data import load_dataset

    model, variables, preprocess, metadata = load_deploy(finished.workdir / "deploy.safetensors")
    assert metadata["variant"] == "repvgg_a0"
    assert preprocess.class_names == tuple("0123456789")
    test = load_dataset("digits", data_dir=tiny.data.data_dir).test
    images = np.stack([test[i]["image"] for i in range(360)])
    inputs = (images / 255 - np.array(preprocess.mean)) / np.array(preprocess.std)
    predictions = model.apply(variables, inputs.astype(np.float32), train=False).argmax(-1)
    np.testing.assert_array_equal(predictions, finished.comparison.predictions)


class StopError(Exception):
    pass


@pytest.mark.long
def test_the_pictures_of_an_unfinished_run_show_its_last_epoch(tiny, tmp_path, monkeypatch):
    drawn = []

    def draw(path, labels, predictions, class_names):
        drawn.append((len(labels), float(np.mean(labels == predictions)), class_names))
        draw_confusion(path, labels, predictions, class_names)

    monkeypatch.setattr(plots, "draw_confusion", draw)
    stop_after_the_first_checkpoint(monkeypatch)
    with pytest.raises(StopError):
        train_and_evaluate(tiny, tmp_path / "run")
    (line,) = read_metrics(tmp_path / "run")
    assert drawn == [(360, line["test/accuracy"], tuple("0123456789"))]
    assert {"curves.png", "confusion.png"} <= {path.name for path in (tmp_path / "run").iterdir()}


def stop_after_the_first_checkpoint(patch):
    save = loop.Checkpoints.save

    def save_then_stop(self, state, data_state, **rest):
        save(self, state, data_state, **rest)
        self.wait()
        raise StopError

    patch.setattr(loop.Checkpoints, "save", save_then_stop)


@pytest.mark.long
def test_a_run_with_a_moving_average_is_judged_by_the_average(tiny, finished, tmp_path):
    run = shutil.copytree(finished.workdir, tmp_path / "run")
    config = TrainConfig.load(run / "config.json").replace(ema_decay=0.9)
    config.save(run / "config.json")
    average = jax.device_get(finished.state.variables)
    average["params"]["head"]["kernel"] = 2 * average["params"]["head"]["kernel"]
    shutil.rmtree(run / "checkpoints")
    with Checkpoints(run) as checkpoints:
        average = jax.device_put(average, finished.state.step.sharding)
        checkpoints.save(finished.state.replace(ema=average), {"next_index": 44})
    result = train_and_evaluate(config, run)
    model = config.network.create_model(10)
    saved = load_deploy(run / "deploy.safetensors").variables
    _, fused = fuse_model(model, average)
    chex.assert_trees_all_close(saved, fused, rtol=1e-5, atol=1e-6)
    _, fused_without = fuse_model(model, finished.state.variables)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(saved, fused_without, rtol=1e-3)
    again = fuse_run(run)
    assert again.agreement == result.comparison.agreement != finished.comparison.agreement
    assert again.deploy.accuracy == result.comparison.deploy.accuracy
    assert "moving average" in (run / "report.md").read_text()
    # Neither does what starts from it begin with anything else.
    begun = start_from(tiny.replace(init_from=str(run)), None, finished.state.variables, None)
    chex.assert_trees_all_equal(begun, average)


@pytest.mark.long
def test_a_run_with_a_moving_average_resumes_bit_identically_and_is_judged_by_the_average(tiny, tmp_path, monkeypatch):
    mixed = dict(flip=True, alternate_flip=True, cutout=2, mixup=0.2, cutmix=1.0, color_jitter=0.2, refine_epochs=1)
    config = tiny.replace(ema_decay=0.9, **mixed)
    whole = train_and_evaluate(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after_the_first_checkpoint(patch)
        with pytest.raises(StopError):
            train_and_evaluate(config, tmp_path / "run")
    # A line that was logged after the last checkpoint must not stand twice.
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 2, "step": 44, "train/loss": 9.0, "seconds": 1.0}) + "\n")
    resumed = train_and_evaluate(config, tmp_path / "run")
    chex.assert_trees_all_equal(resumed.state, whole.state)
    keep = [name for name in whole.history[0] if name not in ("images_per_second", "seconds")]
    assert [[line[name] for name in keep] for line in resumed.history] == [
        [line[name] for name in keep] for line in whole.history
    ]
    chex.assert_trees_all_equal_shapes_and_dtypes(whole.state.ema, whole.state.variables)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(whole.state.ema, whole.state.variables, rtol=1e-3)

    model = config.network.create_model(10)
    _, fused = fuse_model(model, whole.state.ema)
    saved = load_deploy(whole.workdir / "deploy.safetensors").variables
    chex.assert_trees_all_close(saved, fused, rtol=1e-5, atol=1e-6)
    _, fused_without = fuse_model(model, whole.state.variables)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(saved, fused_without, rtol=1e-3)
    assert whole.history[-1]["test/accuracy"] == pytest.approx(whole.comparison.training.accuracy)
    again = fuse_run(whole.workdir)
    assert again.agreement == whole.comparison.agreement
    assert again.deploy.accuracy == whole.comparison.deploy.accuracy
    assert "moving average" in (whole.workdir / "report.md").read_text()


def test_the_forms_are_compared_at_the_size_of_evaluation(finished, tmp_path, monkeypatch):
    run = shutil.copytree(finished.workdir, tmp_path / "run")
    config = TrainConfig.load(run / "config.json").replace(eval_image_size=12)
    config.save(run / "config.json")
    sizes = []
    monkeypatch.setattr(comparison, "shard_batch", lambda batch, mesh: sizes.append(batch["image"].shape) or batch)
    fuse_run(run)
    assert set(sizes) == {(config.data.eval_batch_size, 12, 12, 1)}
    assert load_deploy(run / "deploy.safetensors").preprocess.image_size == 12


def test_a_run_without_a_moving_average_holds_none(finished):
    assert finished.state.ema is None
    assert finished.state.eval_variables == finished.state.variables
    assert "moving average" not in (finished.workdir / "report.md").read_text()


def test_a_finished_run_is_not_trained_again_where_a_kill_cut_off_a_line_either(tiny, finished, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("trained")

    monkeypatch.setattr(loop, "watch", never)
    shutil.copytree(finished.workdir, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "st')
    # Where the data lie is no part of the config that must stay the same.
    (tmp_path / "moved").symlink_to(tiny.data.data_dir)
    again = train_and_evaluate(tiny.replace(data_dir=str(tmp_path / "moved")), tmp_path / "run")
    assert [line["epoch"] for line in again.history] == [1, 2]
    chex.assert_trees_all_equal(again.state, finished.state)


def test_a_run_records_what_was_said_and_what_was_measured_and_is_fused_by_that(finished, tmp_path, monkeypatch):
    assert TrainConfig.load(finished.workdir / "config.json").data.normalization is None
    measured = DataRecord.load(finished.workdir).normalization
    assert measured.mean == pytest.approx([0.3054], abs=1e-4)
    assert load_deploy(finished.workdir / "deploy.safetensors").preprocess.mean == measured.mean
    assert f"| mean                     | {measured.mean}" in (finished.workdir / "report.md").read_text()
    monkeypatch.delattr(directory, "measure_normalization")
    run = shutil.copytree(finished.workdir, tmp_path / "run")
    DataRecord.load(run)._replace(mean=(0.5,)).save(run)
    fuse_run(run)
    assert load_deploy(run / "deploy.safetensors").preprocess.mean == (0.5,)


def test_images_normalised_otherwise_are_not_those_of_the_run(tiny, finished, tmp_path):
    run = shutil.copytree(finished.workdir, tmp_path / "run")
    DataRecord.load(run)._replace(mean=(0.5,)).save(run)
    with pytest.raises(ValueError, match=r"not those of the run in .*mean was \(0.5,\), is \(0.305"):
        train_and_evaluate(tiny, run)
    with pytest.raises(ValueError, match=r"another config \(mean was None, is \(0.5,\); std was None, is \(0.3,\)\)"):
        train_and_evaluate(tiny.replace(mean=(0.5,), std=(0.3,)), run)


def test_another_config_in_the_same_directory_is_refused_by_field(tiny, finished):
    with pytest.raises(ValueError, match=r"another config \(epochs was 2, is 3; learning_rate was 0.1, is 0.2\)"):
        train_and_evaluate(tiny.replace(epochs=3, learning_rate=0.2), finished.workdir)


@pytest.fixture
def moving(tiny, tmp_path):
    """A folder of images, and the configs of runs on it, under its name and under a later one."""
    for split, count in (("train", 8), ("test", 4)):
        for name in ("dark", "light"):
            directory = tmp_path / "old" / split / name
            directory.mkdir(parents=True)
            for number in range(count):
                pixels = np.full((8, 8, 3), 10 * number + 120 * (name == "light"), np.uint8)
                Image.fromarray(pixels).save(directory / f"{number}.png")
    old, new = (
        tiny.replace(dataset=f"folder:{tmp_path / name}", batch_size=8, eval_batch_size=8) for name in ("old", "new")
    )
    return old, new


def test_a_folder_may_move_before_a_run_goes_on_or_is_fused(moving, begin, tmp_path):
    old, new = moving
    first, batch = begin(old, tmp_path / "run")
    (tmp_path / "old").rename(tmp_path / "new")
    again, same_batch = begin(new, tmp_path / "run")
    chex.assert_trees_all_equal((again, same_batch), (first, batch))
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):  # after it has found the images
        fuse_run(tmp_path / "run", data_dir=str(tmp_path / "new"))
    with pytest.raises(FileNotFoundError, match="old does not exist"):
        fuse_run(tmp_path / "run")


def test_a_directory_with_other_files_is_refused(tiny, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        train_and_evaluate(tiny, tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(batch_size=12), r"batch_size is 12: expected a multiple of the 8 devices, e.g. 16"),
        (
            dict(batch_size=24, accumulate_steps=2),
            r"batch_size is 24: .* 8 devices times accumulate_steps \(=2\), e.g. 32",
        ),
        (dict(eval_batch_size=12), "eval_batch_size is 12"),
        (dict(batch_size=1440), "batch_size is 1440: expected at most 1437"),
        (dict(mean=(0.5, 0.5, 0.5), std=(0.1, 0.1, 0.1)), "expected 1 values each"),
        (dict(dataset="digit"), "unknown data set 'digit': did you mean 'digits'"),
        (dict(dataset="folder:/nowhere"), "/nowhere does not exist"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tiny, tmp_path, fields, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_and_evaluate(tiny.replace(**fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_loss_that_is_not_finite_stops_the_run_and_says_what_to_change(tiny, tmp_path):
    config = tiny.replace(learning_rate=1e30)
    with pytest.raises(
        TrainingDivergedError,
        match=r"the loss is (nan|inf) at epoch 1, step 2; there is no checkpoint yet. Lower learning_rate \(=1e\+30\)",
    ):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run" / "deploy.safetensors").exists()


def test_steps_left_out_count_in_no_mean():
    metrics = [{"loss": 1.0, "skipped": 0.0}, {"loss": float("nan"), "skipped": 1.0}, {"loss": 3.0, "skipped": 0.0}]
    assert summarize_epoch(metrics) == {"loss": 2.0, "skipped": 1.0}


def test_a_damaged_line_before_the_last_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1\n{"epoch": 2, "step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl line 1 is damaged.*remove that line"):
        read_metrics(tmp_path)


def test_other_data_in_the_same_run_are_refused(tiny, finished, tmp_path):
    shutil.copytree(finished.workdir, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "dataset.json").read_text())
    (tmp_path / "run" / "dataset.json").write_text(json.dumps({**record, "train_images": 1000}))
    with pytest.raises(ValueError, match=r"data are not those of the run .*train_images was 1000, is 1437"):
        train_and_evaluate(tiny, tmp_path / "run")


def test_a_link_to_nothing_in_the_place_of_the_directory_is_refused(tiny, tmp_path):
    (tmp_path / "run").symlink_to("nothing")
    with pytest.raises(ValueError, match="run is a link to nothing, which is not there: name a directory"):
        train_and_evaluate(tiny, tmp_path / "run")


def test_a_file_in_the_place_of_the_directory_is_refused(tiny, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="is a file: name a new directory"):
        train_and_evaluate(tiny, tmp_path / "run")
