import json

import pytest

from repvgg_jax.training.metrics import MetricsLog, read_metrics

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
        ('{"epoch": 1, "step": 1, "test/accuracy": "high"}', "test/accuracy is 'high': expected a number"),
        ('{"epoch": 1, "step": 1, "test/loss": [1]}', r"test/loss is \[1\]: expected a number"),
        ('{"epoch": 1, "step": 1, "test/loss": NaN}\n{}', "NaN is no number"),
        ('{"epoch": \n{}', "no JSON"),
    ],
)
def test_a_damaged_line_is_named_with_its_file_and_its_fault(line, fault, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(LINE)}\n{line}")
    with pytest.raises(ValueError, match=rf"metrics.jsonl line 2 is damaged \(.*{fault}.*\): remove that line"):
        read_metrics(tmp_path)
