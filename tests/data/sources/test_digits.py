import hashlib
import logging

import numpy as np
import pytest
from sklearn.datasets import load_digits

from repvgg_jax.data import load_dataset
from repvgg_jax.data.sources.digits import Digits, prepare_digits


def test_the_digits_are_described_as_they_are(digits):
    assert digits.name == "digits"
    assert digits.class_names == tuple("0123456789")
    assert digits.num_classes == 10
    assert digits.channels == 1
    assert digits.image_shape == (8, 8)
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    record = digits.train[0]
    assert record["image"].shape == (8, 8, 1)
    assert record["image"].dtype == np.uint8


def test_train_and_test_together_are_scikit_learns_digits(digits):
    original = load_digits()
    expected = sorted(
        (image.tobytes(), int(label))
        for image, label in zip(np.rint(original.images * 255 / 16).astype(np.uint8), original.target, strict=True)
    )
    records = [record for source in (digits.train, digits.test) for record in source]
    assert sorted((record["image"].tobytes(), record["label"]) for record in records) == expected


def test_the_split_keeps_the_proportions_of_the_classes(digits):
    counts = np.bincount([record["label"] for record in digits.test])
    totals = np.bincount(load_digits().target)
    assert abs(counts - totals * 360 / 1797).max() < 1


def test_the_split_is_the_one_that_published_figures_refer_to(digits):
    content = sorted(record["image"].tobytes() for record in digits.test)
    assert hashlib.sha256(b"".join(content)).hexdigest()[:16] == "8ff22b7966af0573"


def test_the_second_use_writes_nothing(digits, data_dir):
    before = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}
    again = load_dataset("digits", data_dir=str(data_dir))
    assert {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")} == before
    assert np.array_equal(again.train[5]["image"], digits.train[5]["image"])


def test_they_are_found_by_version_and_below_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert len(load_dataset("digits:1.0.0", data_dir="~/data").test) == 360
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_an_interrupted_run_left_is_not_read(tmp_path, monkeypatch):
    def interrupt(self, *_):
        yield 0, next(iter(generate(self, *_)))[1]
        raise KeyboardInterrupt

    generate = Digits._generate_examples
    with monkeypatch.context() as patch:
        patch.setattr(Digits, "_generate_examples", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_digits(tmp_path)
    (tmp_path / "digits" / "incomplete.ABCDEF_1.0.0").mkdir(parents=True)
    assert len(load_dataset("digits", data_dir=str(tmp_path)).train) == 1437


def test_losing_the_race_to_another_process_is_no_error(tmp_path, monkeypatch):
    prepare = Digits.download_and_prepare

    def lose(self):
        prepare(self)
        raise OSError("Directory not empty")

    monkeypatch.setattr(Digits, "download_and_prepare", lose)
    prepare_digits(tmp_path)


def test_a_disk_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    def fail(self):
        raise OSError("No space left on device")

    monkeypatch.setattr(Digits, "download_and_prepare", fail)
    with pytest.raises(OSError, match="No space left"):
        prepare_digits(tmp_path)


def test_preparing_prints_nothing_and_leaves_the_log_level(tmp_path, capfd):
    level = logging.getLogger("absl").level
    prepare_digits(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("absl").level == level
