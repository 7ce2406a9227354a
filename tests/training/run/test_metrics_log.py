import errno
import json
import warnings

import pytest

from repvgg_jax.training.run import metrics_log
from repvgg_jax.training.run.metrics_log import MetricsLog, read_metrics

LINE = {"epoch": 1, "step": 22, "train/loss": 2.0}


def test_a_log_that_cannot_be_written_stops_nothing_and_is_mended_by_the_next_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(tmp_path) as log:
        log.write(LINE)
        path.rename(tmp_path / "kept")
        path.mkdir()
        with pytest.warns(UserWarning, match=r"metrics.jsonl could not be written: .*directory"):
            log.write({**LINE, "epoch": 2})
        path.rmdir()
        log.write({**LINE, "epoch": 3})
        assert [line["epoch"] for line in log.history] == [1, 2, 3]
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_tensorboard_where_nothing_can_be_written_stops_nothing(tmp_path):
    (tmp_path / "tensorboard").touch()
    with pytest.warns(UserWarning, match=r"tensorboard could not be written: "):
        log = MetricsLog(tmp_path)
    with log:
        log.write(LINE)
    assert read_metrics(tmp_path) == [LINE]


@pytest.mark.parametrize("failing", ["add_scalar", "flush", "close"])
def test_tensorboard_on_a_full_disk_stops_nothing_and_is_given_up(failing, tmp_path, monkeypatch):
    calls = []

    class Board:
        def __init__(self, directory, purge_step):
            pass

        def __getattr__(self, name):
            def call(*_):
                calls.append(name)
                if name == failing:
                    raise OSError(errno.ENOSPC, "No space left on device")

            return call

    monkeypatch.setattr(metrics_log, "SummaryWriter", Board)
    with warnings.catch_warnings(record=True) as warned, MetricsLog(tmp_path) as log:
        warnings.simplefilter("always")
        log.write(LINE)
        log.write({**LINE, "epoch": 2})
    (warning,) = warned
    assert str(warning.message) == f"{tmp_path}/tensorboard could not be written: [Errno 28] No space left on device"
    assert calls.count(failing) == 1
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("cut", ['{"epoch": 2, "st', '{"epoch": 2, "st\n', "\0\0\0\n", b"\xff\xfe".decode("latin-1")])
def test_a_last_line_that_was_cut_off_is_passed_over(cut, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(LINE) + "\n" + cut, encoding="latin-1")
    assert read_metrics(tmp_path) == [LINE]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("12", "12 is no object"),
        ("null", "None is no object"),
        ('"text"', "is no object"),
        ("[1]", "is no object"),
        ('{"step": 1}', "epoch is None: expected a whole number"),
        ('{"epoch": 1.5, "step": 1}', "epoch is 1.5: expected a whole number"),
        ('{"epoch": 1, "step": true}', "step is True: expected a number"),
        ('{"epoch": 1, "step": 1, "test/accuracy": "high"}', "test/accuracy is high: expected a number"),
        ('{"epoch": 1, "step": 1, "test/loss": [1]}', r"test/loss is \[1\]: expected a number"),
        ('{"epoch": 1, "step": 1, "test/loss": NaN}\n{}', "NaN is no number"),
        ('{"epoch": 1, "step": 1, "test/loss": 1e999}\n{}', "1e999 is no number"),
        ('{"epoch": 1, "step": 1, "test/loss": 1%s}' % ("0" * 400), "test/loss is 10+…: expected a number"),
        ('{"epoch": 1, "step": 1%s}' % ("0" * 40), "step is 10+: expected a whole number from 1 to 2"),
        ('{"epoch": -1, "step": 1}', "epoch is -1: expected a whole number from 1 to 2"),
        ('{"epoch": \n{}', "no JSON"),
    ],
)
def test_a_damaged_line_is_named_with_its_file_and_its_fault(line, fault, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(LINE)}\n{line}")
    with pytest.raises(ValueError, match=rf"metrics.jsonl line 2 is damaged \(.*{fault}.*\): remove that line"):
        read_metrics(tmp_path)


def test_lines_of_later_epochs_go_where_a_run_is_resumed_and_a_process_that_does_not_write_leaves_no_file(tmp_path):
    with MetricsLog(tmp_path) as log:
        for epoch in (1, 2, 3):
            log.write({**LINE, "epoch": epoch, "step": 22 * epoch})
    with MetricsLog(tmp_path, resume_epoch=2, write=False) as log:
        assert [line["epoch"] for line in log.history] == [1, 2]
        log.write({**LINE, "epoch": 3})
        assert [line["epoch"] for line in log.history] == [1, 2, 3]
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    with MetricsLog(tmp_path, resume_epoch=2) as log:
        assert [line["epoch"] for line in read_metrics(tmp_path)] == [1, 2]
        log.write({**LINE, "epoch": 3, "step": 60})
    assert [line["step"] for line in read_metrics(tmp_path)] == [22, 44, 60]
    other = tmp_path / "other"
    other.mkdir()
    with MetricsLog(other, write=False) as log:
        log.write(LINE)
    assert not list(other.iterdir())
