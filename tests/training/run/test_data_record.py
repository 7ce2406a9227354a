import json

import pytest

from repvgg_jax.training.run.data_record import DataRecord

RECORD = DataRecord(1437, 360, 1, ("no", "yes", "Ba$$in", "caf\udce9"), (0.3,), (0.25,))


def test_a_record_survives_the_way_through_a_file(tmp_path):
    RECORD.save(tmp_path)
    assert DataRecord.load(tmp_path) == RECORD
    RECORD.require(tmp_path)
    with pytest.raises(ValueError, match=r"not those of the run .*train_images was 1437, is 1"):
        RECORD._replace(train_images=1).require(tmp_path)


def test_a_record_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dataset.json does not exist: restore it"):
        DataRecord.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda fields: list(fields), "expected a JSON object"),
        (lambda fields: "text", "it holds text, expected a JSON object"),
        (lambda fields: None, "expected a JSON object"),
        (lambda fields: {}, "the fields are none: expected train_images, test_images"),
        (lambda fields: {**fields, "more": 1}, "the fields are .*more: expected"),
        (lambda fields: {**fields, "train_images": "1437"}, "train_images is 1437: expected a whole number"),
        (lambda fields: {**fields, "test_images": True}, "test_images is True: expected a whole number"),
        (lambda fields: {**fields, "channels": 4}, "channels is 4"),
        (lambda fields: {**fields, "class_names": "ab"}, "class_names is ab: expected a list of a text"),
        (lambda fields: {**fields, "class_names": ["a", 1]}, "class_names is .*expected a list of a text"),
        (lambda fields: {**fields, "class_names": []}, "class_names is empty"),
        (lambda fields: {**fields, "mean": 0.3}, "mean is 0.3: expected a list of a finite number"),
        (lambda fields: {**fields, "mean": [0.3] * 3}, r"mean is .*expected as many values as channels \(=1\)"),
        (lambda fields: {**fields, "std": [0.0]}, "std is .*expected positive numbers"),
    ],
)
def test_a_damaged_record_is_named_with_the_field(change, fault, tmp_path):
    fields = {**RECORD._asdict(), "class_names": list(RECORD.class_names)}
    (tmp_path / "dataset.json").write_text(json.dumps(change(fields)))
    with pytest.raises(ValueError, match=rf"dataset.json is damaged \(.*{fault}.*\): restore it from a copy"):
        DataRecord.load(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\0", b"[" * 100_000])
def test_what_is_no_json_is_named(data, tmp_path):
    (tmp_path / "dataset.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"dataset.json is damaged \(no JSON"):
        DataRecord.load(tmp_path)
